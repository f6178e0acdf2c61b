"""The order in which the CPU path of Swin predictions stores cells, window by window, and conversions between orders.

Windows are sorted by their shift mask. There are four: for windows inside the map, in its last column, in its last row,
and in both. Stored cells are those of the map; padding has no row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskwright.models.ops.cpu_path import CHUNK_ROWS


class Chunk(NamedTuple):
    """Consecutive windows with the same mask that fit a CPU's cache.

    Attributes:
        cells: (windows * T,) int64, row of each cell in the order of the block before; 0 for padding.
        mask: index of the mask.
        padding: (n,) int64, indices into `cells` that are padding; None without padding.
        inside: (windows * T - n,) int64, the remaining indices; None without padding.
    """

    cells: Tensor
    mask: int
    padding: Tensor | None
    inside: Tensor | None


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def window_chunks(
    batch: int, size: tuple[int, int], window: int, shift_before: int | None, shift: int
) -> tuple[Chunk, ...]:
    """Return the windows of a block that shifts by `shift` cells, after one that shifted by `shift_before`.

    Args:
        batch: number of images.
        size: (h, w) of the map in cells.
        window: side of the windows in cells.
        shift_before: shift of the block before in cells; None is raster order.
        shift: shift in cells.

    Returns:
        All windows in chunks, sorted by mask. Cached: do not write to it.
    """
    cells, mask_of_window = _window_cells(batch, size, window, shift)
    row_before = _row_of_cell(batch, size, window, shift_before)
    step = max(1, CHUNK_ROWS // window**2)
    chunks = []
    for mask in np.unique(mask_of_window):
        of_mask = cells[mask_of_window == mask]
        for start in range(0, len(of_mask), step):
            part = of_mask[start : start + step].ravel()
            padding, inside = np.flatnonzero(part < 0), np.flatnonzero(part >= 0)
            rows = np.where(part < 0, 0, row_before[part])
            is_padded = len(padding) > 0
            chunks.append(
                Chunk(
                    cells=torch.from_numpy(rows),
                    mask=int(mask),
                    padding=torch.from_numpy(padding) if is_padded else None,
                    inside=torch.from_numpy(inside) if is_padded else None,
                )
            )
    return tuple(chunks)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def raster_order(batch: int, size: tuple[int, int], window: int, shift: int) -> Tensor:
    """Return (B * h * w,) int64: for each cell in raster order, its row after a block. Cached: do not write to it."""
    return torch.from_numpy(_row_of_cell(batch, size, window, shift))


def _row_of_cell(batch: int, size: tuple[int, int], window: int, shift: int | None) -> np.ndarray:
    """Return the row of each cell (B * h * w,); a shift of None is raster order."""
    raster = np.arange(batch * size[0] * size[1])
    if shift is None:
        return raster
    cells = _window_cells(batch, size, window, shift)[0].ravel()
    rows = np.empty_like(raster)
    rows[cells[cells >= 0]] = raster
    return rows


def _window_cells(batch: int, size: tuple[int, int], window: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the raster index of each cell, (B * windows, T), -1 for padding, and the mask of each window, sorted.

    The map (h, w) is padded at the right and bottom to whole windows, then rolled up and left by `shift`. Masks are 0
    inside the map, plus 1 in the last column of windows, plus 2 in the last row; all are 0 without a shift.
    """
    h, w = size
    height, width = h + -h % window, w + -w % window
    padded = np.full((batch, height, width), -1)
    padded[:, :h, :w] = np.arange(batch * h * w).reshape(batch, h, w)
    rolled = np.roll(padded, (-shift, -shift), (1, 2)).reshape(batch, height // window, window, width // window, window)
    cells = rolled.transpose(0, 1, 3, 2, 4).reshape(-1, window * window)
    masks = np.zeros((batch, height // window, width // window), np.int64)
    if shift:
        masks[:, :, -1] += 1
        masks[:, -1] += 2
    order = np.argsort(masks.ravel(), kind="stable")
    return cells[order], masks.ravel()[order]


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def window_masks(window: int, shift: int) -> Tensor:
    """Return the four masks (4, T, T), 0 or -100, as `swin.shift_mask`; 0 without a shift. Do not write to it."""
    wrapped = torch.arange(window) >= window - shift
    across, down = wrapped.repeat(window), wrapped.repeat_interleave(window)
    right, bottom = (part[:, None] != part for part in (across, down))
    return torch.stack([torch.zeros_like(right), right, bottom, right | bottom]) * -100.0
