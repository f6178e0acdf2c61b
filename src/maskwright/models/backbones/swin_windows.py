"""The order in which a Swin holds its cells: window by window, and how rows of one order become those of another.

Windows are sorted by what their shift mask is, of which there are only four: inside the map, in its last column, in its
last row, and in both.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from maskwright.models.layers import CACHED_ROWS

_FAR = -100.0  # is added to the score of cells that only the shift made neighbours


class Transition(NamedTuple):
    """How rows of one order become those of another.

    Attributes:
        index: (rows after,) where each lies before; 0 for padding.
        inverse: (rows before,) where each lies after; 0 for padding.
        lost: numbers of the rows before that are padding and lie nowhere after; None where there are none.
    """

    index: Tensor
    inverse: Tensor
    lost: Tensor | None


class Chunk(NamedTuple):
    """Some windows that have the same mask: rows `start` to `stop`, of which `padded` are padding, from `start` on."""

    start: int
    stop: int
    kind: int
    padded: Tensor | None


class Windows(NamedTuple):
    """How a block sees its cells: window by window, those of one kind behind each other.

    Attributes:
        batch: images.
        transition: from the order of the block before.
        padded: rows of cells outside the map, or None.
        images: (B * windows,) the image of each window.
        kinds: (B * windows,) which of the masks each has.
        masks: (kinds, T, T) float32, added to the scores.
        counts: rows of each kind.
        chunks: the same in parts that fit the cache of a processor.
    """

    batch: int
    transition: Transition
    padded: Tensor | None
    images: Tensor
    kinds: Tensor
    masks: Tensor
    counts: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def spread(self, biases: Tensor) -> list[tuple[int, Tensor]]:
        """For all windows, how many rows have which bias; an accelerator gets one bias for each window instead."""
        if biases.device.type == "cpu":
            return [(rows, bias) for rows, bias in zip(self.counts, biases, strict=True) if rows]
        return [(sum(self.counts), biases.squeeze(1).index_select(0, self.kinds) if len(biases) > 1 else biases[0])]


class _Gather(torch.autograd.Function):
    """`rows.index_select(0, index)`, whose backward pass gathers as well: no row is taken twice, but as padding."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, inverse: Tensor, lost: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, lost)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inverse, lost = ctx.saved_tensors
        gradient = gradients[0].index_select(0, inverse)
        return gradient if lost is None else gradient.index_fill_(0, lost, 0.0), None, None, None


def gather(rows: Tensor, index: Tensor, inverse: Tensor, lost: Tensor | None) -> Tensor:
    """Rows (before, C) to (after, C); see `Transition` for the rest."""
    return cast(Tensor, _Gather.apply(rows, index, inverse, lost))


def _places(batch: int, size: tuple[int, int], window: int, shift: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(B * windows, T) the raster number of each cell, -1 for padding; (B * windows,) the kind of each window.

    The map (h, w) is padded right and bottom to whole windows, then rolled up and left by `shift`. Of a window's kind,
    1 says that it is the last of its row, 2 that it is in the last row. Without a shift all are of kind 0; a shift of
    None stands for the map in raster order, one window of kind 0.
    """
    h, w = size
    cells = np.arange(batch * h * w)
    if shift is None:
        return cells[None], np.zeros(1, np.int64)
    height, width = h + -h % window, w + -w % window
    padded = np.full((batch, height, width), -1)
    padded[:, :h, :w] = cells.reshape(batch, h, w)
    rolled = np.roll(padded, (-shift, -shift), (1, 2)).reshape(batch, height // window, window, width // window, window)
    places = rolled.transpose(0, 1, 3, 2, 4).reshape(-1, window * window)
    kinds = np.zeros((batch, height // window, width // window), np.int64)
    if shift:
        kinds[:, :, -1] += 1
        kinds[:, -1] += 2
    order = np.argsort(kinds.ravel(), kind="stable")
    return places[order], kinds.ravel()[order]


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def transition(
    batch: int, size: tuple[int, int], window: int, before: int | None, after: int | None, device: torch.device
) -> Transition:
    """From windows with one shift to windows with another; a shift of None stands for raster order.

    Args:
        batch: images.
        size: (h, w) of the map of cells.
        window: side of the windows in cells.
        before: shift in cells.
        after: shift in cells.
        device: where the rows are.

    Returns:
        See `Transition`. Shared between calls: do not write to it.
    """
    first, second = (_places(batch, size, window, shift)[0].ravel() for shift in (before, after))

    def found(places: np.ndarray, within: np.ndarray) -> Tensor:
        where = np.zeros(batch * size[0] * size[1] + 1, np.int64)
        real = np.flatnonzero(within >= 0)
        where[within[real]] = real
        return torch.from_numpy(where[places]).to(device)  # -1 is the last entry, which stays 0

    return Transition(found(second, first), found(first, second), _numbers(first < 0, device))


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def arrange_windows(
    batch: int, size: tuple[int, int], window: int, before: int | None, shift: int, device: torch.device
) -> Windows:
    """The windows of a block that shifts by `shift` cells, behind one that shifted by `before`; see `transition`."""
    places, kinds = _places(batch, size, window, shift)
    padded, cells = places < 0, window * window
    chunks, start = [], 0
    counts = np.bincount(kinds, minlength=4 if shift else 1).tolist()
    for kind, count in enumerate(counts):
        step = max(1, CACHED_ROWS // cells)
        for first in range(start, start + count, step):
            last = min(first + step, start + count)
            chunks.append(Chunk(first * cells, last * cells, kind, _numbers(padded[first:last].ravel(), device)))
        start += count
    return Windows(
        batch,
        transition(batch, size, window, before, shift, device),
        _numbers(padded.ravel(), device),
        torch.from_numpy(places.max(1) // (size[0] * size[1])).to(device),
        torch.from_numpy(kinds).to(device),
        _masks(window, shift).to(device),
        tuple(count * cells for count in counts),
        tuple(chunks),
    )


def _masks(window: int, shift: int) -> Tensor:
    """(4, T, T), or (1, T, T) of zeros without a shift: for each kind, see `_places`, what is added to the scores."""
    if not shift:
        return torch.zeros(1, window * window, window * window)
    wrapped = torch.arange(window) >= window - shift
    across, down = wrapped.repeat(window), wrapped.repeat_interleave(window)
    right, bottom = (part[:, None] != part for part in (across, down))
    return torch.stack([torch.zeros_like(right), right, bottom, right | bottom]) * _FAR


def _numbers(chosen: np.ndarray, device: torch.device) -> Tensor | None:
    """Where the array is true; None for nowhere."""
    return torch.from_numpy(np.flatnonzero(chosen)).to(device) if chosen.any() else None
