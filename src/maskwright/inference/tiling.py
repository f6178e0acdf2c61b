"""Tiles of large images: overlapping rectangles, each with a core.

Every pixel is in the core of exactly one tile, the one with the most context around it: the border between the cores of
two neighbors runs through the middle of their overlap.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple


class Rectangle(NamedTuple):
    """Pixels of an image; `bottom` and `right` are exclusive."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.bottom - self.top, self.right - self.left

    def intersection(self, other: Rectangle) -> Rectangle | None:
        """Return the common part; None if there is none."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Rectangle(top, left, bottom, right) if top < bottom and left < right else None

    def slices_in(self, other: Rectangle) -> tuple[slice, slice]:
        """Return the rows and columns of this rectangle in an array of the pixels of `other`."""
        return (
            slice(self.top - other.top, self.bottom - other.top),
            slice(self.left - other.left, self.right - other.left),
        )


class Tile(NamedTuple):
    """A part of an image.

    Attributes:
        area: the pixels that the tile sees.
        core: the part of them that only this tile decides.
    """

    area: Rectangle
    core: Rectangle


def cut_tiles(size: tuple[int, int], tile: int, overlap: int | None) -> list[Tile]:
    """Cover an image with as few tiles of one size as possible, evenly spaced, row by row.

    Args:
        size: (height, width) of the image in pixels.
        tile: side in pixels; an image is not cut in a dimension in which it is smaller.
        overlap: minimum overlap of neighbors in pixels, less than `tile`; None is an eighth of it.
    """
    overlap = tile // 8 if overlap is None else overlap
    rows, columns = (_spans(length, tile, overlap) for length in size)
    return [
        Tile(Rectangle(top, left, bottom, right), Rectangle(core_top, core_left, core_bottom, core_right))
        for top, bottom, core_top, core_bottom in rows
        for left, right, core_left, core_right in columns
    ]


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Return (start, end, start of the core, end of the core) of each tile along one dimension."""
    if length <= tile:
        return [(0, length, 0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(index * (length - tile) / (count - 1)) for index in range(count)]
    cuts = [0, *((start + tile + following) // 2 for start, following in pairwise(starts)), length]
    return [(start, start + tile, *cut) for start, cut in zip(starts, pairwise(cuts), strict=True)]
