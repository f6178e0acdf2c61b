"""A hundred training steps compared with transformers' Mask2Former and EoMT, all else equal.

Equal are weights, batches, sampled points and settings.

Ours is `train_step` with the loader, the criterion and the optimizer of a recipe. Theirs is the live model with its own
criterion, read from a folder that `convert` wrote, and an AdamW built here by the original's rules. Only the points
that its criterion draws are replaced.

`python -m pytest -s tests/test_against_transformers.py` prints the result.
"""

import json
from collections import deque
from pathlib import Path

import pytest
import torch
from torch import nn

from maskwright.checkpoints.checkpoint import make_checkpoint, save_checkpoint
from maskwright.checkpoints.convert import convert
from maskwright.data.build import open_dataset, train_loader
from maskwright.diagnostics.compare_runs import compare
from maskwright.models import build_model
from maskwright.runtime.device import create_accelerator
from maskwright.training.losses.point_sampling import RandomPoints
from maskwright.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from maskwright.training.read_logs import read_log
from maskwright.training.step import build_criterion, train_step
from tests import tiny

STEPS = 100
SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_options": {"embed_dim": 24, "depths": [2, 1, 2, 1], "num_heads": [1, 2, 3, 4]},
    "window_size": 5,
    "drop_path_rate": 0.0,
}
RESNET = {"backbone": "resnet18"}  # with frozen batch norms, as the original's
VIT = {"embed_dim": 48, "depth": 4, "num_heads": 3}
EOMT = {"family": "eomt", "query_blocks": 2}
DINOV2 = EOMT | {
    "backbone": "vit_small_patch14_reg4_dinov2",
    "backbone_options": VIT | {"img_size": 64, "patch_size": 16},
}
DINOV3 = EOMT | {"backbone": "vit_small_patch16_dinov3_qkvb", "backbone_options": VIT | {"mlp_ratio": 2}}


SPARED = ("relative_position_bias_table", "cls_token", "register_tokens")  # have no weight decay


class SamePoints:
    """Our points of a step, in the order in which their criterion draws points: `order` has its layers."""

    def __init__(self, recipe, step, batch, order):
        train, queries = recipe.train, recipe.model.num_queries
        points = RandomPoints(train.seed, step, batch.keys, "cpu")
        uncertain = int(train.num_points * train.importance_sample_ratio)
        drawn, layers = [], len(order)
        for image, target in enumerate(
            batch.targets
        ):  # each image has its own generator, `Criterion` asks in this order
            masks, count = min(len(target), queries), int(train.num_points * train.oversample_ratio)
            matching = points.matching(image, layers, train.num_points)
            candidates = [points.candidates(layer, image, masks, count) for layer in range(layers)]
            uniform = [points.uniform(layer, image, masks, train.num_points - uncertain) for layer in range(layers)]
            drawn.append((matching, candidates, uniform))
        self.queue = deque()
        for layer in order:
            self.queue.extend(matching[layer][None] for matching, _, _ in drawn)
            self.queue.append(torch.cat([candidates[layer] for _, candidates, _ in drawn]))
            self.queue.append(torch.cat([uniform[layer] for _, _, uniform in drawn]))

    def rand(self, *shape, device=None):
        points = self.queue.popleft()
        assert points.shape == shape
        return points


def their_optimizer(model, config):
    """Build AdamW with the original's groups: `train_net.py::Trainer.build_optimizer`."""
    norms = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    new = ("query", "class_predictor", "mask_head", "upscale_block")  # of EoMT: all else is its backbone
    is_eomt = hasattr(model, "upscale_block")
    groups, seen = [], set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            in_backbone = "pixel_level_module.encoder" in module_name
            if is_eomt:
                in_backbone = not module_name.startswith(new)
            rate = config.learning_rate * (config.backbone_lr_multiplier if in_backbone else 1.0)
            spared = isinstance(module, (*norms, nn.Embedding)) or name in SPARED
            decay = 0.0 if spared else config.weight_decay
            groups.append({"params": [parameter], "lr": rate, "weight_decay": decay, "base": rate})
    return torch.optim.AdamW(groups)


def their_step(model, optimizer, batch, points, max_grad_norm, monkeypatch):
    """Take one step of theirs; return its loss and gradient norm."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.pixel_mean, model.pixel_std))
    pixels = (batch.images.float() - mean) / std
    if not hasattr(model, "upscale_block"):  # EoMT's processor pads before it normalizes
        pixels = pixels.masked_fill(batch.padding[:, None], 0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", points.rand)
        output = model(
            pixel_values=pixels,
            mask_labels=[target.masks.float() for target in batch.targets],
            class_labels=[target.labels for target in batch.targets],
        )
    assert not points.queue
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return output.loss.item(), norm.item()


def log(file: Path, rows):
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_log(file)


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param(SWIN, id="swin"),
        pytest.param(RESNET, id="resnet", marks=pytest.mark.slow),
        pytest.param(DINOV2, id="eomt-dinov2", marks=pytest.mark.slow),
        pytest.param(DINOV3, id="eomt-dinov3", marks=pytest.mark.slow),
    ],
)
def test_a_hundred_steps_have_the_losses_of_transformers(backbone, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    values = tiny.values(tiny.write_panoptic(tmp_path / "data", count=6), val=False)
    values["model"] |= backbone | {"pixel_decoder_layers": 2, "masked_decoder_layers": 3}
    values["train"] |= {"steps": STEPS, "batch_size": 2, "num_points": 112}
    for key in ("learning_rate", "backbone_lr_multiplier", "max_grad_norm"):
        del values["train"][key]  # the original's: 1e-4, a tenth of it for the backbone, 0.01
    is_eomt = backbone.get("family") == "eomt"
    if is_eomt:
        values["evaluate"]["pad_size"] = [64, 64]
    recipe = tiny.parse_recipe(values, "tiny")
    blocks = recipe.model.query_blocks if is_eomt else recipe.model.masked_decoder_layers
    order = [*range(blocks + 1)] if is_eomt else [blocks, *range(blocks)]  # Mask2Former's begins with the last layer

    torch.manual_seed(0)
    ours = build_model(recipe.model, open_dataset(recipe, "train").categories).train()
    save_checkpoint(tmp_path / "start.safetensors", make_checkpoint(ours, recipe, {}))
    convert(tmp_path / "start.safetensors", tmp_path / "start", to="transformers")
    theirs = transformers.AutoModelForUniversalSegmentation.from_pretrained(
        tmp_path / "start", train_num_points=recipe.train.num_points
    ).train()
    assert (theirs.config.class_weight, theirs.config.mask_weight, theirs.config.dice_weight) == (2.0, 5.0, 5.0)
    assert theirs.config.no_object_weight == 0.1
    assert getattr(theirs.config, "dropout", 0.0) == 0.0
    theirs.pixel_mean, theirs.pixel_std = recipe.model.pixel_mean, recipe.model.pixel_std
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # theirs has no frozen ones
            module.eval().requires_grad_(False)

    engine, criterion = create_accelerator("fp32"), build_criterion(recipe.train)
    our_optimizer = build_optimizer(ours, recipe.train, fused=False)
    their_own = their_optimizer(theirs, recipe.train)
    rows = ([], [])
    for step, parts in zip(range(STEPS), train_loader(recipe), strict=False):
        factor = learning_rate_factor(step, recipe.train)
        set_learning_rate(our_optimizer, step, recipe.train)
        for group in their_own.param_groups:
            group["lr"] = group["base"] * factor
        done = train_step(engine, ours, our_optimizer, criterion, parts, recipe.train, step)
        loss, norm = criterion.total(done.losses).item(), done.gradient_norm.item()
        rows[0].append({"step": step + 1, "loss": loss, "gradient_norm": norm})
        points = SamePoints(recipe, step, parts[0], order)
        loss, norm = their_step(theirs, their_own, parts[0], points, recipe.train.max_grad_norm, monkeypatch)
        rows[1].append({"step": step + 1, "loss": loss, "gradient_norm": norm})

    logs = [log(tmp_path / name / "log.jsonl", part) for name, part in zip(("ours", "theirs"), rows, strict=True)]
    found = compare(*logs, relative_limit=0.001)
    first, last = (logs[0].series()[step] for step in (1, STEPS))
    print(f"\n{backbone['backbone']}: loss {first:.3f} to {last:.3f}; {found.verdict()}")
    assert len(found.steps) == STEPS
    assert last < 0.9 * first  # they did learn
    assert found.relative_by_step[1] < 1e-5
    assert found.loss.relative < 0.001
