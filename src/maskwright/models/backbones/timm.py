"""Any network of timm as a backbone, through timm's own feature extraction."""

from __future__ import annotations

import difflib
from itertools import pairwise
from typing import Any, cast

import timm
from timm.layers import DropPath, freeze_batch_norm_2d
from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from maskwright.errors import RecipeError
from maskwright.models.backbones.base import STRIDES, Backbone, BackboneOutput, freeze_scales


def build_timm_backbone(name: str, arguments: dict[str, Any], *, norm: str) -> TimmBackbone:
    """Build a network of timm with random weights, and stochastic depth only if `arguments` set it.

    Args:
        name: of the model; a part after a dot names weights and is ignored.
        arguments: of the timm model.
        norm: see `build_backbone`.

    Raises:
        RecipeError: timm does not know the name or an argument, or the network lacks one of the strides.
    """
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), 3, 0.3)
        raise RecipeError(f"timm has no model '{name}'; nearest: {', '.join(nearest)}", where="model.backbone")
    backbone = TimmBackbone(name, arguments, norm)
    if "drop_path_rate" not in arguments:  # some networks of timm have a rate by default
        for module in backbone.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
    return backbone


class TimmBackbone(Backbone):
    """A network of timm.

    Attributes:
        indices: timm's indices of the feature levels at strides 4, 8, 16 and 32.
        channels_last: whether timm's features are (B, h, w, C).
    """

    def __init__(self, name: str, options: dict, norm: str) -> None:
        super().__init__()
        try:
            reductions = _feature_info(timm.create_model(name, features_only=True, **options)).reduction()
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            raise RecipeError(f"'{name}' has no feature levels: {_one_line(error)}", where="model.backbone") from None
        indices = [max((i for i, r in enumerate(reductions) if r == stride), default=None) for stride in STRIDES]
        if None in indices:
            raise RecipeError(
                f"'{name}' has features at strides {reductions}, expected {list(STRIDES)}", where="model.backbone"
            )
        self.indices = tuple(index for index in indices if index is not None)
        self.network = timm.create_model(name, features_only=True, out_indices=self.indices, **options)
        if norm == "frozen":
            self.network = freeze_batch_norm_2d(self.network)
            _fold_frozen_norms(self.network)
        if norm == "statistics":
            freeze_scales(self.network)
        self.channels_last = getattr(self.network, "output_fmt", None) == "NHWC"
        self.channels = dict(zip(STRIDES, _feature_info(self.network).channels(), strict=True))

    def forward(self, images: Tensor) -> BackboneOutput:
        """See `BackboneOutput`."""
        features = self.network(images)
        if self.channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return BackboneOutput(dict(zip(STRIDES, features, strict=True)))

    def first_stages(self, count: int) -> list[nn.Module] | None:
        """See `Backbone`."""
        ends = getattr(self.network, "return_layers", None)
        if not ends:
            return None
        parts, level = [], 0
        for name, child in self.network.named_children():
            if level < count:
                parts.append(child)
            level += name in ends
        return parts


class _FoldedConv(nn.Conv2d):
    """A convolution that includes the frozen batch norm after it, which saves its passes over the output."""

    norm: FrozenBatchNorm2d  # not registered as a submodule, so that its buffers keep their names

    def forward(self, input: Tensor) -> Tensor:
        weight, bias, mean, variance = self.norm.buffers()
        scale = weight * (variance + self.norm.eps).rsqrt()
        return self._conv_forward(input, self.weight * scale[:, None, None, None], bias - mean * scale)


class _FoldedNorm(FrozenBatchNorm2d):
    """Holds the buffers of a frozen batch norm that a `_FoldedConv` applies."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _fold_frozen_norms(network: nn.Module) -> None:
    """Fold each frozen norm into the convolution before it, if names or a Sequential identify that convolution."""
    for parent in network.modules():
        children = dict(parent.named_children())
        if isinstance(parent, nn.Sequential):
            pairs = list(pairwise(children.values()))
        else:
            pairs = [(children.get(name.replace("bn", "conv")), child) for name, child in children.items()]
        for conv, norm in pairs:
            if type(conv) is nn.Conv2d and type(norm) is FrozenBatchNorm2d and conv.bias is None:
                conv.__class__, norm.__class__ = _FoldedConv, _FoldedNorm
                object.__setattr__(conv, "norm", norm)


def _feature_info(network: nn.Module) -> FeatureInfo:
    return cast(FeatureInfo, network.feature_info)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
