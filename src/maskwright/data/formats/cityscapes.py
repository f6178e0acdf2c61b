"""Cityscapes as downloaded: leftImg8bit and gtFine (or gtCoarse), for all three tasks, without preparation scripts.

Semantic classes come from the labelIds pictures, objects from the instanceIds pictures: a value of 1000 and more is
object value % 1000 of class value // 1000, a smaller one is a whole class; where that class has objects, it marks a
group of them that nobody took apart, which is a crowd region. This is what cityscapesscripts' createTrainIdLabelImgs
and createPanopticImgs write to files.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import classes_of
from maskwright.data.formats.image_list import ImageList, Row, pair
from maskwright.data.formats.label_maps import LabelMaps, Meanings, instance_target, read_values
from maskwright.data.formats.published import parts_of
from maskwright.data.storage.folders import Folder
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import look_up_values, present_values

_PARTS = {"train": ("train",), "val": ("val",), "test": ("test",)}
_FIRST_OBJECT = 1000


class CityscapesObjects:
    """Reader of instanceIds pictures."""

    def __init__(self, rows: list[Row], meanings: Meanings, stuff: frozenset[int]):
        """Of (image id, picture, instanceIds picture); `stuff` are the labels that are stuff."""
        self.images, self._meanings, self._stuff = ImageList(rows), meanings, stuff

    def target(self, index: int) -> Target:
        """All objects, crowds included, and one for each stuff class, by ascending value; and void, if there is more.

        Raises:
            DatasetError: the picture cannot be read, or has a class that does not exist.
        """
        image_id, _, file = self.images.rows[index]
        values = read_values(file)
        present = present_values(values)
        is_group = present < _FIRST_OBJECT
        labels = self._meanings.labels(np.where(is_group, present, present // _FIRST_OBJECT), values, file)
        is_crowd = is_group & ~np.isin(labels, list(self._stuff))
        target = instance_target(values, present, labels, is_crowd, self._stuff, image_id)
        void = self._is_void(present)
        if np.array_equal(labels < 0, void):
            return target
        table = np.zeros(int(present[-1]) + 1, dtype=bool)
        table[present] = void
        return replace(target, void=look_up_values(table, values))

    def _is_void(self, present: np.ndarray) -> np.ndarray:
        """Of the values of a picture those that are void; an object of a class that is not evaluated is none."""
        return np.isin(present, list(self._meanings.ignored)) & (present < _FIRST_OBJECT)

    def has_object(self, index: int) -> bool:
        """Whether there is an object that is no crowd."""
        return bool((~self.target(index).is_crowd).any())


def open_cityscapes(split: Split) -> AnnotatedImages:
    """The images of the split's parts, "train", "val", "test" or "train_extra".

    Of each part the fine annotations are taken, or the coarse ones where there are no others; `annotations: gtCoarse`
    asks for these.
    """
    kind = "labelIds" if split.config.task == "semantic" else "instanceIds"
    rows: list[Row] = []
    for part in parts_of(split, _PARTS):
        images = split.root.folder(f"{split.files.images or 'leftImg8bit'}/{part}", f"{split.key}.images")
        name, truth = _annotations(split, part)
        pairs = pair(images, truth, split.key, split.problems, "_leftImg8bit", f"_{name}_{kind}")
        rows += [(image_id.rpartition("/")[2], picture, label) for image_id, picture, label in pairs]
    classes = classes_of(split, "cityscapes")
    if split.config.task == "semantic":
        source = LabelMaps(rows, classes.meanings, split.problems)
    else:
        source = CityscapesObjects(rows, classes.meanings, classes.stuff)
    return AnnotatedImages(classes.kept, split.config.task, source)


def _annotations(split: Split, part: str) -> tuple[str, Folder]:
    """("gtFine" or "gtCoarse", its folder)."""
    key, wanted = f"{split.key}.annotations", split.files.annotations
    if wanted is None and part == "train_extra":
        wanted = "gtCoarse"
    name = wanted or "gtFine"
    return name, split.root.folder(f"{name}/{part}", key)
