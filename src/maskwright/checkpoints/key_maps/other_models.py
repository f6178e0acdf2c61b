"""Recognize the weights of models that are not supported, so that an error can name them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice

_MAX_KEYS = 2000

# (pattern of a key, after the prefix of any wrapper; name of the model). The first match counts.
_MODELS = (
    (r"sem_seg_head\.predictor\.transformer\.decoder\..*", "MaskFormer"),
    (r"model\.transformer_module\.decoder\.layers\..*\.encoder_attn\..*", "MaskFormer"),
    (r"text_encoder\..*|text_projector\..*|task_mlp\..*", "OneFormer"),
    (r"decoder\.layers\.\d+\.(cross|encoder)_attn\.sampling_offsets\.weight", "Deformable DETR"),
    (r"decoder\.layers\.\d+\.(multihead_attn\.in_proj_weight|encoder_attn\.q_proj\.weight)", "DETR"),
    (r"roi_heads?\..*|rpn_head\..*|rpn\.head\..*|proposal_generator\..*", "Mask R-CNN or another region-based model"),
    (r"mask_decoder\.transformer\..*|image_encoder\.blocks\..*", "Segment Anything"),
    (r"bbox_head\..*", "an OpenMMLab detector"),
    (r"classifier\.\d+\.weight|aux_classifier\..*", "a torchvision segmentation model"),
)
_BACKBONES = (
    (r"layer4\.\d+\.conv1\.weight|res5\.\d+\.conv1\.weight|encoder\.stages\.3\.layers\.\d+\.layer\..*", "a ResNet"),
    (r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table", "a Swin"),
    (
        r"blocks\.\d+\.attn\.qkv\.weight|encoder\.layer\.\d+\.attention\.attention\.query\.weight",
        "a vision transformer",
    ),
    (r"stages\.\d+\.blocks\.\d+\.conv_dw\.weight", "a ConvNeXt"),
)


def identify_model(keys: Iterable[str]) -> str | None:
    """Return the name of the other model that weights with these keys belong to, if it is known."""
    return _first_match(_MODELS, keys)


def identify_backbone(keys: Iterable[str]) -> str | None:
    """Return the name of the image classifier that weights with these keys belong to, if it is known."""
    return _first_match(_BACKBONES, keys)


def _first_match(table: tuple[tuple[str, str], ...], keys: Iterable[str]) -> str | None:
    first_keys = list(islice(keys, _MAX_KEYS))
    for pattern, name in table:
        if any(re.match(rf"(\w+\.)*?({pattern})$", key[:200]) for key in first_keys):
            return name
    return None
