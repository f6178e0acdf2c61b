"""COCO panoptic: a JSON of segments and one PNG per image whose color is the segment id, R + 256 G + 65536 B.

Segments of one stuff class are merged, as stuff has no instances.
    Differs from the reference: the original keeps them separate as the JSON lists them. COCO, ADE20K and Cityscapes
    never list two, so their numbers do not change.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import NamedTuple

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
    require_key,
)
from maskwright.data.formats.image_list import ImageList, find_all
from maskwright.data.images.find import is_image_name
from maskwright.data.images.label_images import read_panoptic_png
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError, printable
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import id_dtype

_CITYSCAPES_SUFFIX = "_leftImg8bit"


class Segment(NamedTuple):
    """One entry of segments_info.

    Attributes:
        segment_id: its id in the PNG, above 0.
        label: 0..K-1; None for a class that the task does not train.
        is_crowd: whether it is a crowd region.
    """

    segment_id: int
    label: int | None
    is_crowd: bool


class CocoPanopticReader:
    """Reader of COCO panoptic annotations. Pixels of id 0, and of classes that are not trained, have no object."""

    def __init__(self, split: CocoSplit, masks: Folder, image_suffix: str):
        """Check everything that can be checked without opening images.

        Args:
            split: the JSON.
            masks: folder of the PNGs.
            image_suffix: see `_with_existing_names`.

        Raises:
            DatasetError: see `read_images`; an image or PNG does not exist; an image has no annotation, or more than
                one; a segment has an unknown category, the id 0 or an id used twice in its image.
        """
        self.annotation_file, self._stuff = split.file, split.classes.stuff
        images = read_images(split.document, split.file, split.problems)
        images = _with_existing_names(images, split.images, image_suffix)
        names = [image.name for image in images]
        files = find_all(split.images, names, f"{split.key}.images", split.file, split.problems)
        annotations = _annotations_by_image(split, images)
        png_names, entries = [], []
        for file, image in zip(files, images, strict=True):
            with split.problems.skipping(f"image {image.image_id}"):
                if image.image_id in annotations:
                    entry = annotations[image.image_id]
                    png_name = require_field(entry, "file_name", str, split.file, image.image_id)
                    entries.append((file, image, _read_segments(entry, split)))
                    png_names.append(png_name)
        segments = [segment for *_, parts in entries for segment in parts if segment.label is not None]
        num_crowds = sum(segment.is_crowd for segment in segments)
        report_crowds(split, len(segments) - num_crowds, num_crowds, "segments")
        pngs = find_all(masks, png_names, f"{split.key}.masks", split.file, split.problems)
        self.images = ImageList(
            (image.image_id, file, (image, segments, png))
            for (file, image, segments), png in zip(entries, pngs, strict=True)
        )

    def has_object(self, index: int) -> bool:
        """Return whether the image has a segment of a trained class other than a crowd, without reading its PNG."""
        _, segments, _ = self.images.annotation(index)
        return any(segment.label is not None and not segment.is_crowd for segment in segments)

    def target(self, index: int) -> Target:
        """Return all segments, crowds included.

        Raises:
            DatasetError: the PNG is damaged, its size is not the one in the JSON, or its ids are not those in
                segments_info.
        """
        image, segments, png = self.images.annotation(index)
        ids = read_panoptic_png(png)
        if ids.shape != (image.height, image.width):
            raise DatasetError(
                f"has {ids.shape[0]} x {ids.shape[1]} pixels (height x width), but {self.annotation_file} states "
                f"{image.height} x {image.width} for image {image.image_id}",
                where=png.name,
                remedy="correct one of them",
            )
        numbers, objects = _object_numbers(segments, self._stuff)
        all_trained = all(segment.label is not None for segment in segments)
        return Target(
            id_maps=torch.from_numpy(_renumber(ids, numbers, png, self.annotation_file))[None],
            labels=torch.tensor([segment.label for segment in objects], dtype=torch.int64),
            is_crowd=torch.tensor([segment.is_crowd for segment in objects], dtype=torch.bool),
            image_id=image.image_id,
            original_size=(image.height, image.width),
            void=None if all_trained else ids == 0,
        )


def open_coco_panoptic(split: Split, default: str | None = None) -> AnnotatedImages:
    """Open a split whose annotations are a COCO panoptic JSON and PNGs; `default` is its built-in list of classes."""
    opened = open_json(split, default)
    if default is None and split.config.categories is None and split.config.task != "semantic":
        _warn_of_assumed_things(opened)
    name = split.files.masks or require_key(split.files.annotations, f"{split.key}.annotations").removesuffix(".json")
    masks = split.root.folder(name, f"{split.key}.masks")
    reader = CocoPanopticReader(opened, masks, split.config.image_suffix)
    return AnnotatedImages(opened.classes.categories, split.config.task, reader)


def _warn_of_assumed_things(split: CocoSplit) -> None:
    """Warn about classes that do not say whether they are things or stuff."""
    categories = split.document["categories"]
    unsaid = [str(entry["name"]) for entry in categories if entry.get("isthing") is None]
    if unsaid:
        split.problems.warning(
            f"{len(unsaid)} of {len(categories)} categories have no 'isthing' and are read as things "
            f"({printable(', '.join(unsaid))})",
            where=split.file.name,
            remedy="add isthing: 0 to stuff, such as sky or road, or list the classes in data.categories",
            items=unsaid,
        )


def _with_existing_names(images: list[ImageEntry], folder: Folder, suffix: str) -> list[ImageEntry]:
    """Return the images with names of files that exist, where these can be found.

    The script that writes the panoptic JSON of Cityscapes states image names that no file has. Where no file has the
    stated name, the one called <image id><suffix> is used, anywhere below the folder.
    """
    exists = [file is not None for file in folder.files([image.name for image in images])]
    if all(exists):
        return images
    by_stem = {PurePosixPath(name).stem: name for name in folder.names() if is_image_name(name)}
    found = []
    for image, image_exists in zip(images, exists, strict=True):
        stems = [f"{image.image_id}{ending}" for ending in dict.fromkeys((suffix, "", _CITYSCAPES_SUFFIX))]
        names = [by_stem[stem] for stem in stems if stem in by_stem]
        found.append(image if image_exists or not names else image._replace(name=names[0]))
    return found


def _annotations_by_image(split: CocoSplit, images: list[ImageEntry]) -> dict[int | str, dict]:
    file, where = split.file, split.file.name
    annotations, ids = {}, {image.image_id for image in images}
    for position, entry in enumerate(require_field(split.document, "annotations", list, file, 0)):
        with split.problems.skipping(f"annotation of image {entry_id(entry, position, 'image_id')}"):
            image_id = require_field(entry, "image_id", (int, str), file, position)
            if image_id not in ids:
                raise DatasetError(
                    f"an annotation is for image {image_id!r}, which 'images' does not list",
                    where=where,
                    remedy="correct the file",
                )
            if image_id in annotations:
                raise DatasetError(
                    f"image {image_id!r} has more than one annotation", where=where, remedy="remove all but one"
                )
            annotations[image_id] = entry
    missing = [image.image_id for image in images if image.image_id not in annotations]
    if missing:
        error = DatasetError(
            f"{len(missing)} of {len(images)} images have no annotation, the first is {missing[0]!r}",
            where=where,
            remedy="remove them from 'images', or annotate them",
        )
        split.problems.error(error, [f"image {image_id}" for image_id in missing])
    return annotations


def _read_segments(entry: dict, split: CocoSplit) -> list[Segment]:
    image_id, file, labels = entry["image_id"], split.file, split.labels
    segments = []
    for position, info in enumerate(require_field(entry, "segments_info", list, file, image_id)):
        segment_id = require_field(info, "id", int, file, position)
        category = require_field(info, "category_id", int, file, position)
        if category not in labels:
            raise DatasetError(
                f"image {image_id!r}: segment {segment_id} has category {category!r}, which is not in the class list",
                where=file.name,
                remedy="correct data.categories or the file",
            )
        try:
            is_crowd = read_crowd_flag(info, split.crowds)
        except DatasetError as error:
            found = f"image {image_id!r}: segment {segment_id} {error.found}"
            raise DatasetError(found, where=file.name, remedy="correct the file") from None
        segments.append(Segment(segment_id, labels[category], is_crowd))
    repeated = [segment_id for segment_id, count in Counter(s.segment_id for s in segments).items() if count > 1]
    if repeated or any(segment.segment_id <= 0 for segment in segments):
        found = f"the id {repeated[0]} twice" if repeated else "an id below 1 (0 is void)"
        raise DatasetError(
            f"image {image_id!r}: segments_info has {found}",
            where=file.name,
            remedy="give each segment its own id above 0",
        )
    return segments


def _object_numbers(segments: list[Segment], stuff: frozenset[int]) -> tuple[dict[int, int], list[Segment]]:
    """Return segment id -> object number (0 for classes that are not trained), and one segment of each object."""
    numbers, objects, number_of_label = {}, [], {}
    for segment in segments:
        if segment.label is None:
            numbers[segment.segment_id] = 0
            continue
        mergeable = segment.label in stuff and not segment.is_crowd
        if not mergeable or segment.label not in number_of_label:
            objects.append(segment)
            number_of_label[segment.label] = len(objects)
        numbers[segment.segment_id] = number_of_label[segment.label] if mergeable else len(objects)
    return numbers, objects


def _renumber(ids: np.ndarray, numbers: dict[int, int], png: File, file: File) -> np.ndarray:
    """Map (H, W) ids of 24 bits to object numbers. Mapping runs of equal neighbors is 10 times faster than pixels."""
    flat = ids.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(np.append(starts, len(flat)))
    found, inverse = np.unique(flat[starts], return_inverse=True)
    known = {0: 0, **numbers}
    unknown = [int(value) for value in found if int(value) not in known]
    if unknown:
        count = int(np.count_nonzero(ids == unknown[0]))
        raise DatasetError(
            f"{count} pixels have the segment id {unknown[0]}, which is not in segments_info of {file}",
            where=png.name,
            remedy="correct one of them",
        )
    absent = sorted(set(numbers) - set(found.tolist()))
    if absent:
        raise DatasetError(
            f"no pixel has the segment id {absent[0]}, which {file} lists", where=png.name, remedy="correct one of them"
        )
    table = np.array([known[int(value)] for value in found], dtype=id_dtype(max(known.values())))
    return np.repeat(table[inverse], lengths).reshape(ids.shape)
