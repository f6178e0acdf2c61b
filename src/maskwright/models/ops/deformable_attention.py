"""Multi-scale deformable attention (Zhu et al., Deformable DETR, section 4.1, equation 3), without a compiled operator.

One function, several exact backends. `bag` is a weighted sum of rows, see `deformable_attention_bag.py`; `grid` is
the plain formula on `grid_sample`, for export and as the reference that tests hold the others to; `gather` needs
neither, for devices that lack them; `triton` is a kernel for CUDA and ROCm. Unusual: sampling positions are in cells of
their level, not in 0..1, because the network predicts offsets in cells, and dividing by the level's size only to
multiply again costs time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.models.layers import rows_at_a_time
from maskwright.models.ops.deformable_attention_bag import Bag, Bags, Glance, Sampling, framed, frames, look
from maskwright.runtime.device import constant_when_compiled, has_plain_operators

logger = logging.getLogger(__name__)

BACKENDS = ("bag", "grid", "gather", "triton")


def deformable_attention(
    values: Tensor, shapes: list[tuple[int, int]], positions: Tensor, weights: Tensor, backend: str | None = None
) -> Tensor:
    """Weighted sum of bilinearly sampled values.

    Args:
        values: (B, T, heads, C) with T = sum of h*w over levels, each level row by row.
        shapes: (h, w) of each level, in the order of T.
        positions: (B, Q, heads, L, P, 2), (x, y) in cells of the level; the centre of cell (row i, column j) is (j, i).
            Outside the level, values are zero (bilinear towards zero on the border, as `grid_sample` with zero
            padding and align_corners=False).
        weights: (B, Q, heads, L, P).
        backend: one of `BACKENDS`; None takes what `choose_backend` says. "triton" adds up in float32, and is not
            bit-deterministic in the gradient of the values.

    Returns:
        (B, Q, heads * C).

    Raises:
        ValueError: shapes do not add up to T, or the backend is unknown.
    """
    if sum(h * w for h, w in shapes) != values.shape[1]:
        raise ValueError(f"levels {shapes} have {sum(h * w for h, w in shapes)} cells, values have {values.shape[1]}")
    backend = backend or choose_backend(values)
    if backend == "bag":
        return Bag.apply(values, positions, weights, shapes)
    if backend == "grid":
        return _grid(values, shapes, positions, weights)
    if backend == "gather":
        return _gather(values, shapes, positions, weights)
    if backend == "triton":
        from maskwright.models.ops.deformable_attention_triton import attend  # imports Triton, which few machines need

        sizes = [side for shape in shapes for side in shape]
        return attend(values, sizes, positions.float(), weights.float())
    raise ValueError(f"unknown backend '{backend}'; known: {', '.join(BACKENDS)}")


def choose_backend(values: Tensor) -> str:
    """The backend for these values: "triton" on CUDA and ROCm where it works, "bag" on a CPU, else "grid".

    Devices of plain operators take "gather", see `has_plain_operators`. Where PyTorch is to be deterministic it is
    "bag", whose backward pass sorts in place of adding atomically.
    """
    if has_plain_operators(values.device.type):
        return "gather"
    if values.device.type == "cpu" or torch.are_deterministic_algorithms_enabled():
        return "bag"
    known = (torch.float32, torch.bfloat16, torch.float16)
    return "triton" if values.dtype in known and runs_triton(values.device.type) else "grid"


@constant_when_compiled
@cache
def runs_triton(device_type: str) -> bool:
    """Whether Triton is there and its kernels run on the device; tried once, and told where it should but does not."""
    if device_type != "cuda" or find_spec("triton") is None:
        return False
    values, places = torch.zeros(1, 1, 1, 16, device=device_type), torch.zeros(1, 1, 1, 1, 1, 2, device=device_type)
    try:
        deformable_attention(values, [(1, 1)], places, values[:, :, :, :1, None], "triton")
    except Exception as error:  # it needs a driver and a C compiler, and says what is missing in many ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        logger.warning("Triton does not run here (%s); deformable attention takes the slower grid_sample", reason)
        return False
    return True


def _grid(values: Tensor, shapes: list[tuple[int, int]], positions: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, channels = values.shape
    queries = positions.shape[1]
    sampled = []
    for level, (part, (h, w)) in enumerate(zip(values.split([h * w for h, w in shapes], 1), shapes, strict=True)):
        picture = part.permute(0, 2, 3, 1).reshape(batch * heads, channels, h, w)
        x, y = (positions[:, :, :, level] + 0.5).unbind(-1)
        grid = torch.stack([x / w, y / h], -1) * 2 - 1  # (B, Q, heads, P, 2)
        grid = grid.transpose(1, 2).flatten(0, 1).to(picture.dtype)
        sampled.append(F.grid_sample(picture, grid, "bilinear", "zeros", align_corners=False))  # (B*heads, C, Q, P)
    by_head = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)  # (B*heads, 1, Q, L*P)
    total = (torch.cat(sampled, -1) * by_head).sum(-1)  # (B*heads, C, Q)
    return total.view(batch, heads * channels, queries).transpose(1, 2)


def _gather(values: Tensor, shapes: list[tuple[int, int]], positions: Tensor, weights: Tensor) -> Tensor:
    """Neighbours are gathered one level and corner at a time, and clamped positions keep all indices small."""
    batch, queries, heads, _, points, _ = positions.shape
    channels, start = values.shape[-1], 0
    total = values.new_zeros(batch, heads, queries, channels)
    for level, (h, w) in enumerate(shapes):
        picture = values[:, start : start + h * w].transpose(1, 2)  # (B, heads, h*w, C)
        start += h * w
        x, y = positions[:, :, :, level].transpose(1, 2).flatten(2, 3).unbind(-1)  # (B, heads, Q*P) each
        x, y = _into_frame(x, w), _into_frame(y, h)
        left, top = x.detach().floor(), y.detach().floor()
        right_share, bottom_share = x - left, y - top
        share = weights[:, :, :, level].transpose(1, 2).flatten(2)
        for column, across in ((left, 1 - right_share), (left + 1, right_share)):
            for row, down in ((top, 1 - bottom_share), (top + 1, bottom_share)):
                inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
                cells = (row.clamp(0, h - 1) * w + column.clamp(0, w - 1)).nan_to_num().long()
                found = picture.gather(2, cells[..., None].expand(-1, -1, -1, channels))  # (B, heads, Q*P, C)
                part = share * across * down * inside  # a NaN stays here, and makes the result NaN
                total = total + (found * part[..., None]).unflatten(2, (queries, points)).sum(3)
    return total.transpose(1, 2).flatten(2)


def _into_frame(positions: Tensor, size: int) -> Tensor:
    """Positions clamped to -1..size, without a gradient outside; that of `clamp` on the border is not ours."""
    inside = (positions >= -1) & (positions < size)
    return torch.where(inside, positions, positions.detach().clamp(-1, size))


class DeformableAttention(nn.Module):
    """Self-attention over a feature pyramid: every cell looks at a few learned places of every level.

    Positions and weights are computed in float32 whatever the precision around them: in bfloat16 an offset of four
    cells has a resolution of 1/32 cell.
    """

    def __init__(self, *, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self._initialise()

    def _initialise(self) -> None:
        """Each head starts looking along its own direction, point p at distance p (original `_reset_parameters`)."""
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angles.cos(), angles.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.points + 1, dtype=torch.float32)
        bias = direction[:, None, None] * distance[:, None]  # (heads, 1, P, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, positions: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Attend.

        Args:
            tokens: (B, T, C), the levels one behind the other.
            positions: (T, C) or (B, T, C), added to the tokens to choose places, not to the values.
            shapes: (h, w) of each level.

        Returns:
            (B, T, C).
        """
        values = self.value(tokens).unflatten(-1, (self.heads, -1))
        backend = choose_backend(values)
        reference = reference_positions(tuple(shapes), self.points, tokens.device)
        with torch.autocast(tokens.device.type, enabled=False):
            if backend == "bag":
                frame = frames(tuple(shapes), self.heads, self.points, torch.float32, values.device)
                inputs = (tokens, positions.expand_as(tokens), reference, frame, *self._glance())
                attended = Sampling.apply(values.float(), *inputs)
            else:
                queries = (tokens.float() + positions).flatten(0, 1)
                places, weights = look(queries, reference.repeat(len(tokens), 1, 1), self._glance(), self.heads)
                sizes = (self.heads, self.levels, self.points)
                places = places.view(*tokens.shape[:2], 2, *sizes).movedim(2, -1)
                weights = weights.view(*tokens.shape[:2], *sizes)
                values = values if backend == "triton" else values.float()  # it reads bfloat16 as float32
                attended = deformable_attention(values, shapes, places, weights, backend)
        return self.output(attended)

    def _glance(self) -> Glance:
        return Glance(self.offsets.weight, self.offsets.bias, self.weights.weight, self.weights.bias)

    def in_parts(
        self, tokens: Tensor, positions: Tensor, shapes: list[tuple[int, int]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `forward`, without gradients, for some cells of one image at a time: what lies between stays in the cache.

        Yields:
            Tokens (n, C), a view of those given, and what attention makes of them, (n, C); image by image, in order.
        """
        values = self.value(tokens).unflatten(-1, (self.heads, -1)).float()
        frame = frames(tuple(shapes), self.heads, self.points, values.dtype, values.device)
        reference = reference_positions(tuple(shapes), self.points, values.device)
        count = rows_at_a_time(values.device, tokens.shape[1])
        bags = Bags(count, frame, values)
        for cells, positions_of_image, values_of_image in zip(tokens, positions.expand_as(tokens), values, strict=True):
            table = framed(values_of_image[None], frame)
            parts = (part.split(count) for part in (cells, positions_of_image, reference))
            for some, added, places in zip(*parts, strict=True):
                with torch.autocast(values.device.type, enabled=False):
                    attended = bags.sum(table, *look(some.float() + added, places, self._glance(), self.heads))
                yield some, self.output(attended)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def reference_positions(shapes: tuple[tuple[int, int], ...], points: int, device: torch.device) -> Tensor:
    """(T, 2, L * P): where the centre of each cell lies on each level, x and y in that level's cells, for each point.

    Shared between calls: do not write to it.
    """
    centres = []
    for h, w in shapes:
        y = (torch.arange(h, dtype=torch.float32, device=device) + 0.5) / h
        x = (torch.arange(w, dtype=torch.float32, device=device) + 0.5) / w
        centres.append(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).flatten(0, 1))
    x, y = torch.cat(centres).unbind(-1)
    places = torch.stack([torch.stack([x * w, y * h], -1) for h, w in shapes], -1) - 0.5  # (T, 2, L)
    return places.repeat_interleave(points, -1)
