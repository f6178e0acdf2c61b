"""ResNet (He et al., "Deep Residual Learning for Image Recognition"): stem, and four stages of residual blocks.

Names and shapes of weights, and the order in which random ones are drawn, are those of timm 1.0, which are
torchvision's. The stride of a stage is in its first 3x3 convolution. Predictions on a CPU take the path of
`resnet_cpu.py`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.errors import RecipeError
from maskwright.models.backbones.base import (
    STRIDES,
    Backbone,
    BackboneOutput,
    DropPath,
    FrozenBatchNorm,
    drop_path_rates,
    freeze_scales,
    scale_and_shift,
)
from maskwright.models.backbones.resnet_cpu import conv_norm_relu_cpu, finish_bottleneck_cpu, suits_resnet_cpu

_DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
_OPTIONS = {"layers", "drop_path_rate"}
_PLANES = (64, 128, 256, 512)

Norm = type[nn.BatchNorm2d] | type[FrozenBatchNorm]


def is_resnet(name: str, options: dict[str, Any]) -> bool:
    """Return whether `build_resnet` knows the model and all options; a suffix (name of weights) is ignored."""
    return name.partition(".")[0] in _DEPTHS and not options.keys() - _OPTIONS


def build_resnet(name: str, options: dict[str, Any], *, norm: str, channels: int) -> ResNetBackbone:
    """Build a ResNet with random weights.

    Args:
        name: see `is_resnet`.
        options: `layers`, the number of blocks of each stage, and `drop_path_rate`.
        norm: see `build_backbone`.
        channels: of the images.

    Raises:
        RecipeError: an option has an impossible value.
    """
    model = name.partition(".")[0]
    layers = options.get("layers", _DEPTHS[model])
    depths = list(layers) if isinstance(layers, list | tuple) else []
    if len(depths) != len(STRIDES) or not all(isinstance(depth, int) and depth > 0 for depth in depths):
        raise RecipeError(
            f"{options} do not suit '{name}': layers must be four numbers of blocks, each at least 1",
            where="model.backbone_options",
        )
    block = BasicBlock if model in ("resnet18", "resnet34") else Bottleneck
    rates = drop_path_rates(options.get("drop_path_rate", 0.0), depths)
    network = ResNet(
        block=block, rates=rates, norm=FrozenBatchNorm if norm == "frozen" else nn.BatchNorm2d, channels=channels
    )
    if norm == "statistics":
        freeze_scales(network)
    return ResNetBackbone(network)


class ResNetBackbone(Backbone):
    """The outputs of the four stages of a ResNet."""

    def __init__(self, network: ResNet) -> None:
        super().__init__()
        self.network = network
        self.channels = dict(zip(STRIDES, network.stage_channels, strict=True))

    def forward(self, images: Tensor) -> BackboneOutput:
        """See `BackboneOutput`."""
        return BackboneOutput(dict(zip(STRIDES, self.network(images), strict=True)))

    def first_stages(self, count: int) -> list[nn.Module]:
        """See `Backbone`."""
        network = self.network
        return [network.conv1, network.bn1, *network.stages[:count]]


class ResNet(nn.Module):
    """Stem and stages, without the classifier.

    Args:
        block: type of the residual blocks.
        rates: drop path rates of the blocks of each stage, one per block.
        norm: type of the norms.
        channels: of the images.

    Attributes:
        stage_channels: channels after each stage.
    """

    def __init__(
        self, *, block: type[BasicBlock] | type[Bottleneck], rates: list[list[float]], norm: Norm, channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, _PLANES[0], 7, 2, 3, bias=False)
        self.bn1 = norm(_PLANES[0])
        self.stage_channels = [planes * block.expansion for planes in _PLANES]
        inputs, stages = _PLANES[0], []
        for stage, (planes, outputs) in enumerate(zip(_PLANES, self.stage_channels, strict=True)):
            blocks = []
            for index, rate in enumerate(rates[stage]):
                stride, downsample = 2 if stage and not index else 1, None
                if stride != 1 or inputs != outputs:
                    downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
                blocks.append(block(inputs, planes, stride=stride, downsample=downsample, norm=norm, drop_path=rate))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_(cast(Tensor, module.last_norm.weight))  # each block starts as the identity

    @property
    def stages(self) -> list[nn.Module]:
        """The stages in order."""
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to the features (B, C, H/stride, W/stride) at strides 4, 8, 16 and 32."""
        x = conv_norm_relu(self.conv1, self.bn1, images)
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(
        self, inputs: int, planes: int, *, stride: int, downsample: nn.Sequential | None, norm: Norm, drop_path: float
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
        """The norm before the residual sum."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, planes, h/stride, w/stride)."""
        branch = conv_norm_relu(self.conv1, self.bn1, x)
        branch = self.drop_path(conv_norm(self.conv2, self.bn2, branch))
        return F.relu_(branch.add_(_shortcut(self.downsample, x)))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 convolutions, and a shortcut."""

    expansion = 4

    def __init__(
        self, inputs: int, planes: int, *, stride: int, downsample: nn.Sequential | None, norm: Norm, drop_path: float
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
        """The norm before the residual sum."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, 4 * planes, h/stride, w/stride)."""
        branch = conv_norm_relu(self.conv1, self.bn1, x)
        branch = conv_norm_relu(self.conv2, self.bn2, branch)
        if suits_resnet_cpu(self.bn3, branch) and x.is_contiguous(memory_format=torch.channels_last):
            return finish_bottleneck_cpu(self.conv3, self.bn3, self.downsample, x, branch)
        branch = self.drop_path(conv_norm(self.conv3, self.bn3, branch))
        return F.relu_(branch.add_(_shortcut(self.downsample, x)))


def _shortcut(downsample: nn.Sequential | None, x: Tensor) -> Tensor:
    return x if downsample is None else conv_norm(cast(nn.Conv2d, downsample[0]), downsample[1], x)


def conv_norm_relu(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution, its norm and ReLU."""
    if suits_resnet_cpu(norm, x):
        return conv_norm_relu_cpu(conv, norm, x)
    return F.relu_(conv_norm(conv, norm, x))


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution and its norm; a frozen norm is folded into the convolution in prediction and under autocast.

    In float32 training it is not, because the scaled weights would be kept for the backward pass.
    """
    is_float32_training = torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
    if is_float32_training or not isinstance(norm, FrozenBatchNorm):
        return norm(conv(x))
    scale, shift = scale_and_shift(norm)
    return F.conv2d(x, conv.weight * scale[:, None, None, None], shift, conv.stride, conv.padding)
