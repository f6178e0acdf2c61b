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


@dataclass(frozen=True)
class Axis:
    """One dimension, cut into blocks of `SIDE` output pixels; the last one repeats the last pixel.

    Attributes:
        cells: (n, m) the coarse cells that each block depends on.
        to_middle: (n, s, m) weights by which the block's cells make its middle pixels.
        to_output: (n, SIDE, s) weights by which its middle pixels make those of the output; None where they are those.
        size: output pixels.
    """

    cells: Tensor
    to_middle: Tensor
    to_output: Tensor | None
    size: int

    def __len__(self) -> int:
        return len(self.cells)

    def part(self, start: int, stop: int) -> Axis:
        """Of the blocks from `start` to before `stop`."""
        to_output = None if self.to_output is None else self.to_output[start:stop]
        size = min(self.size, stop * SIDE) - start * SIDE
        return Axis(self.cells[start:stop], self.to_middle[start:stop], to_output, size)


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
        return Axis(cells.to(device), to_middle.to(device), to_output.to(device), output)
    cells, to_middle = _narrow(_resize(to_inner, output)[rows])
    return Axis(cells.to(device), to_middle.to(device), None, output)


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
    """Of (n, rows, size) weights the columns that each n needs: (n, m) numbers, and (n, rows, m) their weights."""
    used = weights.ne(0).any(1)  # (n, size)
    start = used.int().argmax(1)
    end = used.shape[1] - used.flip(1).int().argmax(1)
    columns = start[:, None] + torch.arange(int((end - start).max()))
    inside = columns < used.shape[1]
    columns = columns.clamp_max(used.shape[1] - 1)
    taken = weights.gather(2, columns[:, None].expand(-1, weights.shape[1], -1))
    return columns, taken * inside[:, None]


class BlockMasks:
    """Mask logits of N objects as means of coarse maps, by blocks of the output.

    Blocks are numbered row by row; there are `len(rows) * len(columns)`.

    Args:
        maps: (h, w, N) float32 each; the logits of an object are the sum over all maps.
        rows: how the first dimension of all maps is resized.
        columns: how the second of each is.
    """

    def __init__(self, maps: Sequence[Tensor], rows: Axis, columns: Sequence[Axis]) -> None:
        self.maps, self.rows, self.columns = maps, rows, columns
        self.size = (rows.size, columns[0].size)
        self.blocks = len(rows), len(columns[0])

    def bands(self, values: int) -> Iterator[tuple[slice, BlockMasks]]:
        """Horizontal bands and the output rows of each; what is held of one is about so many values."""
        rows, columns = self.blocks
        step = max(1, values // (columns * SIDE * SIDE * max(1, self.maps[0].shape[2])))
        for start in range(0, rows, step):
            part = self.rows.part(start, min(rows, start + step))
            yield slice(start * SIDE, start * SIDE + part.size), BlockMasks(self.maps, part, self.columns)

    def every_block(self) -> Tensor:
        """The numbers of all blocks."""
        return torch.arange(self.blocks[0] * self.blocks[1], device=self.maps[0].device)

    def least(self) -> Tensor:
        """(blocks, N): no middle pixel of the block has a logit below it."""
        return self._extreme(torch.minimum)

    def largest(self) -> Tensor:
        """(blocks, N): no middle pixel of the block has a logit above it."""
        return self._extreme(torch.maximum)

    def _extreme(self, choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        found = []
        for cells, axis in zip(self.maps, self.columns, strict=True):
            for dimension, needed in enumerate((self.rows.cells, axis.cells)):
                cells = reduce(choose, (cells.index_select(dimension, numbers) for numbers in needed.T))
            found.append(cells.flatten(0, 1))
        return reduce(torch.add, found)

    def middle(self, blocks: Tensor, objects: Tensor) -> Tensor:
        """(P, s, t) logits of P pairs of a block and an object."""
        row, column = blocks // self.blocks[1], blocks % self.blocks[1]
        values = []
        for cells, axis in zip(self.maps, self.columns, strict=True):
            width, count = cells.shape[1:]
            places = self.rows.cells[row][:, :, None] * width + axis.cells[column][:, None]  # (P, m, l)
            taken = cells.flatten()[places * count + objects[:, None, None]]
            values.append(self.rows.to_middle[row] @ taken @ axis.to_middle[column].transpose(1, 2))
        return reduce(torch.add, values)

    def middle_of_all(self, blocks: Tensor) -> Tensor:
        """(B, N, s * t) logits of all objects in B blocks, at the middle's size."""
        row, column = blocks // self.blocks[1], blocks % self.blocks[1]
        values = []
        for cells, axis in zip(self.maps, self.columns, strict=True):
            places = self.rows.cells[row][:, :, None] * cells.shape[1] + axis.cells[column][:, None]  # (B, m, l)
            taken = cells.flatten(0, 1)[places.flatten(1)]  # (B, m * l, N)
            down, across = self.rows.to_middle[row], axis.to_middle[column]  # (B, s, m), (B, t, l)
            weights = torch.einsum("bsm,btl->bstml", down, across).flatten(3).flatten(1, 2)  # (B, s * t, m * l)
            values.append(taken.transpose(1, 2) @ weights.transpose(1, 2))
        return reduce(torch.add, values)

    def to_output(self, blocks: Tensor, middle: Tensor) -> Tensor:
        """(B, K, SIDE, SIDE) of the values (B, K, s * t) at the middle of B blocks."""
        down, across = self.rows.to_output, self.columns[0].to_output
        row, column = blocks // self.blocks[1], blocks % self.blocks[1]
        height = self.rows.to_middle.shape[1]
        values = middle.unflatten(2, (height, -1))
        if down is not None:
            values = down[row][:, None] @ values
        return values if across is None else values @ across[column][:, None].transpose(2, 3)

    def pixels(self) -> Tensor:
        """(blocks, SIDE, SIDE) bool: which pixels of the blocks the output has."""
        rows, columns = (
            (torch.arange(count * SIDE, device=self.maps[0].device) < size).view(count, SIDE)
            for count, size in zip(self.blocks, self.size, strict=True)
        )
        return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(0, 1)

    def whole(self, values: Tensor) -> Tensor:
        """(..., H, W) of values (blocks, ..., SIDE, SIDE)."""
        rows, columns = self.blocks
        ordered = values.unflatten(0, (rows, columns)).movedim((0, 1), (-4, -2))  # (..., rows, SIDE, columns, SIDE)
        return ordered.flatten(-2).flatten(-3, -2)[..., : self.size[0], : self.size[1]]
