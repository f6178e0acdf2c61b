"""The interface of all backbones, and the parts that several of them share."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)


class BackboneOutput(NamedTuple):
    """The features of images (B, 3, H, W).

    Attributes:
        features: {stride: (B, C_stride, H/stride, W/stride)}.
        semantic_maps: class logits of each stage, (B, K, H/stride, W/stride); empty without semantic layers.
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

    def first_stages(self, count: int) -> list[nn.Module] | None:
        """Return all modules up to feature level `count` (1..4); None if the network is not divided into stages."""
        raise NotImplementedError


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, skip the residual branch of a block for some images.

    Args:
        rate: probability; branches that are kept are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_prob = rate

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) to the same shape."""
        if not self.training or self.drop_prob == 0:
            return x
        keep_prob = 1 - self.drop_prob
        scales = x.new_empty(len(x)).bernoulli_(keep_prob)
        if keep_prob > 0:
            scales.div_(keep_prob)
        return x * scales.view(-1, *[1] * (x.ndim - 1))


def drop_path_rates(rate: float, depths: list[int]) -> list[list[float]]:
    """Return the rate of each block of each stage, growing linearly from 0 in the first block to `rate` in the last."""
    count = sum(depths)
    rates = iter([rate * block / max(1, count - 1) for block in range(count)])
    return [[next(rates) for _ in range(depth)] for depth in depths]


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics, scale and shift: buffers with the names of `BatchNorm2d`."""

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

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        scale, shift = scale_and_shift(self)
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the scale and shift of a batch norm with fixed statistics, (C,) each."""
    norm = cast(FrozenBatchNorm, norm)  # or a BatchNorm2d, whose tensors have the same names
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def freeze_scales(network: nn.Module) -> None:
    """Exclude the scales and shifts of all batch norms from training; their statistics still follow the batches."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


def scale_maps(maps: Tensor, factor: float, size: tuple[int, int]) -> Tensor:
    """Scale (B, C, h, w) bilinearly by a factor, to at least `size`; cells beyond the input repeat its edge."""
    down, right = (
        max(0, math.ceil(side / factor) + 1 - found) for side, found in zip(size, maps.shape[-2:], strict=True)
    )
    return F.interpolate(F.pad(maps, (0, right, 0, down), mode="replicate"), scale_factor=factor, mode="bilinear")
