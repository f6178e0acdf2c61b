"""Masks at the output's size, computed only in the blocks of pixels where they decide something.

A mask logit at the output is a weighted mean of a few cells of the network's coarse map, because bilinear resizing,
cropping and resizing again only ever take means. So within a block of pixels it lies between the least and the largest
of the block's cells, which is known before anything is resized. Where these bounds settle a question for the whole
block (this query cannot win here; this mask covers all of it), no pixel of it is computed. The others are, with the
weights of `torch.nn.functional.interpolate`, so results are those of whole masks up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor

SIDE = 8  # pixels of a block
PAIRS = 2**13  # of an object and a block that are worked on together
COLUMNS = 1024  # of a product of embeddings and features
_MEMBERS = 8  # blocks of one kind that are worth a product of their own


@dataclass(frozen=True)
class Axis:
    """One dimension, cut into blocks of `SIDE` output pixels; the last one repeats the last pixel.

    Attributes:
        starts: of n blocks the first of the m coarse cells, one behind the other, that each depends on.
        cells: (n, m) the numbers of all these cells.
        kinds: (n,) which weights each block has; many have the same.
        to_middle: (kinds, s, m) weights by which a block's cells make its middle pixels.
        to_output: (n, SIDE, s) weights by which its middle pixels make those of the output; None where they are those.
        size: output pixels.
    """

    starts: tuple[int, ...]
    cells: Tensor
    kinds: Tensor
    to_middle: Tensor
    to_output: Tensor | None
    size: int

    def __len__(self) -> int:
        return len(self.starts)

    def needed(self, blocks: slice) -> slice:
        """The cells that some adjacent blocks depend on."""
        return slice(min(self.starts[blocks]), max(self.starts[blocks]) + self.cells.shape[1])

    def part(self, blocks: slice) -> Axis:
        """Of some adjacent blocks; cells are counted from the first of those that they need."""
        first = self.needed(blocks).start
        to_output = None if self.to_output is None else self.to_output[blocks]
        size = min(self.size, blocks.stop * SIDE) - blocks.start * SIDE
        starts = tuple(start - first for start in self.starts[blocks])
        return Axis(starts, self.cells[blocks] - first, self.kinds[blocks], self.to_middle, to_output, size)

    def pixels(self) -> Tensor:
        """(n, SIDE) bool: which pixels of the blocks the output has."""
        return (torch.arange(len(self) * SIDE, device=self.cells.device) < self.size).view(-1, SIDE)


@lru_cache(64)
def axis(coarse: int, padded: int, inner: int, output: int, flipped: bool, middle: bool, device: torch.device) -> Axis:
    """How one dimension is resized.

    Args:
        coarse: cells of the map.
        padded: pixels of the network's input.
        inner: those of them that belong to the picture.
        output: pixels of the result.
        flipped: whether the picture was seen mirrored.
        middle: whether something is done to the values at the input's size, before they are resized to the output.
        device: of the weights.
    """
    to_inner = _resize(torch.eye(coarse), padded)[:inner]  # (inner, coarse)
    to_inner = to_inner.flip(0) if flipped else to_inner
    rows = torch.arange(-(-output // SIDE) * SIDE).clamp_max(output - 1).view(-1, SIDE)
    if middle and inner != output:
        pixels, to_output = _narrow(_resize(torch.eye(inner), output)[rows])  # (n, s), (n, SIDE, s)
        cells, to_middle = _narrow(to_inner[pixels])
    else:
        cells, to_middle = _narrow(_resize(to_inner, output)[rows])
        to_output = None
    to_middle, kinds = to_middle.unique(dim=0, return_inverse=True)
    starts, to_output = tuple(cells[:, 0].tolist()), None if to_output is None else to_output.to(device)
    return Axis(starts, cells.to(device), kinds.to(device), to_middle.to(device), to_output, output)


def _resize(values: Tensor, wanted: int) -> Tensor:
    """(wanted, k): the rows of (size, k) resized bilinearly, pixel centres aligned, as PyTorch does it in float32."""
    size = len(values)
    if size == wanted:
        return values
    place = (torch.tensor(size / wanted, dtype=torch.float32) * (torch.arange(wanted) + 0.5) - 0.5).clamp_min(0)
    low = place.long().clamp_max(size - 1)
    share = (place - low)[:, None]
    return values[low] * (1 - share) + values[(low + 1).clamp_max(size - 1)] * share


def _narrow(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of (n, rows, size) weights m adjacent columns that each n needs: (n, m) numbers, and (n, rows, m) the weights."""
    used = weights.ne(0).any(1)  # (n, size)
    start = used.int().argmax(1)
    end = used.shape[1] - used.flip(1).int().argmax(1)
    count = int((end - start).max())
    columns = start.clamp_max(used.shape[1] - count)[:, None] + torch.arange(count)
    return columns, weights.gather(2, columns[:, None].expand(-1, weights.shape[1], -1))


def bands(
    embeddings: Sequence[Tensor], features: Sequence[Tensor], rows: Axis, columns: Sequence[Axis], values: int
) -> Iterator[tuple[slice, BlockMasks]]:
    """Horizontal bands of masks that are products of embeddings and features, and the output rows of each.

    Only the cells of one band are multiplied at a time: what lies between stays in the cache.

    Args:
        embeddings: (N, C) each; the logits of an object are the sum over all products.
        features: (C, h, w) each.
        rows: how the second dimension of all features is resized.
        columns: how the third of each is.
        values: about how many pixels of masks a band has.
    """
    step = max(1, values // (len(columns[0]) * SIDE * SIDE * max(1, len(embeddings[0]))))
    for start in range(0, len(rows), step):
        blocks = slice(start, min(len(rows), start + step))
        part, needed = rows.part(blocks), rows.needed(blocks)
        maps = [_product(weight, feature[:, needed]) for feature, weight in zip(features, embeddings, strict=True)]
        yield slice(start * SIDE, start * SIDE + part.size), BlockMasks(maps, part, columns)


def _product(embeddings: Tensor, features: Tensor) -> Tensor:
    """(N, h, w) of (N, C) and (C, h, w). A CPU takes few columns at a time: with many, the factors leave its cache."""
    if features.device.type != "cpu":
        return (embeddings @ features.flatten(1)).unflatten(1, features.shape[1:])
    maps = features.new_empty(len(embeddings), *features.shape[1:])
    rows = max(1, COLUMNS // features.shape[2])
    for part, out in zip(features.split(rows, 1), maps.split(rows, 1), strict=True):
        torch.mm(embeddings, part.flatten(1), out=out.flatten(1))
    return maps


class BlockMasks:
    """Mask logits of N objects as means of coarse maps, by blocks of the output.

    Blocks are numbered row by row; there are `len(rows) * len(columns)`.

    Args:
        maps: (N, h, w) float32 each; the logits of an object are the sum over all maps.
        rows: how the second dimension of all maps is resized.
        columns: how the third of each is.
    """

    def __init__(self, maps: Sequence[Tensor], rows: Axis, columns: Sequence[Axis]) -> None:
        self.maps, self.rows, self.columns = maps, rows, columns
        self.size = (rows.size, columns[0].size)
        self.blocks = len(rows), len(columns[0])

    def every_block(self) -> Tensor:
        """The numbers of all blocks."""
        return torch.arange(self.blocks[0] * self.blocks[1], device=self.maps[0].device)

    def least(self) -> Tensor:
        """(N, blocks): no middle pixel of the block has a logit below it."""
        return self._extreme(torch.amin, torch.minimum)

    def largest(self) -> Tensor:
        """(N, blocks): no middle pixel of the block has a logit above it."""
        return self._extreme(torch.amax, torch.maximum)

    def _extreme(self, of_rows: Callable[..., Tensor], of_two: Callable[..., Tensor]) -> Tensor:
        """Row of blocks by row, so that what lies between stays in the cache."""
        high, found = self.rows.cells.shape[1], []
        for cells, axis in zip(self.maps, self.columns, strict=True):
            extreme = cells.new_empty(len(cells), *self.blocks)
            for row, start in enumerate(self.rows.starts):
                near = of_rows(cells[:, start : start + high], 1)  # (N, w)
                reached, wide = 1, axis.cells.shape[1]  # how many columns count in each place, and how many shall
                while reached < wide:
                    step = min(reached, wide - reached)
                    near, reached = of_two(near[:, :-step], near[:, step:]), reached + step
                extreme[:, row] = near.index_select(1, axis.cells[:, 0])
            found.append(extreme.flatten(1))
        return reduce(torch.add, found)

    def middle(self, blocks: Tensor, objects: Tensor) -> Tensor:
        """(P, s, t) logits of P pairs of a block and an object. In memory the pairs come last, for fast arithmetic."""
        row, column = blocks // self.blocks[1], blocks % self.blocks[1]
        down, values = _last(self.rows.to_middle, self.rows.kinds[row]), []  # (s, m, P)
        for cells, axis in zip(self.maps, self.columns, strict=True):
            height, width = cells.shape[1:]
            first = (objects * height + self.rows.cells[:, 0][row]) * width + axis.cells[:, 0][column]
            high, wide = (torch.arange(part.cells.shape[1], device=first.device) for part in (self.rows, axis))
            taken = cells.flatten().take((high[:, None] * width + wide)[:, :, None] + first)  # (m, l, P)
            across = _last(axis.to_middle, axis.kinds[column])  # (t, l, P)
            values.append(_weigh(_weigh(taken, down).transpose(0, 1), across).transpose(0, 1))
        return reduce(torch.add, values).movedim(2, 0)

    def middle_of_all(self, blocks: Tensor) -> Tensor:
        """(B, N, s * t) logits of all objects in B blocks, at the middle's size. In memory the objects come first."""
        row, column = blocks // self.blocks[1], blocks % self.blocks[1]
        values = []
        for cells, axis in zip(self.maps, self.columns, strict=True):
            places = self.rows.cells[row][:, :, None] * cells.shape[2] + axis.cells[column][:, None]  # (B, m, l)
            taken = cells.flatten(1).index_select(1, places.flatten()).unflatten(1, (len(blocks), -1))  # (N, B, m * l)
            pairs = self.rows.kinds[row] * len(axis.to_middle) + axis.kinds[column]
            kinds, members = pairs.unique(return_inverse=True)
            weights = _both(
                self.rows.to_middle[kinds // len(axis.to_middle)], axis.to_middle[kinds % len(axis.to_middle)]
            )
            if len(kinds) == 1:
                values.append(taken @ weights[0])
            elif _MEMBERS * len(kinds) > len(blocks):
                values.append((taken.transpose(0, 1) @ weights[members]).transpose(0, 1))
            else:
                value = taken.new_empty(*taken.shape[:2], weights.shape[2])
                for number, part in enumerate(weights):
                    of_kind = (members == number).nonzero()[:, 0]
                    value[:, of_kind] = taken[:, of_kind] @ part
                values.append(value)
        return reduce(torch.add, values).transpose(0, 1)

    def to_output(self, blocks: Tensor, middle: Tensor) -> Tensor:
        """(B, K, SIDE, SIDE) of the values (B, K, s * t) at the middle of B blocks."""
        down, across = self.rows.to_output, self.columns[0].to_output
        row, column = blocks // self.blocks[1], blocks % self.blocks[1]
        height = self.rows.to_middle.shape[1]
        values = middle.unflatten(2, (height, -1))
        if down is not None:
            values = down[row][:, None] @ values
        return values if across is None else values @ across[column][:, None].transpose(2, 3)

    def clip_(self, values: Tensor, blocks: Tensor) -> Tensor:
        """The values (B, SIDE, SIDE) of B blocks, of which those become zero that belong to no pixel of the output."""
        places = blocks // self.blocks[1], blocks % self.blocks[1]
        for axis, numbers, dimension in zip((self.rows, self.columns[0]), places, (2, 1), strict=True):
            if len(axis) * SIDE > axis.size:
                inside = _last(axis.pixels().to(values.dtype), numbers)  # (SIDE, B)
                values.mul_(inside.T.unsqueeze(dimension))
        return values

    def areas(self) -> Tensor:
        """(blocks,) int64: how many pixels of each block the output has."""
        rows, columns = self.rows.pixels().sum(1), self.columns[0].pixels().sum(1)
        return (rows[:, None] * columns).flatten()

    def whole(self, values: Tensor) -> Tensor:
        """(..., H, W) of values (blocks, ..., SIDE, SIDE)."""
        rows, columns = self.blocks
        ordered = values.unflatten(0, (rows, columns)).movedim((0, 1), (-4, -2))  # (..., rows, SIDE, columns, SIDE)
        return ordered.flatten(-2).flatten(-3, -2)[..., : self.size[0], : self.size[1]]


def pieces(pairs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The true places of (N, blocks) as objects and blocks, so many at a time that the caches hold what they need."""
    objects, blocks = pairs.nonzero().T
    return zip(objects.split(PAIRS), blocks.split(PAIRS), strict=True)


def _last(values: Tensor, numbers: Tensor) -> Tensor:
    """(..., P): those of (n, ...) values that P numbers choose, as the last dimension."""
    return values.movedim(0, -1).contiguous().flatten(0, -2).index_select(1, numbers).unflatten(0, values.shape[1:])


def _weigh(values: Tensor, weights: Tensor) -> Tensor:
    """(s, l, P) sums over m of (m, l, P) values times (s, m, P) weights; the last dimension stays side by side."""
    total = weights[:, 0, None] * values[0]
    for number in range(1, len(values)):
        total.addcmul_(weights[:, number, None], values[number])
    return total


def _both(down: Tensor, across: Tensor) -> Tensor:
    """(n, m * l, s * t) weights by which cells make pixels, of (n, s, m) and (n, t, l) for rows and columns."""
    return torch.einsum("nsm,ntl->nmlst", down, across).flatten(3).flatten(1, 2)
