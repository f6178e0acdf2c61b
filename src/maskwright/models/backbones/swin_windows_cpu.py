"""The order in which the CPU path of a Swin stores its cells, window by window, and how to change between orders.

Windows are sorted by their shift mask. There are four: for windows inside the map, in its last column, in its last row,
and in both.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from maskwright.models.ops.cpu_path import CHUNK_ROWS


class Transition(NamedTuple):
    """The mapping from one order of rows to another.

    Attributes:
        index: (rows after,) position before; 0 for padding.
        inverse: (rows before,) position after; 0 for padding.
        dropped: rows before that are padding and have no position after; None if there are none.
    """

    index: Tensor
    inverse: Tensor
    dropped: Tensor | None


class Chunk(NamedTuple):
    """Consecutive windows with the same mask.

    Attributes:
        start: first row.
        stop: row after the last.
        mask: index of the mask.
        padding: rows that are padding, counted from `start`; None if there are none.
    """

    start: int
    stop: int
    mask: int
    padding: Tensor | None


class Windows(NamedTuple):
    """The order of a block's cells.

    Attributes:
        batch: number of images.
        transition: from the order of the block before.
        padding: rows that are padding; None if there are none.
        images: (B * windows,) image of each window.
        masks: (masks, T, T) float32, added to the scores.
        rows_per_mask: number of rows with each mask.
        chunks: all rows, in chunks that fit the cache of a CPU.
    """

    batch: int
    transition: Transition
    padding: Tensor | None
    images: Tensor
    masks: Tensor
    rows_per_mask: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class _Gather(torch.autograd.Function):
    """`rows.index_select(0, index)` with a backward pass that gathers too: only padding is selected more than once."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, inverse: Tensor, dropped: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, dropped)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inverse, dropped = ctx.saved_tensors
        gradient = gradients[0].index_select(0, inverse)
        return gradient if dropped is None else gradient.index_fill_(0, dropped, 0.0), None, None, None


def gather(rows: Tensor, transition: Transition) -> Tensor:
    """Reorder rows (before, C) to (after, C)."""
    return cast(Tensor, _Gather.apply(rows, *transition))


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def transition(
    batch: int, size: tuple[int, int], window: int, shift_before: int | None, shift_after: int | None
) -> Transition:
    """Return the mapping from windows with one shift to windows with another; a shift of None is raster order.

    Args:
        batch: number of images.
        size: (h, w) of the map in cells.
        window: side of the windows in cells.
        shift_before: shift in cells.
        shift_after: shift in cells.

    Returns:
        See `Transition`. Cached: do not write to it.
    """
    before, after = (_window_cells(batch, size, window, shift)[0].ravel() for shift in (shift_before, shift_after))

    def positions(cells: np.ndarray, order: np.ndarray) -> Tensor:
        position = np.zeros(batch * size[0] * size[1] + 1, np.int64)  # the last entry, for cell -1, stays 0
        rows = np.flatnonzero(order >= 0)
        position[order[rows]] = rows
        return torch.from_numpy(position[cells])

    return Transition(positions(after, before), positions(before, after), _true_indices(before < 0))


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def arrange_windows(batch: int, size: tuple[int, int], window: int, shift_before: int | None, shift: int) -> Windows:
    """Return the order of a block that shifts by `shift` cells, after one that shifted by `shift_before`.

    See `transition` for the arguments. Cached: do not write to it.
    """
    cells, mask_of_window = _window_cells(batch, size, window, shift)
    is_padding, window_cells = cells < 0, window * window
    chunks, start = [], 0
    counts = np.bincount(mask_of_window, minlength=4 if shift else 1).tolist()
    step = max(1, CHUNK_ROWS // window_cells)
    for mask, count in enumerate(counts):
        for first in range(start, start + count, step):
            last = min(first + step, start + count)
            padding = _true_indices(is_padding[first:last].ravel())
            chunks.append(Chunk(first * window_cells, last * window_cells, mask, padding))
        start += count
    return Windows(
        batch=batch,
        transition=transition(batch, size, window, shift_before, shift),
        padding=_true_indices(is_padding.ravel()),
        images=torch.from_numpy(cells.max(1) // (size[0] * size[1])),
        masks=_masks(window, shift),
        rows_per_mask=tuple(count * window_cells for count in counts),
        chunks=tuple(chunks),
    )


def _window_cells(batch: int, size: tuple[int, int], window: int, shift: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the raster index of each cell, (B * windows, T), -1 for padding, and the mask of each window.

    The map (h, w) is padded at the right and bottom to whole windows, then rolled up and left by `shift`. Masks are
    numbered 1 for the last window of a row, plus 2 in the last row. Without a shift (None), the map stays in raster
    order, as one window with mask 0.
    """
    h, w = size
    raster = np.arange(batch * h * w)
    if shift is None:
        return raster[None], np.zeros(1, np.int64)
    height, width = h + -h % window, w + -w % window
    padded = np.full((batch, height, width), -1)
    padded[:, :h, :w] = raster.reshape(batch, h, w)
    rolled = np.roll(padded, (-shift, -shift), (1, 2)).reshape(batch, height // window, window, width // window, window)
    cells = rolled.transpose(0, 1, 3, 2, 4).reshape(-1, window * window)
    masks = np.zeros((batch, height // window, width // window), np.int64)
    if shift:
        masks[:, :, -1] += 1
        masks[:, -1] += 2
    order = np.argsort(masks.ravel(), kind="stable")
    return cells[order], masks.ravel()[order]


def _masks(window: int, shift: int) -> Tensor:
    """Return the four masks (4, T, T), or one of zeros (1, T, T) without a shift; see `swin.shift_mask`."""
    if not shift:
        return torch.zeros(1, window * window, window * window)
    wrapped = torch.arange(window) >= window - shift
    across, down = wrapped.repeat(window), wrapped.repeat_interleave(window)
    right, bottom = (part[:, None] != part for part in (across, down))
    return torch.stack([torch.zeros_like(right), right, bottom, right | bottom]) * -100.0


def _true_indices(values: np.ndarray) -> Tensor | None:
    """Return the indices where the array is true; None if it is true nowhere."""
    return torch.from_numpy(np.flatnonzero(values)) if values.any() else None
