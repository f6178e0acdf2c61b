"""Multi-scale deformable attention (Zhu et al., Deformable DETR, section 4.1, equation 3), without a compiled operator.

One function, four exact backends:

- `grid` is the plain formula on `grid_sample`; tests hold the others to it.
- `bag` is a weighted sum of table rows, the fastest on a CPU; see `deformable_attention_bag.py`.
- `gather` uses only operators that every device and exporter has.
- `triton` is a kernel for CUDA and ROCm; see `deformable_attention_triton.py`.

Sampling positions are in cells of their level, not in 0..1: the network predicts offsets in cells, and dividing by the
level's size only to multiply again costs time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.models.ops.cpu_path import rows_per_chunk
from maskwright.models.ops.deformable_attention_bag import (
    Bag,
    Bags,
    SamplingLayers,
    SelfAttentionBag,
    build_table,
    padded_levels,
    sampling_positions_and_weights,
)
from maskwright.runtime.device import constant_when_compiled, full_precision, has_plain_operators

logger = logging.getLogger(__name__)

BACKENDS = ("bag", "grid", "gather", "triton")


def deformable_attention(
    values: Tensor, shapes: list[tuple[int, int]], positions: Tensor, weights: Tensor, backend: str | None = None
) -> Tensor:
    """Compute weighted sums of bilinearly sampled values.

    Args:
        values: (B, T, heads, C) with T = sum of h*w over levels, each level row by row.
        shapes: (h, w) of each level, in the order of T.
        positions: (B, Q, heads, L, P, 2), (x, y) in cells of the level; the center of cell (row i, column j) is (j, i).
            Values outside the level are zero (`grid_sample` with zero padding and align_corners=False).
        weights: (B, Q, heads, L, P).
        backend: one of `BACKENDS`; None takes `choose_backend`. "triton" accumulates in float32, and its gradient of
            the values is not bit-deterministic.

    Returns:
        (B, Q, heads * C).

    Raises:
        ValueError: the shapes do not add up to T, or the backend is unknown.
    """
    if sum(h * w for h, w in shapes) != values.shape[1]:
        raise ValueError(f"levels {shapes} have {sum(h * w for h, w in shapes)} cells, values have {values.shape[1]}")
    match backend or choose_backend(values):
        case "grid":
            return _grid(values, shapes, positions, weights)
        case "bag":
            return Bag.apply(values, positions, weights, shapes)
        case "gather":
            return _gather(values, shapes, positions, weights)
        case "triton":
            from maskwright.models.ops.deformable_attention_triton import attend  # imports Triton

            sides = [side for shape in shapes for side in shape]
            return attend(values, sides, positions.float(), weights.float())
    raise ValueError(f"unknown backend '{backend}'; known: {', '.join(BACKENDS)}")


_chosen: str | None = None


@contextmanager
def use_backend(backend: str) -> Generator[None]:
    """Use one of `BACKENDS` for all values inside the block, in all threads, whatever their device."""
    global _chosen
    before, _chosen = _chosen, backend
    try:
        yield
    finally:
        _chosen = before


def choose_backend(values: Tensor) -> str:
    """Return the backend for these values.

    "gather" on devices with plain operators only (`has_plain_operators`), "bag" on a CPU, "triton" on CUDA and ROCm
    where it works, else "grid". With deterministic algorithms "bag", whose backward pass uses no atomics. The one of
    `use_backend` comes before all these.
    """
    if _chosen is not None:
        return _chosen
    if has_plain_operators(values.device.type):
        return "gather"
    if values.device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
        return "bag"
    supported = (torch.float32, torch.bfloat16, torch.float16)
    return "triton" if values.dtype in supported and runs_triton(values.device.type) else "grid"


@constant_when_compiled
@cache
def runs_triton(device_type: str) -> bool:
    """Try the Triton kernel on the device, once; log a warning if Triton is installed but does not run."""
    if device_type != "cuda" or find_spec("triton") is None:
        return False
    values, positions = torch.zeros(1, 1, 1, 16, device=device_type), torch.zeros(1, 1, 1, 1, 1, 2, device=device_type)
    try:
        deformable_attention(values, [(1, 1)], positions, values[:, :, :, :1, None], "triton")
    except Exception as error:  # Triton needs a driver and a C compiler, and reports a missing one in many ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        logger.warning("Triton does not run here (%s); deformable attention uses the slower grid_sample", reason)
        return False
    return True


def _grid(values: Tensor, shapes: list[tuple[int, int]], positions: Tensor, weights: Tensor) -> Tensor:
    batch, _, num_heads, channels = values.shape
    queries = positions.shape[1]
    sampled = []
    for level, (part, (h, w)) in enumerate(zip(values.split([h * w for h, w in shapes], 1), shapes, strict=True)):
        level_map = part.permute(0, 2, 3, 1).reshape(batch * num_heads, channels, h, w)
        x, y = (positions[:, :, :, level] + 0.5).unbind(-1)
        grid = torch.stack([x / w, y / h], -1) * 2 - 1  # (B, Q, heads, P, 2), in -1..1
        grid = grid.transpose(1, 2).flatten(0, 1).to(level_map.dtype)
        sampled.append(F.grid_sample(level_map, grid, "bilinear", "zeros", align_corners=False))  # (B*heads, C, Q, P)
    by_head = weights.transpose(1, 2).reshape(batch * num_heads, 1, queries, -1)  # (B*heads, 1, Q, L*P)
    total = (torch.cat(sampled, -1) * by_head).sum(-1)  # (B*heads, C, Q)
    return total.view(batch, num_heads * channels, queries).transpose(1, 2)


def _gather(values: Tensor, shapes: list[tuple[int, int]], positions: Tensor, weights: Tensor) -> Tensor:
    """Gather one level and corner at a time; clamped positions keep all indices in range.

    Indices are computed in integers, because runtimes of exported files may compute in float16 or bfloat16, which skip
    integers above 2048 and 256.
    """
    batch, queries, num_heads, _, num_points, _ = positions.shape
    channels, start = values.shape[-1], 0
    total = values.new_zeros(batch, num_heads, queries, channels)
    for level, (h, w) in enumerate(shapes):
        cells = values[:, start : start + h * w].transpose(1, 2)  # (B, heads, h*w, C)
        start += h * w
        x, y = positions[:, :, :, level].transpose(1, 2).flatten(2, 3).unbind(-1)  # (B, heads, Q*P) each
        x, y = _clamp_to_border(x, w), _clamp_to_border(y, h)
        left, top = x.detach().floor().nan_to_num(), y.detach().floor().nan_to_num()
        right_weight, bottom_weight = x - left, y - top  # NaN for a NaN position, and so is the result
        weight = weights[:, :, :, level].transpose(1, 2).flatten(2)
        first_row, first_column = top.long(), left.long()
        rows = [(row.clamp(0, h - 1) * w, (row >= 0) & (row < h)) for row in (first_row, first_row + 1)]
        columns = [(cell.clamp(0, w - 1), (cell >= 0) & (cell < w)) for cell in (first_column, first_column + 1)]
        for (column, inside_width), x_weight in zip(columns, (1 - right_weight, right_weight), strict=True):
            for (row, inside_height), y_weight in zip(rows, (1 - bottom_weight, bottom_weight), strict=True):
                neighbor = cells.gather(2, (row + column)[..., None].expand(-1, -1, -1, channels))  # (B, heads, Q*P, C)
                scale = weight * x_weight * y_weight * (inside_height & inside_width)
                total = total + (neighbor * scale[..., None]).unflatten(2, (queries, num_points)).sum(3)
    return total.transpose(1, 2).flatten(2)


def _clamp_to_border(positions: Tensor, size: int) -> Tensor:
    """Clamp positions to -1..size, with zero gradient outside and, unlike `clamp`, on the border itself."""
    inside = (positions >= -1) & (positions < size)
    return torch.where(inside, positions, positions.detach().clamp(-1, size))


class SamplingAttention(nn.Module):
    """The layers of deformable attention: where queries sample, what is sampled, and the output.

    Positions and weights are computed in float32 under any precision: in bfloat16 an offset of four cells has a
    resolution of 1/32 cell.
    """

    def __init__(self, *, dim: int, value_dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value = nn.Linear(dim, value_dim)
        self.output = nn.Linear(value_dim, dim)
        self._initialize()

    def _initialize(self) -> None:
        """Point each head in its own direction, point p at distance p (original `_reset_parameters`)."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angles.cos(), angles.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        bias = direction[:, None, None] * distance[:, None]  # (heads, 1, P, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(bias.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _sample(self, queries: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Return sampling positions (B, Q, heads, L, P, 2) and weights (B, Q, heads, L, P).

        Args:
            queries: (B, Q, C) float32.
            reference: (Q, 2, L * P), where the offsets of each query start, in cells of each level.
        """
        batch, count, _ = queries.shape
        places, weights = sampling_positions_and_weights(
            queries.flatten(0, 1), reference.repeat(batch, 1, 1), self._sampling_layers(), self.num_heads
        )
        sizes = (self.num_heads, self.num_levels, self.num_points)
        places = places.view(batch, count, 2, *sizes).movedim(2, -1)
        return places, weights.view(batch, count, *sizes)

    def _sampling_layers(self) -> SamplingLayers:
        return SamplingLayers(self.offsets.weight, self.offsets.bias, self.weights.weight, self.weights.bias)


class DeformableCrossAttention(SamplingAttention):
    """Attention of any queries to a few learned positions on every level of other features."""

    def forward(self, queries: Tensor, features: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Attend.

        Args:
            queries: (B, Q, C).
            features: (B, T, C), the levels concatenated.
            reference: (Q, 2, L * P), where the offsets of each query start, in cells of each level.
            shapes: (h, w) of each level.

        Returns:
            (B, Q, C).
        """
        values = self.value(features).unflatten(-1, (self.num_heads, -1))
        backend = choose_backend(values)
        with full_precision(queries):
            values = values if backend == "triton" else values.float()  # the kernel reads bfloat16 as float32
            places, weights = self._sample(queries.float(), reference)
            attended = deformable_attention(values, shapes, places, weights, backend)
        return self.output(attended)


class DeformableAttention(SamplingAttention):
    """Self-attention over a feature pyramid: every cell attends to a few learned positions on every level."""

    def __init__(self, *, dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__(dim=dim, value_dim=dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points)

    def forward(self, tokens: Tensor, positions: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Attend.

        Args:
            tokens: (B, T, C), the levels concatenated.
            positions: (T, C) or (B, T, C), added to the tokens to choose where to sample, not to the values.
            shapes: (h, w) of each level.

        Returns:
            (B, T, C).
        """
        values = self.value(tokens).unflatten(-1, (self.num_heads, -1))
        backend = choose_backend(values)
        with full_precision(tokens):
            if backend == "bag":
                attended = self._attend_bag(values.float(), tokens, positions, shapes)
            else:
                values = values if backend == "triton" else values.float()  # the kernel reads bfloat16 as float32
                reference = reference_positions(tuple(shapes), self.num_points, tokens.device)
                places, weights = self._sample(tokens.float() + positions, reference)
                attended = deformable_attention(values, shapes, places, weights, backend)
        return self.output(attended)

    def _attend_bag(self, values: Tensor, tokens: Tensor, positions: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        reference = reference_positions(tuple(shapes), self.num_points, tokens.device)
        levels = padded_levels(tuple(shapes), self.num_heads, self.num_points, torch.float32, values.device)
        inputs = (tokens, positions.expand_as(tokens), reference, levels, *self._sampling_layers())
        return SelfAttentionBag.apply(values, *inputs)

    def forward_in_chunks(
        self, tokens: Tensor, positions: Tensor, shapes: list[tuple[int, int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Attend without gradients, one chunk of tokens at a time; see `EncoderLayer` for why.

        Yields:
            Tokens (n, C), a view of those given, and the output for them (n, C); image by image, in order.
        """
        values = self.value(tokens).unflatten(-1, (self.num_heads, -1)).float()
        levels = padded_levels(tuple(shapes), self.num_heads, self.num_points, values.dtype, values.device)
        reference = reference_positions(tuple(shapes), self.num_points, values.device)
        chunk = rows_per_chunk(values, tokens.shape[1])
        bags = Bags(chunk, levels, values)
        positions = positions.expand_as(tokens)
        for image in range(len(tokens)):
            table = build_table(values[image : image + 1], levels)
            chunks = (part.split(chunk) for part in (tokens[image], positions[image], reference))
            for token, embedding, cell in zip(*chunks, strict=True):
                with full_precision(values):
                    queries = token.float() + embedding
                    samples = sampling_positions_and_weights(queries, cell, self._sampling_layers(), self.num_heads)
                    attended = bags.sum(table, *samples)
                yield token, self.output(attended)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def reference_positions(shapes: tuple[tuple[int, int], ...], num_points: int, device: torch.device) -> Tensor:
    """Return (T, 2, L * P): the center of each cell on each level, x and y in that level's cells, for each point.

    Cached: do not write to it.
    """
    centers = []
    for h, w in shapes:
        y = (torch.arange(h, dtype=torch.float32, device=device) + 0.5) / h
        x = (torch.arange(w, dtype=torch.float32, device=device) + 0.5) / w
        centers.append(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).flatten(0, 1))
    x, y = torch.cat(centers).unbind(-1)
    positions = torch.stack([torch.stack([x * w, y * h], -1) for h, w in shapes], -1) - 0.5  # (T, 2, L)
    return positions.repeat_interleave(num_points, -1)
