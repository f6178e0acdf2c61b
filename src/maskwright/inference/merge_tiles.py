"""Merge the results of tiles into the result of the image.

Semantic results are joined at the borders between the cores of tiles. Objects are first compared in the overlap, where
two tiles see the same pixels: two of one class with an IoU above one half there are one object, so an object may span
any number of tiles.

Unusual: no object has a mask of the size of the image. A panoptic result is one id map, instances are run-length
encoded, and a tile is kept only while later ones overlap it. Noisy masks have long encodings, so their memory is
limited: beyond the limit, the objects with the lowest scores are dropped while tiles are added.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from maskwright.inference.tiling import Rectangle, Tile
from maskwright.results.rle import decode_runs, find_runs, runs_box
from maskwright.results.segmentation import Segmentation
from maskwright.structures.category import Category, Task

logger = logging.getLogger(__name__)

SAME_OBJECT = 0.5  # IoU in the overlap of two tiles above which two objects are one
OBJECT_BYTES = 1024  # memory of an object without its mask, here and in the files that are written
_ROWS = 512  # rows of a map that are processed at a time


class TileMerge(Protocol):
    """Merges the results of tiles, which come in the order of `cut_tiles`."""

    def add(self, tile: Tile, result: Segmentation) -> None:
        """Add the result of the next tile."""
        ...

    def finish(self) -> Segmentation:
        """Return the result of the image; nothing can be added afterwards."""
        ...


def start_merge(task: Task, size: tuple[int, int], categories: tuple[Category, ...], mask_bytes: int) -> TileMerge:
    """Start to merge the results of an image's tiles.

    Args:
        task: kind of the results.
        size: (height, width) of the image.
        categories: in label order.
        mask_bytes: memory for the run-length encoding of instances, plus 1 KiB for each; those with the highest
            scores that fit are kept.
    """
    match task:
        case "semantic":
            return _SemanticMerge(size, categories)
        case "instance":
            return _InstanceMerge(size, categories, mask_bytes)
        case "panoptic":
            return _PanopticMerge(size, categories)


class _SemanticMerge:
    """A label map of the smallest integer type that holds all labels."""

    def __init__(self, size: tuple[int, int], categories: tuple[Category, ...]) -> None:
        self.categories = categories
        self.label_map = np.zeros(size, dtype=np.min_scalar_type(len(categories)))
        self.confidence: np.ndarray | None = None
        self.seen = np.zeros(len(categories), dtype=bool)

    def add(self, tile: Tile, result: Segmentation) -> None:
        assert result.label_map is not None
        part = result.label_map[tile.core.slices_in(tile.area)]
        self.label_map[tile.core.slices_in(_whole(self.label_map))] = part
        self.seen[np.unique(part)] = True
        self.confidence = _add_core(self.confidence, result.confidence, tile, self.label_map.shape)

    def finish(self) -> Segmentation:
        labels = np.flatnonzero(self.seen)
        return Segmentation(
            "semantic",
            self.label_map.shape,
            self.categories,
            labels,
            label_map=self.label_map,
            confidence=self.confidence,
        )


@dataclass
class _DisjointSets:
    """Disjoint sets of the numbers 0, 1, 2, ...: the detections of each object. A set's smallest number is its root."""

    parents: list[int] = field(default_factory=list)

    def add(self, count: int) -> int:
        """Add `count` sets of one number each; return the first number."""
        first = len(self.parents)
        self.parents.extend(range(first, first + count))
        return first

    def root(self, number: int) -> int:
        """Return the root of a number's set."""
        while self.parents[number] != number:
            self.parents[number] = self.parents[self.parents[number]]
            number = self.parents[number]
        return number

    def union(self, one: int, other: int) -> None:
        """Merge the sets of two numbers."""
        first, second = sorted((self.root(one), self.root(other)))
        self.parents[second] = first

    def sets(self) -> Iterator[list[int]]:
        """Iterate over the sets, in the order of their roots."""
        members: dict[int, list[int]] = {}
        for number in range(len(self.parents)):
            members.setdefault(self.root(number), []).append(number)
        return iter(members.values())


class _PanopticMerge:
    """A map of the segments of all tiles, numbered from 1, which `finish` maps to those of the image."""

    def __init__(self, size: tuple[int, int], categories: tuple[Category, ...]) -> None:
        self.categories = categories
        self.segment_map = np.zeros(size, dtype=np.int32)
        self.confidence: np.ndarray | None = None
        self.objects = _DisjointSets()
        self.labels: list[int] = []
        self.scores: list[float] = []
        self.areas: list[int] = []  # pixels in the tile of the segment
        self.core_areas: list[int] = []
        self.recent: list[tuple[Tile, np.ndarray, int]] = []  # tile, its map, index of its first segment

    def add(self, tile: Tile, result: Segmentation) -> None:
        own = result.segment_map
        assert own is not None
        assert result.scores is not None
        first, count = self.objects.add(len(result)), len(result)
        self.labels += result.labels.tolist()
        self.scores += result.scores.tolist()
        core = own[tile.core.slices_in(tile.area)]
        self.areas += np.bincount(own.ravel(), minlength=count + 1)[1:].tolist()
        self.core_areas += np.bincount(core.ravel(), minlength=count + 1)[1:].tolist()
        self.segment_map[tile.core.slices_in(_whole(self.segment_map))] = np.where(core > 0, core + first, 0)
        self.confidence = _add_core(self.confidence, result.confidence, tile, self.segment_map.shape)
        self.recent = [earlier for earlier in self.recent if earlier[0].area.bottom > tile.area.top]
        for other, map_, other_first in self.recent:
            if (overlap := tile.area.intersection(other.area)) is not None:
                pairs = _same_segments(map_[overlap.slices_in(other.area)], own[overlap.slices_in(tile.area)])
                for one, two in pairs:
                    if self.labels[other_first + one] == self.labels[first + two]:
                        self.objects.union(other_first + one, first + two)
        self.recent.append((tile, own, first))

    def finish(self) -> Segmentation:
        first_of: dict[int, int] = {}
        for number, label in enumerate(self.labels):
            if not self.categories[label].is_thing:  # a stuff class is one segment
                self.objects.union(first_of.setdefault(label, number), number)
        table = np.zeros(len(self.labels) + 1, dtype=np.int32)
        labels, scores = [], []
        for members in self.objects.sets():
            label, area = self.labels[members[0]], sum(self.core_areas[i] for i in members)
            unconfirmed = len(members) == 1 and 2 * area < self.areas[members[0]]
            if area and not (unconfirmed and self.categories[label].is_thing):
                labels.append(label)
                scores.append(sum(self.scores[i] * self.core_areas[i] for i in members) / area)
                table[[i + 1 for i in members]] = len(labels)
        for rows in _row_chunks(self.segment_map):
            np.take(table, rows, out=rows)
        if self.confidence is not None:  # segments that only a tile had are gone
            for rows, shown in zip(_row_chunks(self.confidence), _row_chunks(self.segment_map), strict=True):
                rows *= shown > 0
        return Segmentation(
            "panoptic",
            self.segment_map.shape,
            self.categories,
            np.array(labels, dtype=np.int64),
            np.array(scores, dtype=np.float32),
            segment_map=self.segment_map,
            confidence=self.confidence,
        )


class _Instance(NamedTuple):
    """An instance in one tile.

    Attributes:
        tile: where it was detected.
        label: its class.
        score: 0..1.
        runs: its mask in the image, see `rle.find_runs`.
        area: pixels.
        core_area: pixels in the core of the tile.
    """

    tile: Tile
    label: int
    score: float
    runs: np.ndarray
    area: int
    core_area: int


class _InstanceMerge:
    """The instances of all tiles, run-length encoded.

    An object that only one tile detects keeps that tile's mask. It is dropped if most of it is in the cores of other
    tiles, because they did not detect it. An object that several tiles detect takes, in the core of each tile, that
    tile's mask.

    If all encodings together exceed `mask_bytes`, the objects of lowest score so far are dropped from all tiles.
    """

    def __init__(self, size: tuple[int, int], categories: tuple[Category, ...], mask_bytes: int) -> None:
        self.size, self.categories, self.mask_bytes = size, categories, mask_bytes
        self.objects = _DisjointSets()
        self.found: dict[int, _Instance] = {}  # by number in `objects`
        self.dropped = 0
        self.recent: list[tuple[Tile, np.ndarray, np.ndarray]] = []  # tile, bit-packed masks, numbers
        self.confidence: np.ndarray | None = None

    def add(self, tile: Tile, result: Segmentation) -> None:
        assert result.scores is not None
        areas = np.count_nonzero(result.masks, axis=(1, 2))
        core_areas = np.count_nonzero(result.masks[:, *tile.core.slices_in(tile.area)], axis=(1, 2))
        first = self.objects.add(len(result))
        rows = zip(result.labels, result.scores, result.masks, areas, core_areas, strict=True)
        for number, (label, score, mask, area, core_area) in enumerate(rows, first):
            if area:
                runs = find_runs(mask, tile.area.top, tile.area.left, self.size[0])
                self.found[number] = _Instance(tile, int(label), float(score), runs, int(area), int(core_area))
        numbers, masks = first + np.flatnonzero(areas), result.masks[areas > 0]
        self.recent = [earlier for earlier in self.recent if earlier[0].area.bottom > tile.area.top]
        for other, packed, other_numbers in self.recent:
            if (overlap := tile.area.intersection(other.area)) is not None:
                iou = _mask_iou(packed, overlap.slices_in(other.area), masks, overlap.slices_in(tile.area))
                for one, two in self._pairs(iou, other_numbers, numbers):
                    self.objects.union(one, two)
        self.recent.append((tile, np.packbits(masks, axis=2), numbers))
        if result.confidence is not None:
            if self.confidence is None:
                self.confidence = np.zeros(self.size, dtype=np.float32)
            seen = self.confidence[tile.area.slices_in(_whole(self.confidence))]
            np.maximum(seen, result.confidence, out=seen)
        if sum(_bytes(instance) for instance in self.found.values()) > self.mask_bytes:
            self._drop_lowest_scores()

    def _pairs(self, iou: np.ndarray, numbers: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, int]]:
        """Yield pairs of numbers that are one object, each number at most once, pairs of highest score first.

        Two tiles may both detect an object twice; the second detections, with lower scores, then form another pair.
        """
        rows, columns = np.nonzero(iou > SAME_OBJECT)
        pairs = list(zip(numbers[rows].tolist(), others[columns].tolist(), strict=True))
        pairs = [pair for pair in pairs if self.found[pair[0]].label == self.found[pair[1]].label]
        taken: set[int] = set()
        for pair in sorted(pairs, key=lambda pair: -self.found[pair[0]].score * self.found[pair[1]].score):
            if taken.isdisjoint(pair):
                taken.update(pair)
                yield pair

    def _drop_lowest_scores(self) -> None:
        """Keep the objects with the highest scores that fit into memory, and their masks in recent tiles."""
        objects = sorted(self._kept_objects(), key=lambda numbers: -_score([self.found[i] for i in numbers]))
        free = self.mask_bytes
        for numbers in objects:
            needed = sum(_bytes(self.found[i]) for i in numbers)
            if needed <= free:
                free -= needed
                continue
            self.dropped += 1
            for i in numbers:
                del self.found[i]
        for place, (tile, packed, numbers) in enumerate(self.recent):
            kept = np.array([number in self.found for number in numbers.tolist()], dtype=bool)
            if not kept.all():
                self.recent[place] = tile, packed[kept], numbers[kept]

    def _kept_objects(self) -> list[list[int]]:
        """Return the numbers of each object that is not dropped."""
        members = ([i for i in numbers if i in self.found] for numbers in self.objects.sets())
        return [numbers for numbers in members if numbers]

    def finish(self) -> Segmentation:
        labels, scores, masks = [], [], []
        self.recent.clear()
        for numbers in self._kept_objects():
            members = [self.found.pop(number) for number in numbers]
            if len(members) == 1 and 2 * members[0].core_area < members[0].area:
                continue
            labels.append(members[0].label)
            scores.append(_score(members))
            masks.append(self._unite(members))
        if self.dropped:
            logger.warning(
                "the masks of all instances need more than %d MB, so the %d of lowest score were dropped; raise "
                "score_threshold, or tile_mask_megabytes if there is memory",
                self.mask_bytes // 10**6,
                self.dropped,
            )
        if self.confidence is not None:
            self.confidence *= self._covered(masks)
        order = np.argsort(-np.array(scores), kind="stable")
        return Segmentation(
            "instance",
            self.size,
            self.categories,
            np.array(labels, dtype=np.int64)[order],
            np.array(scores, dtype=np.float32)[order],
            instance_runs=[masks[i] for i in order],
            confidence=self.confidence,
        )

    def _covered(self, masks: list[np.ndarray]) -> np.ndarray:
        """Return the pixels (H, W) bool of all masks, given their runs."""
        covered = np.zeros(self.size, dtype=bool)
        for runs in masks:
            box = Rectangle(*runs_box(runs, self.size[0]))
            covered[box.slices_in(_whole(covered))] |= decode_runs(runs, box, self.size[0])
        return covered

    def _unite(self, members: list[_Instance]) -> np.ndarray:
        """Merge the masks of one object; for any number of members, memory holds one array of the size of its box."""
        if len(members) == 1:
            return members[0].runs
        boxes = [Rectangle(*runs_box(member.runs, self.size[0])) for member in members]
        tops, lefts, bottoms, rights = zip(*boxes, strict=True)
        whole = Rectangle(min(tops), min(lefts), max(bottoms), max(rights))
        united = np.zeros(whole.size, dtype=bool)
        for member, box in zip(members, boxes, strict=True):
            united[box.slices_in(whole)] |= decode_runs(member.runs, box, self.size[0])
        for member, box in zip(members, boxes, strict=True):
            if (core := member.tile.core.intersection(whole)) is not None:
                united[core.slices_in(whole)] = False
                if (seen := core.intersection(box)) is not None:
                    united[seen.slices_in(whole)] = decode_runs(member.runs, box, self.size[0])[seen.slices_in(box)]
        return find_runs(united, whole.top, whole.left, self.size[0])


def _score(members: list[_Instance]) -> float:
    """Return the mean score of an object over its pixels."""
    weights = [member.core_area or 1 for member in members]
    return sum(member.score * weight for member, weight in zip(members, weights, strict=True)) / sum(weights)


def _bytes(instance: _Instance) -> int:
    return instance.runs.nbytes + OBJECT_BYTES


def _add_core(
    whole: np.ndarray | None, part: np.ndarray | None, tile: Tile, size: tuple[int, ...]
) -> np.ndarray | None:
    """Write the core of a tile's confidence map, if it has one, into that of the image, and return the latter."""
    if part is None:
        return whole
    whole = np.zeros(size, dtype=np.float32) if whole is None else whole
    whole[tile.core.slices_in(_whole(whole))] = part[tile.core.slices_in(tile.area)]
    return whole


def _whole(array: np.ndarray) -> Rectangle:
    return Rectangle(0, 0, *array.shape)


def _row_chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + _ROWS] for start in range(0, len(array), _ROWS))


def _same_segments(one: np.ndarray, other: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield indices of segments in two maps of the same pixels that are one object; a map holds index + 1."""
    rows, columns = int(one.max()) + 1, int(other.max()) + 1
    joint = np.bincount((one.astype(np.int64) * columns + other).ravel(), minlength=rows * columns)
    joint = joint.reshape(rows, columns)
    union = joint.sum(1)[1:, None] + joint.sum(0)[1:] - joint[1:, 1:]
    for first, second in np.argwhere(joint[1:, 1:] > SAME_OBJECT * union):
        yield int(first), int(second)


def _mask_iou(
    packed: np.ndarray, place: tuple[slice, slice], masks: np.ndarray, other_place: tuple[slice, slice]
) -> np.ndarray:
    """Return the IoU (N, M) of bit-packed masks with other masks in their common pixels; 0 for two empty masks."""
    iou = np.zeros((len(packed), len(masks)))
    (rows, columns), (other_rows, other_columns) = place, other_place
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
