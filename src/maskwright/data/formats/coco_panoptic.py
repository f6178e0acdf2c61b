"""COCO panoptic: a json of segments and one PNG per image whose colour is the segment id, R + 256 G + 65536 B.

Unusual here: segments of one stuff class are merged, as the task knows no instances of stuff.
    Differs from the reference: the original keeps them apart as the json lists them. COCO, ADE20K and Cityscapes
    never list two, so their numbers do not change.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from maskwright.data.formats.coco import ImageEntry, PackedRows, check_files, field, inside, read_images
from maskwright.data.image import find_images, read_id_png
from maskwright.errors import DatasetError
from maskwright.structures import Target

_CITYSCAPES_SUFFIX = "_leftImg8bit"


class Segment(NamedTuple):
    """One entry of segments_info.

    Attributes:
        segment_id: its id in the PNG, above 0.
        label: 0..K-1; None for a class that the task leaves out.
        is_crowd: whether it is a crowd region.
    """

    segment_id: int
    label: int | None
    is_crowd: bool


class CocoPanoptic:
    """Reader of COCO panoptic annotations. Pixels of id 0, and of classes that the task leaves out, have no object."""

    def __init__(
        self,
        document: dict,
        path: Path,
        folder: Path,
        masks: Path,
        key: str,
        labels: dict[int, int | None],
        stuff: frozenset[int],
        image_suffix: str,
    ):
        """Check everything that can be checked without opening pictures.

        Args:
            document: the json.
            path: its file.
            folder: of the pictures.
            masks: folder of the PNGs.
            key: what errors call the split, e.g. "data.train".
            labels: category id -> label; None for classes that the task leaves out.
            stuff: the labels that are stuff.
            image_suffix: see `_located`.

        Raises:
            DatasetError: see `coco.read_images`; a picture or PNG does not exist; an image has no annotation, or more
                than one; a segment has an unknown category, the id 0 or an id used twice in its image.
        """
        self._where, self._stuff = path, stuff
        images = _located(read_images(document, path, folder), folder, image_suffix)
        check_files([image.path for image in images], f"{key}.images", path)
        annotations = _by_image(document, path, images)
        rows = []
        for image in images:
            entry = annotations[image.image_id]
            png = inside(masks, field(entry, "file_name", str, path, image.image_id), path)
            rows.append((image, str(png), _segments(entry, path, labels)))
        check_files([png for _, png, _ in rows], f"{key}.masks", path)
        self._rows = PackedRows(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def drop_empty(self) -> int:
        """Leave out the images without a segment of a trained class that is no crowd; returns how many."""
        rows = [self._rows[index] for index in range(len(self))]
        kept = [row for row in rows if any(one.label is not None and not one.is_crowd for one in row[2])]
        self._rows = PackedRows(kept)
        return len(rows) - len(kept)

    def path(self, index: int) -> Path:
        """The picture's file."""
        return Path(self._rows[index][0].path)

    def image_id(self, index: int) -> int | str:
        """The image's id in the json."""
        return self._rows[index][0].image_id

    def target(self, index: int) -> Target:
        """All segments, crowds included.

        Raises:
            DatasetError: the PNG is damaged, has another size than the json states, has an id that segments_info lacks,
                or lacks one that it lists.
        """
        image, png, segments = self._rows[index]
        ids = read_id_png(png)
        if ids.shape != (image.height, image.width):
            raise DatasetError(
                f"{png}: {ids.shape[0]} x {ids.shape[1]} pixels (height x width), but {self._where} states "
                f"{image.height} x {image.width} for image {image.image_id}; mend one of them"
            )
        numbers, objects = _numbers(segments, self._stuff)
        return Target(
            id_maps=torch.from_numpy(_renumber(ids, numbers, png, self._where))[None],
            labels=torch.tensor([segment.label for segment in objects], dtype=torch.int64),
            is_crowd=torch.tensor([segment.is_crowd for segment in objects], dtype=torch.bool),
            image_id=image.image_id,
            original_size=(image.height, image.width),
        )


def _located(images: list[ImageEntry], folder: Path, suffix: str) -> list[ImageEntry]:
    """The images with the files they really have.

    The script that writes Cityscapes' panoptic json puts picture names into it that exist nowhere. Where no file has
    the stated name, the one called <image id><suffix> is taken, wherever it lies below the folder.
    """
    if all(Path(image.path).is_file() for image in images):
        return images
    by_stem = {path.stem: str(path) for path in find_images(folder)}
    found = []
    for image in images:
        names = [f"{image.image_id}{ending}" for ending in dict.fromkeys((suffix, "", _CITYSCAPES_SUFFIX))]
        paths = [by_stem[name] for name in names if name in by_stem]
        found.append(image if Path(image.path).is_file() or not paths else image._replace(path=paths[0]))
    return found


def _by_image(document: dict, where: Path, images: list[ImageEntry]) -> dict[int | str, dict]:
    annotations, ids = {}, {image.image_id for image in images}
    for number, entry in enumerate(field(document, "annotations", list, where, 0)):
        image_id = field(entry, "image_id", (int, str), where, number)
        if image_id not in ids:
            raise DatasetError(
                f"{where}: an annotation is for image {image_id!r}, which 'images' does not list; mend it"
            )
        if image_id in annotations:
            raise DatasetError(f"{where}: image {image_id!r} has more than one annotation; keep one")
        annotations[image_id] = entry
    missing = [image.image_id for image in images if image.image_id not in annotations]
    if missing:
        raise DatasetError(
            f"{where}: {len(missing)} of {len(images)} images have no annotation, the first is {missing[0]!r}; "
            "remove them from 'images' or annotate them"
        )
    return annotations


def _segments(entry: dict, where: Path, labels: dict[int, int | None]) -> list[Segment]:
    place = f"{where}: image {entry['image_id']!r}"
    segments = []
    for number, info in enumerate(field(entry, "segments_info", list, where, entry["image_id"])):
        segment_id = field(info, "id", int, where, number)
        category = field(info, "category_id", int, where, number)
        if category not in labels:
            raise DatasetError(
                f"{place}: segment {segment_id} has category {category!r}, which the list of classes lacks; "
                "correct data.categories or the file"
            )
        segments.append(Segment(segment_id, labels[category], bool(info.get("iscrowd", 0))))
    twice = [segment_id for segment_id, count in Counter(s.segment_id for s in segments).items() if count > 1]
    if twice or any(segment.segment_id <= 0 for segment in segments):
        found = f"the id {twice[0]} twice" if twice else "an id below 1 (0 is void)"
        raise DatasetError(f"{place}: segments_info has {found}; give each segment its own id above 0")
    return segments


def _numbers(segments: list[Segment], stuff: frozenset[int]) -> tuple[dict[int, int], list[Segment]]:
    """Segment id -> object number (0 for segments left out), and the segment that speaks for each object."""
    numbers, objects, merged = {}, [], {}
    for segment in segments:
        if segment.label is None:
            numbers[segment.segment_id] = 0
            continue
        mergeable = segment.label in stuff and not segment.is_crowd
        if not mergeable or segment.label not in merged:
            objects.append(segment)
            merged[segment.label] = len(objects)
        numbers[segment.segment_id] = merged[segment.label] if mergeable else len(objects)
    return numbers, objects


def _renumber(ids: np.ndarray, numbers: dict[int, int], png: str, where: Path) -> np.ndarray:
    """(H, W) ids of 24 bits -> (H, W) int32 object numbers, by runs of equal neighbours, which is 10 times faster."""
    flat = ids.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(np.append(starts, len(flat)))
    found, inverse = np.unique(flat[starts], return_inverse=True)
    known = {0: 0, **numbers}
    unknown = [int(value) for value in found if int(value) not in known]
    if unknown:
        count = int(np.count_nonzero(ids == unknown[0]))
        raise DatasetError(
            f"{png}: {count} pixels have the segment id {unknown[0]}, which segments_info in {where} lacks; "
            "mend one of them"
        )
    absent = sorted(set(numbers) - set(found.tolist()))
    if absent:
        raise DatasetError(f"{png}: no pixel has the segment id {absent[0]}, which {where} lists; mend one of them")
    table = np.array([known[int(value)] for value in found], dtype=np.int32)
    return np.repeat(table[inverse], lengths).reshape(ids.shape)
