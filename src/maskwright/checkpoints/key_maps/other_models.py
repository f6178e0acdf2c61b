"""Weights of other models, so that a refusal can say whose they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice

_MOST_READ = 2000  # keys

# (pattern of a key, whatever wrapper's name stands before it, what the weights are), the most telling first.
_MODELS = (
    (r"sem_seg_head\.predictor\.transformer\.decoder\..*", "MaskFormer"),
    (r"model\.transformer_module\.decoder\.layers\..*\.encoder_attn\..*", "MaskFormer"),
    (r"text_encoder\..*|text_projector\..*|task_mlp\..*", "OneFormer"),
    (r"decoder\.layers\.\d+\.(cross|encoder)_attn\.sampling_offsets\.weight", "Deformable DETR"),
    (r"decoder\.layers\.\d+\.(multihead_attn\.in_proj_weight|encoder_attn\.q_proj\.weight)", "DETR"),
    (r"roi_heads?\..*|rpn_head\..*|rpn\.head\..*|proposal_generator\..*", "Mask R-CNN or another model with regions"),
    (r"mask_decoder\.transformer\..*|image_encoder\.blocks\..*", "Segment Anything"),
    (r"bbox_head\..*", "a detector of OpenMMLab"),
    (r"classifier\.\d+\.weight|aux_classifier\..*", "a segmenter of torchvision"),
)
_BACKBONES = (
    (r"layer4\.\d+\.conv1\.weight|res5\.\d+\.conv1\.weight|encoder\.stages\.3\.layers\.\d+\.layer\..*", "ResNet"),
    (r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table", "Swin"),
    (
        r"blocks\.\d+\.attn\.qkv\.weight|encoder\.layer\.\d+\.attention\.attention\.query\.weight",
        "a vision transformer",
    ),
    (r"stages\.\d+\.blocks\.\d+\.conv_dw\.weight", "ConvNeXt"),
)


def other_model(keys: Iterable[str]) -> str | None:
    """The name of another model whose weights are called so, if that is known."""
    return _first_match(_MODELS, keys)


def lone_backbone(keys: Iterable[str]) -> str | None:
    """The name of a network that classifies pictures, whose weights are called so, if that is known."""
    return _first_match(_BACKBONES, keys)


def _first_match(table: tuple[tuple[str, str], ...], keys: Iterable[str]) -> str | None:
    some = list(islice(keys, _MOST_READ))
    for pattern, what in table:
        if any(re.match(rf"(\w+\.)*?({pattern})$", key[:200]) for key in some):
            return what
    return None
