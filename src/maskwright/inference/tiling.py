"""Large images in parts: where tiles and windows lie.

Every pixel belongs to the core of exactly one tile, the one that sees most around it: neighbours share their overlap in
the middle.
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

    def common(self, other: Rectangle) -> Rectangle | None:
        """What lies in both; None where they do not overlap."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.bottom, other.bottom), min(self.right, other.right)
        return Rectangle(top, left, bottom, right) if top < bottom and left < right else None

    def within(self, other: Rectangle) -> tuple[slice, slice]:
        """The rows and columns of an array that holds `other`."""
        return (
            slice(self.top - other.top, self.bottom - other.top),
            slice(self.left - other.left, self.right - other.left),
        )


class Tile(NamedTuple):
    """A part of an image.

    Attributes:
        area: what is looked at.
        core: the part of it that no other tile decides.
    """

    area: Rectangle
    core: Rectangle


def cut_tiles(size: tuple[int, int], tile: int, overlap: int) -> list[Tile]:
    """Tiles that cover an image, row by row; all of one size, as few as reach, evenly spread.

    Args:
        size: (height, width) of the image in pixels.
        tile: side in pixels; an image that is smaller in a direction is not cut there.
        overlap: least overlap of neighbours in pixels, below `tile`.
    """
    rows, columns = (_spans(length, tile, overlap) for length in size)
    return [
        Tile(Rectangle(top, left, bottom, right), Rectangle(core_top, core_left, core_bottom, core_right))
        for top, bottom, core_top, core_bottom in rows
        for left, right, core_left, core_right in columns
    ]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where sliding windows begin in one direction: every `stride` pixels, the last one moved back into the image.

    As OpenMMLab's mmseg (`slide_inference`). A window longer than the image becomes the image.
    """
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(number * stride, length - window), 0) for number in range(count)]


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """(start, end, start of the core, end of the core) of each tile in one direction."""
    if length <= tile:
        return [(0, length, 0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(number * (length - tile) / (count - 1)) for number in range(count)]
    cuts = [0, *((start + tile + following) // 2 for start, following in pairwise(starts)), length]
    return [(start, start + tile, *cut) for start, cut in zip(starts, pairwise(cuts), strict=True)]
