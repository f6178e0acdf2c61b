"""What weights in our names tell about their model, and how the published models of that kind are used."""

from __future__ import annotations

import math
import re
from typing import Any

from pydantic import ValidationError

from maskwright.errors import CheckpointError
from maskwright.layouts.layout import State
from maskwright.recipe import EvaluateConfig, ModelConfig

HEADS = 8


def infer_config(state: State, heads: int = HEADS) -> tuple[ModelConfig, int]:
    """The model that weights in our names belong to, and its number of classes.

    Args:
        state: our name to tensor.
        heads: attention heads of both decoders, which leave no trace in any shape; 8 in every published model.

    Raises:
        CheckpointError: a key that shapes are read from is missing, sizes contradict each other, or the backbone is
            none that we know.
    """
    try:
        queries, width = state["masked_decoder.query_features.weight"].shape
        num_classes = state["masked_decoder.class_head.weight"].shape[0] - 1
        mask_width = state["masked_decoder.mask_head.4.weight"].shape[0]
        places = state["pixel_decoder.layers.0.attention.weights.weight"].shape[0]  # heads * 3 levels * points
        if places % (3 * heads):
            raise CheckpointError(f"{places} attention weights per place do not divide into {heads} heads and 3 levels")
        config = ModelConfig(
            **_infer_backbone(state),
            queries=queries,
            width=width,
            mask_width=None if mask_width == width else mask_width,
            heads=heads,
            points=places // (3 * heads),
            pixel_decoder_layers=_count(state, r"pixel_decoder\.layers\.(\d+)\."),
            pixel_decoder_feedforward=state["pixel_decoder.layers.0.feedforward.expand.weight"].shape[0],
            masked_decoder_layers=_count(state, r"masked_decoder\.layers\.(\d+)\."),
            masked_decoder_feedforward=state["masked_decoder.layers.0.feedforward.expand.weight"].shape[0],
        )
    except KeyError as error:
        raise CheckpointError(f"not a whole Mask2Former: it has no '{error.args[0]}'") from None
    except (ValueError, IndexError) as error:
        reason = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(f"sizes of its weights belong to no Mask2Former: {reason}") from None
    return config, num_classes


_SWINS = {
    (96, (2, 2, 6, 2), (3, 6, 12, 24)): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2), (3, 6, 12, 24)): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2), (4, 8, 16, 32)): "swin_base_patch4_window7_224",
    (192, (2, 2, 18, 2), (6, 12, 24, 48)): "swin_large_patch4_window7_224",
}
_RESNETS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}


def _infer_backbone(state: State) -> dict:
    if "backbone.patch_embed.proj.weight" in state:
        return _infer_swin(state)
    if "backbone.network.layer1.0.conv1.weight" in state:
        return _infer_resnet(state)
    raise CheckpointError("the backbone is neither a ResNet nor a Swin: its weights have unknown names")


def _infer_swin(state: State) -> dict:
    width = state["backbone.patch_embed.proj.weight"].shape[0]
    table = "backbone.stages.{}.blocks.0.attn.relative_position_bias_table"
    stages = _count(state, r"backbone\.stages\.(\d+)\.")
    depths = tuple(_count(state, rf"backbone\.stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages))
    heads = tuple(state[table.format(stage)].shape[1] for stage in range(stages))
    window = (math.isqrt(state[table.format(0)].shape[0]) + 1) // 2
    name = _SWINS.get((width, depths, heads))
    options: dict[str, Any] = {} if name else {"embed_dim": width, "depths": list(depths), "num_heads": list(heads)}
    block = "backbone.stages.0.blocks.0"
    if (hidden := state[f"{block}.mlp.fc1.weight"].shape[0]) != 4 * width:
        options["mlp_ratio"] = hidden / width
    if f"{block}.attn.qkv.bias" not in state:
        options["qkv_bias"] = False
    name = name or "swin_tiny_patch4_window7_224"
    if window == 12:
        named = name.replace("window7_224", "window12_384")
        name, window = (named, 7) if named in _WINDOW12 else (name, window)
    return {"backbone": name, "backbone_options": options, "window": None if window == 7 else window}


_WINDOW12 = ("swin_base_patch4_window12_384", "swin_large_patch4_window12_384")


def _infer_resnet(state: State) -> dict:
    bottleneck = "backbone.network.layer1.0.conv3.weight" in state
    depths = tuple(_count(state, rf"backbone\.network\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    name = _RESNETS.get((bottleneck, depths))
    options = {} if name else {"layers": list(depths)}
    tracked = "backbone.network.bn1.num_batches_tracked" in state
    return {
        "backbone": name or ("resnet50" if bottleneck else "resnet18"),
        "backbone_options": options,
        "backbone_norm": "sync" if tracked else "frozen",
    }


def _count(state: State, pattern: str) -> int:
    """One more than the largest number that the pattern finds in a key."""
    numbers = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    return max(numbers, default=-1) + 1


def published_setting(num_classes: int, config: ModelConfig) -> tuple[str | None, EvaluateConfig]:
    """Class list and evaluation of the published models with so many classes; (None, plain defaults) for others."""
    large = "swin_base" in config.backbone or "swin_large" in config.backbone
    match num_classes:
        case 133:
            return "coco_panoptic", EvaluateConfig(task="panoptic", short_side=800, max_side=1333)
        case 80:
            return "coco_instance", EvaluateConfig(task="instance", short_side=800, max_side=1333)
        case 150:
            short = 640 if large else 512
            return "ade20k", EvaluateConfig(task="semantic", short_side=short, max_side=4 * short, semantic_at="input")
        case 19:
            return "cityscapes", EvaluateConfig(task="semantic", short_side=1024, max_side=2048, semantic_at="input")
    return None, EvaluateConfig(task="panoptic", short_side=800, max_side=1333)
