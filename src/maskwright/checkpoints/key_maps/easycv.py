"""Key map of EasyCV and of ModelScope's models: torchvision's backbone and the original's decoders."""

from __future__ import annotations

from maskwright.checkpoints.key_maps.detectron2 import head_prefixes, head_qkv
from maskwright.checkpoints.key_maps.key_map import NOT_PARAMETERS, KeyMap, torchvision_resnet

EASYCV = KeyMap(
    name="easycv",
    signatures=("head.predictor.query_embed.weight",),
    prefixes=(*torchvision_resnet("backbone"), *head_prefixes("head")),
    split_qkv=head_qkv("head"),
    dropped=(
        *NOT_PARAMETERS,
        (r"backbone\..*\.num_batches_tracked", "a step counter of norms that are frozen there"),
    ),
)
