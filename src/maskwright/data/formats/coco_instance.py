"""COCO instances: polygons and run lengths per object; overlaps are kept, crowds are marked.

Masks equal those of pycocotools bit for bit (hotcoco draws them; a test compares the two). Objects that overlap are put
on different layers of the id map, so none loses a pixel. Problems of a file are reported once, when it is opened.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import hotcoco.mask
import numpy as np
import torch

from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.coco_json import (
    CocoSplit,
    ImageEntry,
    entry_id,
    open_json,
    read_crowd_flag,
    read_images,
    report_crowds,
    require_field,
)
from maskwright.data.formats.image_list import ImageList, find_all
from maskwright.errors import DatasetError, printable
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import id_dtype

# Unusual but usable: (finding, remedy) -> ids of the annotations.
Oddities = dict[tuple[str, str], list]
_ID_ZERO = "have the id 0, which COCO's evaluator reads as 'no match'", "number annotations from 1"
_NO_POLYGON = "have no polygon of three points and are dropped", "draw them again, or remove them"
_EMPTY_BOX = "have a bbox without area", "correct or remove the boxes; masks are used as they are"
_OUTSIDE = "have polygons that extend outside the image and are clipped", "check that they belong to this image"
_NO_MASK = "have no mask (a file of boxes?), and masks cannot be learned without", "export segmentation, not boxes"
_ONLY_CROWDS = (
    "are crowd regions (iscrowd 1), which are not trained on; CVAT writes that for every brush mask",
    "set data.crowds=objects to read them as objects, unless they are groups of objects",
)
_HOLE = (
    "have a polygon inside another one, which is part of the object, not a hole",
    "write objects with holes as run lengths",
)
_FRACTIONS = (
    "have all coordinates in 0..1, as if they were fractions of width and height",
    "multiply x by the width and y by the height of the image",
)

_FRACTION_TOLERANCE = 0.02  # beyond 0..1, as tools round at the border
_MANY_CROWDS = 0.25  # of the annotations; COCO has 1 %
_OUTSIDE_TOLERANCE = 1.0  # pixels; annotation tools round differently at the border of an image
_BOX_TOLERANCE = 2.0, 0.1  # pixels, and as a fraction of the longer side of the mask's box
_MAX_COORDINATE = 1e9
_MAX_POLYGONS = 50  # of an object, among which holes are searched


class Annotation(NamedTuple):
    """One object of an image.

    Attributes:
        annotation_id: its id in the JSON.
        label: 0..K-1.
        is_crowd: whether it is a crowd region.
        area: annotated area in pixels; None if the file states none.
        box: annotated x0, y0, x1, y1 in pixels; None if the file states none.
        segmentation: polygons of at least three points, or a COCO run-length dictionary.
    """

    annotation_id: int | str
    label: int
    is_crowd: bool
    area: float | None
    box: tuple[float, float, float, float] | None
    segmentation: list[list[float]] | dict


class CocoInstanceReader:
    """Reader of COCO instance annotations. Images without objects are kept.

    Objects without a polygon of three points, or without a pixel, are dropped with a warning, since they could only
    ever count as missed. Objects of classes that the task does not train are dropped silently.
    """

    def __init__(self, split: CocoSplit):
        """Check everything that can be checked without opening images.

        Raises:
            DatasetError: see `read_images`; an image does not exist; an annotation names an unknown image or category,
                shares its id with another, has no segmentation, or has one of another size.
        """
        self.annotation_file, self._problems = split.file, split.problems
        images = read_images(split.document, split.file, split.problems)
        names = [image.name for image in images]
        files = find_all(split.images, names, f"{split.key}.images", split.file, split.problems)
        objects = _read_annotations(split, images)
        entries = zip(files, images, strict=True)
        self.images = ImageList((image.image_id, file, (image, objects[image.image_id])) for file, image in entries)

    def has_object(self, index: int) -> bool:
        """Return whether the image has an object other than a crowd, without drawing any."""
        return not all(annotation.is_crowd for annotation in self.images.annotation(index)[1])

    def target(self, index: int) -> Target:
        """Return all objects, crowds included, with their annotated areas and boxes."""
        image, objects = self.images.annotation(index)
        target, dropped, misfits = draw_target(objects, (image.height, image.width), image.image_id)
        for annotation_id, found in misfits:
            self._problems.warning(
                f"annotation {annotation_id} (image {image.image_id}) {found}",
                where=self.annotation_file.name,
                remedy="correct one of them; boxes are x, y, width, height in pixels",
                items=[f"annotation {annotation_id}"],
            )
        for annotation_id in dropped:
            self._problems.warning(
                f"annotation {annotation_id} (image {image.image_id}) covers no pixel and is dropped",
                where=self.annotation_file.name,
                remedy="draw it again, or remove it",
                items=[f"annotation {annotation_id}"],
            )
        return target


def open_coco_instance(split: Split, default: str | None = None) -> AnnotatedImages:
    """Open a split whose annotations are a COCO instance JSON; `default` is its built-in list of classes."""
    opened = open_json(split, default)
    return AnnotatedImages(opened.classes.categories, split.config.task, CocoInstanceReader(opened))


def draw_target(
    objects: list[Annotation], size: tuple[int, int], image_id: int | str
) -> tuple[Target, list[int | str], list[tuple[int | str, str]]]:
    """Draw objects on id maps.

    Args:
        objects: the annotations of an image.
        size: height and width of the image.
        image_id: id of the image.

    Returns:
        The target; the ids of objects without a pixel, which are dropped; and (id, finding) of objects whose annotated
        box is not that of the mask.
    """
    rles = [draw_mask(annotation.segmentation, *size) for annotation in objects]
    boxes = hotcoco.mask.toBbox(rles).reshape(-1, 4) if rles else np.zeros((0, 4))
    areas = np.asarray(hotcoco.mask.area(rles), dtype=np.float64) if rles else np.zeros(0)
    drawn = np.flatnonzero(areas)
    dropped = [objects[i].annotation_id for i in np.flatnonzero(areas == 0)]
    objects, rles, boxes, areas = [objects[i] for i in drawn], [rles[i] for i in drawn], boxes[drawn], areas[drawn]
    id_maps = stack_masks(rles, boxes.astype(int), *size)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float64)
    misfits = []
    for i, annotation in enumerate(objects):
        if annotation.box is not None and _differs(annotation.box, corners[i], size):
            found = (
                f"has the bbox {_corners_text(annotation.box)}, but its mask has {_corners_text(corners[i])} (corners)"
            )
            misfits.append((annotation.annotation_id, found))
        areas[i] = areas[i] if annotation.area is None else annotation.area
        corners[i] = corners[i] if annotation.box is None else annotation.box
    target = Target(
        id_maps=torch.from_numpy(id_maps),
        labels=torch.tensor([annotation.label for annotation in objects], dtype=torch.int64),
        is_crowd=torch.tensor([annotation.is_crowd for annotation in objects], dtype=torch.bool),
        image_id=image_id,
        original_size=size,
        areas=areas,
        boxes=corners,
    )
    return target, dropped, misfits


def _differs(box: Sequence[float], mask_box: np.ndarray, size: tuple[int, int]) -> bool:
    """Return whether an annotated box clearly differs from that of the mask; empty ones are reported elsewhere."""
    if box[2] <= box[0] or box[3] <= box[1]:
        return False
    height, width = size
    clipped = np.clip(box, 0, (width, height, width, height))
    as_corners = np.array([box[0], box[1], box[2] - box[0], box[3] - box[1]])  # if the file has corners, not sizes
    if np.abs(as_corners - mask_box).max() <= 1 < np.abs(clipped - mask_box).max():
        return True
    pixels, fraction = _BOX_TOLERANCE
    longer_side = max(mask_box[2] - mask_box[0], mask_box[3] - mask_box[1])
    return bool(np.abs(clipped - mask_box).max() > pixels + fraction * longer_side)


def _corners_text(box: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.5g}" for value in box) + "]"


def draw_mask(segmentation: list[list[float]] | dict, height: int, width: int) -> dict:
    """Draw a segmentation as one compressed run-length mask, as pycocotools does."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if isinstance(counts, list):
            return hotcoco.mask.frPyObjects(segmentation, height, width)
        return {"size": [height, width], "counts": counts}
    return hotcoco.mask.merge(hotcoco.mask.frPyObjects(segmentation, height, width))


def stack_masks(rles: list[dict], boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return (D, H, W) id maps with number n+1 for object n, each on the first layer where it overlaps no other.

    Args:
        rles: compressed masks, each with at least one pixel.
        boxes: (N, 4) int x, y, width, height of each mask in pixels.
        height: height of the image.
        width: width of the image.
    """
    dtype = id_dtype(len(rles))
    maps = [np.zeros((height, width), dtype=dtype)]
    for number, (rle, (x, y, w, h)) in enumerate(zip(rles, boxes, strict=True), 1):
        mask = hotcoco.mask.decode(rle)[y : y + h, x : x + w].view(bool)  # (h, w)
        for layer in maps:
            window = layer[y : y + h, x : x + w]
            if not window[mask].any():
                break
        else:
            maps.append(np.zeros((height, width), dtype=dtype))
            window = maps[-1][y : y + h, x : x + w]
        window[mask] = number
    return np.stack(maps)


def _read_annotations(split: CocoSplit, images: list[ImageEntry]) -> dict[int | str, list[Annotation]]:
    """Return annotations by image id, in the file's order."""
    by_id = {image.image_id: image for image in images}
    objects, seen, oddities = defaultdict(list), set(), defaultdict(list)
    num_crowds = 0
    for position, entry in enumerate(_entries(split)):
        with split.problems.skipping(f"annotation {entry_id(entry, position)}"):
            image, annotation = _read_annotation(entry, position, split, by_id, seen, oddities)
            if annotation is not None:
                objects[image.image_id].append(annotation)
                num_crowds += annotation.is_crowd
    num_objects = sum(map(len, objects.values()))
    report_crowds(split, num_objects - num_crowds, num_crowds)
    if num_crowds < num_objects and num_crowds > _MANY_CROWDS * num_objects and split.task != "semantic":
        oddities[_ONLY_CROWDS] = [
            entry.annotation_id for image in objects.values() for entry in image if entry.is_crowd
        ]
    if 2 * len(oddities[_FRACTIONS]) > num_objects:
        _refuse(split, _FRACTIONS, oddities.pop(_FRACTIONS))
    if not num_objects and oddities[_NO_POLYGON]:
        _refuse(split, _NO_MASK, oddities.pop(_NO_POLYGON))
    for (finding, remedy), ids in ((kind, ids) for kind, ids in oddities.items() if ids):
        split.problems.warning(
            f"{len(ids)} annotations {finding}, the first is {ids[0]}",
            where=split.file.name,
            remedy=remedy,
            items=[f"annotation {annotation_id}" for annotation_id in ids],
        )
    return objects


def _refuse(split: CocoSplit, kind: tuple[str, str], ids: list) -> None:
    """Refuse what is unusual but usable in few annotations, and a mistake in most."""
    finding, remedy = kind
    total = len(split.document["annotations"])
    error = DatasetError(f"{len(ids)} of {total} annotations {finding}", where=split.file.name, remedy=remedy)
    split.problems.error(error, [f"annotation {annotation_id}" for annotation_id in ids])


def _entries(split: CocoSplit) -> list:
    if "annotations" in split.document:
        return require_field(split.document, "annotations", list, split.file, 0)
    split.problems.warning(
        "has no 'annotations'; its images can be predicted, but not used for training or evaluation",
        where=split.file.name,
        remedy="use a file with annotations for these",
    )
    return []


def _read_annotation(
    entry: dict, position: int, split: CocoSplit, images: dict[int | str, ImageEntry], seen: set, oddities: Oddities
) -> tuple[ImageEntry, Annotation | None]:
    """Check an entry; the annotation is None if it cannot be drawn, or its class is not trained."""
    file, where = split.file, split.file.name
    annotation_id = require_field(entry, "id", (int, str), file, position)
    image_id = require_field(entry, "image_id", (int, str), file, position)
    category = require_field(entry, "category_id", int, file, position)
    name = f"annotation {annotation_id}"
    if annotation_id in seen:
        raise DatasetError(
            f"{name} occurs more than once, so evaluation would drop objects", where=where, remedy="make ids unique"
        )
    seen.add(annotation_id)
    if image_id not in images:
        raise DatasetError(
            f"{name} is for image {image_id!r}, which 'images' does not list", where=where, remedy="correct the file"
        )
    if category not in split.labels:
        raise DatasetError(
            f"{name} has category {category!r}, but the class ids are {_id_range(split.labels)}",
            where=where,
            remedy="correct data.categories or the file",
        )
    image, label = images[image_id], split.labels[category]
    if label is None:
        return image, None
    try:
        is_crowd = read_crowd_flag(entry, split.crowds)
        return image, _checked_annotation(entry, annotation_id, label, is_crowd, image, oddities)
    except DatasetError as error:
        raise DatasetError(f"{name} {error.found}", where=where, remedy="correct the file") from None


def _checked_annotation(
    entry: dict, annotation_id: int | str, label: int, is_crowd: bool, image: ImageEntry, oddities: Oddities
) -> Annotation | None:
    """Return the annotation, None if it cannot be drawn; add what is unusual but usable to `oddities`.

    Raises:
        DatasetError: a field is malformed; the text continues "annotation 7 ...".
    """
    if annotation_id == 0:
        oddities[_ID_ZERO].append(annotation_id)
    segmentation = _checked_segmentation(entry.get("segmentation"), annotation_id, image, oddities)
    if segmentation is None:
        oddities[_NO_POLYGON].append(annotation_id)
        return None
    box, area = entry.get("bbox"), entry.get("area")
    if box is not None:
        if not _are_numbers(box) or len(box) != 4:
            raise DatasetError(f"has the bbox {printable(box)}, expected x, y, width, height")
        if min(box[2], box[3]) <= 0:
            oddities[_EMPTY_BOX].append(annotation_id)
        box = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    if area is not None and not _are_numbers([area]):
        raise DatasetError(f"has the area {printable(area)}, expected a number")
    return Annotation(annotation_id, label, is_crowd, area, box, segmentation)


def _checked_segmentation(
    value, annotation_id: int | str, image: ImageEntry, oddities: Oddities
) -> list[list[float]] | dict | None:
    if value is None:
        raise DatasetError("has no 'segmentation' (a file of boxes?), and masks cannot be learned without")
    if isinstance(value, dict):
        return _checked_run_lengths(value, image)
    if not isinstance(value, list) or not all(_are_numbers(part) and len(part) % 2 == 0 for part in value):
        raise DatasetError("has a malformed segmentation, expected polygons [[x, y, x, y, ...], ...] or run lengths")
    polygons = [part for part in value if len(part) >= 6]
    if not polygons and len(value) > 2 and all(len(part) == 2 for part in value):
        raise DatasetError("has a segmentation of points [[x, y], ...], expected polygons [[x, y, x, y, ...], ...]")
    if polygons and _are_fractions(polygons) and min(image.height, image.width) > 2:
        oddities[_FRACTIONS].append(annotation_id)
    if 1 < len(polygons) <= _MAX_POLYGONS and _has_inner_polygon(polygons):
        oddities[_HOLE].append(annotation_id)
    for part in polygons:
        low, right, bottom = min(part), max(part[::2]) - image.width, max(part[1::2]) - image.height
        if max(-low, right, bottom) > _OUTSIDE_TOLERANCE:
            oddities[_OUTSIDE].append(annotation_id)
            break
    return polygons or None


def _has_inner_polygon(polygons: list[list[float]]) -> bool:
    """Return whether a polygon lies inside another one, as those of holes do."""
    boxes = [(min(part[::2]), min(part[1::2]), max(part[::2]), max(part[1::2])) for part in polygons]
    return any(
        outer[0] <= inner[0]
        and outer[1] <= inner[1]
        and inner[2] <= outer[2]
        and inner[3] <= outer[3]
        # Equal polygons are copies, not holes.
        and polygon != around
        and _is_inside(polygon[0], polygon[1], around)
        for (inner, polygon), (outer, around) in itertools.permutations(zip(boxes, polygons, strict=True), 2)
    )


def _is_inside(x: float, y: float, polygon: list[float]) -> bool:
    """Return whether a point is inside a polygon: a ray to the right crosses an odd number of its sides."""
    inside = False
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
            inside = not inside
    return inside


def _are_fractions(polygons: list[list[float]]) -> bool:
    return min(map(min, polygons)) >= -_FRACTION_TOLERANCE and max(map(max, polygons)) <= 1 + _FRACTION_TOLERANCE


def _checked_run_lengths(value: dict, image: ImageEntry) -> dict:
    size, counts = value.get("size"), value.get("counts")
    if size != [image.height, image.width]:
        raise DatasetError(
            f"has run lengths for {size} pixels, but the image has [{image.height}, {image.width}] (height, width)"
        )
    if isinstance(counts, list):
        if not _are_numbers(counts) or any(count != int(count) for count in counts):
            raise DatasetError("has run lengths that are not whole numbers")
        counts = [int(count) for count in counts]
        if min(counts, default=0) < 0 or sum(counts) != image.height * image.width:
            raise DatasetError("has run lengths that do not add up to height x width")
        return {"size": size, "counts": counts}
    if not isinstance(counts, str):
        raise DatasetError("has damaged run lengths (neither a list nor text)")
    try:
        hotcoco.mask.area({"size": size, "counts": counts})
    except (ValueError, TypeError, OverflowError) as error:
        raise DatasetError(f"has damaged run lengths ({error})") from None
    if _total_length(counts) != image.height * image.width:
        raise DatasetError("has run lengths that do not add up to height x width")
    return {"size": size, "counts": counts}


def _total_length(counts: str) -> int:
    """Return the sum of run lengths in COCO's text (5 bits per letter, differences from the fourth on), -1 if cut."""
    letters = np.frombuffer(counts.encode(), dtype=np.uint8).astype(np.int64) - 48
    is_last = letters & 0x20 == 0
    if not len(letters) or not is_last[-1]:
        return -1
    starts = np.flatnonzero(np.concatenate([[True], is_last[:-1]]))
    positions = np.arange(len(letters)) - np.repeat(starts, np.diff(np.append(starts, len(letters))))
    values = np.add.reduceat((letters & 0x1F) << 5 * positions, starts)
    negative = letters[is_last] & 0x10 != 0
    values -= negative.astype(np.int64) << 5 * (positions[is_last] + 1)
    return int(values[0] + values[1::2].cumsum().sum() + values[2::2].cumsum().sum())


def _are_numbers(values) -> bool:
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        return False
    return not values or (
        min(values) >= -_MAX_COORDINATE and max(values) <= _MAX_COORDINATE and math.isfinite(sum(values))
    )


def _id_range(labels: dict) -> str:
    ids = sorted(labels)
    return ", ".join(map(str, ids)) if len(ids) <= 12 else f"{ids[0]}..{ids[-1]} ({len(ids)} classes)"
