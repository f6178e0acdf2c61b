"""Checkpoint layouts of other implementations: one table of names each, and what a state dict tells about its model.

The only file that knows foreign names. A table is a list of (foreign, ours) prefixes with `{i}` and `{j}` for numbers;
what follows the prefix (`.weight`, `.norm.running_mean`) is kept. No configuration is needed: every size that shapes
a weight is read from the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from maskwright.errors import CheckpointError
from maskwright.recipe import EvaluateConfig, ModelConfig

State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How one implementation names its weights.

    Attributes:
        name: for messages and provenance.
        marks: substrings of keys, each of which must occur for the layout to be recognised.
        modernise: renames keys of older releases to today's, or None.
        names: (foreign prefix, our prefix).
        packed: (foreign key, our prefix) of query, key and value weights stored as one tensor.
        dropped: patterns of entries that are not parameters, each with the reason.
    """

    name: str
    marks: tuple[str, ...]
    modernise: Callable[[str, Iterable[str]], str] | None
    names: tuple[tuple[str, str], ...]
    packed: tuple[tuple[str, str], ...]
    dropped: tuple[tuple[str, str], ...]


def _detectron2_modernise(key: str, keys: Iterable[str]) -> str:
    """Names of the original's first releases (its `_load_from_state_dict` hooks rename them when loading)."""
    head, decoder = "sem_seg_head.", ("sem_seg_head.pixel_decoder.", "sem_seg_head.predictor.")
    if key.startswith(head) and not key.startswith(decoder):
        key = decoder[0] + key.removeprefix(head)
    return key.replace("static_query", "query_feat")


_ENCODER = "sem_seg_head.pixel_decoder.transformer.encoder.layers.{i}"
_CROSS = "sem_seg_head.predictor.transformer_cross_attention_layers.{i}"
_SELF = "sem_seg_head.predictor.transformer_self_attention_layers.{i}"
_FEEDFORWARD = "sem_seg_head.predictor.transformer_ffn_layers.{i}"

DETECTRON2 = Layout(
    name="detectron2",
    marks=("sem_seg_head.", "predictor.query_embed"),
    modernise=_detectron2_modernise,
    names=(
        ("backbone.stem.conv1.norm", "backbone.network.bn1"),
        ("backbone.stem.conv1", "backbone.network.conv1"),
        *(
            (f"backbone.res{stage + 1}.{{i}}.{foreign}", f"backbone.network.layer{stage}.{{i}}.{ours}")
            for stage in (1, 2, 3, 4)
            for foreign, ours in (
                ("shortcut.norm", "downsample.1"),
                ("shortcut", "downsample.0"),
                ("conv{j}.norm", "bn{j}"),
                ("conv{j}", "conv{j}"),
            )
        ),
        ("backbone.patch_embed", "backbone.patch_embed"),
        # timm merges patches at the start of a stage, the original at the end of the one before.
        *((f"backbone.layers.{i}.downsample", f"backbone.stages.{i + 1}.downsample") for i in range(3)),
        ("backbone.layers.{i}.blocks.{j}", "backbone.stages.{i}.blocks.{j}"),
        ("backbone.norm{i}", "backbone.norms.{i}"),
        ("sem_seg_head.pixel_decoder.input_proj.{i}.0", "pixel_decoder.input_projections.{i}.conv"),
        ("sem_seg_head.pixel_decoder.input_proj.{i}.1", "pixel_decoder.input_projections.{i}.norm"),
        ("sem_seg_head.pixel_decoder.transformer.level_embed", "pixel_decoder.level_embedding"),
        (f"{_ENCODER}.self_attn.sampling_offsets", "pixel_decoder.layers.{i}.attention.offsets"),
        (f"{_ENCODER}.self_attn.attention_weights", "pixel_decoder.layers.{i}.attention.weights"),
        (f"{_ENCODER}.self_attn.value_proj", "pixel_decoder.layers.{i}.attention.value"),
        (f"{_ENCODER}.self_attn.output_proj", "pixel_decoder.layers.{i}.attention.output"),
        (f"{_ENCODER}.norm1", "pixel_decoder.layers.{i}.attention_norm"),
        (f"{_ENCODER}.linear1", "pixel_decoder.layers.{i}.feedforward.expand"),
        (f"{_ENCODER}.linear2", "pixel_decoder.layers.{i}.feedforward.reduce"),
        (f"{_ENCODER}.norm2", "pixel_decoder.layers.{i}.feedforward_norm"),
        ("sem_seg_head.pixel_decoder.mask_features", "pixel_decoder.mask_projection"),
        ("sem_seg_head.pixel_decoder.adapter_1.norm", "pixel_decoder.lateral.norm"),
        ("sem_seg_head.pixel_decoder.adapter_1", "pixel_decoder.lateral.conv"),
        ("sem_seg_head.pixel_decoder.layer_1.norm", "pixel_decoder.smooth.norm"),
        ("sem_seg_head.pixel_decoder.layer_1", "pixel_decoder.smooth.conv"),
        ("sem_seg_head.predictor.query_feat", "masked_decoder.query_features"),
        ("sem_seg_head.predictor.query_embed", "masked_decoder.query_positions"),
        ("sem_seg_head.predictor.level_embed", "masked_decoder.level_embedding"),
        (
            f"{_CROSS}.multihead_attn.out_proj",
            "masked_decoder.layers.{i}.cross_attention.output",
        ),
        (f"{_CROSS}.norm", "masked_decoder.layers.{i}.cross_norm"),
        (
            f"{_SELF}.self_attn.out_proj",
            "masked_decoder.layers.{i}.self_attention.output",
        ),
        (f"{_SELF}.norm", "masked_decoder.layers.{i}.self_norm"),
        (f"{_FEEDFORWARD}.linear1", "masked_decoder.layers.{i}.feedforward.expand"),
        (f"{_FEEDFORWARD}.linear2", "masked_decoder.layers.{i}.feedforward.reduce"),
        (f"{_FEEDFORWARD}.norm", "masked_decoder.layers.{i}.feedforward_norm"),
        ("sem_seg_head.predictor.decoder_norm", "masked_decoder.norm"),
        ("sem_seg_head.predictor.class_embed", "masked_decoder.class_head"),
        *((f"sem_seg_head.predictor.mask_embed.layers.{i}", f"masked_decoder.mask_head.{2 * i}") for i in range(3)),
    ),
    packed=(
        (
            f"{_CROSS}.multihead_attn.in_proj_",
            "masked_decoder.layers.{i}.cross_attention",
        ),
        (f"{_SELF}.self_attn.in_proj_", "masked_decoder.layers.{i}.self_attention"),
    ),
    dropped=(
        (r"criterion\.empty_weight", "class weights of the loss, set by the recipe"),
        (r".*\.relative_position_index", "follows from the window size"),
        (r".*\.attn_mask", "follows from the image size"),
        (r"pixel_(mean|std)", "normalisation constants, set by the recipe"),
    ),
)

LAYOUTS = (DETECTRON2,)


@dataclass(frozen=True)
class Translation:
    """A foreign state dict in our names.

    Attributes:
        layout: where it came from.
        state: our name to tensor.
        dropped: (key, reason) of each entry left out on purpose.
    """

    layout: str
    state: State
    dropped: list[tuple[str, str]]


def recognise(state: State) -> Layout | None:
    """The layout whose marks all occur, or None."""
    return next((layout for layout in LAYOUTS if all(any(mark in key for key in state) for mark in layout.marks)), None)


def translate(state: State, layout: Layout) -> Translation:
    """Rename every entry of a foreign state dict.

    Raises:
        CheckpointError: an entry has no place here, or two entries claim the same one; all are listed.
    """
    rules = [(_pattern(foreign), ours) for foreign, ours in layout.names]
    packed = [(_pattern(foreign, tail=r"(?P<tail>weight|bias)"), ours) for foreign, ours in layout.packed]
    ours: State = {}
    dropped: list[tuple[str, str]] = []
    unknown: list[str] = []

    def place(key: str, tensor: Tensor) -> None:
        if key in ours:
            raise CheckpointError(
                f"two entries of the {layout.name} checkpoint become '{key}': old and new names mixed"
            )
        ours[key] = tensor

    for original, tensor in state.items():
        key = layout.modernise(original, state) if layout.modernise else original
        reason = next((reason for pattern, reason in layout.dropped if re.fullmatch(pattern, key)), None)
        if reason:
            dropped.append((original, reason))
        elif found := _first(packed, key):
            for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                place(f"{found[0]}.{name}.{found[1]}", part)
        elif found := _first(rules, key):
            place(found[0] + found[1], tensor)
        else:
            unknown.append(original)
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} entries of the {layout.name} checkpoint have no place here: {listing(unknown)}"
        )
    return Translation(layout.name, ours, dropped)


def listing(keys: Iterable[str], most: int = 12) -> str:
    """Keys for a message: the first of them, and how many more."""
    keys = sorted(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _pattern(prefix: str, tail: str = r"(?P<tail>(\..*)?)") -> re.Pattern[str]:
    escaped = re.escape(prefix).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
    return re.compile(escaped + tail)


def _first(rules: list[tuple[re.Pattern[str], str]], key: str) -> tuple[str, str] | None:
    for pattern, ours in rules:
        if match := pattern.fullmatch(key):
            numbers = {name: value for name, value in match.groupdict().items() if name in "ij"}
            return ours.format(**numbers), match["tail"]
    return None


def infer_config(state: State) -> tuple[ModelConfig, int]:
    """The model that weights in our names belong to, and its number of classes.

    The number of attention heads leaves no trace in any shape: it is 8, as in every published model, unless the width
    is not a multiple of 8 x 4.

    Raises:
        CheckpointError: a key that shapes are read from is missing, or the backbone is none that we know.
    """
    try:
        queries, width = state["masked_decoder.query_features.weight"].shape
        num_classes = state["masked_decoder.class_head.weight"].shape[0] - 1
        mask_width = state["masked_decoder.mask_head.4.weight"].shape[0]
        heads = 8
        places = state["pixel_decoder.layers.0.attention.weights.weight"].shape[0]  # heads * 3 levels * points
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
    options = {} if name else {"embed_dim": width, "depths": list(depths), "num_heads": list(heads)}
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
