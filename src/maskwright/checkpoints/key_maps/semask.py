"""Key maps of SeMask (Picsart-AI-Research/SeMask-Segmentation): FPN models on mmsegmentation, others on detectron2.

All have the same backbone. The FaPN decoder has a key map of its own, because it uses some keys with another meaning.
"""

from __future__ import annotations

import re

from maskwright.checkpoints.key_maps.detectron2 import SWIN, head_prefixes, head_qkv
from maskwright.checkpoints.key_maps.key_map import NOT_PARAMETERS, KeyMap

_SEMANTIC, _OURS = "backbone.layers.{i}.semantic_layer", "backbone.semantic_layers.{i}"
_ATTENTION = f"{_SEMANTIC}.class_injection.0"  # only one per layer, for any configuration
_PIXELS = "sem_seg_head.pixel_decoder"

_SEMANTIC_LAYERS = (
    (f"{_SEMANTIC}.norm1", f"{_OURS}.norm"),
    (f"{_ATTENTION}.gamma", f"{_OURS}.gamma"),
    (f"{_ATTENTION}.mlp_cls_q", f"{_OURS}.query"),
    (f"{_ATTENTION}.mlp_cls_k", f"{_OURS}.key"),
    (f"{_ATTENTION}.mlp_v", f"{_OURS}.value"),
    (f"{_ATTENTION}.mlp_res", f"{_OURS}.output"),
)
# Positions within a level count the blocks and the parameterless upsamplings between them.
_FPN = (
    ("decode_head.conv_seg", "decoder.classifier"),
    *(
        (f"decode_head.scale_heads.{level}.{2 * block}.{foreign}", f"decoder.levels.{level}.{block}.{ours}")
        for level in range(4)
        for block in range(max(level, 1))
        for foreign, ours in (("conv", "conv"), ("bn", "norm"))
    ),
)


def _alignment(foreign: str, ours: str) -> tuple[tuple[str, str], ...]:
    return (
        (f"{foreign}.offset", f"{ours}.difference"),
        (f"{foreign}.dcpack_L2.conv_offset_mask", f"{ours}.places"),
        (f"{foreign}.dcpack_L2", f"{ours}.sampled"),
    )


# An alignment shares its norm with the following convolution, so the file has it under two keys. The reference loads
# both into the same tensor, in the order of its keys, so the other one counts.
_SHARED = (r"sem_seg_head\.pixel_decoder\.align_\d\.offset\.norm\..*", "the same norm as that of layer_1, 2 or 3")
_MSFAPN = (*head_prefixes("sem_seg_head"), *_alignment(f"{_PIXELS}.align_1", "pixel_decoder.alignment"))
_PYRAMID = tuple(
    row
    for step, level in enumerate((3, 2, 1))  # levels are numbered from fine to coarse
    for row in (
        (f"{_PIXELS}.adapter_{level}.norm", f"pixel_decoder.laterals.{step}.norm"),
        (f"{_PIXELS}.adapter_{level}", f"pixel_decoder.laterals.{step}.conv"),
        *_alignment(f"{_PIXELS}.align_{level}", f"pixel_decoder.alignments.{step}"),
        (f"{_PIXELS}.layer_{level}.norm", f"pixel_decoder.smooths.{step}.norm"),
        (f"{_PIXELS}.layer_{level}", f"pixel_decoder.smooths.{step}.conv"),
    )
)
_FAPN = (
    *_PYRAMID,
    (f"{_PIXELS}.layer_4.norm", "pixel_decoder.coarsest.norm"),
    (f"{_PIXELS}.layer_4", "pixel_decoder.coarsest.conv"),
    *(row for row in head_prefixes("sem_seg_head") if not re.search(r"\.(adapter|layer)_1", row[0])),
)

SEMASK = KeyMap(
    name="semask",
    signatures=("backbone.layers.0.semantic_layer.norm1.weight",),
    prefixes=(*SWIN, *_SEMANTIC_LAYERS, *_FPN, *_MSFAPN),
    split_qkv=head_qkv("sem_seg_head"),
    dropped=(*NOT_PARAMETERS, _SHARED),
)
SEMASK_FAPN = KeyMap(
    name="semask-fapn",
    signatures=(f"{_PIXELS}.align_3.offset.weight",),
    prefixes=(*SWIN, *_SEMANTIC_LAYERS, *_FAPN),
    split_qkv=head_qkv("sem_seg_head"),
    dropped=(*NOT_PARAMETERS, _SHARED),
)
