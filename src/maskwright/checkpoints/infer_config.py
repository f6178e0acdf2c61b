"""Infer the configuration of a model from its weights, and the evaluation settings of published models like it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from maskwright.checkpoints.infer_vit import infer_eomt
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.errors import CheckpointError
from maskwright.structures.annotations import Task

LEVELS, POINTS = 3, 4


@dataclass(frozen=True)
class SwinShape:
    """Architecture of a Swin.

    Attributes:
        width: channels of the first stage.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        window: side of a window in cells.
        mlp_ratio: hidden channels of the MLPs relative to their input.
        qkv_bias: queries, keys and values have a bias.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    mlp_ratio: float
    qkv_bias: bool


@dataclass(frozen=True)
class ResNetShape:
    """Architecture of a ResNet.

    Attributes:
        bottleneck: blocks have three convolutions instead of two.
        depths: blocks of each stage.
        widths: output channels of each stage.
        groups: groups of the middle convolution.
        base_width: channels of one group in the first stage.
    """

    bottleneck: bool
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    groups: int
    base_width: int


def infer_config(
    state: State, heads: int | None = None, backbone: str | None = None, norm_eps: float | None = None
) -> tuple[ModelConfig, int]:
    """Return the configuration of the model that weights belong to, and its number of classes.

    Args:
        state: our names to tensors.
        heads: attention heads of both decoders, which no shape depends on; None takes as many as leave 4 sampling
            points to each, as in the original and transformers.
        backbone: name of the timm network; None recognizes ResNets, Swins and an EoMT's ViT by their weights.
        norm_eps: of the layer norms of an EoMT's ViT; None is that of the published networks.

    Raises:
        CheckpointError: a weight is missing, shapes contradict each other, or the backbone is unknown.
    """
    per_pixel, eomt = "decoder.classifier.weight" in state, "head.class_head.weight" in state
    model = "semantic FPN" if per_pixel else "EoMT" if eomt else "Mask2Former"
    try:
        if eomt:
            values, head = infer_eomt(state, heads, norm_eps), state["head.class_head.weight"]
        else:
            values = _infer_fpn(state) if per_pixel else _infer_mask2former(state, heads)
            head = state["decoder.classifier.weight" if per_pixel else "masked_decoder.class_head.weight"]
            values |= _infer_backbone(state, backbone)
        num_classes = head.shape[0] - (not per_pixel)  # the last one is "no object"
        config = ModelConfig(**values)
    except KeyError as error:
        raise CheckpointError(
            f"incomplete {model}: '{error.args[0]}' is missing", remedy="use the complete checkpoint"
        ) from None
    except (ValueError, IndexError) as error:
        reason = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(f"shapes of its weights do not fit any {model}: {reason}") from None
    if "backbone.semantic_layers.0.gamma" in state:
        config = config.model_copy(update=_published_semantic_layers(num_classes, config))
    return config, num_classes


def _infer_fpn(state: State) -> dict:
    return {"family": "semantic_fpn", "hidden_dim": state["decoder.classifier.weight"].shape[1]}


def _infer_mask2former(state: State, heads: int | None) -> dict:
    queries, width = state["masked_decoder.query_features.weight"].shape
    mask_width = state["masked_decoder.mask_head.4.weight"].shape[0]
    config = {
        "num_queries": queries,
        "hidden_dim": width,
        "mask_dim": None if mask_width == width else mask_width,
        "masked_decoder_layers": _count(state, r"masked_decoder\.layers\.(\d+)\."),
        "masked_decoder_feedforward_dim": state["masked_decoder.layers.0.feedforward.expand.weight"].shape[0],
    }
    if "pixel_decoder.alignments.0.difference.weight" in state:
        return config | {"pixel_decoder": "fapn"} | ({"num_heads": heads} if heads else {})
    heads, points = _heads_and_points(state, heads)
    return config | {
        "pixel_decoder": "msfapn" if "pixel_decoder.alignment.difference.weight" in state else "deformable",
        "num_heads": heads,
        "deformable_points": points,
        "pixel_decoder_layers": _count(state, r"pixel_decoder\.layers\.(\d+)\."),
        "pixel_decoder_feedforward_dim": state["pixel_decoder.layers.0.feedforward.expand.weight"].shape[0],
    }


def _heads_and_points(state: State, heads: int | None) -> tuple[int, int]:
    levels = len(state["pixel_decoder.level_embedding"])
    if levels != LEVELS:
        raise CheckpointError(f"its pixel decoder attends to {levels} feature levels, but only {LEVELS} are supported")
    samples = state["pixel_decoder.layers.0.attention.weights.weight"].shape[0]  # heads * levels * points
    heads = heads or samples // (LEVELS * POINTS) or 1
    if samples % (LEVELS * heads):
        raise CheckpointError(f"{samples} attention weights per query do not divide into {heads} heads and 3 levels")
    return heads, samples // (LEVELS * heads)


def _published_semantic_layers(num_classes: int, config: ModelConfig) -> dict:
    """Return the attention scope of the semantic layers in published models, which shapes do not reveal.

    The published code bases choose it by family, size and number of classes, so the same rules are applied here.
    """
    match config.family, config.pixel_decoder:
        case "mask2former", "fapn" | "msfapn":
            global_stages = 2
        case "mask2former", _:
            global_stages = 1 if num_classes == 150 else 0
        case _:
            global_stages = 2 if num_classes > 19 and "swin_base" not in config.backbone else 0
    # The Cityscapes model of the plain decoder was left at the default window.
    left_at_default = (config.family, config.pixel_decoder, num_classes) == ("mask2former", "deformable", 19)
    return {
        "semantic_attention": ("window",) * (4 - global_stages) + ("global",) * global_stages,
        "semantic_window_size": 7 if left_at_default else None,
    }


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


_WINDOW12 = ("swin_base_patch4_window12_384", "swin_large_patch4_window12_384")


def _infer_backbone(state: State, name: str | None) -> dict:
    if "backbone.patch_embed.proj.weight" in state:
        return _infer_swin(swin_shape(state))
    tracked = any(key.endswith(".num_batches_tracked") for key in state)
    norm = {"backbone_norm": "sync" if tracked else "frozen"}
    if name:
        return {"backbone": name, **norm}
    if "backbone.network.layer1.0.conv1.weight" in state:
        return _infer_resnet(resnet_shape(state)) | norm
    raise CheckpointError(
        "the backbone is neither a ResNet nor a Swin; other timm networks are recognized only by the config.json of "
        "transformers in the same folder"
    )


def swin_shape(state: State) -> SwinShape:
    """Return the architecture of the Swin backbone in a state dict.

    Raises:
        KeyError: the backbone is not a Swin.
    """
    width = state["backbone.patch_embed.proj.weight"].shape[0]
    stages = _count(state, r"backbone\.stages\.(\d+)\.")
    depths = tuple(_count(state, rf"backbone\.stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages))
    table = "backbone.stages.{}.blocks.0.attn.relative_position_bias_table"
    block = "backbone.stages.0.blocks.0"
    return SwinShape(
        width=width,
        depths=depths,
        heads=tuple(state[table.format(stage)].shape[1] for stage in range(stages)),
        window=(math.isqrt(state[table.format(0)].shape[0]) + 1) // 2,
        mlp_ratio=state[f"{block}.mlp.fc1.weight"].shape[0] / width,
        qkv_bias=f"{block}.attn.qkv.bias" in state,
    )


def _infer_swin(shape: SwinShape) -> dict:
    name = _SWINS.get((shape.width, shape.depths, shape.heads))
    options: dict[str, Any] = {}
    if name is None:
        options |= {"embed_dim": shape.width, "depths": list(shape.depths), "num_heads": list(shape.heads)}
    if shape.mlp_ratio != 4:
        options["mlp_ratio"] = shape.mlp_ratio
    if not shape.qkv_bias:
        options["qkv_bias"] = False
    name, window = name or "swin_tiny_patch4_window7_224", shape.window
    if window == 12:
        named = name.replace("window7_224", "window12_384")
        name, window = (named, 7) if named in _WINDOW12 else (name, window)
    return {"backbone": name, "backbone_options": options, "window_size": None if window == 7 else window}


def resnet_shape(state: State) -> ResNetShape:
    """Return the architecture of the ResNet backbone in a state dict.

    Raises:
        KeyError: the backbone is not a ResNet.
    """
    stage = "backbone.network.layer{}"
    bottleneck = f"{stage.format(1)}.0.conv3.weight" in state
    middle = state[f"{stage.format(1)}.0.conv2.weight"]
    groups = middle.shape[0] // middle.shape[1]
    return ResNetShape(
        bottleneck=bottleneck,
        depths=tuple(_count(state, rf"backbone\.network\.layer{number}\.(\d+)\.") for number in (1, 2, 3, 4)),
        widths=tuple(
            state[f"{stage.format(number)}.0.conv{3 if bottleneck else 2}.weight"].shape[0] for number in (1, 2, 3, 4)
        ),
        groups=groups,
        base_width=middle.shape[0] // groups,
    )


def _infer_resnet(shape: ResNetShape) -> dict:
    name = _RESNETS.get((shape.bottleneck, shape.depths))
    options: dict[str, Any] = {} if name else {"layers": list(shape.depths)}
    if shape.bottleneck and (shape.groups, shape.base_width) != (1, 64):  # ResNeXt, or a wide ResNet
        options |= {"cardinality": shape.groups, "base_width": shape.base_width}
    return {"backbone": name or ("resnet50" if shape.bottleneck else "resnet18"), "backbone_options": options}


def _count(state: State, pattern: str) -> int:
    """Return one more than the largest index that the pattern captures in any key."""
    numbers = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    return max(numbers, default=-1) + 1


def published_setting(num_classes: int, config: ModelConfig) -> tuple[str | None, EvaluateConfig]:
    """Return class list and evaluation settings of published models with so many classes; else (None, defaults).

    The number alone does not make a model one of them: its classes have to be those of the list.
    """
    if config.family == "semantic_fpn":
        return _published_fpn_setting(num_classes, config)
    if config.family == "eomt":
        return _published_eomt_setting(num_classes, config)
    large = "swin_base" in config.backbone or "swin_large" in config.backbone
    match num_classes:
        case 133:
            return "coco_panoptic", EvaluateConfig(task="panoptic", short_side=800, max_side=1333)
        case 80:
            return "coco_instance", EvaluateConfig(task="instance", short_side=800, max_side=1333)
        case 150:
            short = 640 if large else 512
            return "ade20k", EvaluateConfig(
                task="semantic", short_side=short, max_side=4 * short, semantic_resolution="input"
            )
        case 19:
            return "cityscapes", EvaluateConfig(
                task="semantic", short_side=1024, max_side=2048, semantic_resolution="input"
            )
    return None, default_setting(config)


def default_setting(config: ModelConfig) -> EvaluateConfig:
    """Return the evaluation settings of a model that is not known to be a published one."""
    if config.family == "semantic_fpn":
        return EvaluateConfig(task="semantic", short_side=512, max_side=2048)
    if config.family == "eomt":
        return padded_setting("panoptic", config.backbone_options.get("img_size", _EOMT_SIDE))
    return EvaluateConfig(task="panoptic", short_side=800, max_side=1333)


_EOMT_SIDE = 640  # if the position table does not tell


def padded_setting(task: Task, side: int) -> EvaluateConfig:
    """Return the settings with which EoMT finds objects: images resized to fit a square, and padded to it."""
    return EvaluateConfig(task=task, short_side=side, max_side=side, pad_size=(side, side))


def windows_setting(side: int) -> EvaluateConfig:
    """Return the settings with which EoMT classifies pixels: evenly spaced square windows along the long side."""
    return EvaluateConfig(
        task="semantic",
        short_side=side,
        window_size=(side, side),
        window_stride="even",
        semantic_resolution="input",
    )


def _published_eomt_setting(num_classes: int, config: ModelConfig) -> tuple[str | None, EvaluateConfig]:
    side = config.backbone_options.get("img_size")
    match num_classes:
        case 133:
            return "coco_panoptic", padded_setting("panoptic", side or _EOMT_SIDE)
        case 80:
            return "coco_instance", padded_setting("instance", side or _EOMT_SIDE)
        case 150 if side is not None and side >= _EOMT_SIDE:
            return "ade20k", padded_setting("panoptic", side)
        case 150:
            return "ade20k", windows_setting(512)
        case 19:
            return "cityscapes", windows_setting(1024)
    return None, default_setting(config)


def _published_fpn_setting(num_classes: int, config: ModelConfig) -> tuple[str | None, EvaluateConfig]:
    short = 640 if "swin_large" in config.backbone else 512
    match num_classes:
        case 150:
            return "ade20k", EvaluateConfig(task="semantic", short_side=short, max_side=4 * short)
        case 171:
            return "coco_stuff", EvaluateConfig(task="semantic", short_side=short, max_side=4 * short)
        case 19:
            return "cityscapes", EvaluateConfig(task="semantic", short_side=1024, max_side=2048)
    return None, default_setting(config)
