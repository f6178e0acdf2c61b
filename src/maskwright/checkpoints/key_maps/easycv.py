"""Names of EasyCV, and of the ModelScope models made with it: torchvision's backbone, the original's decoders."""

from __future__ import annotations

from maskwright.checkpoints.key_maps.detectron2 import head_names, head_packed
from maskwright.checkpoints.key_maps.key_map import NOT_PARAMETERS, Layout, torchvision_resnet

EASYCV = Layout(
    name="easycv",
    marks=("head.predictor.query_embed.weight",),
    names=(*torchvision_resnet("backbone"), *head_names("head")),
    packed=head_packed("head"),
    dropped=(
        *NOT_PARAMETERS,
        (r"backbone\..*\.num_batches_tracked", "counts training steps, though the backbone's norms are frozen there"),
    ),
)
