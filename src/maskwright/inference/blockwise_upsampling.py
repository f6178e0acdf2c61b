"""Mask logits in blocks of pixels, computed only where they matter: the CPU counterpart of `mask_upsampling`.

A mask logit at the output is a weighted mean of a few cells of the network's coarse map, because bilinear resizing and
cropping only take means. So within a block of pixels it is between the minimum and the maximum of the block's cells,
which are known before anything is resized. Where these bounds settle a question for the whole block (this query cannot
win here; this mask covers all of it), no pixel of it is computed. The other pixels are computed with the weights of
`torch.nn.functional.interpolate`, so results equal those of whole masks up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor

SIDE = 8  # pixels of a block
PAIRS = 2**13  # pairs of a query and a block that are processed at a time
COLUMNS = 1024  # columns of a product of embeddings and features
_MIN_BLOCKS = 8  # blocks with the same weights that are worth a product of their own


@dataclass(frozen=True)
class Axis:
    """One dimension, cut into blocks of `SIDE` output pixels; the last block repeats the last pixel.

    Logits are computed at sample pixels: the output's, or the input's that the output's depend on (see `make_axis`).

    Attributes:
        starts: the first of the m adjacent coarse cells that each of the n blocks depends on.
        cells: (n, m) indices of all these cells.
        kinds: (n,) index of each block's weights in `cell_weights`; many blocks share theirs.
        cell_weights: (kinds, s, m) weights of a block's cells in its s sample pixels.
        output_weights: (n, SIDE, s) weights of a block's sample pixels in its output pixels; None if they are the same.
        size: output pixels.
    """

    starts: tuple[int, ...]
    cells: Tensor
    kinds: Tensor
    cell_weights: Tensor
    output_weights: Tensor | None
    size: int

    def __len__(self) -> int:
        return len(self.starts)

    def needed_cells(self, blocks: slice) -> slice:
        """Return the range of cells that a range of blocks depends on."""
        return slice(min(self.starts[blocks]), max(self.starts[blocks]) + self.cells.shape[1])

    def part(self, blocks: slice) -> Axis:
        """Return the axis of a range of blocks; cell 0 is then the first one that they depend on."""
        first = self.needed_cells(blocks).start
        output_weights = None if self.output_weights is None else self.output_weights[blocks]
        size = min(self.size, blocks.stop * SIDE) - blocks.start * SIDE
        starts = tuple(start - first for start in self.starts[blocks])
        return Axis(starts, self.cells[blocks] - first, self.kinds[blocks], self.cell_weights, output_weights, size)

    def inside(self) -> Tensor:
        """Return (n, SIDE) bool: which pixels of the blocks are inside the output."""
        return (torch.arange(len(self) * SIDE) < self.size).view(-1, SIDE)


@lru_cache(64)
def make_axis(coarse: int, padded: int, inner: int, output: int, flipped: bool, at_input: bool) -> Axis:
    """Describe how one dimension is resized.

    Args:
        coarse: cells of the map.
        padded: pixels of the network's input.
        inner: pixels of the crop, without padding.
        output: pixels of the result.
        flipped: whether the crop was flipped in this dimension.
        at_input: sample at the input's pixels, for values that are changed before they are resized to the output.
    """
    to_inner = _resize(torch.eye(coarse), padded)[:inner]  # (inner, coarse)
    to_inner = to_inner.flip(0) if flipped else to_inner
    rows = torch.arange(-(-output // SIDE) * SIDE).clamp_max(output - 1).view(-1, SIDE)
    if at_input and inner != output:
        pixels, output_weights = _nonzero_columns(_resize(torch.eye(inner), output)[rows])  # (n, s), (n, SIDE, s)
        cells, weights = _nonzero_columns(to_inner[pixels])
    else:
        cells, weights = _nonzero_columns(_resize(to_inner, output)[rows])
        output_weights = None
    weights, kinds = weights.unique(dim=0, return_inverse=True)
    return Axis(tuple(cells[:, 0].tolist()), cells, kinds, weights, output_weights, output)


def _resize(values: Tensor, output: int) -> Tensor:
    """Resize the rows of (size, k) bilinearly to (output, k), as `interpolate` with align_corners=False in float32."""
    size = len(values)
    if size == output:
        return values
    place = (torch.tensor(size / output, dtype=torch.float32) * (torch.arange(output) + 0.5) - 0.5).clamp_min(0)
    low = place.long().clamp_max(size - 1)
    share = (place - low)[:, None]
    return values[low] * (1 - share) + values[(low + 1).clamp_max(size - 1)] * share


def _nonzero_columns(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices (n, m) of adjacent columns of (n, rows, size) with all nonzero weights, and these weights."""
    used = weights.ne(0).any(1)  # (n, size)
    start = used.int().argmax(1)
    end = used.shape[1] - used.flip(1).int().argmax(1)
    count = int((end - start).max())
    columns = start.clamp_max(used.shape[1] - count)[:, None] + torch.arange(count)
    return columns, weights.gather(2, columns[:, None].expand(-1, weights.shape[1], -1))


def mask_bands(
    embeddings: Sequence[Tensor], features: Sequence[Tensor], rows: Axis, columns: Sequence[Axis], values: int
) -> Iterator[tuple[slice, BlockMasks]]:
    """Yield horizontal bands of masks, which are products of embeddings and features, with the output rows of each.

    Only the cells of one band are multiplied at a time, so that they stay in the cache.

    Args:
        embeddings: (N, C) each; the logits of a query are the sum over all products.
        features: (C, h, w) each.
        rows: how the second dimension of all features is resized.
        columns: how the third dimension of each is resized.
        values: approximate number of mask pixels in a band.
    """
    step = max(1, values // (len(columns[0]) * SIDE * SIDE * max(1, len(embeddings[0]))))
    for start in range(0, len(rows), step):
        blocks = slice(start, min(len(rows), start + step))
        part, needed = rows.part(blocks), rows.needed_cells(blocks)
        maps = [_product(weight, feature[:, needed]) for feature, weight in zip(features, embeddings, strict=True)]
        yield slice(start * SIDE, start * SIDE + part.size), BlockMasks(maps, part, columns)


def _product(embeddings: Tensor, features: Tensor) -> Tensor:
    """Multiply (N, C) by (C, h, w) to (N, h, w), a few columns at a time: with many, the factors leave the cache."""
    maps = features.new_empty(len(embeddings), *features.shape[1:])
    rows = max(1, COLUMNS // features.shape[2])
    for part, out in zip(features.split(rows, 1), maps.split(rows, 1), strict=True):
        torch.mm(embeddings, part.flatten(1), out=out.flatten(1))
    return maps


class BlockMasks:
    """Mask logits of N queries by blocks of the output.

    Blocks are numbered row by row; there are `len(rows) * len(columns)`.

    Args:
        maps: (N, h, w) float32 each; the logits of a query are the sum over all maps.
        rows: how the second dimension of all maps is resized.
        columns: how the third dimension of each is resized.
    """

    def __init__(self, maps: Sequence[Tensor], rows: Axis, columns: Sequence[Axis]) -> None:
        self.maps, self.rows, self.columns = maps, rows, columns
        self.size = (rows.size, columns[0].size)
        self.blocks = len(rows), len(columns[0])

    def every_block(self) -> Tensor:
        """Return the numbers of all blocks."""
        return torch.arange(self.blocks[0] * self.blocks[1])

    def lower_bound(self) -> Tensor:
        """Return (N, blocks): lower bounds of the logits at the sample pixels of each block."""
        return self._extreme(torch.amin, torch.minimum)

    def upper_bound(self) -> Tensor:
        """Return (N, blocks): upper bounds of the logits at the sample pixels of each block."""
        return self._extreme(torch.amax, torch.maximum)

    def _extreme(self, of_rows: Callable[..., Tensor], of_two: Callable[..., Tensor]) -> Tensor:
        """Reduce the cells of each block, one row of blocks at a time, so that temporaries stay in the cache."""
        height, found = self.rows.cells.shape[1], []
        for cells, axis in zip(self.maps, self.columns, strict=True):
            extreme = cells.new_empty(len(cells), *self.blocks)
            for row, start in enumerate(self.rows.starts):
                reduced = of_rows(cells[:, start : start + height], 1)  # (N, w)
                covered, width = 1, axis.cells.shape[1]  # columns that each place covers by now, and in the end
                while covered < width:
                    step = min(covered, width - covered)
                    reduced, covered = of_two(reduced[:, :-step], reduced[:, step:]), covered + step
                extreme[:, row] = reduced.index_select(1, axis.cells[:, 0])
            found.append(extreme.flatten(1))
        return reduce(torch.add, found)

    def logits(self, blocks: Tensor, queries: Tensor) -> Tensor:
        """Return (P, s, t) logits at the sample pixels of P pairs of a block and a query.

        In memory the pairs are the last dimension, for fast arithmetic.
        """
        row, column = self._row_and_column(blocks)
        down, values = _select_last(self.rows.cell_weights, self.rows.kinds[row]), []  # (s, m, P)
        for cells, axis in zip(self.maps, self.columns, strict=True):
            height, width = cells.shape[1:]
            first = (queries * height + self.rows.cells[:, 0][row]) * width + axis.cells[:, 0][column]
            high, wide = (torch.arange(part.cells.shape[1]) for part in (self.rows, axis))
            taken = cells.flatten().take((high[:, None] * width + wide)[:, :, None] + first)  # (m, l, P)
            across = _select_last(axis.cell_weights, axis.kinds[column])  # (t, l, P)
            values.append(_weighted_sum(_weighted_sum(taken, down).transpose(0, 1), across).transpose(0, 1))
        return reduce(torch.add, values).movedim(2, 0)

    def all_logits(self, blocks: Tensor) -> Tensor:
        """Return (B, N, s * t) logits of all queries at the sample pixels of B blocks.

        In memory the queries are the first dimension.
        """
        row, column = self._row_and_column(blocks)
        values = []
        for cells, axis in zip(self.maps, self.columns, strict=True):
            places = self.rows.cells[row][:, :, None] * cells.shape[2] + axis.cells[column][:, None]  # (B, m, l)
            taken = cells.flatten(1).index_select(1, places.flatten()).unflatten(1, (len(blocks), -1))  # (N, B, m * l)
            pairs = self.rows.kinds[row] * len(axis.cell_weights) + axis.kinds[column]
            kinds, members = pairs.unique(return_inverse=True)
            weights = _outer_weights(
                self.rows.cell_weights[kinds // len(axis.cell_weights)],
                axis.cell_weights[kinds % len(axis.cell_weights)],
            )
            if len(kinds) == 1:
                values.append(taken @ weights[0])
            elif _MIN_BLOCKS * len(kinds) > len(blocks):
                values.append((taken.transpose(0, 1) @ weights[members]).transpose(0, 1))
            else:
                value = taken.new_empty(*taken.shape[:2], weights.shape[2])
                for kind, weight in enumerate(weights):
                    of_kind = (members == kind).nonzero()[:, 0]
                    value[:, of_kind] = taken[:, of_kind] @ weight
                values.append(value)
        return reduce(torch.add, values).transpose(0, 1)

    def to_output(self, blocks: Tensor, samples: Tensor) -> Tensor:
        """Resize values (B, K, s * t) at the sample pixels of B blocks to (B, K, SIDE, SIDE)."""
        down, across = self.rows.output_weights, self.columns[0].output_weights
        row, column = self._row_and_column(blocks)
        values = samples.unflatten(2, (self.rows.cell_weights.shape[1], -1))
        if down is not None:
            values = down[row][:, None] @ values
        return values if across is None else values @ across[column][:, None].transpose(2, 3)

    def clip_(self, values: Tensor, blocks: Tensor) -> Tensor:
        """Zero the values (B, SIDE, SIDE) of B blocks that are outside the output."""
        for axis, index, dimension in zip(
            (self.rows, self.columns[0]), self._row_and_column(blocks), (2, 1), strict=True
        ):
            if len(axis) * SIDE > axis.size:
                inside = _select_last(axis.inside().to(values.dtype), index)  # (SIDE, B)
                values.mul_(inside.T.unsqueeze(dimension))
        return values

    def areas(self) -> Tensor:
        """Return (blocks,) int64: the number of pixels of each block that are inside the output."""
        rows, columns = self.rows.inside().sum(1), self.columns[0].inside().sum(1)
        return (rows[:, None] * columns).flatten()

    def join(self, values: Tensor) -> Tensor:
        """Return the values (blocks, ..., SIDE, SIDE) of all blocks as (..., H, W)."""
        rows, columns = self.blocks
        ordered = values.unflatten(0, (rows, columns)).movedim((0, 1), (-4, -2))  # (..., rows, SIDE, columns, SIDE)
        return ordered.flatten(-2).flatten(-3, -2)[..., : self.size[0], : self.size[1]]

    def _row_and_column(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        return blocks // self.blocks[1], blocks % self.blocks[1]


def pairs_in_chunks(pairs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield queries and blocks of the true elements of (N, blocks), so few at a time that they fit into the cache."""
    queries, blocks = pairs.nonzero().T
    return zip(queries.split(PAIRS), blocks.split(PAIRS), strict=True)


def _select_last(values: Tensor, index: Tensor) -> Tensor:
    """Return values[index] for an index (P,), with the indexed dimension moved last: (n, ...) to (..., P)."""
    return values.movedim(0, -1).contiguous().flatten(0, -2).index_select(1, index).unflatten(0, values.shape[1:])


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Return (s, l, P), sums over m of values (m, l, P) times weights (s, m, P)."""
    total = weights[:, 0, None] * values[0]
    for m in range(1, len(values)):
        total.addcmul_(weights[:, m, None], values[m])
    return total


def _outer_weights(down: Tensor, across: Tensor) -> Tensor:
    """Combine weights (n, s, m) of rows and (n, t, l) of columns to weights (n, m * l, s * t) of cells in pixels."""
    return torch.einsum("nsm,ntl->nmlst", down, across).flatten(3).flatten(1, 2)
