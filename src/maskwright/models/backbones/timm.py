"""Any network of timm as a backbone, through timm's own feature extraction."""

from __future__ import annotations

import difflib
from itertools import pairwise
from typing import Any, cast

import timm
import torch
from timm.layers import Conv2dSame, DropPath, freeze_batch_norm_2d
from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from maskwright.errors import RecipeError, one_line
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
        is_depthwise: whether there are depthwise convolutions.
    """

    def __init__(self, name: str, options: dict, norm: str) -> None:
        super().__init__()
        try:
            reductions = _feature_info(timm.create_model(name, features_only=True, **options)).reduction()
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            raise RecipeError(f"'{name}' has no feature levels: {one_line(error)}", where="model.backbone") from None
        indices = [max((i for i, r in enumerate(reductions) if r == stride), default=None) for stride in STRIDES]
        if len(set(reductions)) == 1:
            blocks = len(getattr(timm.create_model(name, **options), "blocks", reductions))
            raise RecipeError(
                f"all features of '{name}' have stride {reductions[0]}; its blocks are 0 to {blocks - 1}",
                where="model.backbone",
                remedy="use a hierarchical network, or a plain ViT such as vit_small_patch14_dinov2",
            )
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
        self.is_depthwise = _replace_depthwise(self.network)
        self.channels_last = getattr(self.network, "output_fmt", None) == "NHWC"
        self.channels = dict(zip(STRIDES, _feature_info(self.network).channels(), strict=True))

    def forward(self, images: Tensor) -> BackboneOutput:
        """See `BackboneOutput`."""
        is_cpu = images.device.type == "cpu" and not torch.compiler.is_exporting()  # see `Segmenter.normalize`
        if self.is_depthwise and is_cpu:  # training EfficientNet-Lite0 takes 12 % less time
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.network(images)
        if self.channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return BackboneOutput(dict(zip(STRIDES, features, strict=True)))

    def first_stages(self, count: int) -> list[nn.Module] | None:
        """See `Backbone`."""
        ends = getattr(self.network, "return_layers", None)
        children = list(self.network.named_children())
        if not ends and isinstance(blocks := getattr(self.network, "blocks", None), nn.Sequential):  # EfficientNets
            ends = _feature_info(self.network).module_name()
            children = [child for child in children if child[0] != "blocks"]
            children += [(f"blocks.{name}", block) for name, block in blocks.named_children()]
        if not ends:
            return None
        parts, level = [], 0
        for name, child in children:
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


class _DepthwiseConv(nn.Conv2d):
    """A depthwise convolution that is trained in float32 on a CPU, see `_is_slow`."""

    def forward(self, input: Tensor) -> Tensor:
        if not _is_slow(input):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


class _DepthwiseConvSame(Conv2dSame):
    """The same with TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        if not _is_slow(x):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


def _is_slow(x: Tensor) -> bool:
    """Return whether a depthwise convolution is trained under autocast on a CPU.

    There the backward pass is up to seven times as slow in bfloat16 as in float32. Gain of float32: a training step of
    EfficientNet-Lite0 takes 14 % less time (AMD EPYC with bfloat16 products, one thread).
    """
    return x.device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")


def _replace_depthwise(network: nn.Module) -> bool:
    """Replace the class of all depthwise convolutions; return whether there are any."""
    depthwise = [
        module
        for module in network.modules()
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
    ]
    for conv in depthwise:
        if type(conv) is Conv2dSame:
            conv.__class__ = _DepthwiseConvSame
        elif type(conv) is nn.Conv2d:
            conv.__class__ = _DepthwiseConv
    return bool(depthwise)


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
