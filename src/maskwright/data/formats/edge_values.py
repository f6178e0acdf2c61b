"""Values that resizing with interpolation, or lossy compression, adds to label images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

_MIN_EDGE_SHARE = 0.7  # of the pixels of a value, for it to count as added
_MIN_ADDED, _MAX_PIXEL_SHARE = 3, 0.4


def edge_pixels(values: np.ndarray) -> np.ndarray:
    """Return which pixels of a label image (H, W) or (H, W, C) are unlike the inside of an area, (H, W) bool.

    They lie between the values of their neighbors on two sides, without being equal to one, or equal none of four.
    """
    channels = values[..., None] if values.ndim == 2 else values
    padded = np.pad(channels.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    middle = padded[1:-1, 1:-1]
    up, down, left, right = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    isolated = np.ones(middle.shape[:2], dtype=bool)
    isolated[[0, -1]] = isolated[:, [0, -1]] = False  # their neighbors are copies of themselves
    for neighbor in (up, down, left, right):
        isolated &= (middle != neighbor).any(-1)
    return isolated | _is_between(middle, up, down) | _is_between(middle, left, right)


def _is_between(middle: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    within = ((np.minimum(first, second) <= middle) & (middle <= np.maximum(first, second))).all(-1)
    return within & (middle != first).any(-1) & (middle != second).any(-1)


def find_added_values(images: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[list[int], int]:
    """Return the values that interpolation or compression seems to have added, and the number of all values.

    The list is empty unless most values are such, with a minority of the pixels: areas of a class are rarely one pixel
    wide.

    Args:
        images: pairs of a label image (H, W) or (H, W, C), and one number (H, W) for each of its values.
    """
    pixels: Counter[int] = Counter()
    on_edges: Counter[int] = Counter()
    for values, numbers in images:
        for counter, chosen in ((pixels, numbers), (on_edges, numbers[edge_pixels(values)])):
            found, counts = np.unique(chosen, return_counts=True)
            counter.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
    added = sorted(value for value, count in pixels.items() if on_edges[value] >= _MIN_EDGE_SHARE * count)
    share = sum(pixels[value] for value in added) / max(pixels.total(), 1)
    is_typical = len(added) >= max(_MIN_ADDED, len(pixels) / 2) and share <= _MAX_PIXEL_SHARE
    return (added if is_typical else []), len(pixels)
