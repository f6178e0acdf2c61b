"""Deformable attention on the operators of every PyTorch: one `embedding_bag`, and a backward pass that sorts nothing.

The sum over levels, points and bilinear neighbours is what it is, a weighted sum of rows of a table: a bag per query
and head, its rows the four neighbours of every sample. Each level is framed with one cell of zeros and positions are
clamped to that frame, so a neighbour outside the level is a row of zeros and no comparison is needed.

Unusual: a CPU takes some queries at a time, so that their row numbers and shares, 96 times as many as a head has
channels, stay in its cache; and everything between is laid out so that PyTorch walks along rows of at least a head's
samples, because it walks along short rows many times slower.
"""

from __future__ import annotations

import warnings
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.models.layers import rows_at_a_time, scratch

CELLS_TOGETHER = 4096  # of images that are taken at once in training


class Frames(NamedTuple):
    """What depends on the sizes of the levels alone; S samples per head are L levels of P points.

    Attributes:
        shapes: (h, w) of each level.
        sizes: with its frame, (h + 2, w + 2).
        cells: of all levels with their frames, and some spare ones.
        high: (2, heads * S) the largest x, then the largest y, inside the frame of each sample's level.
        width: (heads * S,) of the framed level.
        corners: (heads, 4, S) int32, the row of each corner of the square of cells that begins at (0, 0).
    """

    shapes: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...]
    cells: int
    high: Tensor
    width: Tensor
    corners: Tensor


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def frames(
    shapes: tuple[tuple[int, int], ...], heads: int, points: int, kind: torch.dtype, device: torch.device
) -> Frames:
    """`Frames` for positions of the type; shared between calls: do not write to it."""
    sizes = torch.tensor([(h + 2) * (w + 2) for h, w in shapes])
    width = torch.tensor([w + 2 for _, w in shapes])
    start = sizes.cumsum(0) - sizes + width + 1  # of each level's first cell, behind its frame
    steps = torch.stack([torch.zeros_like(width), torch.ones_like(width), width, width + 1]) + start  # (4, L)
    corners = steps.repeat_interleave(points, 1) * heads + torch.arange(heads)[:, None, None]
    high = torch.tensor([[w for _, w in shapes], [h for h, _ in shapes]], dtype=kind)
    return Frames(
        shapes,
        tuple((h + 2, w + 2) for h, w in shapes),
        int(sizes.sum()) + shapes[-1][1] + 3,
        high.repeat_interleave(points, 1).repeat(1, heads).to(device),
        width.repeat_interleave(points).repeat(heads).to(kind).to(device),
        corners.int().to(device),
    )


def framed(values: Tensor, frame: Frames) -> Tensor:
    """The table of n images, (n * cells * heads, C), from their values (n, T, heads, C)."""
    images, _, heads, channels = values.shape
    table = values.new_empty(images, frame.cells, heads * channels)
    parts = values.flatten(2).split([h * w for h, w in frame.shapes], 1)
    for level, part in zip(_levels(table, frame), parts, strict=True):
        for border in (level[:, 0], level[:, -1], level[:, :, 0], level[:, :, -1]):
            border.zero_()
        inner = level[:, 1:-1, 1:-1]
        inner.copy_(part.unflatten(1, inner.shape[1:3]))
    table[:, sum(h * w for h, w in frame.sizes) :] = 0
    return table.view(-1, channels)


def _unframed(table: Tensor, frame: Frames, heads: int) -> Tensor:
    """The way back: (n, T, heads, C)."""
    levels = _levels(table.view(-1, frame.cells, heads * table.shape[1]), frame)
    return torch.cat([level[:, 1:-1, 1:-1].flatten(1, 2) for level in levels], 1).unflatten(2, (heads, -1))


def _levels(table: Tensor, frame: Frames) -> list[Tensor]:
    """Views (n, h + 2, w + 2, heads * C) of the levels with their frames, of (n, cells, heads * C)."""
    counts = [h * w for h, w in frame.sizes]
    parts = table[:, : sum(counts)].split(counts, 1)
    return [part.unflatten(1, size) for part, size in zip(parts, frame.sizes, strict=True)]


class Bags:
    """Room for the rows and shares of some queries, which is used again and again.

    Args:
        queries: at most.
        like: of the type of the shares, on their device.
    """

    def __init__(self, queries: int, frame: Frames, like: Tensor) -> None:
        heads, corners, samples = frame.corners.shape
        self.frame = frame
        self._rows = scratch("rows", (queries, heads, corners, samples), frame.corners)
        self._shares = scratch("shares", (queries, heads, corners, samples), like)

    def fill(self, positions: Tensor, weights: Tensor, begin: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and shares for q queries.

        Args:
            positions: (q, 2, heads * S), first all x.
            weights: (q, heads * S).
            begin: (q,) int32, where the table of each query's image begins; None where all look at the first.

        Returns:
            Row numbers and shares, attention weight times bilinear weight, (q * heads, 4 * S) each, corners first; they
            hold until the next call. And the fractions of the positions, as they are.
        """
        frame, queries = self.frame, len(positions)
        rows, shares = self._rows[:queries], self._shares[:queries]
        clamped = positions.clamp(frame.high.new_tensor(-1.0), frame.high)
        whole = clamped.floor()
        fractions = clamped.sub_(whole)
        first = torch.addcmul(whole[:, 0], whole[:, 1], frame.width)
        first = first.nan_to_num_(-1.0).int().mul_(rows.shape[1])  # a NaN's fraction makes the result NaN
        if begin is not None:
            first += begin[:, None]
        x, y = fractions.unbind(1)
        right = weights * x
        left = weights - right
        bottom_right, bottom_left = right * y, left * y
        parts = left.sub_(bottom_left), right.sub_(bottom_right), bottom_left, bottom_right
        for corner, part in enumerate(parts):
            rows[:, :, corner].copy_(first.unflatten(1, (rows.shape[1], -1)))
            shares[:, :, corner].copy_(part.unflatten(1, (rows.shape[1], -1)))
        rows += frame.corners
        return rows.view(-1, rows[0, 0].numel()), shares.view(-1, rows[0, 0].numel()), fractions

    def sum(self, table: Tensor, positions: Tensor, weights: Tensor, begin: Tensor | None = None) -> Tensor:
        """(q, heads * C): what the queries sample; see `fill`."""
        rows, shares, _ = self.fill(positions, weights, begin)
        return F.embedding_bag(rows, table, per_sample_weights=shares, mode="sum").view(len(positions), -1)


class Glance(NamedTuple):
    """The layers that tell a query where to look, weights and biases of `DeformableAttention`."""

    offset_weight: Tensor
    offset_bias: Tensor
    share_weight: Tensor
    share_bias: Tensor


def look(queries: Tensor, reference: Tensor, glance: Glance, heads: int) -> tuple[Tensor, Tensor]:
    """Where each of n queries looks, and how much that counts.

    Args:
        queries: (n, C) float32.
        reference: (n, 2, L * P), see `reference_positions`.
        glance: the layers.
        heads: of the attention.

    Returns:
        (n, 2, heads * L * P) positions, first all x, and (n, heads * L * P) weights: long rows, because PyTorch walks
        along short ones many times slower. For the same reason the softmax runs down columns.
    """
    weight, bias = _x_first(glance.offset_weight), _x_first(glance.offset_bias)
    offsets = F.linear(queries, weight, bias).view(len(queries), 2, heads, -1)
    places = offsets.add_(reference[:, :, None]).flatten(2)
    logits = torch.addmm(glance.share_bias[:, None], glance.share_weight, queries.t())  # (heads * L * P, n)
    weights = logits.unflatten(0, (heads, -1)).softmax(1).flatten(0, 1)
    return places, weights.t().contiguous()


def _x_first(parameter: Tensor) -> Tensor:
    """Rows that alternate between x and y, to all of x before all of y."""
    return parameter.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


class Sampling(torch.autograd.Function):
    """`look` and the sum that follows for all queries: where they looked is computed again in the backward pass.

    Small images are taken together, since a CPU takes as long to begin an operation as for hundreds of cells.
    """

    @staticmethod
    def forward(
        ctx, values: Tensor, tokens: Tensor, positions: Tensor, reference: Tensor, frame: Frames, *glance: Tensor
    ) -> Tensor:
        """(B, T, heads * C) from values (B, T, heads, C), tokens and positions (B, T, width); see `look`."""
        batch, cells, heads, _ = values.shape
        count = rows_at_a_time(values.device, batch * cells)
        bags, total = Bags(count, frame, values), torch.empty_like(values).flatten(2)
        for images in _together(batch, cells):
            table = framed(values[images], frame)
            some = tokens[images]
            inputs = some.flatten(0, 1), positions[images].flatten(0, 1), reference.repeat(len(some), 1, 1)
            outputs = total[images].view(-1, total.shape[-1])
            parts = (part.split(count) for part in (*inputs, _begins(table, some), outputs))
            for token, position, place, begin, out in zip(*parts, strict=True):
                out.copy_(bags.sum(table, *look(token.float() + position, place, Glance(*glance), heads), begin))
        ctx.frame = frame
        ctx.save_for_backward(values, tokens, positions, reference, *glance)
        return total

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Those of values, tokens, positions and the layers."""
        values, tokens, positions, reference, *layers = ctx.saved_tensors
        glance, (batch, cells, heads, _) = Glance(*layers), values.shape
        groups = _together(batch, cells)
        bags = Bags(cells * (groups[0].stop - groups[0].start), ctx.frame, values)
        of_layers = [torch.zeros_like(layer) for layer in glance]
        of_values, of_queries = torch.empty_like(values), values.new_empty(positions.shape)
        for images in groups:
            queries = (tokens[images].float() + positions[images]).flatten(0, 1)
            places, weights = look(queries, reference.repeat(len(tokens[images]), 1, 1), glance, heads)
            gradient = gradients[0][images].flatten(0, 1)
            of_values[images], slopes, of_weights = _backward(bags, values[images], places, weights, gradient)
            slopes = slopes.flatten(1)
            of_logits = of_weights.mul_(weights).unflatten(1, (heads, -1))
            whole = of_logits.sum(-1, keepdim=True)
            of_logits = of_logits.sub_(weights.unflatten(1, (heads, -1)) * whole).flatten(1)
            out = of_queries[images].view(-1, of_queries.shape[-1])
            torch.mm(slopes, _x_first(glance.offset_weight), out=out)
            out.addmm_(of_logits, glance.share_weight)
            parts = (slopes.t() @ queries, slopes.sum(0), of_logits.t() @ queries, of_logits.sum(0))
            for total, part in zip(of_layers, (*map(_alternating, parts[:2]), *parts[2:]), strict=True):
                total += part
        return of_values, of_queries.to(tokens.dtype), of_queries, None, None, *of_layers


def _together(images: int, cells: int) -> list[slice]:
    """The images in groups: as many at a time as have few cells together."""
    count = max(1, CELLS_TOGETHER // cells)
    return [slice(start, min(start + count, images)) for start in range(0, images, count)]


def _begins(table: Tensor, images: Tensor) -> Tensor:
    """(n * T,) int32: where in the table of n images that of each of their cells begins; of images (n, T, ...)."""
    begins = torch.arange(len(images), dtype=torch.int32, device=table.device) * (len(table) // len(images))
    return begins.repeat_interleave(images.shape[1])


def _alternating(parameter: Tensor) -> Tensor:
    """The way back of `_x_first`."""
    return parameter.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


class Bag(torch.autograd.Function):
    """All queries of all images; the arguments are those of `deformable_attention`.

    The backward pass is written out, since the one of `embedding_bag` sorts 64-bit row numbers of every neighbour and
    is most of a training step on a CPU. It makes rows and table again: they are four times as much as all else.
    """

    @staticmethod
    def forward(ctx, values: Tensor, positions: Tensor, weights: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """(B, Q, heads * C)."""
        batch, queries, heads, _, points = weights.shape
        frame = frames(tuple(shapes), heads, points, positions.dtype, positions.device)
        count = rows_at_a_time(values.device, queries)
        bags = Bags(count, frame, weights)
        total = values.new_empty(batch, queries, heads * values.shape[-1])
        for image in range(batch):
            table = framed(values[image : image + 1], frame)
            parts = (tensor[image].split(count) for tensor in (*_in_rows(positions, weights), total))
            for places, shares, out in zip(*parts, strict=True):
                out.copy_(bags.sum(table, places, shares))
        ctx.frame = frame
        ctx.save_for_backward(values, positions, weights)
        return total

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Those of values, positions and weights."""
        values, positions, weights = ctx.saved_tensors
        bags = Bags(weights.shape[1], ctx.frame, weights)
        of_images = zip(values.split(1), *_in_rows(positions, weights), gradients[0], strict=True)
        of_values, *found = zip(*(_backward(bags, *image) for image in of_images), strict=True)
        of_positions, of_weights = (torch.stack(parts) for parts in found)
        of_positions = of_positions.unflatten(-1, weights.shape[2:]).movedim(2, -1)
        return torch.cat(of_values), of_positions, of_weights.view_as(weights), None


def _in_rows(positions: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q, 2, heads * S) and (B, Q, heads * S)."""
    return positions.movedim(-1, 2).flatten(3), weights.flatten(2)


def _backward(
    bags: Bags, values: Tensor, positions: Tensor, weights: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of values (n, T, heads, C), positions and weights, of their shapes, from that of the sum.

    Positions, weights and gradient are those of the queries of all n images, one behind the other.
    """
    frame, heads = bags.frame, values.shape[2]
    table = framed(values, frame)
    queries = positions.unflatten(0, (len(values), -1))
    rows, shares, fractions = bags.fill(positions, weights, _begins(table, queries))
    gradient = gradient.reshape(-1, table.shape[1])
    dots = _row_dots(rows, gradient, table).view(len(positions), heads, 4, -1)
    top_left, top_right, bottom_left, bottom_right = (part.flatten(1) for part in dots.unbind(2))
    x, y = fractions.unbind(1)
    step_top, step_bottom = top_right.sub_(top_left), bottom_right.sub_(bottom_left)
    top = top_left.addcmul_(step_top, x)
    rise = bottom_left.addcmul_(step_bottom, x).sub_(top)
    of_weights = torch.addcmul(top, rise, y)
    slopes = torch.stack([step_top.addcmul_(step_bottom.sub_(step_top), y), rise], 1).mul_(weights[:, None])
    slopes.mul_((positions >= -1) & (positions < frame.high))
    of_values = _unframed(_scatter(rows, shares, gradient, len(table)), frame, heads)
    return of_values, slopes, of_weights


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
    return torch.sparse.sampled_addmm(pattern, gradient, table.t(), beta=0.0, out=pattern).values()


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
