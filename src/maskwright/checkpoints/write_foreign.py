"""Write checkpoints for other implementations.

A model that the other implementation cannot express is refused before anything is written.
"""

from __future__ import annotations

import errno
import json
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from maskwright import __version__
from maskwright.checkpoints.checkpoint import Checkpoint
from maskwright.checkpoints.compare_weights import check_fit
from maskwright.checkpoints.infer_config import infer_config, resnet_shape
from maskwright.checkpoints.key_maps.detectron2 import DETECTRON2
from maskwright.checkpoints.key_maps.key_map import KeyMap, State
from maskwright.checkpoints.key_maps.openmmlab import OPENMMLAB
from maskwright.checkpoints.key_maps.transformers import TRANSFORMERS, TRANSFORMERS_TIMM
from maskwright.checkpoints.key_maps.translate import translate_back
from maskwright.checkpoints.transformers_config import (
    CONFIG,
    POINTS,
    PROCESSOR,
    image_processor,
    model_config,
    resnet_config,
    swin_config,
    timm_config,
)
from maskwright.config.schema import ModelConfig, TrainConfig
from maskwright.errors import CheckpointError, MaskwrightError
from maskwright.models import build_model
from maskwright.runtime.atomic_write import write_file_atomically, write_folder_atomically

_NO_OBJECT_WEIGHT = TrainConfig.model_fields["no_object_weight"].default
_D2_FEEDFORWARD = 1024  # of the original's pixel decoder, for any configuration
# Without both, its `_load_from_state_dict` hooks take the file for an older release and rename its weights.
_VERSIONS = {"sem_seg_head": {"version": 2}, "sem_seg_head.predictor": {"version": 2}}


def write_detectron2(path: Path, checkpoint: Checkpoint) -> None:
    """Write a file for the original's `DetectionCheckpointer`.

    Args:
        path: `.pkl` (arrays) or `.pth` (tensors).
        checkpoint: a plain Swin or ResNet with the decoders of the original.

    Raises:
        CheckpointError: the original cannot express the model.
    """
    _check_decoders(checkpoint, "detectron2")
    if (hidden := checkpoint.config.pixel_decoder_feedforward_dim) != _D2_FEEDFORWARD:
        raise CheckpointError(
            f"detectron2 cannot express model.pixel_decoder_feedforward_dim={hidden}: its pixel decoder always has "
            f"{_D2_FEEDFORWARD}"
        )
    _check_plain(checkpoint, "detectron2")
    _check_normalization(checkpoint.config, "detectron2")
    weights = OrderedDict(foreign_state(checkpoint, DETECTRON2))
    if path.suffix == ".pkl":
        weights = OrderedDict((key, tensor.numpy()) for key, tensor in weights.items())
    vars(weights).update(_metadata=_VERSIONS)  # where `load_state_dict` looks for it
    content = {"model": weights, "__author__": f"maskwright {__version__}"}

    def write(temporary: Path) -> None:
        if path.suffix == ".pth":
            save_torch(content, temporary)
            return
        with temporary.open("wb") as file:
            pickle.dump(content, file, protocol=4)

    write_file_atomically(path, write)


def write_transformers(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a folder for `Mask2FormerForUniversalSegmentation.from_pretrained` of transformers 4.x and 5.x.

    A plain ResNet or Swin becomes that of transformers; any other timm network is wrapped in its `TimmBackbone`.

    Args:
        folder: absent or empty.
        checkpoint: a model whose deformable attention has 4 points.

    Raises:
        CheckpointError: transformers cannot express the model.
    """
    _check_decoders(checkpoint, "transformers")
    key_map, backbone = _transformers_backbone(checkpoint)
    weights = {key: tensor.contiguous() for key, tensor in foreign_state(checkpoint, key_map).items()}
    train = checkpoint.recipe.train if checkpoint.recipe else None
    config, categories, evaluate = checkpoint.config, checkpoint.categories, checkpoint.evaluate
    described = {
        CONFIG: model_config(config, backbone, categories, evaluate, train),
        PROCESSOR: image_processor(config, categories, evaluate),
    }

    write_transformers_folder(folder, weights, described)


def write_transformers_folder(folder: Path, weights: State, described: dict[str, dict[str, Any]]) -> None:
    """Write weights and JSON files by name into a new folder, atomically."""

    def write(temporary: Path) -> None:
        for name, content in described.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        safetensors.torch.save_file(weights, temporary / "model.safetensors", {"format": "pt"})

    write_folder_atomically(folder, write)


def write_openmmlab(path: Path, checkpoint: Checkpoint, head: str) -> None:
    """Write a file for OpenMMLab's releases 3.x (mmdetection) and 1.x (mmsegmentation).

    Args:
        path: a `.pth` file.
        checkpoint: a plain Swin or ResNet with the decoders of the original.
        head: prefix of the decoders: "panoptic_head" in mmdetection, "decode_head" in mmsegmentation.

    Raises:
        CheckpointError: OpenMMLab cannot express the model.
    """
    _check_decoders(checkpoint, "OpenMMLab", any_points=True)
    _check_plain(checkpoint, "OpenMMLab")
    _check_normalization(checkpoint.config, "OpenMMLab")
    weights = {
        re.sub(r"^panoptic_head\.", f"{head}.", key): tensor
        for key, tensor in foreign_state(checkpoint, OPENMMLAB).items()
    }
    classes = {
        "classes": [category.name for category in checkpoint.categories],
        "palette": [list(category.color) for category in checkpoint.categories],
    }
    content = {"meta": {"dataset_meta": classes}, "state_dict": weights}
    write_file_atomically(path, lambda temporary: save_torch(content, temporary))


def save_torch(content: dict[str, Any], path: Path) -> None:
    """Call `torch.save`, which raises a RuntimeError when the disk is full."""
    try:
        torch.save(content, path)
    except RuntimeError:
        raise OSError(errno.ENOSPC, "writing stopped, as on a full disk") from None


def foreign_state(checkpoint: Checkpoint, key_map: KeyMap) -> State:
    """Return all entries of the other implementation's file, on the CPU."""
    if checkpoint.config.channels is not None:
        raise CheckpointError(
            f"the model takes {checkpoint.config.channels} channels in their stored units, which no other program's "
            "preprocessing supports",
            remedy="keep the model in our format",
        )
    train = checkpoint.recipe.train if checkpoint.recipe else None
    class_weights = torch.ones(len(checkpoint.categories) + 1)
    class_weights[-1] = train.no_object_weight if train else _NO_OBJECT_WEIGHT
    state = {name: _plain_tensor(tensor) for name, tensor in checkpoint.state.items()}
    if key_map is not OPENMMLAB:  # its loss reads them from the configuration
        state["criterion.empty_weight"] = class_weights
    return translate_back(state, key_map)


def _plain_tensor(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _check_decoders(checkpoint: Checkpoint, target: str, *, any_points: bool = False) -> None:
    """Raise CheckpointError unless the decoders are those of Mask2Former; OpenMMLab supports any number of points."""
    config = checkpoint.config
    for name, expected in (("family", "mask2former"), ("pixel_decoder", "deformable"), ("semantic_attention", None)):
        if (found := getattr(config, name)) != expected:
            raise CheckpointError(
                f"{target} cannot express model.{name}={found}: it supports only the original's Mask2Former"
            )
    if config.deformable_points != POINTS and not any_points:
        raise CheckpointError(
            f"{target} cannot express model.deformable_points={config.deformable_points}: its deformable attention has "
            f"{POINTS} points per level and head"
        )


def _check_normalization(config: ModelConfig, target: str) -> None:
    """Raise CheckpointError if pixels are not normalized as usual: files of weights have no place to say so."""
    for name in ("pixel_mean", "pixel_std"):
        found, usual = getattr(config, name), ModelConfig.model_fields[name].default
        if len(found) != len(usual) or any(abs(a - b) > 0.01 for a, b in zip(found, usual, strict=True)):
            raise CheckpointError(
                f"a weight file for {target} cannot store model.{name}={list(found)}, and would be used with "
                f"{list(usual)}",
                remedy="keep the model in our format, or convert it to transformers, which stores these values",
            )


# Plain means that the weights determine the network: timm changes nothing else, such as the pooling.
_RESNETS = {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"} | {
    f"resnext{size}" for size in ("50_32x4d", "101_32x4d", "101_32x8d", "101_64x4d")
}
_SIZES = {"embed_dim", "depths", "num_heads", "mlp_ratio", "qkv_bias", "layers", "cardinality", "base_width"}
_RATES = {"drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"}  # in training only


def _plain_backbone(checkpoint: Checkpoint) -> ModelConfig | None:
    """Return the configuration inferred from the weights alone; None if they do not determine the backbone."""
    config = checkpoint.config
    name = config.backbone.split(".")[0]
    if not (name in _RESNETS or name.startswith("swin_")) or config.backbone_options.keys() - _SIZES - _RATES:
        return None
    try:
        inferred, _ = infer_config(checkpoint.state, config.num_heads)
        with torch.device("meta"):
            check_fit(build_model(inferred, checkpoint.categories).state_dict(), checkpoint.state)
    except MaskwrightError:  # for instance, windows that differ between stages
        return None
    return inferred


def _check_plain(checkpoint: Checkpoint, target: str) -> None:
    """Raise CheckpointError unless the backbone is a Swin, or a ResNet of a standard depth."""
    plain = _plain_backbone(checkpoint)
    if plain is None or "layers" in plain.backbone_options:
        raise CheckpointError(
            f"{target} cannot express the backbone {_backbone_name(checkpoint)}: it supports plain Swins, and ResNets "
            "of 18, 34, 50, 101 or 152 layers"
        )


def _transformers_backbone(checkpoint: Checkpoint) -> tuple[KeyMap, dict[str, Any]]:
    """Return the key map for the weights, and the `backbone_config` that they fit."""
    config, state = checkpoint.config, checkpoint.state
    if _plain_backbone(checkpoint):
        if "backbone.patch_embed.proj.weight" in state:
            return TRANSFORMERS, swin_config(state, config)
        shape = resnet_shape(state)
        if not shape.bottleneck or (shape.groups, shape.base_width) == (1, 64):
            return TRANSFORMERS, resnet_config(state)
    from maskwright.models.backbones.timm import TimmBackbone  # imports timm

    with torch.device("meta"):
        backbone = build_model(config, checkpoint.categories).backbone
    if config.backbone_options or not isinstance(backbone, TimmBackbone) or backbone.channels_last:
        raise CheckpointError(
            f"transformers cannot express the backbone {_backbone_name(checkpoint)}: it supports plain ResNets and "
            "Swins, and timm networks without options whose features are (channels, height, width)"
        )
    return TRANSFORMERS_TIMM, timm_config(config, list(backbone.indices))


def _backbone_name(checkpoint: Checkpoint) -> str:
    options = checkpoint.config.backbone_options
    return f"'{checkpoint.config.backbone}'" + (f" with {options}" if options else "")
