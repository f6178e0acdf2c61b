"""Cityscapes as downloaded: leftImg8bit and gtFine (or gtCoarse), for all three tasks, without preparation scripts.

Classes come from the labelIds images, objects from the instanceIds images. There, a value of 1000 or more is object
value % 1000 of class value // 1000. A smaller value is a whole class; for a class of things it marks a group of
objects that were not separated, which is a crowd region. cityscapesscripts' createTrainIdLabelImgs and
createPanopticImgs write the same to files.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import ValueToLabel, resolve_classes
from maskwright.data.formats.color_tables import read_color_table
from maskwright.data.formats.image_list import ImageAndLabel, ImageList, pair_by_name
from maskwright.data.formats.label_maps import LabelMapReader, instance_target, read_label_values
from maskwright.data.formats.layouts import (
    Detection,
    detected,
    detected_tasks,
    search_folder,
    split_of_folder,
    subset_names,
)
from maskwright.data.storage.folders import Folder
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import look_up, present_values

_CITIES = frozenset({"aachen", "bremen", "cologne", "frankfurt", "hamburg", "lindau", "munster", "zurich"})  # some
_SUBSETS = {"train": ("train",), "val": ("val",), "test": ("test",)}
_FIRST_OBJECT = 1000


class CityscapesObjectReader:
    """Reader of instanceIds images."""

    def __init__(self, entries: list[ImageAndLabel], values: ValueToLabel, stuff: frozenset[int]):
        self.images, self._values, self._stuff = ImageList(entries), values, stuff

    def target(self, index: int) -> Target:
        """Return all objects, crowds included, and one per stuff class, by ascending value; and void, if it differs.

        Raises:
            DatasetError: the image cannot be read, or has a class that does not exist.
        """
        image_id, _, file = self.images.entries[index]
        values = read_label_values(file)
        present = present_values(values)
        is_class = present < _FIRST_OBJECT
        labels = self._values.look_up(np.where(is_class, present, present // _FIRST_OBJECT), values, file)
        is_crowd = is_class & ~np.isin(labels, list(self._stuff))
        target = instance_target(values, present, labels, is_crowd, self._stuff, image_id)
        is_void = is_class & np.isin(present, list(self._values.ignored))  # not an object of a class without evaluation
        if np.array_equal(labels < 0, is_void):
            return target
        table = np.zeros(int(present[-1]) + 1, dtype=bool)
        table[present] = is_void
        return replace(target, void=look_up(table, values))


def open_cityscapes(split: Split) -> AnnotatedImages:
    """Open the subsets "train", "val", "test" or "train_extra" of a split.

    Fine annotations are used, except for train_extra, which has coarse ones only; `annotations: gtCoarse` selects
    these for all.
    """
    kind = "labelIds" if split.config.task == "semantic" else "instanceIds"
    entries: list[ImageAndLabel] = []
    for subset in subset_names(split, _SUBSETS):
        name = split.files.annotations or ("gtCoarse" if subset == "train_extra" else "gtFine")
        images = split.root.folder(f"{split.files.images or 'leftImg8bit'}/{subset}", f"{split.key}.images")
        labels = split.root.folder(f"{name}/{subset}", f"{split.key}.annotations")
        pairs = pair_by_name(images, labels, split.key, split.problems, "_leftImg8bit", f"_{name}_{kind}")
        entries += [(image_id.rpartition("/")[2], image, label) for image_id, image, label in pairs]
    classes = resolve_classes(split, "cityscapes")
    if split.config.task == "semantic":
        reader = LabelMapReader(entries, classes.value_to_label, split.problems)
    else:
        reader = CityscapesObjectReader(entries, classes.value_to_label, classes.stuff)
    return AnnotatedImages(classes.categories, split.config.task, reader)


def detect(root: Folder) -> Detection:
    """Detect gtFine beside leftImg8bit; a table of colors, as CVAT writes it, has the classes of other data."""
    if (table := read_color_table(root)) is not None:
        return _detect_export(root, table)
    panoptic, semantic = {}, {}
    for split in ("train", "val"):
        labels = search_folder(root, f"gtFine/{split}")
        if labels and search_folder(root, f"leftImg8bit/{split}"):
            panoptic[split] = any(name.endswith("_instanceIds.png") for name in labels.names())
            semantic[split] = any(name.endswith("_labelIds.png") for name in labels.names())
    configs = detected_tasks(root, "cityscapes", panoptic=panoptic, semantic=semantic)
    if not configs:
        return Detection(mismatch=_mismatch(root, semantic))
    labels = search_folder(root, "gtFine")
    cities = {name.split("_")[0] for name in map(posixpath.basename, labels.names() if labels else ())}
    is_published = bool(cities & _CITIES)
    note = "classes are taken to be those of Cityscapes, whose layout this is; for others set data.categories"
    return Detection(configs, notes=() if is_published else (note,))


def _detect_export(root: Folder, table: Sequence[CategoryConfig]) -> Detection:
    """Return the classes that an annotation tool painted in *_color.png; its subsets may have any names."""
    images, labels = search_folder(root, "leftImg8bit"), search_folder(root, "gtFine")
    if images is None or labels is None:
        return Detection()
    subsets = [name for name in labels.folders() if images.find_folder(name)]
    splits = {
        split_of_folder(name) or "train": {
            "images": f"{images.path}/{name}",
            "annotations": f"{labels.path}/{name}",
        }
        for name in subsets
    }
    categories = tuple(entry.model_copy(update={"is_thing": False}) for entry in table)
    suffixes = {"image_suffix": "_leftImg8bit", "label_suffix": "_gtFine_color"}
    config = detected(root.root, "label_maps", "semantic", splits, categories=categories, **suffixes)
    return Detection((config,)) if splits else Detection()


def _mismatch(root: Folder, splits: dict[str, bool]) -> str:
    if splits:
        return "gtFine has neither *_instanceIds.png nor *_labelIds.png for Cityscapes"
    if search_folder(root, "leftImg8bit") or search_folder(root, "gtFine"):
        return "Cityscapes needs the folders leftImg8bit and gtFine, both with train or both with val"
    return ""
