"""Training of transformers' Mask2Former by our recipes: the same batches, optimizer, schedule and precision.

Its decoders start as transformers initializes them. Pretrained weights of the backbone are those of the recipe, and
its batch norms are trained (`model.backbone_norm: batch`). The model is eager.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks import peer
from maskwright.checkpoints.checkpoint import make_checkpoint, save_checkpoint
from maskwright.checkpoints.convert import convert
from maskwright.checkpoints.finetune import load_initial_weights
from maskwright.config.recipe import Recipe
from maskwright.data.build import open_dataset, train_loader
from maskwright.models import build_model
from maskwright.runtime.device import autocast
from maskwright.training.optimizer import build_optimizer, set_learning_rate

_ENCODER = "model.pixel_level_module.encoder"


class PeerBatch(NamedTuple):
    """A batch as the peer takes it.

    Attributes:
        pixels: (B, 3, H, W) normalized, zero in the padding.
        masks: (N, H, W) of each image, 0 or 1.
        labels: (N,) of each image.
    """

    pixels: Tensor
    masks: list[Tensor]
    labels: list[Tensor]


class PeerTraining:
    """A training of the peer, step by step.

    Args:
        recipe: as for ours; its seed is that of the weights, too.
        folder: an empty folder; holds the model at the start and at the end.

    Raises:
        MaskwrightError: transformers is not installed, or cannot express the recipe's model.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        peer.peer_name()
        torch.manual_seed(recipe.train.seed)
        self.recipe, self.folder, self.taken = recipe, folder, 0
        self.model = _new_model(recipe, folder).train()
        self.optimizer = build_optimizer(_by_parts(self.model), recipe.train, fused=True)  # ty: ignore[invalid-argument-type]
        self._batches = iter(train_loader(recipe))
        values = (recipe.model.pixel_mean, recipe.model.pixel_std)
        self._mean, self._std = (torch.tensor(value)[:, None, None] for value in values)

    def next_batch(self) -> PeerBatch:
        """Prepare the next batch."""
        (batch,) = next(self._batches)
        pixels = ((batch.images.float() - self._mean) / self._std).masked_fill(batch.padding[:, None], 0)
        masks = [target.masks.float() for target in batch.targets]
        return PeerBatch(pixels, masks, [target.labels for target in batch.targets])

    def step(self, batch: PeerBatch) -> None:
        """Take a step."""
        train = self.recipe.train
        set_learning_rate(self.optimizer, self.taken, train)
        with autocast(torch.device("cpu"), train.precision):
            loss = self.model(batch.pixels, mask_labels=batch.masks, class_labels=batch.labels).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), train.max_grad_norm or float("inf"))
        self.optimizer.step()
        self.taken += 1

    def save(self) -> Path:
        """Save the model in the folder; return its own folder, of which `load_model` makes ours."""
        output = self.folder / "trained"
        self.model.save_pretrained(output)
        shutil.copyfile(self.folder / "start" / "preprocessor_config.json", output / "preprocessor_config.json")
        return output


def _new_model(recipe: Recipe, folder: Path) -> nn.Module:
    """Return a model with settings, size and pretrained backbone of ours."""
    import transformers

    ours = build_model(recipe.model, open_dataset(recipe, "train").categories)
    load_initial_weights(ours, recipe)
    start = folder / "start"
    save_checkpoint(folder / "start.safetensors", make_checkpoint(ours, recipe, {}))
    convert(folder / "start.safetensors", start, to="transformers")
    config = transformers.Mask2FormerConfig.from_pretrained(start, train_num_points=recipe.train.num_points)
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    if recipe.model.backbone_weights:
        weights = safetensors.torch.load_file(start / "model.safetensors")
        backbone = {key: value for key, value in weights.items() if key.startswith(f"{_ENCODER}.")}
        model.get_submodule(_ENCODER).load_state_dict(
            {key.removeprefix(f"{_ENCODER}."): value for key, value in backbone.items()}
        )
    return model


def _by_parts(model: nn.Module) -> nn.Module:
    """Return a view of the model by which `build_optimizer` knows the backbone, which has its own learning rate."""
    names = {
        "backbone": _ENCODER,
        "pixel_decoder": "model.pixel_level_module.decoder",
        "masked_decoder": "model.transformer_module",
        "class_head": "class_predictor",
    }
    return nn.ModuleDict({ours: model.get_submodule(theirs) for ours, theirs in names.items()})
