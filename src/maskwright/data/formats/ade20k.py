"""ADE20K, SceneParsing benchmark, as downloaded, for all three tasks.

Semantic classes come from `annotations` (0 is to be ignored, 1..150 are classes). Objects come from the benchmark's
`annotations_instance`, whose red byte is the number 1..100 of a thing class, in the order of the class list, and whose
green byte counts the objects of the picture. Panoptic targets are both, things over stuff, as the original's
datasets/prepare_ade20k_pan_seg.py puts them together; a thing of `annotations` alone is void. Where that script was
run, its files are read.
"""

from __future__ import annotations

import numpy as np

from maskwright.config.categories import load_categories
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import Classes, classes_of
from maskwright.data.formats.image_list import ImageList, Row, pair
from maskwright.data.formats.label_maps import LabelMaps, instance_target, read_values
from maskwright.data.formats.published import single_part
from maskwright.data.images.load import read_colours
from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import present_values

_PARTS = {"train": ("training",), "val": ("validation",), "test": ("testing",)}
_LARGEST_CLASS = 1 << 8  # class ids fit one byte; behind them come values that stand for objects


class Ade20kObjects:
    """Reader of objects, with stuff behind them where the task has stuff."""

    def __init__(self, rows: list[tuple[str, File, tuple[File, File | None]]], classes: Classes, things: list[int]):
        """Of (image id, picture, (objects, classes or None)); `things` are the ids that objects' classes stand for."""
        self.images, self._meanings, self._stuff = ImageList(rows), classes.meanings, classes.stuff
        self._ids = np.array([0, *things])

    def target(self, index: int) -> Target:
        """Stuff by class, then objects by number.

        Raises:
            DatasetError: a picture cannot be read, sizes differ, a class does not exist, or an object has two classes.
        """
        image_id, _, (objects_file, classes_file) = self.images.rows[index]
        colours = read_colours(objects_file)
        classes, numbers = colours[..., 0], colours[..., 1]
        kinds = self._classes_of_objects(classes, numbers, objects_file)
        behind = np.zeros(numbers.shape, dtype=np.uint16)
        if classes_file is not None:
            behind = self._stuff_of(read_values(classes_file), classes_file)
            if behind.shape != numbers.shape:
                raise DatasetError(
                    f"{objects_file}: {numbers.shape[0]} x {numbers.shape[1]} pixels (height x width), but "
                    f"{classes_file} has {behind.shape[0]} x {behind.shape[1]}; fetch them again"
                )
        values = np.where(numbers > 0, numbers.astype(np.uint16) + _LARGEST_CLASS, behind)
        present = present_values(values)
        ids = np.where(present > _LARGEST_CLASS, kinds[np.maximum(present - _LARGEST_CLASS, 0)], present)
        labels = self._meanings.labels(ids, values, objects_file)
        return instance_target(values, present, labels, np.zeros(len(present), dtype=bool), self._stuff, image_id)

    def has_object(self, index: int) -> bool:
        """Whether there is something to train on."""
        return len(self.target(index)) > 0

    def _classes_of_objects(self, classes: np.ndarray, numbers: np.ndarray, file: File) -> np.ndarray:
        """(256,) class id of each object number, 0 for numbers that do not occur."""
        pairs = present_values(numbers.astype(np.uint16) << 8 | classes)
        pairs = pairs[pairs >> 8 > 0]
        counted, kinds = pairs >> 8, pairs & 255
        twice = np.flatnonzero(np.diff(counted) == 0)
        if len(twice):
            first, second = kinds[twice[0] : twice[0] + 2]
            raise DatasetError(
                f"{file}: object {counted[twice[0]]} has the classes {first} and {second}, expected one; fetch it again"
            )
        if len(kinds) and (kinds.max() >= len(self._ids) or kinds.min() == 0):
            wrong = kinds.min() if kinds.min() == 0 else kinds.max()
            raise DatasetError(
                f"{file}: an object has the class {wrong}, expected 1..{len(self._ids) - 1} (the thing classes of the "
                "instance benchmark); use the benchmark's annotations_instance"
            )
        ids = np.zeros(256, dtype=np.intp)
        ids[counted] = self._ids[kinds]
        return ids

    def _stuff_of(self, values: np.ndarray, file: File) -> np.ndarray:
        """The class ids of stuff; 0 elsewhere."""
        present = present_values(values)
        labels = self._meanings.labels(present, values, file)
        table = np.zeros(int(present[-1]) + 1, dtype=np.uint16)
        table[present] = np.where(np.isin(labels, list(self._stuff)), present, 0)
        return table.take(values)


def open_ade20k(split: Split) -> AnnotatedImages:
    """The images of the split's part, "training" or "validation"."""
    files, key, task = split.files, split.key, split.config.task
    part = single_part(split, _PARTS)
    images = split.root.folder(f"{files.images or 'images'}/{part}", f"{key}.images")
    classes = classes_of(split, "ade20k")
    if task != "instance":
        truth = split.root.folder(f"{files.annotations or 'annotations'}/{part}", f"{key}.annotations")
        semantic = pair(images, truth, key, split.problems)
    if task == "semantic":
        return AnnotatedImages(classes.kept, task, LabelMaps(semantic, classes.meanings, split.problems))
    objects = split.root.folder(f"{files.masks or 'annotations_instance'}/{part}", f"{key}.masks")
    rows: list[Row] = pair(images, objects, key, split.problems)
    behind = {name: file for name, _, file in semantic} if task == "panoptic" else {}
    joined = [(name, picture, (truth, behind.get(name))) for name, picture, truth in rows]
    return AnnotatedImages(classes.kept, task, Ade20kObjects(joined, classes, _things()))


def _things() -> list[int]:
    """The ids of the benchmark's thing classes, ascending, as the instance pictures number them."""
    return sorted(category.id for category in load_categories("ade20k") if category.is_thing)
