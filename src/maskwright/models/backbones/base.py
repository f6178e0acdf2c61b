"""What a backbone is, whatever its network: pictures in, features in NCHW at strides 4, 8, 16 and 32 out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

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

    def first_stages(self, count: int) -> list[nn.Module] | None:
        """All parts up to the `count`-th feature level, 1..4; None where the network does not tell its stages apart."""
        raise NotImplementedError


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, what a block adds is left out for some images.

    Args:
        rate: how often; what is kept is scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_prob = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same shape."""
        return x * self.scales(x, len(x)).view(-1, *[1] * (x.ndim - 1)) if self.is_active else x

    @property
    def is_active(self) -> bool:
        """Whether anything is left out now."""
        return self.training and self.drop_prob > 0

    def scales(self, like: Tensor, images: int) -> Tensor:
        """(images,) of the type and on the device of `like`: by what is multiplied that which is added to each."""
        kept = 1 - self.drop_prob
        scales = like.new_empty(images).bernoulli_(kept)
        return scales.div_(kept) if kept > 0 else scales


def drop_path_rates(rate: float, depths: list[int]) -> list[list[float]]:
    """The rate of each block of each stage: they grow evenly from 0 in the first block to `rate` in the last."""
    count = sum(depths)
    rates = iter([rate * block / max(1, count - 1) for block in range(count)])
    return [[next(rates) for _ in range(depth)] for depth in depths]
