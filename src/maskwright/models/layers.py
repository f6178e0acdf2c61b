"""Small parts shared by the decoders: sine positions, attention, feed-forward blocks, and convolution with norm."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHED_ROWS = 2048
_MANY_KEYS = 2048
_CACHED_SCORES = 2**22
_LEAST_TOTAL = 1e-20  # of exponentials, the largest being 1; far above the least float32 that has all its digits
_kept = threading.local()


def rows_at_a_time(device: torch.device, rows: int) -> int:
    """How many of so many rows go together through several steps: as many as stay in the cache of a CPU."""
    return rows if device.type != "cpu" or torch.compiler.is_compiling() else min(rows, CACHED_ROWS)


def scratch(name: str, size: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for what is needed for a moment only: new memory costs a CPU as much as filling it twice.

    Args:
        name: of what lies there; the next call of this thread with that name and type gets the same memory.
        size: about `CACHED_ROWS` rows; more than that is new memory.
        like: of the same type, on the same device.
    """
    if like.device.type != "cpu" or torch.compiler.is_compiling() or size[0] > CACHED_ROWS:
        return like.new_empty(size)
    numbers = math.prod(size)
    key = f"{name} {like.dtype}"
    memory = getattr(_kept, key, None)
    if memory is None or len(memory) < numbers:
        with torch.inference_mode(False):
            memory = torch.empty(numbers, dtype=like.dtype)
        setattr(_kept, key, memory)
    return memory[:numbers].view(size)


def added(made: Tensor, kept: Tensor) -> Tensor:
    """The sum of both, in the memory of the one that was just made, unless precision makes their types differ."""
    return made.add_(kept) if made.dtype == kept.dtype else made + kept


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def sine_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Fixed two-dimensional positions (Carion et al., DETR; `PositionEmbeddingSine` of the original).

    Cells are numbered from 1 and divided by the last number, so positions do not depend on the map's size.

    Returns:
        (height * width, channels) float32: the first half of the channels tells y, the second x; in each half sine and
        cosine alternate. Shared between calls: do not write to it.
    """
    half = channels // 2
    wavelength = 10000 ** (2 * (torch.arange(half, dtype=torch.float32, device=device) // 2) / half)

    def encode(count: int) -> Tensor:
        number = torch.arange(1, count + 1, dtype=torch.float32, device=device)
        angle = (number / (count + 1e-6) * (2 * math.pi))[:, None] / wavelength  # (count, half)
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1)

    y = encode(height)[:, None].expand(height, width, half)
    x = encode(width).expand(height, width, half)
    return torch.cat([y, x], -1).flatten(0, 1)


class Attention(nn.Module):
    """Multi-head attention with a separate projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(layer.weight, gain=0.5**0.5)  # the original fills all three as one matrix
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attend: queries (B, Q, C), keys and values (B, T, C), visible (B, Q, T) bool where attention is allowed."""
        query, key, value = self.query(queries), self.key(keys), self.value(values)
        if visible is not None and _suits_masked_attention(query, visible):
            attended = masked_attention(query, key, value, visible, self.heads)
        else:
            attended = _attention(query, key, value, visible, self.heads)
        return self.output(attended)


def _attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, heads: int) -> Tensor:
    query, key, value = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (query, key, value))
    mask = None if visible is None else visible[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def _suits_masked_attention(query: Tensor, visible: Tensor) -> bool:
    """Whether `masked_attention` is faster: in a float32 prediction on a CPU whose cache holds the scores of a head."""
    return (
        query.device.type == "cpu"
        and query.dtype == torch.float32
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        and visible.shape[-1] >= _MANY_KEYS
        and visible[0].numel() <= _CACHED_SCORES
    )


def masked_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, heads: int) -> Tensor:
    """Attention of a few queries to very many keys, in two thirds of the time that PyTorch's own takes on a CPU.

    One head at a time, so that its scores stay in the cache; what is hidden is multiplied by zero behind the
    exponential, which takes a hundred times as long for minus infinity.

    Args:
        query: (B, Q, C), projected.
        key: (B, T, C), projected.
        value: (B, T, C), projected.
        visible: (B, Q, T) bool, somewhere true in each row.
        heads: divides C.

    Returns:
        (B, Q, C).
    """
    attended, channels = torch.empty_like(query), query.shape[-1] // heads
    scores, totals = query.new_empty(visible.shape[1:]), []
    for image, (shown, out) in enumerate(zip(visible, attended, strict=True)):
        shares = shown.to(query.dtype)
        scaled = query[image] * channels**-0.5
        of_heads = (tensor.split(channels, -1) for tensor in (scaled, key[image], value[image], out))
        for one_query, one_key, one_value, one_out in zip(*of_heads, strict=True):
            torch.mm(one_query, one_key.t(), out=scores)
            scores.sub_(scores.amax(1, keepdim=True)).exp_().mul_(shares)
            total = scores.sum(1, keepdim=True)
            torch.div(scores @ one_value, total, out=one_out)
            totals.append(total)
    if not (torch.stack(totals) > _LEAST_TOTAL).all():  # something hidden outweighs all visible, or is not finite
        return _attention(query, key, value, visible, heads)
    return attended


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.reduce = nn.Linear(hidden, width)
        for layer in (self.expand, self.reduce):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return self.reduce(F.relu(self.expand(tokens)))
        inputs = (tokens, self.expand.weight, self.expand.bias, self.reduce.weight, self.reduce.bias)
        if torch.is_autocast_enabled("cpu"):
            inputs = tuple(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in inputs)
        return _RowsFeedForward.apply(*inputs)


class _RowsFeedForward(torch.autograd.Function):
    """Linear, ReLU, linear for a few rows at a time: what lies between then stays in the processor's cache.

    It is not kept for the backward pass either but computed again, the largest activation of a pixel decoder otherwise.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, expand: Tensor, expand_bias: Tensor, reduce: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, expand, expand_bias, reduce)
        reduced = tokens.new_empty(*tokens.shape[:-1], len(reduce))
        for rows, out in _rows_of(tokens, reduced):
            hidden = scratch("hidden", (len(rows), len(expand)), rows)
            torch.addmm(expand_bias, rows, expand.t(), out=hidden)
            torch.addmm(bias, hidden.relu_(), reduce.t(), out=out)
        return reduced

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, ...]:
        tokens, expand, expand_bias, reduce = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        token_gradient = torch.empty_like(tokens, memory_format=torch.contiguous_format)
        expand_gradient, reduce_gradient = torch.zeros_like(expand), torch.zeros_like(reduce)
        bias_gradient = torch.zeros_like(expand_bias)
        for rows, out, above in _rows_of(tokens, token_gradient, gradient):
            hidden = torch.addmm(expand_bias, rows, expand.t()).relu_()
            reduce_gradient.addmm_(above.t(), hidden)
            hidden = torch.ops.aten.threshold_backward(above @ reduce, hidden, 0)
            expand_gradient.addmm_(hidden.t(), rows)
            bias_gradient += hidden.sum(0)
            torch.mm(hidden, expand, out=out)
        return token_gradient, expand_gradient, bias_gradient, reduce_gradient, gradient.flatten(0, -2).sum(0)


def _rows_of(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of each, (rows, C) views of contiguous memory or copies of what is not."""
    return zip(*(tensor.reshape(-1, tensor.shape[-1]).split(CACHED_ROWS) for tensor in tensors), strict=True)


class MLP(nn.Sequential):
    """Three linear layers with ReLU between them: the head that makes mask embeddings."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
        )


class ConvNorm(nn.Module):
    """Convolution without bias, group norm of 32 groups, and ReLU where asked for."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, activate: bool, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.norm = nn.GroupNorm(32, outputs)
        self.activate = activate
        initialise_convolution(self.conv)

    def forward(self, features: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h, w)."""
        normed = group_norm(self.conv(features), self.norm)
        return F.relu_(normed) if self.activate else normed


def group_norm(features: Tensor, norm: nn.GroupNorm) -> Tensor:
    """As `norm(features)`, which refuses groups of one value; a picture of 1x1 gives such with a width of 32."""
    return torch.group_norm(features, norm.num_groups, norm.weight, norm.bias, norm.eps)


def resize(maps: Tensor, like: Tensor, align_corners: bool = False) -> Tensor:
    """(B, C, h, w) to the height and width of `like`, bilinear; the same maps where they have them."""
    size = like.shape[-2:]
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)


def initialise_convolution(conv: nn.Conv2d) -> None:
    """Uniform with variance 1 / fan-in, biases zero: detectron2's `c2_xavier_fill`."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
