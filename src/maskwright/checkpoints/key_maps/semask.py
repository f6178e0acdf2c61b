"""Names of SeMask (Picsart-AI-Research/SeMask-Segmentation): its FPN models on mmsegmentation, others on detectron2.

All have the same backbone. The FaPN decoder has a table of its own, as it gives names of the others another meaning.
"""

from __future__ import annotations

import re

from maskwright.checkpoints.key_maps.detectron2 import SWIN, head_names, head_packed
from maskwright.checkpoints.key_maps.key_map import NOT_PARAMETERS, Layout

_SEMANTIC, _OURS = "backbone.layers.{i}.semantic_layer", "backbone.semantic_layers.{i}"
_ATTENTION = f"{_SEMANTIC}.class_injection.0"  # one per layer, whatever the configuration calls for
_PIXELS = "sem_seg_head.pixel_decoder"

_SEMANTIC_LAYERS = (
    (f"{_SEMANTIC}.norm1", f"{_OURS}.norm"),
    (f"{_ATTENTION}.gamma", f"{_OURS}.gamma"),
    (f"{_ATTENTION}.mlp_cls_q", f"{_OURS}.query"),
    (f"{_ATTENTION}.mlp_cls_k", f"{_OURS}.key"),
    (f"{_ATTENTION}.mlp_v", f"{_OURS}.value"),
    (f"{_ATTENTION}.mlp_res", f"{_OURS}.output"),
)
# The position in a level counts blocks and the parameterless doublings between them.
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


# The norm of an alignment is that of the convolution behind it, under a second name. The reference reads both into the
# one tensor, in the order of its names, so the other name counts.
_SHARED = (r"sem_seg_head\.pixel_decoder\.align_\d\.offset\.norm\..*", "one norm with that of layer_1, 2 or 3")
_MSFAPN = (*head_names("sem_seg_head"), *_alignment(f"{_PIXELS}.align_1", "pixel_decoder.alignment"))
_PYRAMID = tuple(
    row
    for step, level in enumerate((3, 2, 1))  # they count from fine to coarse
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
    *(row for row in head_names("sem_seg_head") if not re.search(r"\.(adapter|layer)_1", row[0])),
)

SEMASK = Layout(
    name="semask",
    marks=("backbone.layers.0.semantic_layer.norm1.weight",),
    names=(*SWIN, *_SEMANTIC_LAYERS, *_FPN, *_MSFAPN),
    packed=head_packed("sem_seg_head"),
    dropped=(*NOT_PARAMETERS, _SHARED),
)
SEMASK_FAPN = Layout(
    name="semask-fapn",
    marks=(f"{_PIXELS}.align_3.offset.weight",),
    names=(*SWIN, *_SEMANTIC_LAYERS, *_FAPN),
    packed=head_packed("sem_seg_head"),
    dropped=(*NOT_PARAMETERS, _SHARED),
)
