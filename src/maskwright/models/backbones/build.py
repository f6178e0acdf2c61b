"""`build_backbone`: our own ResNets and Swins, and all other networks of timm.

timm is imported only when needed: together with torchvision it takes longer to import than a model to load.
"""

from __future__ import annotations

from typing import Literal

from maskwright.errors import RecipeError
from maskwright.models.backbones.base import Backbone
from maskwright.models.backbones.resnet import build_resnet, is_resnet
from maskwright.models.backbones.swin import build_swin, is_swin


def build_backbone(
    name: str,
    *,
    options: dict,
    norm: str,
    window: int | None,
    drop_path: float,
    channels: int = 3,
    vit_pyramid: Literal["simple", "adapter"] = "simple",
) -> Backbone:
    """Build a backbone with random weights.

    Args:
        name: a timm model name; a part after a dot names weights and is ignored.
        options: further arguments of the timm model.
        norm: "frozen" fixes batch norms; "batch" and "sync" train them; "statistics" fixes their scales and shifts but
            uses and tracks the statistics of the batches.
        window: Swin window in cells; None takes the named model's.
        drop_path: stochastic depth rate.
        channels: of the images.
        vit_pyramid: for a plain ViT, a simple feature pyramid or a ViT-Adapter.

    Raises:
        RecipeError: the name or an option is unknown, or the network lacks one of the strides.
    """
    arguments = dict(options)
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    if vit_pyramid == "adapter":
        _require_plain_vit(name)
    if is_swin(name):
        if window:
            arguments["window_size"] = window
        return build_swin(name, arguments, channels=channels)
    if is_resnet(name, arguments) and not window:
        return build_resnet(name, arguments, norm=norm, channels=channels)
    from maskwright.models.backbones.timm import build_timm_backbone  # imports timm, see above
    from maskwright.models.backbones.vit import build_vit, is_plain_vit

    if channels != 3:
        arguments["in_chans"] = channels
    if is_plain_vit(name):
        backbone = build_vit(name, arguments, pyramid=vit_pyramid)
    else:
        backbone = build_timm_backbone(name, arguments, norm=norm)
    if window:
        raise RecipeError(f"'{name}' has no windows; only Swin backbones have", where="model.window_size")
    return backbone


def _require_plain_vit(name: str) -> None:
    from maskwright.models.backbones.vit import is_plain_vit  # imports timm

    if not is_plain_vit(name):
        raise RecipeError(
            f"adapter is for plain ViTs, and '{name}' is not one",
            where="model.vit_pyramid",
            remedy="leave it out, or use a backbone such as vit_small_patch14_dinov2",
        )
