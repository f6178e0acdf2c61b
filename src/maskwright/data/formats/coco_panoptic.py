"""COCO panoptic: a json of segments and one PNG per image whose colour is the segment id, R + 256 G + 65536 B.

Unusual here: segments of one stuff class are merged, as the task knows no instances of stuff.
    Differs from the reference: the original keeps them apart as the json lists them. COCO, ADE20K and Cityscapes
    never list two, so their numbers do not change.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import torch

from maskwright.data.formats.coco import ImageEntry, entry_id, field, find_all, inside, read_images
from maskwright.data.formats.image_list import ImageList
from maskwright.data.images.load import is_image_name, read_id_png
from maskwright.data.problems import ProblemHandler
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Target, id_type

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
        path: File,
        folder: Folder,
        masks: Folder,
        key: str,
        labels: dict[int, int | None],
        stuff: frozenset[int],
        image_suffix: str,
        problems: ProblemHandler,
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
            problems: hears what is wrong.

        Raises:
            DatasetError: see `coco.read_images`; a picture or PNG does not exist; an image has no annotation, or more
                than one; a segment has an unknown category, the id 0 or an id used twice in its image.
        """
        self._where, self._stuff = path, stuff
        images = _located(read_images(document, path, problems), folder, image_suffix)
        files = find_all(folder, [image.name for image in images], f"{key}.images", path, problems)
        annotations = _by_image(document, path, images, problems)
        names, rows = [], []
        for file, image in zip(files, images, strict=True):
            with problems.skipping(f"image {image.image_id}"):
                if image.image_id in annotations:
                    entry = annotations[image.image_id]
                    name = inside(field(entry, "file_name", str, path, image.image_id), path)
                    rows.append((file, image, _segments(entry, path, labels)))
                    names.append(name)
        pngs = find_all(masks, names, f"{key}.masks", path, problems)
        self.images = ImageList(
            (image.image_id, file, (image, segments, png))
            for (file, image, segments), png in zip(rows, pngs, strict=True)
        )

    def has_object(self, index: int) -> bool:
        """Whether the image has a segment of a trained class that is no crowd."""
        _, segments, _ = self.images.annotation(index)
        return any(one.label is not None and not one.is_crowd for one in segments)

    def target(self, index: int) -> Target:
        """All segments, crowds included.

        Raises:
            DatasetError: the PNG is damaged, has another size than the json states, has an id that segments_info lacks,
                or lacks one that it lists.
        """
        image, segments, png = self.images.annotation(index)
        ids = read_id_png(png)
        if ids.shape != (image.height, image.width):
            raise DatasetError(
                f"{png}: {ids.shape[0]} x {ids.shape[1]} pixels (height x width), but {self._where} states "
                f"{image.height} x {image.width} for image {image.image_id}; mend one of them"
            )
        numbers, objects = _numbers(segments, self._stuff)
        whole = all(segment.label is not None for segment in segments)
        return Target(
            id_maps=torch.from_numpy(_renumber(ids, numbers, png, self._where))[None],
            labels=torch.tensor([segment.label for segment in objects], dtype=torch.int64),
            is_crowd=torch.tensor([segment.is_crowd for segment in objects], dtype=torch.bool),
            image_id=image.image_id,
            original_size=(image.height, image.width),
            void=None if whole else ids == 0,
        )


def _located(images: list[ImageEntry], folder: Folder, suffix: str) -> list[ImageEntry]:
    """The images with the names their files really have.

    The script that writes Cityscapes' panoptic json puts picture names into it that exist nowhere. Where no file has
    the stated name, the one called <image id><suffix> is taken, wherever it lies below the folder.
    """
    present = [file is not None for file in folder.files([image.name for image in images])]
    if all(present):
        return images
    by_stem = {PurePosixPath(name).stem: name for name in folder.names() if is_image_name(name)}
    found = []
    for image, is_present in zip(images, present, strict=True):
        stems = [f"{image.image_id}{ending}" for ending in dict.fromkeys((suffix, "", _CITYSCAPES_SUFFIX))]
        names = [by_stem[stem] for stem in stems if stem in by_stem]
        found.append(image if is_present or not names else image._replace(name=names[0]))
    return found


def _by_image(document: dict, where: File, images: list[ImageEntry], problems: ProblemHandler) -> dict[int | str, dict]:
    annotations, ids = {}, {image.image_id for image in images}
    for number, entry in enumerate(field(document, "annotations", list, where, 0)):
        with problems.skipping(f"annotation of image {entry_id(entry, number, 'image_id')}"):
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
        text = f"{where}: {len(missing)} of {len(images)} images have no annotation, the first is {missing[0]!r}"
        remedy = "remove them from 'images' or annotate them"
        problems.error(DatasetError(f"{text}; {remedy}"), [f"image {image_id}" for image_id in missing])
    return annotations


def _segments(entry: dict, where: File, labels: dict[int, int | None]) -> list[Segment]:
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


def _renumber(ids: np.ndarray, numbers: dict[int, int], png: File, where: File) -> np.ndarray:
    """(H, W) ids of 24 bits -> (H, W) object numbers, by runs of equal neighbours, which is 10 times faster."""
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
    table = np.array([known[int(value)] for value in found], dtype=id_type(max(known.values())))
    return np.repeat(table[inverse], lengths).reshape(ids.shape)
