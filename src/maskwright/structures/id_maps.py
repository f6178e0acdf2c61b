"""Counts and look-ups in label maps and id maps.

Unusual: neighboring pixels mostly have the same value, so values are compared and looked up once per run of
equal pixels (row by row) instead of once per pixel. Maps with more than one run per eight pixels, such as noise, are
processed pixel by pixel, which is faster there.
"""

from __future__ import annotations

import numpy as np

_MIN_RUN_LENGTH = 8  # on average, in pixels; with shorter runs there is nothing to gain


def id_dtype(count: int) -> type[np.uint8] | type[np.int32]:
    """Return the type of an id map with `count` objects."""
    return np.uint8 if count < 256 else np.int32


def present_values(values: np.ndarray) -> np.ndarray:
    """Return the distinct values of a map of integers >= 0, ascending."""
    flat = values.ravel()
    ends = _run_ends(flat)
    if ends is None:
        return np.flatnonzero(np.bincount(flat))
    return np.unique(flat[ends]).astype(np.intp)


def count_values(values: np.ndarray, count: int) -> np.ndarray:
    """Return the number of pixels of each value 0..count-1 in a map of these values, (count,) int64."""
    flat = values.ravel()
    ends = _run_ends(flat)
    if ends is None:
        return np.bincount(flat, minlength=count)
    # Weighted counts are floats, which are exact up to 2**53 pixels.
    return np.bincount(flat[ends], _run_lengths(ends), count).astype(np.int64)


def look_up(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return `table[values]` for a map of integers >= 0: the shape of the map, the type of the table."""
    if values.dtype == np.uint8 and table.itemsize == 1:
        return _look_up_bytes(table, values)
    flat = values.ravel()
    ends = _run_ends(flat)
    found = table.take(flat) if ends is None else np.repeat(table.take(flat[ends]), _run_lengths(ends))
    return found.reshape(values.shape)


def _look_up_bytes(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Translate bytes to bytes, in a tenth of the time of numpy's indexing."""
    translation = np.zeros(256, dtype=table.dtype)
    translation[: len(table)] = table[:256]
    found = bytearray(np.ascontiguousarray(values)).translate(translation.tobytes())
    return np.frombuffer(found, dtype=table.dtype).reshape(values.shape)


def _run_ends(flat: np.ndarray) -> np.ndarray | None:
    """Return the last index of each run, ascending; None if the runs are too short, or there is no pixel."""
    changes = _sparse_nonzero(flat[1:] != flat[:-1])
    return np.append(changes, len(flat) - 1) if _MIN_RUN_LENGTH * len(changes) < len(flat) else None


def _run_lengths(ends: np.ndarray) -> np.ndarray:
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    lengths[0] += 1
    return lengths


def _sparse_nonzero(flags: np.ndarray) -> np.ndarray:
    """Return `flags.nonzero()[0]` of (N,) bool that is mostly False, tested in groups of eight: half of the time."""
    grouped = len(flags) // 8 * 8
    groups = (flags[:grouped].view(np.uint64) != 0).nonzero()[0]
    inside = flags[:grouped].reshape(-1, 8).take(groups, 0).ravel().nonzero()[0]
    indices = groups.take(inside >> 3)
    indices *= 8
    indices += inside & 7
    return np.append(indices, flags[grouped:].nonzero()[0] + grouped)
