"""COCO instances: polygons and run lengths per object, overlaps kept, crowds marked.

Masks equal those of pycocotools bit for bit (hotcoco draws them; a test holds both together).

Unusual here: objects that overlap are put on different layers of the id map, so none loses a pixel; and what is wrong
in a file is said once, when it is opened.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from typing import NamedTuple

import hotcoco.mask
import numpy as np
import torch

from maskwright.data.formats.coco import ImageEntry, entry_id, field, find_all, read_images
from maskwright.data.formats.image_list import ImageList
from maskwright.data.problems import ProblemHandler
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Target, id_type

logger = logging.getLogger(__name__)

# What is odd but usable, with what to do about it, and the annotations concerned.
Oddities = dict[tuple[str, str], list]
_ID_ZERO = "have the id 0, which COCO's evaluator takes for 'no match'", "number annotations from 1"
_NO_POLYGON = "have no polygon of three points and are dropped", "draw them anew, or remove them"
_FLAT_BOX = "have a bbox without area", "correct or remove the boxes; masks are used as they are"
_OUTSIDE = "have polygons that reach out of the image and are clipped", "check that they belong to this picture"

_OUTSIDE_TOLERANCE = 1.0  # pixels; annotation tools round the rim of a picture in different ways


class Annotation(NamedTuple):
    """One object of one image, with what is needed to draw it.

    Attributes:
        annotation_id: its id in the json.
        label: 0..K-1.
        is_crowd: whether it is a crowd region.
        area: annotated, in pixels; None where the file states none.
        box: annotated x0, y0, x1, y1 in pixels; None where the file states none.
        segmentation: polygons of at least three points, or a COCO run-length dictionary.
    """

    annotation_id: int | str
    label: int
    is_crowd: bool
    area: float | None
    box: tuple[float, float, float, float] | None
    segmentation: list[list[float]] | dict


class CocoInstance:
    """Reader of COCO instance annotations; images without objects are kept.

    Objects that cannot be drawn (no polygon of three points, or no pixel covered) are dropped with a warning, since
    they could only ever count as missed. Objects of classes that the task leaves out are dropped silently.
    """

    def __init__(
        self,
        document: dict,
        path: File,
        folder: Folder,
        key: str,
        labels: dict[int, int | None],
        problems: ProblemHandler,
    ):
        """Check everything that can be checked without opening pictures.

        Args:
            document: the json.
            path: its file.
            folder: of the pictures.
            key: what errors call the split, e.g. "data.train".
            labels: category id -> label; None for classes that the task leaves out.
            problems: hears what is wrong, here and later.

        Raises:
            DatasetError: see `coco.read_images`; a picture does not exist; an annotation names an unknown image or
                category, shares its id with another, has no segmentation, or has one of another size.
        """
        self._where, self._problems = path, problems
        images = read_images(document, path, problems)
        files = find_all(folder, [image.name for image in images], f"{key}.images", path, problems)
        objects = _read_annotations(document, path, images, labels, problems)
        rows = zip(files, images, strict=True)
        self.images = ImageList((image.image_id, file, (image, objects[image.image_id])) for file, image in rows)

    def has_object(self, index: int) -> bool:
        """Whether the image has an object that is no crowd."""
        return not all(one.is_crowd for one in self.images.annotation(index)[1])

    def target(self, index: int) -> Target:
        """All objects, crowds included, with their annotated areas and boxes."""
        image, objects = self.images.annotation(index)
        target, dropped = drawn_target(objects, (image.height, image.width), image.image_id)
        for number in dropped:
            self._problems.warning(
                f"{self._where}: annotation {number} (image {image.image_id}) covers no pixel and is dropped; draw it "
                "anew, or remove it",
                [f"annotation {number}"],
            )
        return target


def drawn_target(
    objects: list[Annotation], size: tuple[int, int], image_id: int | str
) -> tuple[Target, list[int | str]]:
    """The objects on id maps of this (height, width), and the ids of those that cover no pixel and are left out."""
    rles = [draw(annotation.segmentation, *size) for annotation in objects]
    boxes = hotcoco.mask.toBbox(rles).reshape(-1, 4) if rles else np.zeros((0, 4))
    areas = np.asarray(hotcoco.mask.area(rles), dtype=np.float64) if rles else np.zeros(0)
    drawn = np.flatnonzero(areas)
    dropped = [objects[i].annotation_id for i in np.flatnonzero(areas == 0)]
    objects, rles, boxes, areas = [objects[i] for i in drawn], [rles[i] for i in drawn], boxes[drawn], areas[drawn]
    for i, annotation in enumerate(objects):
        areas[i] = areas[i] if annotation.area is None else annotation.area
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float64)
    id_maps = layers(rles, boxes.astype(int), *size)
    for i, annotation in enumerate(objects):
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
    return target, dropped


def draw(segmentation: list[list[float]] | dict, height: int, width: int) -> dict:
    """A segmentation as one compressed run-length mask, drawn as pycocotools does."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if isinstance(counts, list):
            return hotcoco.mask.frPyObjects(segmentation, height, width)
        return {"size": [height, width], "counts": counts}
    return hotcoco.mask.merge(hotcoco.mask.frPyObjects(segmentation, height, width))


def layers(rles: list[dict], boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """(D, H, W) id maps: each object whole on the first layer where it covers nobody, number n+1 for object n.

    Args:
        rles: compressed masks, each with at least one pixel.
        boxes: (N, 4) int x, y, width, height of each mask in pixels.
        height: of the image.
        width: of the image.
    """
    kind = id_type(len(rles))
    maps = [np.zeros((height, width), dtype=kind)]
    for number, (rle, (x, y, w, h)) in enumerate(zip(rles, boxes, strict=True), 1):
        mask = hotcoco.mask.decode(rle)[y : y + h, x : x + w].view(bool)  # (h, w)
        for layer in maps:
            window = layer[y : y + h, x : x + w]
            if not window[mask].any():
                break
        else:
            maps.append(np.zeros((height, width), dtype=kind))
            window = maps[-1][y : y + h, x : x + w]
        window[mask] = number
    return np.stack(maps)


def _read_annotations(
    document: dict, where: File, images: list[ImageEntry], labels: dict[int, int | None], problems: ProblemHandler
) -> dict[int | str, list[Annotation]]:
    """Annotations by image id, in the file's order."""
    by_id = {image.image_id: image for image in images}
    if "annotations" not in document:
        problems.warning(
            f"{where}: has no 'annotations'; its images can be predicted, but neither trained on nor scored"
        )
    objects, seen, oddities = defaultdict(list), set(), defaultdict(list)
    entries = field(document, "annotations", list, where, 0) if "annotations" in document else []
    for number, entry in enumerate(entries):
        with problems.skipping(f"annotation {entry_id(entry, number)}"):
            annotation_id = field(entry, "id", (int, str), where, number)
            image_id = field(entry, "image_id", (int, str), where, number)
            category = field(entry, "category_id", int, where, number)
            place = f"{where}: annotation {annotation_id}"
            if annotation_id in seen:
                raise DatasetError(
                    f"{place} occurs more than once, so evaluation would drop objects; give each its own id"
                )
            seen.add(annotation_id)
            if image_id not in by_id:
                raise DatasetError(f"{place} is for image {image_id!r}, which 'images' does not list; mend the file")
            if category not in labels:
                raise DatasetError(
                    f"{place} has category {category!r}, but the classes have the ids {_range(labels)}; "
                    "correct data.categories or the file"
                )
            label = labels[category]
            if label is None:
                continue
            read = _annotation(entry, annotation_id, label, by_id[image_id], place, oddities)
            if read is not None:
                objects[image_id].append(read)
    for (oddity, remedy), ids in oddities.items():
        text = f"{where}: {len(ids)} annotations {oddity}, the first is {ids[0]}; {remedy}"
        problems.warning(text, [f"annotation {number}" for number in ids])
    return objects


def _annotation(
    entry: dict, annotation_id: int | str, label: int, image: ImageEntry, place: str, oddities: Oddities
) -> Annotation | None:
    """One checked annotation; None if it cannot be drawn. What is odd but usable is noted in `oddities`."""
    if annotation_id == 0:
        oddities[_ID_ZERO].append(annotation_id)
    if entry.get("segmentation") is None:
        raise DatasetError(f"{place} has no 'segmentation' (a file of boxes?); masks cannot be learned from it")
    segmentation = _segmentation(entry["segmentation"], image, place, annotation_id, oddities)
    if segmentation is None:
        oddities[_NO_POLYGON].append(annotation_id)
        return None
    box, area = entry.get("bbox"), entry.get("area")
    if box is not None:
        if not _are_numbers(box) or len(box) != 4:
            raise DatasetError(f"{place} has the bbox {box!r}, expected x, y, width, height; mend the file")
        if min(box[2], box[3]) <= 0:
            oddities[_FLAT_BOX].append(annotation_id)
        box = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    if area is not None and not _are_numbers([area]):
        raise DatasetError(f"{place} has the area {area!r}, expected a number; mend the file")
    return Annotation(annotation_id, label, bool(entry.get("iscrowd", 0)), area, box, segmentation)


def _segmentation(value, image: ImageEntry, place: str, annotation_id, oddities: Oddities) -> list | dict | None:
    if isinstance(value, dict):
        return _run_lengths(value, image, place)
    if not isinstance(value, list) or not all(_are_numbers(part) and len(part) % 2 == 0 for part in value):
        raise DatasetError(f"{place}: expected polygons [[x, y, x, y, ...], ...] or run lengths; mend the file")
    polygons = [part for part in value if len(part) >= 6]
    for part in polygons:
        low, right, bottom = min(part), max(part[::2]) - image.width, max(part[1::2]) - image.height
        if max(-low, right, bottom) > _OUTSIDE_TOLERANCE:
            oddities[_OUTSIDE].append(annotation_id)
            break
    return polygons or None


def _run_lengths(value: dict, image: ImageEntry, place: str) -> dict:
    size, counts = value.get("size"), value.get("counts")
    if size != [image.height, image.width]:
        raise DatasetError(
            f"{place} has run lengths for {size} pixels, but the image has [{image.height}, {image.width}] "
            "(height, width); mend the file"
        )
    if isinstance(counts, list):
        if not _are_numbers(counts) or min(counts, default=0) < 0 or sum(counts) != image.height * image.width:
            raise DatasetError(f"{place} has run lengths that do not add up to height x width; mend the file")
        return {"size": size, "counts": counts}
    try:
        hotcoco.mask.area({"size": size, "counts": counts})
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{place} has damaged run lengths ({error}); mend the file") from None
    return {"size": size, "counts": counts}


def _are_numbers(values) -> bool:
    return isinstance(values, list) and set(map(type, values)) <= {int, float} and math.isfinite(sum(values))


def _range(labels: dict) -> str:
    ids = sorted(labels)
    return ", ".join(map(str, ids)) if len(ids) <= 12 else f"{ids[0]}..{ids[-1]} ({len(ids)} classes)"
