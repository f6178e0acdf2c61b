"""Stretches of equal numbers in maps of classes and ids: most maps are hundreds of times fewer of these than pixels.

Unusual here: what is asked of every pixel (which numbers, how often, what each means) is asked once per stretch. Maps
that change at more than one pixel in eight (noise) are worked on pixel by pixel, which is the faster way then.
"""

from __future__ import annotations

import numpy as np

_SHARE = 8  # with more stretches than one per so many pixels, there is nothing to gain


def present_values(values: np.ndarray) -> np.ndarray:
    """The different numbers of a map of whole numbers from 0 on, ascending."""
    flat = values.ravel()
    ends = _ends(flat)
    if ends is None:
        return np.flatnonzero(np.bincount(flat))
    return np.unique(flat[ends]).astype(np.intp)


def count_values(values: np.ndarray, count: int) -> np.ndarray:
    """(count,) int64, how often each of 0..count-1 occurs in a map of these numbers."""
    flat = values.ravel()
    ends = _ends(flat)
    if ends is None:
        return np.bincount(flat, minlength=count)
    # weighted counts are floats, exact up to 2^53 pixels
    return np.bincount(flat[ends], _lengths(ends), count).astype(np.int64)


def look_up_values(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`table[values]`: what each number of a map means, in the map's shape and the table's type."""
    flat = values.ravel()
    ends = _ends(flat)
    found = table.take(flat) if ends is None else np.repeat(table.take(flat[ends]), _lengths(ends))
    return found.reshape(values.shape)


def _ends(flat: np.ndarray) -> np.ndarray | None:
    """The last place of each stretch, ascending; None where there are too many, or no pixel."""
    changes = _true_places(flat[1:] != flat[:-1])
    return np.append(changes, len(flat) - 1) if _SHARE * len(changes) < len(flat) else None


def _lengths(ends: np.ndarray) -> np.ndarray:
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    lengths[0] += 1
    return lengths


def _true_places(flags: np.ndarray) -> np.ndarray:
    """`flags.nonzero()[0]` of (N,) flags that are mostly false, looked through by eights: half of the time."""
    whole = len(flags) // 8 * 8
    eights = (flags[:whole].view(np.uint64) != 0).nonzero()[0]
    inside = flags[:whole].reshape(-1, 8).take(eights, 0).ravel().nonzero()[0]
    places = eights.take(inside >> 3)
    places *= 8
    places += inside & 7
    return np.append(places, flags[whole:].nonzero()[0] + whole)
