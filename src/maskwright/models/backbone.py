"""Backbones: any timm network as features in NCHW at strides 4, 8, 16 and 32.

Swin gets one output norm per level, as the original has. Its blocks are timm's weights in the original's order of
steps: the map is padded to whole windows and then shifted (timm shifts first, which differs wherever the size is not a
multiple of the window), and odd blocks always shift, also where the map fits one window.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, freeze_batch_norm_2d
from timm.models import FeatureInfo
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from maskwright.errors import RecipeError

STRIDES = (4, 8, 16, 32)


class BackboneOutput(NamedTuple):
    """What a backbone gives for images (B, 3, H, W).

    Attributes:
        features: {stride: (B, C_stride, H/stride, W/stride)}.
        semantic_maps: class logits of each stage, (B, K, H/stride, W/stride), where it has semantic layers.
    """

    features: dict[int, Tensor]
    semantic_maps: tuple[Tensor, ...] = ()


class Backbone(nn.Module):
    """A network whose forward maps (B, 3, H, W) to `BackboneOutput`.

    Attributes:
        channels: {stride: C_stride}.
        size_divisor: H and W must be multiples of it.
    """

    channels: dict[int, int]
    size_divisor = 32


def build_backbone(
    name: str, *, options: dict, norm: str, window: int | None, drop_path: float, channels: int = 3
) -> Backbone:
    """A backbone with random weights.

    Args:
        name: a timm model name.
        options: further arguments of the timm model.
        norm: "frozen" fixes batch norms (statistics and scales); "batch" and "sync" train them; "statistics" fixes
            their scales, and statistics are those of the batch.
        window: Swin window in cells; None takes the named model's.
        drop_path: stochastic depth rate.
        channels: of the images.

    Raises:
        RecipeError: timm does not know the name, or the network lacks one of the strides.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3, 0.3)
        raise RecipeError(f"model.backbone: timm has no model '{name}'; nearest: {', '.join(near)}")
    arguments = dict(options)
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    if channels != 3:
        arguments["in_chans"] = channels
    if name.startswith("swin_"):
        arguments.setdefault("drop_path_rate", 0.0)  # timm's own default is 0.1
        if window:
            arguments["window_size"] = window
        try:
            network = timm.create_model(name, num_classes=0, strict_img_size=False, always_partition=True, **arguments)
            return SwinBackbone(cast(SwinTransformer, network))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise RecipeError(f"model.backbone_options {arguments} do not suit '{name}': {_one_line(error)}") from None
    if window:
        raise RecipeError(f"model.window is for Swin backbones; '{name}' has no windows")
    return _with_told_depth(ConvBackbone(name, arguments, norm), arguments)


def _with_told_depth(backbone: Backbone, arguments: dict) -> Backbone:
    """The backbone with stochastic depth only where it was asked for; timm gives some networks a rate by itself."""
    if "drop_path_rate" not in arguments:
        for module in backbone.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
    return backbone


class ConvBackbone(Backbone):
    """A timm network through timm's own feature extraction.

    Attributes:
        indices: of the feature levels at strides 4, 8, 16 and 32, as timm counts them.
        channels_last: whether timm's features are (B, h, w, C).
    """

    def __init__(self, name: str, options: dict, norm: str) -> None:
        super().__init__()
        try:
            reductions = _feature_info(timm.create_model(name, features_only=True, **options)).reduction()
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            raise RecipeError(f"model.backbone: '{name}' gives no feature levels: {_one_line(error)}") from None
        indices = [max((i for i, r in enumerate(reductions) if r == stride), default=None) for stride in STRIDES]
        if None in indices:
            raise RecipeError(
                f"model.backbone: '{name}' has features at strides {reductions}, needed are {list(STRIDES)}"
            )
        self.indices = tuple(index for index in indices if index is not None)
        self.network = timm.create_model(name, features_only=True, out_indices=self.indices, **options)
        if norm == "frozen":
            self.network = freeze_batch_norm_2d(self.network)
            _fold_frozen_norms(self.network)
        if norm == "statistics":
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)
        self.channels_last = getattr(self.network, "output_fmt", None) == "NHWC"
        self.channels = dict(zip(STRIDES, _feature_info(self.network).channels(), strict=True))

    def forward(self, images: Tensor) -> BackboneOutput:
        """See `BackboneOutput`."""
        features = self.network(images)
        if self.channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        return BackboneOutput(dict(zip(STRIDES, features, strict=True)))


class _FoldedConv(nn.Conv2d):
    """A convolution that also does what the frozen batch norm behind it did: one product instead of three passes."""

    norm: FrozenBatchNorm2d  # held, not registered: its buffers keep their names

    def forward(self, input: Tensor) -> Tensor:
        weight, bias, mean, variance = self.norm.buffers()
        scale = weight * (variance + self.norm.eps).rsqrt()
        return self._conv_forward(input, self.weight * scale[:, None, None, None], bias - mean * scale)


class _FoldedNorm(FrozenBatchNorm2d):
    """The buffers of a frozen batch norm whose work a `_FoldedConv` does."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _fold_frozen_norms(network: nn.Module) -> None:
    """Fold each frozen norm into the convolution before it, where names or a Sequential say which one that is."""
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


class SwinBackbone(Backbone):
    """The stages of a timm Swin (Liu et al.), with a layer norm on each output. Images may have any size.

    Attributes:
        window: side of the windows of its attention, in cells.
    """

    size_divisor = 1

    def __init__(self, network: SwinTransformer) -> None:
        super().__init__()
        self.patch_embed = network.patch_embed
        self.stages = network.layers
        for block in network.modules():
            if isinstance(block, SwinTransformerBlock):
                block.__class__ = _SwinBlock
        widths = [info["num_chs"] for info in network.feature_info]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.channels = dict(zip(STRIDES, widths, strict=True))
        self.window = cast(SwinTransformerBlock, cast(SwinTransformerStage, self.stages[0]).blocks[0]).window_size[0]

    def forward(self, images: Tensor) -> BackboneOutput:
        """See `BackboneOutput`; sides that are no multiple of a stride are rounded up."""
        x = embed_patches(self.patch_embed, images)
        features = {}
        for stride, stage, norm in zip(STRIDES, self.stages, self.norms, strict=True):
            x = run_stage(cast(SwinTransformerStage, stage), x)
            features[stride] = norm(x).permute(0, 3, 1, 2)
        return BackboneOutput(features)


def embed_patches(embed: nn.Module, images: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, h, w, C), after padding to whole patches of 4x4 with zeros right and bottom."""
    height, width = images.shape[-2:]
    return embed(F.pad(images, (0, -width % STRIDES[0], 0, -height % STRIDES[0])))


def run_stage(stage: SwinTransformerStage, x: Tensor) -> Tensor:
    """One Swin stage on (B, h, w, C): merging of patches, except in the first, and all blocks."""
    x = stage.downsample(x)
    for block in stage.blocks:
        x = block(x)
    return x


def _feature_info(network: nn.Module) -> FeatureInfo:
    return cast(FeatureInfo, network.feature_info)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _SwinBlock(SwinTransformerBlock):
    """A block of timm in the original's order of steps."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(_attend_in_windows(self, self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def _attend_in_windows(block: SwinTransformerBlock, x: Tensor) -> Tensor:
    """Window attention on (B, h, w, C): pad right and bottom with zeros, shift, attend, and back."""
    _, h, w, _ = x.shape
    (rows, columns), (shift, _) = block.window_size, block.target_shift_size
    x = F.pad(x, (0, 0, 0, -w % columns, 0, -h % rows))
    padded = (x.shape[1], x.shape[2])
    if shift:
        x = x.roll((-shift, -shift), (1, 2))
    windows = window_partition(x, (rows, columns)).flatten(1, 2)  # (B * windows, cells, C)
    mask = _shift_mask(padded, rows, shift, x.device).to(x.dtype) if shift else None
    windows = block.attn(windows, mask=mask).unflatten(1, (rows, columns))
    x = window_reverse(windows, (rows, columns), *padded)
    if shift:
        x = x.roll((shift, shift), (1, 2))
    return x[:, :h, :w]


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _shift_mask(size: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """(windows, cells, cells): -100 between cells that only the shift made neighbours, else 0."""

    def region(count: int) -> Tensor:
        place = torch.arange(count, device=device)
        return (place >= count - window).int() + (place >= count - shift).int()

    regions = region(size[0])[:, None] * 3 + region(size[1])  # (H, W)
    windows = window_partition(regions[None, :, :, None], (window, window)).flatten(1)  # (windows, cells)
    return torch.where(windows[:, None] == windows[:, :, None], 0.0, -100.0)
