"""Label maps: images with one value per pixel, which is a class (CamVid, ADE20K, most custom data) or an object number.

There is no connected-component search: all pixels of a class are one object. Label images may be painted in the colors
of the classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import MAX_VALUE, OUT_OF_RANGE, ClassMapping, ValueToLabel, resolve_classes
from maskwright.data.formats.color_tables import ColorTable
from maskwright.data.formats.image_list import ImageAndLabel, ImageList, pair_by_name, read_pair_list
from maskwright.data.images.label_images import read_label_image
from maskwright.data.problems import ProblemHandler
from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError, RecipeError
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import id_dtype, look_up, present_values


class LabelMapReader:
    """Reader of label images whose values are classes."""

    def __init__(self, entries: Iterable[ImageAndLabel], values: ValueToLabel, problems: ProblemHandler):
        self.images, self._values, self._problems = ImageList(entries), values, problems

    def target(self, index: int) -> Target:
        """Return one object per class that occurs, ordered by label.

        Raises:
            DatasetError: the label image cannot be read, or has an undeclared value.
        """
        image_id, _, file = self.images.entries[index]
        values = read_label_values(file, self._values)
        present = present_values(values)
        labels = self._values.look_up(present, values, file)
        if present.tolist() == [0, 255] and 255 in self._values.ignored:
            self._problems.warning(
                "has only the values 0 and 255, and 255 is ignored",
                where=file.name,
                remedy="if 255 marks objects here (a binary mask), map it to a class with data.label_map",
            )
        return semantic_target(values, present, labels, image_id)


def open_label_maps(split: Split) -> AnnotatedImages:
    """Open a split of images and label images that are paired by name or by a list."""
    classes = resolve_classes(split)
    pairs = pair_label_images(split)
    warn_of_joined_objects(split, classes)
    reader = LabelMapReader(pairs, classes.value_to_label, split.problems)
    return AnnotatedImages(classes.categories, split.config.task, reader)


def pair_label_images(split: Split) -> list[ImageAndLabel]:
    """Return the images of a split with their label images, paired by the split's list or by name.

    Raises:
        DatasetError: a file or folder is missing, or the list is damaged.
        RecipeError: the recipe names neither a list nor both folders.
    """
    config, files, key = split.config, split.files, split.key
    list_file = split.root.file(files.list, f"{key}.list") if files.list is not None else None
    if list_file is not None and files.annotations is None:
        return read_pair_list(split.root, list_file, f"{key}.list", split.problems)
    for name in ("images", "annotations"):
        if getattr(files, name) is None:
            raise RecipeError(
                "is missing", where=f"{key}.{name}", remedy=f"name the folder of the {name}, or give {key}.list"
            )
    images = split.root.folder(files.images or "", f"{key}.images")
    labels = split.root.folder(files.annotations or "", f"{key}.annotations")
    return pair_by_name(images, labels, key, split.problems, config.image_suffix, config.label_suffix, list_file)


def warn_of_joined_objects(split: Split, classes: ClassMapping) -> None:
    """Warn if objects are to be learned from annotations that do not tell the objects of a class apart."""
    things = [category.name for category in classes.categories if category.is_thing]
    if split.config.task != "semantic" and things:
        split.problems.warning(
            f"label images do not tell objects apart: for the task {split.config.task}, all pixels of a thing class "
            "are one object in each image",
            where=split.key,
            remedy="use annotations with objects (COCO JSON, YOLO, SegmentationObject of VOC), or the task semantic",
            items=things,
        )


def read_label_values(file: File, classes: ValueToLabel | None = None) -> np.ndarray:
    """Return the values of a label image, (H, W) uint8, uint16 or int32, all in 0..65536.

    Args:
        file: the label image; one that is painted in the colors of the classes is read by these.
        classes: the classes, if the values are classes. Values out of range that are to be ignored become OUT_OF_RANGE.

    Raises:
        DatasetError: see `read_label_image`; a value is out of range; or a color is not that of a class.
    """
    values = read_label_image(file, allow_colors=True)
    if values.ndim == 3:
        values = (classes.colors if classes is not None else ColorTable({})).look_up(values, file)
    if values.dtype in (np.uint8, np.uint16):
        return values
    if classes is not None and classes.ignored_out_of_range:
        values = np.where(np.isin(values, list(classes.ignored_out_of_range)), OUT_OF_RANGE, values)
        if values.min() >= 0 and values.max() <= OUT_OF_RANGE:
            return values
    if values.min() < 0 or values.max() > MAX_VALUE:
        wrong = values.min() if values.min() < 0 else values.max()
        raise DatasetError(
            f"has values from {values.min()} to {values.max()}, expected 0..{MAX_VALUE}",
            where=file.name,
            remedy=f"if {wrong} means no data, add it to data.ignore_values, else export the file again",
        )
    return values


def require_same_size(first: np.ndarray, first_file: File, second: np.ndarray, second_file: File) -> None:
    """Raise a DatasetError unless two label images of one image have the same size."""
    if first.shape != second.shape:
        raise DatasetError(
            f"has {first.shape[0]} x {first.shape[1]} pixels (height x width), but {second_file} has "
            f"{second.shape[0]} x {second.shape[1]}",
            where=first_file.name,
            remedy="download or export both again",
        )


def semantic_target(values: np.ndarray, present: np.ndarray, labels: np.ndarray, image_id: int | str) -> Target:
    """Return one object per label; `labels` has the label of each value in `present`, -1 for none."""
    classes = np.unique(labels[labels >= 0])
    numbers = np.where(labels >= 0, np.searchsorted(classes, labels) + 1, 0)
    return target_from_values(values, present, numbers, classes, np.zeros(len(classes), dtype=bool), image_id)


def instance_target(
    values: np.ndarray,
    present: np.ndarray,
    labels: np.ndarray,
    is_crowd: np.ndarray,
    stuff: frozenset[int],
    image_id: int | str,
) -> Target:
    """Return one object per value for things, and one per class for stuff.

    Args:
        values: (H, W) values that stand for objects.
        present: (V,) the distinct values.
        labels: (V,) their labels, -1 for no object.
        is_crowd: (V,) bool.
        stuff: the labels of stuff classes.
        image_id: id of the image.
    """
    numbers, objects, stuff_numbers = np.zeros(len(present), dtype=np.int32), [], {}
    for i, (label, crowd) in enumerate(zip(labels.tolist(), is_crowd.tolist(), strict=True)):
        if label < 0:
            continue
        if label in stuff and label in stuff_numbers:
            numbers[i] = stuff_numbers[label]
            continue
        objects.append((label, crowd))
        numbers[i] = stuff_numbers[label] = len(objects)
    object_labels = np.array([label for label, _ in objects], dtype=np.int64)
    object_is_crowd = np.array([crowd for _, crowd in objects], dtype=bool)
    return target_from_values(values, present, numbers, object_labels, object_is_crowd, image_id)


def target_from_values(
    values: np.ndarray,
    present: np.ndarray,
    numbers: np.ndarray,
    labels: np.ndarray,
    is_crowd: np.ndarray,
    image_id: int | str,
) -> Target:
    """Return a target whose id map replaces each value in `present` by its number: 0 for none, n for object n-1."""
    table = np.zeros(int(present[-1]) + 1, dtype=id_dtype(len(labels)))
    table[present] = numbers
    ids = look_up(table, values)
    return Target(
        id_maps=torch.from_numpy(ids)[None],
        labels=torch.from_numpy(labels.astype(np.int64)),
        is_crowd=torch.from_numpy(is_crowd),
        image_id=image_id,
        original_size=values.shape,
    )
