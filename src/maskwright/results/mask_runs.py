"""Masks as runs: what an object in a very large image is held as, so that its size counts and not the image's.

The runs of a mask are an array (n, 2) uint32: the first pixel of each and the one behind its last, ascending. Pixels
are counted from 0 down the columns of the image, which has fewer than 2**32, as in COCO's run-length encoding; no run
goes on into the next column.
"""

from __future__ import annotations

import numpy as np

_BAND = 2**22  # pixels that are looked at together


def find_runs(mask: np.ndarray, top: int, left: int, image_height: int) -> np.ndarray:
    """The runs of a mask (h, w) bool whose first pixel is at (top, left) of an image; (0, 2) for an empty one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.zeros((0, 2), dtype=np.uint32)
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    width = max(1, _BAND // len(part))
    bands = (_column_runs(part[:, start : start + width], start) for start in range(0, part.shape[1], width))
    found = []
    for column, row in bands:
        column += left + columns[0]
        column *= image_height
        column += row
        column += top + rows[0]
        found.append(column.astype(np.uint32))
    return np.concatenate(found).reshape(-1, 2)


def _column_runs(band: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Column and row of where runs begin and end, in turns; the columns of the band count from `first`."""
    padded = np.zeros((band.shape[1], band.shape[0] + 2), dtype=bool)
    padded[:, 1:-1] = band.T
    column, row = np.nonzero(padded[:, 1:] != padded[:, :-1])
    column += first
    return column, row


def paint_runs(runs: np.ndarray, box: tuple[int, int, int, int], image_height: int) -> np.ndarray:
    """(h, w) bool: the mask of the runs, all of which lie in the box (top, left, bottom, right)."""
    top, left, bottom, right = box
    columns, rows = np.divmod(runs[:, 0].astype(np.int64), image_height)
    columns, rows = columns - left, rows - top
    change = np.zeros((right - left, bottom - top + 1), dtype=np.int8)
    change[columns, rows] = 1
    change[columns, rows + runs[:, 1] - runs[:, 0]] = -1
    return np.cumsum(change, axis=1, dtype=np.int8)[:, :-1].T.astype(bool)


def bounds(runs: np.ndarray, image_height: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the pixels, bottom and right exclusive; zeros for no run."""
    if not len(runs):
        return 0, 0, 0, 0
    columns, rows = np.divmod(runs[:, 0], image_height)
    ends = rows + runs[:, 1] - runs[:, 0]
    return int(rows.min()), int(columns[0]), int(ends.max()), int(columns[-1]) + 1
