"""Multi-scale deformable attention (Zhu et al., Deformable DETR, section 4.1, equation 3), without a compiled operator.

One function, several exact backends. `bag` sees the sum over levels, points and bilinear neighbours as what it is, a
weighted sum of table rows, and hands it to `embedding_bag`; `grid` is the plain formula on `grid_sample`, for export
and as the reference that tests hold the others to; `gather` needs neither, for devices that lack them; `triton` is a
kernel for CUDA and ROCm. Unusual: sampling positions are in cells of their level, not in 0..1, because the network
predicts offsets in cells, and dividing by the level's size only to multiply again costs time.
"""

from __future__ import annotations

import logging
import math
import warnings
from functools import cache, lru_cache, partial
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.device import constant_when_compiled, has_plain_operators

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
        return _Bag.apply(values, positions, weights, shapes)
    if backend == "grid":
        return _grid(values, shapes, positions, weights)
    if backend == "gather":
        return _gather(values, shapes, positions, weights)
    if backend == "triton":
        from maskwright.models.deformable_attention_triton import attend  # imports Triton, which few machines need

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
        batch, cells, _ = tokens.shape
        values = self.value(tokens).unflatten(-1, (self.heads, -1))
        backend = choose_backend(values)
        if backend != "triton":  # which reads bfloat16 as float32
            values = values.float()
        with torch.autocast(tokens.device.type, enabled=False):
            queries = tokens.float() + positions
            places = self._offsets(queries) + reference_positions(tuple(shapes), tokens.device)[:, None, :, None]
            weights = self.weights(queries).view(batch, cells, self.heads, -1).softmax(-1)
            weights = weights.view(batch, cells, self.heads, self.levels, self.points)
            attended = deformable_attention(values, shapes, places, weights, backend)
        return self.output(attended)

    def _offsets(self, queries: Tensor) -> Tensor:
        """(B, T, heads, L, P, 2), in memory first all x of a query, then all y: `_split` walks so through long rows."""
        weight, bias = (p.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1) for p in self.offsets.parameters())
        offsets = F.linear(queries, weight, bias).unflatten(-1, (2, self.heads, self.levels, self.points))
        return offsets.movedim(2, -1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def reference_positions(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(T, L, 2): where the centre of each cell lies on each level, (x, y) in that level's cells."""
    centres = []
    for h, w in shapes:
        y = (torch.arange(h, dtype=torch.float32, device=device) + 0.5) / h
        x = (torch.arange(w, dtype=torch.float32, device=device) + 0.5) / w
        centres.append(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).flatten(0, 1))
    x, y = torch.cat(centres).unbind(-1)
    return torch.stack([torch.stack([x * w, y * h], -1) for h, w in shapes], 1) - 0.5


class _Bag(torch.autograd.Function):
    """The sum as one `embedding_bag`: a bag per query and head, its rows the four neighbours of every sample.

    Each level is framed with one cell of zeros and positions are clamped to that frame, so a neighbour outside the
    level is a row of zeros and no comparison is needed. The backward pass is written out, since the one of
    `embedding_bag` sorts 64-bit row numbers of every neighbour and is most of a training step on a CPU.
    """

    @staticmethod
    def forward(ctx, values: Tensor, positions: Tensor, weights: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        batch, _, heads, channels = values.shape
        table = _frame(values, shapes)  # (B*heads*T', C)
        rows, x, y = _rows(positions, shapes, len(table) // (batch * heads))
        shares = _shares(weights.flatten(-2), x, y)
        total = F.embedding_bag(rows, table, per_sample_weights=shares, mode="sum")  # (B*Q*heads, C)
        ctx.shapes = shapes
        ctx.save_for_backward(values, positions, weights)  # rows and table are four times as much, and quickly made
        return total.view(batch, positions.shape[1], heads * channels)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, positions, weights = ctx.saved_tensors
        table = _frame(values, ctx.shapes)
        rows, x, y = _rows(positions, ctx.shapes, len(table) // (values.shape[0] * values.shape[2]))
        gradient = gradients[0].reshape(-1, table.shape[1])
        highs = _highs(positions, ctx.shapes)
        x_inside, y_inside = (
            (flat >= -1) & (flat < high) for flat, high in zip(positions.flatten(-3, -2).unbind(-1), highs, strict=True)
        )
        dots = _row_dots(rows, gradient, table).view(*x.shape[:3], 4, -1)
        top_left, top_right, bottom_left, bottom_right = dots.unbind(-2)  # (B, Q, heads, L*P) each
        step_top, step_bottom = top_right - top_left, bottom_right - bottom_left
        top = top_left.addcmul_(step_top, x)
        rise = bottom_left.addcmul_(step_bottom, x).sub_(top)
        flat = weights.flatten(-2)
        weight_gradient = torch.addcmul(top, rise, y).view_as(weights)
        slope = step_top.addcmul_(step_bottom.sub_(step_top), y).mul_(flat).mul_(x_inside)
        position_gradient = torch.stack([slope, rise.mul_(flat).mul_(y_inside)], -1).view_as(positions)
        shares = _shares(flat, x, y)
        value_gradient = _unframe(_scatter(rows, shares, gradient, len(table)), ctx.shapes, values.shape)
        return value_gradient, position_gradient, weight_gradient, None


def _frame(values: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """(B, T, heads, C) to (B*heads*T', C): heads first, each level with a border of zeros, spare zeros at the end."""
    batch, _, heads, channels = values.shape
    cells = sum((h + 2) * (w + 2) for h, w in shapes) + shapes[-1][1] + 3
    table = values.new_zeros(batch, heads, cells, channels)
    for inner, part in zip(_inner(table, shapes), values.split([h * w for h, w in shapes], 1), strict=True):
        inner.copy_(part.transpose(1, 2).unflatten(2, inner.shape[2:4]))
    return table.view(-1, channels)


def _unframe(table: Tensor, shapes: list[tuple[int, int]], shape: tuple[int, ...]) -> Tensor:
    batch, _, heads, channels = shape
    levels = _inner(table.view(batch, heads, -1, channels), shapes)
    return torch.cat([inner.flatten(2, 3).transpose(1, 2) for inner in levels], 1)


def _inner(table: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Views (B, heads, h, w, C) of the levels inside their frames."""
    sizes = [(h + 2) * (w + 2) for h, w in shapes]
    parts = table[:, :, : sum(sizes)].split(sizes, 2)
    return [part.unflatten(2, (h + 2, w + 2))[:, :, 1:-1, 1:-1] for part, (h, w) in zip(parts, shapes, strict=True)]


def _highs(positions: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """The largest x and the largest y inside the frame, (heads, L*P) each.

    As long as a query has samples, because PyTorch walks through short rows many times slower.
    """
    heads, _, points = positions.shape[2:5]
    sizes = positions.new_tensor([[w for _, w in shapes], [h for h, _ in shapes]])
    return [size.repeat_interleave(points).expand(heads, -1).contiguous() for size in sizes]


def _split(positions: Tensor, shapes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """For x and for y the fraction and the whole part of the clamped position, (B, Q, heads, L*P) float32 each."""
    parts = []
    for flat, high in zip(positions.flatten(-3, -2).unbind(-1), _highs(positions, shapes), strict=True):
        clamped = flat.clamp(flat.new_tensor(-1.0), high)
        whole = clamped.floor()
        parts.append((clamped.sub_(whole), whole))
    return parts


def _rows(positions: Tensor, shapes: list[tuple[int, int]], cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers (B*Q*heads, 4*L*P) int32, corners first, and fractions of x and y, (B, Q, heads, L*P) each."""
    batch, queries, heads, levels, points, _ = positions.shape
    (x, column), (y, row) = _split(positions, shapes)
    width = torch.tensor([w + 2 for _, w in shapes])
    sizes = torch.tensor([(h + 2) * (w + 2) for h, w in shapes])
    start = sizes.cumsum(0) - sizes + width + 1  # of each level's first cell, behind its frame
    by_sample = partial(torch.repeat_interleave, repeats=points)
    inside = row.mul_(by_sample(width).to(row)).add_(column).nan_to_num_(-1.0)  # a NaN's fraction makes the result NaN
    first = inside.int()
    steps = torch.stack([torch.zeros_like(width), torch.ones_like(width), width, width + 1]) + start  # (4, L)
    head = torch.arange(heads)[:, None] * cells
    rows = torch.empty(batch, queries, heads, 4, levels * points, dtype=torch.int32, device=positions.device)
    for corner, step in enumerate(steps):
        torch.add(first, (head + by_sample(step)).int().to(first.device), out=rows[..., corner, :])
    if batch > 1:
        image = torch.arange(batch, device=rows.device, dtype=torch.int32) * (heads * cells)
        rows += image[:, None, None, None, None]
    return rows.view(batch * queries * heads, 4 * levels * points), x, y


def _shares(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(B*Q*heads, 4*L*P): attention weight times bilinear weight of each neighbour, in the order of `_rows`."""
    shares = weights.new_empty(*weights.shape[:3], 4, weights.shape[-1])
    top_left, top_right, bottom_left, bottom_right = shares.unbind(-2)
    right = weights * x
    left = weights - right
    torch.mul(right, y, out=bottom_right)
    torch.mul(left, y, out=bottom_left)
    torch.sub(right, bottom_right, out=top_right)
    torch.sub(left, bottom_left, out=top_left)
    return shares.view(-1, 4 * weights.shape[-1])


def _row_dots(rows: Tensor, gradient: Tensor, table: Tensor) -> Tensor:
    """(bags, rows per bag): the product of each bag's gradient with each of its rows."""
    if rows.shape[1] > len(table):  # sampled_addmm refuses more entries than a dense matrix has
        return (gradient @ table.t()).gather(1, rows.long())
    _silence_sparse_notice()
    starts = torch.arange(0, rows.numel() + 1, rows.shape[1], device=rows.device, dtype=torch.int32)
    size = (len(rows), len(table))
    pattern = torch.sparse_csr_tensor(
        starts, rows.view(-1), gradient.new_zeros(rows.numel()), size, check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, gradient, table.t(), beta=0.0).values()


@cache
def _silence_sparse_notice() -> None:
    """PyTorch says once per process that sparse CSR is in beta; users of this package cannot act on that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def _scatter(rows: Tensor, shares: Tensor, gradient: Tensor, length: int) -> Tensor:
    """(length, C): each row's sum of its bags' gradients times its shares."""
    bags, size = rows.shape
    if rows.device.type == "cpu":  # scipy's product with a transposed sparse matrix needs no sorting
        import scipy.sparse  # only training needs it

        starts = np.arange(0, bags * size + 1, size, dtype=np.int32)
        matrix = scipy.sparse.csr_array((shares.view(-1).numpy(), rows.view(-1).numpy(), starts), (bags, length))
        return torch.from_numpy(matrix.T @ gradient.numpy())
    ordered, order = rows.view(-1).sort(stable=True)
    ends = torch.bincount(ordered, minlength=length).cumsum(0, dtype=torch.int32)
    owners = order.div(size, rounding_mode="floor").int()
    share = shares.view(-1)[order]
    return F.embedding_bag(owners, gradient, F.pad(ends[:-1], (1, 0)), per_sample_weights=share, mode="sum")
