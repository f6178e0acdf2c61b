"""Segments cut out of a result, their connected parts, and polygons around these parts.

A polygon runs along the edges of pixels, `INSET` inside of them. So it is exact both for tools that fill
the pixels whose center is inside (the COCO API), and for tools that truncate coordinates to pixel indices and also draw
the outline (OpenCV, Pillow).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.ndimage

from maskwright.results.rle import decode_runs, runs_box
from maskwright.results.segmentation import Segmentation

INSET = 1 / 16  # pixels

# The four sides of a pixel, clockwise from the top; each is followed with the pixel on its right.
_ENDS = np.array([[1, 0], [1, 1], [0, 1], [0, 0]])  # x, y of the corner that ends a side, from the pixel's top left
_AHEAD = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])  # x, y of the next pixel along a side
_INSIDE = np.array([[0, 1], [-1, 0], [0, -1], [1, 0]])  # x, y from a side to the inside of its pixel


class Crop(NamedTuple):
    """A mask (h, w) bool whose first pixel is at row `top` and column `left` of the image."""

    mask: np.ndarray
    top: int
    left: int


class Polygon(NamedTuple):
    """The outline of a connected part.

    Attributes:
        points: (n, 2) float64 x, y in pixels of the image; n >= 4, clockwise.
        has_hole: True if it encloses pixels outside the part.
    """

    points: np.ndarray
    has_hole: bool


def crop_segments(segmentation: Segmentation) -> Iterator[tuple[int, Crop]]:
    """Yield the index and mask of each segment, in ascending order; segments without a pixel are skipped."""
    if segmentation.instance_runs is not None:
        crops = (_crop_runs(runs, segmentation.size[0]) for runs in segmentation.instance_runs)
    elif segmentation.instance_masks is not None:
        crops = (_crop_mask(mask) for mask in segmentation.instance_masks)
    else:
        crops = crop_ids(segmentation.id_map(), len(segmentation))
    return ((index, crop) for index, crop in enumerate(crops) if crop is not None)


def split_parts(crop: Crop) -> list[Crop]:
    """Return the parts of a mask, in which pixels are connected by sides or corners."""
    parts, count = scipy.ndimage.label(crop.mask, np.ones((3, 3)))
    boxes = scipy.ndimage.find_objects(parts, count)
    return [
        Crop(parts[box] == part, crop.top + box[0].start, crop.left + box[1].start) for part, box in enumerate(boxes, 1)
    ]


def trace_polygons(crop: Crop) -> list[Polygon]:
    """Return the outline of each part of a mask, in which pixels are connected by sides. Holes are not traced."""
    parts, count = scipy.ndimage.label(crop.mask)
    areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    _, first = np.unique(parts[crop.mask], return_index=True)
    starts = np.flatnonzero(crop.mask)[first]  # the first pixel of a part in row order: its top is on the outline
    following = _following_sides(crop.mask)
    polygons = []
    for start, area in zip(starts.tolist(), areas.tolist(), strict=True):
        corners, inside = _corners(_follow(following, 4 * start), crop.mask.shape[1])
        points = corners + INSET * inside + (crop.left, crop.top)
        polygons.append(Polygon(points, has_hole=_enclosed_area(corners) > area))
    return polygons


def _crop_runs(runs: np.ndarray, image_height: int) -> Crop | None:
    top, left, bottom, right = box = runs_box(runs, image_height)
    return Crop(decode_runs(runs, box, image_height), top, left) if bottom > top and right > left else None


def _crop_mask(mask: np.ndarray) -> Crop | None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return Crop(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], int(rows[0]), int(columns[0]))


def crop_ids(ids: np.ndarray, count: int) -> Iterator[Crop | None]:
    """Yield the mask of each of the objects 1..count of an id map (H, W); None for one without a pixel."""
    boxes = scipy.ndimage.find_objects(ids, max(1, count))[:count]
    for number, box in enumerate(boxes, 1):
        yield None if box is None else Crop(ids[box] == number, box[0].start, box[1].start)


def _following_sides(mask: np.ndarray) -> dict[int, int]:
    """Return the side that follows each side of the outlines; side s of pixel p, in row order, has the number 4p + s.

    Where two pixels touch only at a corner, the outline stays at its pixel, so they are different parts.
    """
    padded = np.pad(mask, 1)
    width = mask.shape[1]
    following: dict[int, int] = {}
    for side, ((ahead_x, ahead_y), (inside_x, inside_y)) in enumerate(zip(_AHEAD, _INSIDE, strict=True)):
        y, x = np.nonzero(mask & ~_shifted(padded, -inside_x, -inside_y))
        ahead = padded[y + ahead_y + 1, x + ahead_x + 1]
        beyond = padded[y + ahead_y - inside_y + 1, x + ahead_x - inside_x + 1]
        pixel, step, outward = y * width + x, ahead_y * width + ahead_x, -(inside_y * width + inside_x)
        turn_right = 4 * pixel + (side + 1) % 4
        straight = 4 * (pixel + step) + side
        turn_left = 4 * (pixel + step + outward) + (side - 1) % 4
        chosen = np.where(~ahead, turn_right, np.where(~beyond, straight, turn_left))
        following.update(zip((4 * pixel + side).tolist(), chosen.tolist(), strict=True))
    return following


def _shifted(padded: np.ndarray, x: int, y: int) -> np.ndarray:
    """Return the neighbors at distance x, y of all pixels, from the mask with a border of one pixel."""
    height, width = padded.shape[0] - 2, padded.shape[1] - 2
    return padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]


def _follow(following: dict[int, int], start: int) -> np.ndarray:
    """Return the numbers of the sides of one outline, in order."""
    sides = [start]
    while (side := following[sides[-1]]) != start:
        sides.append(side)
    return np.array(sides)


def _corners(sides: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners (n, 2) x, y of an outline, and the direction (n, 2) from each to the inside."""
    pixels, directions = np.divmod(sides, 4)
    after = np.roll(directions, -1)
    turns = directions != after
    rows, columns = np.divmod(pixels[turns], width)
    corners = np.stack([columns, rows], 1) + _ENDS[directions[turns]]
    return corners, _INSIDE[directions[turns]] + _INSIDE[after[turns]]


def _enclosed_area(corners: np.ndarray) -> int:
    """Return the area of a polygon in pixels."""
    x, y = corners.T
    return abs(int(x @ np.roll(y, -1) - y @ np.roll(x, -1))) // 2
