"""Building blocks of the decoders: sine positions, attention, feed-forward block, and convolution with group norm."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.models.ops.cpu_path import uses_cpu_path
from maskwright.models.ops.explicit_attention import explicit_attention, suits_explicit_attention
from maskwright.models.ops.feedforward_cpu import feedforward_cpu
from maskwright.models.ops.masked_attention_cpu import masked_attention_cpu, suits_masked_attention_cpu


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def sine_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Return fixed two-dimensional positions (Carion et al., DETR; `PositionEmbeddingSine` of the original).

    Rows and columns count from 1 and are divided by their number, so positions do not depend on the map's size.

    Returns:
        (height * width, channels) float32: the first half of the channels encodes y, the second x; in each half sine
        and cosine alternate. Cached: do not write to it.
    """
    half = channels // 2
    wavelength = 10000 ** (2 * (torch.arange(half, dtype=torch.float32, device=device) // 2) / half)

    def encode(count: int) -> Tensor:
        index = torch.arange(1, count + 1, dtype=torch.float32, device=device)
        angle = (index / (count + 1e-6) * (2 * math.pi))[:, None] / wavelength  # (count, half)
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1)

    y = encode(height)[:, None].expand(height, width, half)
    x = encode(width).expand(height, width, half)
    return torch.cat([y, x], -1).flatten(0, 1)


class Attention(nn.Module):
    """Multi-head attention with separate projections for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(layer.weight, gain=0.5**0.5)  # the original initializes all three as one matrix
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            queries: (B, Q, C).
            keys: (B, T, C).
            values: (B, T, C).
            visible: (B, Q, T) bool, True where a query may attend to a key; None allows all.

        Returns:
            (B, Q, C).
        """
        query, key, value = self.query(queries), self.key(keys), self.value(values)
        attended = None
        if visible is not None and suits_masked_attention_cpu(query, visible):
            attended = masked_attention_cpu(query, key, value, visible, self.num_heads)
        if attended is None:
            attended = attention(query, key, value, visible, self.num_heads)
        return self.output(attended)


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, num_heads: int) -> Tensor:
    """Multi-head attention of projected queries, keys and values; see `Attention`."""
    query, key, value = (tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tensor in (query, key, value))
    mask = None if visible is None else visible[:, None]  # the same for all heads
    attend = explicit_attention if suits_explicit_attention(query) else F.scaled_dot_product_attention
    return attend(query, key, value, mask).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden_dim)
        self.reduce = nn.Linear(hidden_dim, dim)
        for layer in (self.expand, self.reduce):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        if uses_cpu_path(tokens):
            return feedforward_cpu(tokens, self.expand, self.reduce)
        return self.reduce(F.relu(self.expand(tokens)))


class MLP(nn.Sequential):
    """Three linear layers with ReLU between them: the head that predicts mask embeddings."""

    def __init__(self, dim: int, output_dim: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, output_dim))


class ConvNorm(nn.Module):
    """Convolution, group norm with 32 groups, and optionally ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, activate: bool, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.norm = nn.GroupNorm(32, outputs)
        self.activate = activate
        initialize_convolution(self.conv)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h, w)."""
        normed = group_norm(self.conv(features), self.norm)
        return F.relu_(normed) if self.activate else normed


def group_norm(features: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Apply `norm`, also to groups of one value (32 channels, map of 1x1), which `norm(features)` refuses."""
    return torch.group_norm(features, norm.num_groups, norm.weight, norm.bias, norm.eps)


def resize(maps: Tensor, like: Tensor, align_corners: bool = False) -> Tensor:
    """Resize (B, C, h, w) bilinearly to the height and width of `like`; return maps of that size unchanged."""
    size = like.shape[-2:]
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)


def initialize_convolution(conv: nn.Conv2d) -> None:
    """Initialize weights uniformly with variance 1 / fan-in and biases with zero, as detectron2's `c2_xavier_fill`."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
