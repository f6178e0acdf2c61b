"""How the results of tiles become the result of an image.

Semantic results are cut where the cores of tiles meet. Objects are first compared in the overlap, where two tiles see
the same pixels: two of one class whose IoU there is above one half are one object, so an object may span any number of
tiles.

What is unusual: nothing is held per object at the size of the image. A panoptic result is one map of numbers, an
instance is its runs, and of the tiles only those are kept that a later one overlaps. Runs of masks that are noise have
no short form, so their memory has a limit, beyond which the least sure objects are dropped while tiles come in.
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
from maskwright.structures.annotations import Category, Task

logger = logging.getLogger(__name__)

SAME_OBJECT = 0.5  # IoU in the overlap of two tiles above which what they see is one object
OBJECT_BYTES = 1024  # what an object takes beside its mask, here and in the files that are written of it
_ROWS = 512  # of a map that are looked at together


class Mosaic(Protocol):
    """Gathers the results of tiles, in the order of `cut_tiles`, into that of the image."""

    def add(self, tile: Tile, result: Segmentation) -> None:
        """Add the result of the next tile."""
        ...

    def finish(self) -> Segmentation:
        """The result of the whole image; nothing can be added afterwards."""
        ...


def start_mosaic(task: Task, size: tuple[int, int], categories: tuple[Category, ...], mask_bytes: int) -> Mosaic:
    """An empty mosaic.

    Args:
        task: which kind of results come.
        size: (height, width) of the image.
        categories: what labels mean.
        mask_bytes: memory for the runs of instances, with 1 KiB for each; the surest that fit into it are kept.
    """
    match task:
        case "semantic":
            return _SemanticMosaic(size, categories)
        case "instance":
            return _InstanceMosaic(size, categories, mask_bytes)
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
    """What the tiles found, as runs.

    An object that only one tile sees is whole, as that tile sees it, and is dropped where the greater part of it lies
    in the cores of others, who do not confirm it. An object that several tiles see is, in the core of each, what that
    tile says.

    Where all runs together outgrow `mask_bytes`, the objects of lowest score so far are dropped with all their parts.
    """

    def __init__(self, size: tuple[int, int], categories: tuple[Category, ...], mask_bytes: int) -> None:
        self.size, self.categories, self.mask_bytes = size, categories, mask_bytes
        self.groups = _Groups()
        self.found: dict[int, _Instance] = {}  # by its number in the groups
        self.dropped = 0
        self.recent: list[tuple[Tile, np.ndarray, np.ndarray]] = []  # tile, its masks in packed bits, their numbers

    def add(self, tile: Tile, result: Segmentation) -> None:
        assert result.scores is not None
        areas = np.count_nonzero(result.masks, axis=(1, 2))
        core_areas = np.count_nonzero(result.masks[:, *tile.core.within(tile.area)], axis=(1, 2))
        first = self.groups.add(len(result))
        rows = zip(result.labels, result.scores, result.masks, areas, core_areas, strict=True)
        for number, (label, score, mask, area, core_area) in enumerate(rows, first):
            if area:
                runs = find_runs(mask, tile.area.top, tile.area.left, self.size[0])
                self.found[number] = _Instance(tile, int(label), float(score), runs, int(area), int(core_area))
        numbers, masks = first + np.flatnonzero(areas), result.masks[areas > 0]
        self.recent = [earlier for earlier in self.recent if earlier[0].area.bottom > tile.area.top]
        for other, packed, other_numbers in self.recent:
            if (overlap := tile.area.common(other.area)) is not None:
                iou = _mask_iou(packed, overlap.within(other.area), masks, overlap.within(tile.area))
                for one, two in self._pairs(iou, other_numbers, numbers):
                    self.groups.join(one, two)
        self.recent.append((tile, np.packbits(masks, axis=2), numbers))
        if sum(_bytes(instance) for instance in self.found.values()) > self.mask_bytes:
            self._drop_least_sure()

    def _pairs(self, iou: np.ndarray, numbers: np.ndarray, others: np.ndarray) -> Iterator[tuple[int, int]]:
        """Numbers of equal objects, each at most once, the pairs that both tiles are surest of first.

        A tile may name one object twice, less surely the second time; then the two second ones are a pair as well.
        """
        rows, columns = np.nonzero(iou > SAME_OBJECT)
        pairs = list(zip(numbers[rows].tolist(), others[columns].tolist(), strict=True))
        pairs = [pair for pair in pairs if self.found[pair[0]].label == self.found[pair[1]].label]
        taken: set[int] = set()
        for pair in sorted(pairs, key=lambda pair: -self.found[pair[0]].score * self.found[pair[1]].score):
            if taken.isdisjoint(pair):
                taken.update(pair)
                yield pair

    def _drop_least_sure(self) -> None:
        """Keep the objects of highest score that fit, and of recent tiles the masks of those."""
        objects = sorted(self._objects(), key=lambda numbers: -_score([self.found[i] for i in numbers]))
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

    def _objects(self) -> list[list[int]]:
        """The numbers of what each object was found as."""
        members = ([i for i in numbers if i in self.found] for numbers in self.groups.members())
        return [numbers for numbers in members if numbers]

    def finish(self) -> Segmentation:
        labels, scores, masks = [], [], []
        self.recent.clear()
        for numbers in self._objects():
            members = [self.found.pop(number) for number in numbers]
            if len(members) == 1 and 2 * members[0].core_area < members[0].area:
                continue
            labels.append(members[0].label)
            scores.append(_score(members))
            masks.append(self._unite(members))
        if self.dropped:
            logger.warning(
                "the masks of all instances need more than %d MB: the %d of lowest score are left out; raise "
                "score_threshold, or tile_mask_megabytes if there is memory",
                self.mask_bytes // 10**6,
                self.dropped,
            )
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
        """The runs of one object; one array of its box is held, whatever the number of members."""
        if len(members) == 1:
            return members[0].runs
        boxes = [Rectangle(*runs_box(member.runs, self.size[0])) for member in members]
        tops, lefts, bottoms, rights = zip(*boxes, strict=True)
        whole = Rectangle(min(tops), min(lefts), max(bottoms), max(rights))
        united = np.zeros(whole.size, dtype=bool)
        for member, box in zip(members, boxes, strict=True):
            united[box.within(whole)] |= decode_runs(member.runs, box, self.size[0])
        for member, box in zip(members, boxes, strict=True):
            if (core := member.tile.core.common(whole)) is not None:
                united[core.within(whole)] = False
                if (seen := core.common(box)) is not None:
                    united[seen.within(whole)] = decode_runs(member.runs, box, self.size[0])[seen.within(box)]
        return find_runs(united, whole.top, whole.left, self.size[0])


def _score(members: list[_Instance]) -> float:
    """Of one object: the mean over its pixels."""
    weights = [member.core_area or 1 for member in members]
    return sum(member.score * weight for member, weight in zip(members, weights, strict=True)) / sum(weights)


def _bytes(instance: _Instance) -> int:
    return instance.runs.nbytes + OBJECT_BYTES


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
