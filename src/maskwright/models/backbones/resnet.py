"""ResNet (He et al., "Deep Residual Learning for Image Recognition"): stem, and four stages of residual blocks.

Names and shapes of weights, and the order in which random ones are drawn, are those of timm 1.0, which are
torchvision's. A stage begins with its stride in the 3x3 convolution. Unusual: a frozen batch norm is folded into the
convolution before it in prediction, and is one pass behind it in training; its weights stay as they are.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.errors import RecipeError
from maskwright.models.backbones.base import STRIDES, Backbone, BackboneOutput, DropPath, drop_path_rates
from maskwright.models.layers import scratch

_DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
_OPTIONS = {"layers", "drop_path_rate"}
_PLANES = (64, 128, 256, 512)
_CACHED = 2**18  # values of pixels that are worked on together


def is_resnet(name: str, options: dict[str, Any]) -> bool:
    """Whether `build_resnet` knows the name, whatever weights the part behind a dot names, and all options."""
    return name.partition(".")[0] in _DEPTHS and not options.keys() - _OPTIONS


def build_resnet(name: str, options: dict[str, Any], *, norm: str, channels: int) -> ResNetBackbone:
    """A ResNet with random weights.

    Args:
        name: see `is_resnet`.
        options: `layers`, the number of blocks of each stage, and `drop_path_rate`.
        norm: see `build_backbone`.
        channels: of the images.

    Raises:
        RecipeError: an option has a value that no ResNet has.
    """
    plain = name.partition(".")[0]
    layers = options.get("layers", _DEPTHS[plain])
    depths = list(layers) if isinstance(layers, list | tuple) else []
    if len(depths) != len(STRIDES) or not all(isinstance(depth, int) and depth > 0 for depth in depths):
        raise RecipeError(
            f"model.backbone_options {options} do not suit '{name}': layers must be four numbers of blocks, at least 1"
        )
    block = BasicBlock if plain in ("resnet18", "resnet34") else Bottleneck
    rates = drop_path_rates(options.get("drop_path_rate", 0.0), depths)
    network = ResNet(block, rates, FrozenBatchNorm if norm == "frozen" else nn.BatchNorm2d, channels)
    if norm == "statistics":
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
    return ResNetBackbone(network)


class ResNetBackbone(Backbone):
    """The features of a ResNet behind each of its stages."""

    def __init__(self, network: ResNet) -> None:
        super().__init__()
        self.network = network
        self.channels = dict(zip(STRIDES, network.widths, strict=True))

    def forward(self, images: Tensor) -> BackboneOutput:
        """See `BackboneOutput`."""
        return BackboneOutput(dict(zip(STRIDES, self.network(images), strict=True)))

    def first_stages(self, count: int) -> list[nn.Module]:
        """See `Backbone`."""
        network = self.network
        return [network.conv1, network.bn1, *network.stages[:count]]


class ResNet(nn.Module):
    """See the file's head.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        rates: of dropped paths in the blocks of each stage, which also says how many there are.
        norm: makes a norm for so many channels.
        channels: of the images.

    Attributes:
        widths: channels behind each stage.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        rates: list[list[float]],
        norm: type[nn.BatchNorm2d] | type[FrozenBatchNorm],
        channels: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, _PLANES[0], 7, 2, 3, bias=False)
        self.bn1 = norm(_PLANES[0])
        self.widths = [planes * block.expansion for planes in _PLANES]
        inputs, stages = _PLANES[0], []
        for stage, (planes, width) in enumerate(zip(_PLANES, self.widths, strict=True)):
            blocks = []
            for number, rate in enumerate(rates[stage]):
                stride, downsample = 2 if stage and not number else 1, None
                if stride != 1 or inputs != width:
                    downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), norm(width))
                blocks.append(block(inputs, planes, stride, downsample, norm, rate))
                inputs = width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(cast(Tensor, module.last_norm.weight))  # each block begins as the identity

    @property
    def stages(self) -> list[nn.Module]:
        """In order."""
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to the features (B, C, H/stride, W/stride) at strides 4, 8, 16 and 32."""
        x = _rectified(self.conv1, self.bn1, images)
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual."""

    expansion = 1

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int,
        downsample: nn.Sequential | None,
        norm: type[nn.BatchNorm2d] | type[FrozenBatchNorm],
        drop_path: float,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.drop_path = DropPath(drop_path)

    @property
    def last_norm(self) -> nn.Module:
        """The norm before the residual."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, planes, h/stride, w/stride)."""
        added = _rectified(self.conv1, self.bn1, x)
        added = self.drop_path(_normed(self.conv2, self.bn2, added))
        return _joined(x, added, self.downsample)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, and a residual."""

    expansion = 4

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int,
        downsample: nn.Sequential | None,
        norm: type[nn.BatchNorm2d] | type[FrozenBatchNorm],
        drop_path: float,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = norm(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = norm(planes * self.expansion)
        self.downsample = downsample
        self.drop_path = DropPath(drop_path)

    @property
    def last_norm(self) -> nn.Module:
        """The norm before the residual."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, 4 * planes, h/stride, w/stride)."""
        added = _rectified(self.conv1, self.bn1, x)
        added = _rectified(self.conv2, self.bn2, added)
        if _by_rows(self.bn3, added) and x.is_contiguous(memory_format=torch.channels_last):
            return _joined_by_rows(x, added, self)
        added = self.drop_path(_normed(self.conv3, self.bn3, added))
        return _joined(x, added, self.downsample)


class FrozenBatchNorm(nn.Module):
    """A batch norm whose statistics, scales and shifts are fixed: buffers with the names of `BatchNorm2d`."""

    eps = 1e-5

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))


class _Affine(torch.autograd.Function):
    """Scale and shift in the memory of what is scaled, which a convolution does not need again."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(scale)
        return torch.addcmul(shift, x, scale, out=x)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return gradients[0] * scale, None, None


def _normed(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """The convolution and the norm behind it."""
    if not isinstance(norm, FrozenBatchNorm):
        return norm(conv(x))
    scale, shift = _scale_and_shift(norm)
    if torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):  # so no scaled weights are kept
        return _Affine.apply(conv(x), scale[:, None, None], shift[:, None, None])
    return F.conv2d(x, conv.weight * scale[:, None, None, None], shift, conv.stride, conv.padding)


def _rectified(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """The convolution, the norm behind it and a ReLU."""
    if not _by_rows(norm, x):
        return F.relu_(_normed(conv, norm, x))
    if conv.kernel_size == (1, 1):
        return _products(conv, norm, x, rectified=True)
    x = conv(x).contiguous(memory_format=torch.channels_last)  # of one channel it cannot tell how its input lies
    scale, shift = _scale_and_shift(norm)
    for rows in _rows(x).split(_pixels_at_a_time(x.shape[1])):
        torch.addcmul(shift, rows, scale, out=rows).relu_()
    return x


def _joined(shortcut: Tensor, added: Tensor, downsample: nn.Sequential | None) -> Tensor:
    if downsample is not None:
        shortcut = _normed(cast(nn.Conv2d, downsample[0]), downsample[1], shortcut)
    return F.relu_(added.add_(shortcut))


def _by_rows(norm: nn.Module, x: Tensor) -> bool:
    """Whether convolutions of 1x1 are products of some rows of pixels at a time, and norm and ReLU follow in the cache.

    So it is in a prediction on a CPU, which takes longer for the memory of large maps than for their products.
    """
    return (
        x.device.type == "cpu"
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        and x.dtype == torch.float32
        and not norm.training
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _products(conv: nn.Conv2d, norm: nn.Module, x: Tensor, *, rectified: bool) -> Tensor:
    """A convolution of 1x1, the norm, and a ReLU if wanted, by rows."""
    if conv.stride != (1, 1):
        x = x[:, :, :: conv.stride[0], :: conv.stride[1]].contiguous(memory_format=torch.channels_last)
    size = len(x), len(conv.weight), *x.shape[2:]
    made = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
    weight, (scale, shift) = conv.weight.flatten(1).t(), _scale_and_shift(norm)
    count = _pixels_at_a_time(size[1])
    for rows, out in zip(_rows(x).split(count), _rows(made).split(count), strict=True):
        torch.mm(rows, weight, out=out)
        torch.addcmul(shift, out, scale, out=out)
        if rectified:
            out.relu_()
    return made


def _joined_by_rows(x: Tensor, added: Tensor, block: Bottleneck) -> Tensor:
    """What a block ends with; without a downsampling it is written over `x`, which nothing else needs any more."""
    shortcut = x
    if block.downsample is not None:
        shortcut = _products(cast(nn.Conv2d, block.downsample[0]), block.downsample[1], x, rectified=False)
    weight, (scale, shift) = block.conv3.weight.flatten(1).t(), _scale_and_shift(block.bn3)
    count = _pixels_at_a_time(shortcut.shape[1])
    memory = scratch("products", (count, shortcut.shape[1]), shortcut)
    for rows, out in zip(_rows(added).split(count), _rows(shortcut).split(count), strict=True):
        made = torch.mm(rows, weight, out=memory[: len(rows)])
        out.add_(torch.addcmul(shift, made, scale, out=made)).relu_()
    return shortcut


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(C,) each: what a batch norm with fixed statistics does."""
    norm = cast(FrozenBatchNorm, norm)  # or a BatchNorm2d, whose tensors have the same names
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _rows(x: Tensor) -> Tensor:
    """(B * h * w, C), a view of (B, C, h, w) with the channels last in memory."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def _pixels_at_a_time(width: int) -> int:
    return max(1, _CACHED // width)
