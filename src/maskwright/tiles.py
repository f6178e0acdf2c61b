"""Large images in parts: where tiles and windows lie, and how the results of tiles become one.

Every pixel belongs to the core of exactly one tile, the one that sees most around it: neighbours share their overlap in
the middle. Semantic results are cut there. Objects are first compared in the overlap, where two tiles see the same
pixels: two of one class whose IoU there is above one half are one object, so an object may span any number of tiles.

What is unusual: nothing is held per object at the size of the image. A panoptic result is one map of numbers, an
instance is its runs, and of the tiles only those are kept that a later one overlaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from maskwright.runs import bounds, find_runs, paint_runs
from maskwright.structures import Category, Segmentation, Task

SAME_OBJECT = 0.5  # IoU in the overlap of two tiles above which what they see is one object
_ROWS = 512  # of a map that are looked at together


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


class Mosaic(Protocol):
    """Gathers the results of tiles, in the order of `cut_tiles`, into that of the image."""

    def add(self, tile: Tile, result: Segmentation) -> None:
        """Add the result of the next tile."""
        ...

    def finish(self) -> Segmentation:
        """The result of the whole image; nothing can be added afterwards."""
        ...


def start_mosaic(task: Task, size: tuple[int, int], categories: tuple[Category, ...]) -> Mosaic:
    """An empty mosaic of an image of `size` (height, width)."""
    match task:
        case "semantic":
            return _SemanticMosaic(size, categories)
        case "instance":
            return _InstanceMosaic(size, categories)
        case "panoptic":
            return _PanopticMosaic(size, categories)


class _SemanticMosaic:
    """Labels in the smallest integers that hold them."""

    def __init__(self, size: tuple[int, int], categories: tuple[Category, ...]) -> None:
        self.categories = categories
        self.label_map = np.zeros(size, dtype=np.min_scalar_type(len(categories)))
        self.seen = np.zeros(len(categories), dtype=bool)

    def add(self, tile: Tile, result: Segmentation) -> None:
        assert result.label_map is not None
        part = result.label_map[tile.core.within(tile.area)]
        self.label_map[tile.core.within(_whole(self.label_map))] = part
        self.seen[np.unique(part)] = True

    def finish(self) -> Segmentation:
        labels = np.flatnonzero(self.seen)
        return Segmentation("semantic", self.label_map.shape, self.categories, labels, label_map=self.label_map)


@dataclass
class _Groups:
    """Which of the numbers 0, 1, 2, ... are one object; the smallest of them stands for all."""

    leaders: list[int] = field(default_factory=list)

    def add(self, count: int) -> int:
        """Make `count` more objects; returns the number of the first."""
        first = len(self.leaders)
        self.leaders.extend(range(first, first + count))
        return first

    def leader(self, number: int) -> int:
        while self.leaders[number] != number:
            self.leaders[number] = self.leaders[self.leaders[number]]
            number = self.leaders[number]
        return number

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self.leader(one), self.leader(other)))
        self.leaders[second] = first

    def members(self) -> Iterator[list[int]]:
        """The numbers of each object, in the order of its first."""
        together: dict[int, list[int]] = {}
        for number in range(len(self.leaders)):
            together.setdefault(self.leader(number), []).append(number)
        return iter(together.values())


class _PanopticMosaic:
    """A map of provisional numbers, 1 and up through all tiles, that `finish` replaces."""

    def __init__(self, size: tuple[int, int], categories: tuple[Category, ...]) -> None:
        self.categories = categories
        self.segment_map = np.zeros(size, dtype=np.int32)
        self.groups = _Groups()
        self.labels: list[int] = []
        self.scores: list[float] = []
        self.areas: list[int] = []  # in the segment's tile
        self.core_areas: list[int] = []
        self.recent: list[tuple[Tile, np.ndarray, int]] = []  # tile, its map, number of its first segment

    def add(self, tile: Tile, result: Segmentation) -> None:
        own = result.segment_map
        assert own is not None
        assert result.scores is not None
        first, count = self.groups.add(len(result)), len(result)
        self.labels += result.labels.tolist()
        self.scores += result.scores.tolist()
        core = own[tile.core.within(tile.area)]
        self.areas += np.bincount(own.ravel(), minlength=count + 1)[1:].tolist()
        self.core_areas += np.bincount(core.ravel(), minlength=count + 1)[1:].tolist()
        self.segment_map[tile.core.within(_whole(self.segment_map))] = np.where(core > 0, core + first, 0)
        self.recent = [earlier for earlier in self.recent if earlier[0].area.bottom > tile.area.top]
        for other, map_, other_first in self.recent:
            if (overlap := tile.area.common(other.area)) is not None:
                pairs = _same_segments(map_[overlap.within(other.area)], own[overlap.within(tile.area)])
                for one, two in pairs:
                    if self.labels[other_first + one] == self.labels[first + two]:
                        self.groups.join(other_first + one, first + two)
        self.recent.append((tile, own, first))

    def finish(self) -> Segmentation:
        first_of: dict[int, int] = {}
        for number, label in enumerate(self.labels):
            if not self.categories[label].is_thing:  # pieces of one stuff class are one segment
                self.groups.join(first_of.setdefault(label, number), number)
        table = np.zeros(len(self.labels) + 1, dtype=np.int32)
        labels, scores = [], []
        for members in self.groups.members():
            label, area = self.labels[members[0]], sum(self.core_areas[i] for i in members)
            unconfirmed = len(members) == 1 and 2 * area < self.areas[members[0]]
            if area and not (unconfirmed and self.categories[label].is_thing):
                labels.append(label)
                scores.append(sum(self.scores[i] * self.core_areas[i] for i in members) / area)
                table[[i + 1 for i in members]] = len(labels)
        for rows in _bands(self.segment_map):
            np.take(table, rows, out=rows)
        return Segmentation(
            "panoptic",
            self.segment_map.shape,
            self.categories,
            np.array(labels, dtype=np.int64),
            np.array(scores, dtype=np.float32),
            segment_map=self.segment_map,
        )


class _Instance(NamedTuple):
    """What one tile found.

    Attributes:
        tile: that found it.
        label: its class.
        score: 0..1.
        runs: its mask, see `runs`.
        area: pixels.
        core_area: of these, in the core of the tile.
    """

    tile: Tile
    label: int
    score: float
    runs: np.ndarray
    area: int
    core_area: int


class _InstanceMosaic:
    """Every object that a tile found, as runs.

    An object that only one tile sees is whole, as that tile sees it, and is dropped where the greater part of it lies
    in the cores of others, who do not confirm it. An object that several tiles see is, in the core of each, what that
    tile says.
    """

    def __init__(self, size: tuple[int, int], categories: tuple[Category, ...]) -> None:
        self.size, self.categories = size, categories
        self.groups = _Groups()
        self.found: list[_Instance] = []
        self.recent: list[tuple[Tile, np.ndarray, int]] = []  # tile, its masks in packed bits, number of the first

    def add(self, tile: Tile, result: Segmentation) -> None:
        masks = result.masks  # (N, h, w)
        assert result.scores is not None
        first = self.groups.add(len(result))
        for mask, label, score in zip(masks, result.labels.tolist(), result.scores.tolist(), strict=True):
            area, core_area = (int(np.count_nonzero(part)) for part in (mask, mask[tile.core.within(tile.area)]))
            runs = find_runs(mask, tile.area.top, tile.area.left, self.size[0])
            self.found.append(_Instance(tile, label, score, runs, area, core_area))
        self.recent = [earlier for earlier in self.recent if earlier[0].area.bottom > tile.area.top]
        for other, packed, other_first in self.recent:
            if (overlap := tile.area.common(other.area)) is not None:
                iou = _mask_iou(packed, overlap.within(other.area), masks, overlap.within(tile.area))
                for one, two in self._pairs(iou, other_first, first):
                    self.groups.join(one, two)
        self.recent.append((tile, np.packbits(masks, axis=2), first))

    def _pairs(self, iou: np.ndarray, first_row: int, first_column: int) -> Iterator[tuple[int, int]]:
        """Numbers of equal objects, each at most once, the pairs that both tiles are surest of first.

        A tile may name one object twice, less surely the second time; then the two second ones are a pair as well.
        """
        rows, columns = np.nonzero(iou > SAME_OBJECT)
        pairs = [(first_row + row, first_column + column) for row, column in zip(rows, columns, strict=True)]
        pairs = [pair for pair in pairs if self.found[pair[0]].label == self.found[pair[1]].label]
        taken: set[int] = set()
        for pair in sorted(pairs, key=lambda pair: -self.found[pair[0]].score * self.found[pair[1]].score):
            if taken.isdisjoint(pair):
                taken.update(pair)
                yield pair

    def finish(self) -> Segmentation:
        labels, scores, masks = [], [], []
        for numbers in self.groups.members():
            members = [self.found[number] for number in numbers if self.found[number].area]
            if not members or (len(members) == 1 and 2 * members[0].core_area < members[0].area):
                continue
            weights = [member.core_area or 1 for member in members]
            labels.append(members[0].label)
            scores.append(sum(m.score * weight for m, weight in zip(members, weights, strict=True)) / sum(weights))
            masks.append(self._unite(members))
        order = np.argsort(-np.array(scores), kind="stable")
        return Segmentation(
            "instance",
            self.size,
            self.categories,
            np.array(labels, dtype=np.int64)[order],
            np.array(scores, dtype=np.float32)[order],
            instance_runs=[masks[i] for i in order],
        )

    def _unite(self, members: list[_Instance]) -> np.ndarray:
        """The runs of one object."""
        if len(members) == 1:
            return members[0].runs
        tops, lefts, bottoms, rights = zip(*(bounds(member.runs, self.size[0]) for member in members), strict=True)
        box = Rectangle(min(tops), min(lefts), max(bottoms), max(rights))
        masks = [paint_runs(member.runs, box, self.size[0]) for member in members]
        united = np.logical_or.reduce(masks)
        for member, mask in zip(members, masks, strict=True):
            if (core := member.tile.core.common(box)) is not None:
                part = core.within(box)
                united[part] = mask[part]
        return find_runs(united, box.top, box.left, self.size[0])


def _whole(array: np.ndarray) -> Rectangle:
    return Rectangle(0, 0, *array.shape)


def _bands(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + _ROWS] for start in range(0, len(array), _ROWS))


def _same_segments(one: np.ndarray, other: np.ndarray) -> Iterator[tuple[int, int]]:
    """Which segments of two maps of the same pixels are one; segments count from 0, their pixels are number + 1."""
    rows, columns = int(one.max()) + 1, int(other.max()) + 1
    joint = np.bincount((one.astype(np.int64) * columns + other).ravel(), minlength=rows * columns)
    joint = joint.reshape(rows, columns)
    union = joint.sum(1)[1:, None] + joint.sum(0)[1:] - joint[1:, 1:]
    for first, second in np.argwhere(joint[1:, 1:] > SAME_OBJECT * union):
        yield int(first), int(second)


def _mask_iou(
    packed: np.ndarray, where: tuple[slice, slice], masks: np.ndarray, other_where: tuple[slice, slice]
) -> np.ndarray:
    """(N, M) IoU of masks in packed bits with others, in the pixels that both have; 0 for two empty ones."""
    iou = np.zeros((len(packed), len(masks)))
    (rows, columns), (other_rows, other_columns) = where, other_where
    packed, masks = packed[:, rows], masks[:, other_rows, other_columns]
    first, second = packed.any((1, 2)), masks.any((1, 2))  # most objects are elsewhere
    packed, masks = packed[first], masks[second]
    if not len(packed) or not len(masks):
        return iou
    inside = np.zeros((len(packed), len(masks)))
    areas, other_areas = np.zeros(len(packed)), np.zeros(len(masks))
    for start in range(0, packed.shape[1], _ROWS // 8):
        step = slice(start, start + _ROWS // 8)
        ours = np.unpackbits(packed[:, step], axis=2)[:, :, columns].reshape(len(packed), -1).astype(np.float32)
        theirs = masks[:, step].reshape(len(masks), -1).astype(np.float32)
        inside += ours @ theirs.T
        areas += ours.sum(1)
        other_areas += theirs.sum(1)
    iou[np.ix_(first, second)] = inside / np.maximum(areas[:, None] + other_areas - inside, 1)
    return iou
