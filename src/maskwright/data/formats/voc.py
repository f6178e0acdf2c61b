"""Folders in the layout of Pascal VOC: JPEGImages, SegmentationClass, SegmentationObject and lists in ImageSets.

Palette images hold class numbers, and object numbers for the other tasks; 255 is the border between objects, which is
ignored. An object has the class of most of its pixels. Tools that export this layout write class names beside it,
`labelmap.txt` (CVAT) or `class_names.txt` (Labelme); without either, the classes are VOC's own 21.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np

from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import ValueToLabel, resolve_classes
from maskwright.data.formats.image_list import ImageList, find_all
from maskwright.data.formats.label_maps import LabelMapReader, instance_target, read_label_values, require_same_size
from maskwright.data.formats.layouts import Detection, detected, detected_tasks, search_folder, subset_names
from maskwright.data.images.load import is_image_name
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import present_values

_SUBSETS = {"train": ("train",), "val": ("val",), "test": ("test",)}
_BORDER = 255
_BACKGROUND = ("background", "_background_")


class VocObjectReader:
    """Reader of object images with class images."""

    def __init__(self, entries: list[tuple[str, File, tuple[File, File]]], values: ValueToLabel, stuff: frozenset[int]):
        """Each entry is (image id, image, (image of objects, image of classes))."""
        self.images, self._values, self._stuff = ImageList(entries), values, stuff

    def target(self, index: int) -> Target:
        """Return the background if it is a class, then objects by number.

        Raises:
            DatasetError: an image cannot be read, sizes differ, or a class does not exist.
        """
        image_id, _, (objects_file, classes_file) = self.images.entries[index]
        numbers, classes = read_label_values(objects_file), read_label_values(classes_file)
        require_same_size(numbers, objects_file, classes, classes_file)
        if max(int(numbers.max()), int(classes.max())) > _BORDER:
            raise DatasetError(
                f"has values above 255, or {classes_file} has; expected 8-bit images",
                where=objects_file.name,
                remedy="export both again",
            )
        values = numbers.astype(np.uint16) << 8 | classes.astype(np.uint16)
        pairs = present_values(values)
        labels = self._values.look_up(pairs & 255, values & 255, classes_file)
        objects = pairs >> 8
        counts = np.bincount(values.ravel(), minlength=int(pairs[-1]) + 1)[pairs]
        for number in np.unique(objects[(objects > 0) & (objects < _BORDER)]):
            own = objects == number
            labels[own] = labels[own][np.argmax(np.where(labels[own] >= 0, counts[own], -1))]
        labels[objects == _BORDER] = -1
        labels[(objects == 0) & ~np.isin(labels, list(self._stuff))] = -1
        return self._target_of_objects(values, pairs, objects, labels, image_id)

    def _target_of_objects(self, values, pairs, objects, labels, image_id) -> Target:
        """Return one object per number; pixels without a number go by their class."""
        table = np.zeros(int(pairs[-1]) + 1, dtype=np.uint16)
        keys = np.where(objects > 0, objects, np.where(labels >= 0, 256 + (pairs & 255), 0))
        table[pairs] = keys
        present, first = np.unique(keys, return_index=True)
        is_crowd = np.zeros(len(present), dtype=bool)
        return instance_target(table.take(values), present, labels[first], is_crowd, self._stuff, image_id)


def open_voc(split: Split) -> AnnotatedImages:
    """Open the images in the split's lists, e.g. train.txt in ImageSets/Segmentation."""
    files, key, task = split.files, split.key, split.config.task
    lists = split.root.folder("ImageSets/Segmentation", f"{key}.list")
    list_files = [_list_file(lists, subset, f"{key}.subsets") for subset in subset_names(split, _SUBSETS)]
    ids = list(dict.fromkeys(name for file in list_files for name in file.read().decode("utf-8-sig").split()))
    if not ids:
        raise DatasetError("is empty, expected one image name per line", where=list_files[0].name, remedy="add names")

    def files_by_id(folder: str, kind: str) -> list[File]:
        return _files_by_id(split, split.root.folder(folder, f"{key}.{kind}"), ids, f"{key}.{kind}", list_files[0])

    images = files_by_id(files.images or "JPEGImages", "images")
    classes_files = files_by_id(files.annotations or "SegmentationClass", "annotations")
    if split.config.categories is None:
        config = split.config.model_copy(update={"categories": _exported_classes(split.root) or "voc"})
        split = split._replace(config=config)
    classes = resolve_classes(split)
    if task == "semantic":
        pairs = list(zip(ids, images, classes_files, strict=True))
        return AnnotatedImages(classes.categories, task, LabelMapReader(pairs, classes.value_to_label, split.problems))
    objects_files = files_by_id(files.masks or "SegmentationObject", "masks")
    entries = list(zip(ids, images, zip(objects_files, classes_files, strict=True), strict=True))
    return AnnotatedImages(classes.categories, task, VocObjectReader(entries, classes.value_to_label, classes.stuff))


def _list_file(lists: Folder, subset: str, key: str) -> File:
    file = lists.find_file(f"{subset}.txt")
    if file is None:
        names = ", ".join(_list_names(lists)) or "none"
        raise DatasetError(f"no list '{subset}.txt' in {lists}, only: {names}", where=key, remedy="name one of these")
    return file


def _list_names(lists: Folder) -> list[str]:
    return [name.removesuffix(".txt") for name in lists.names() if name.endswith(".txt")]


def _files_by_id(split: Split, folder: Folder, ids: list[str], key: str, list_file: File) -> list[File]:
    """Return the image of each id, with any file extension."""
    by_id = {str(PurePosixPath(name).with_suffix("")): name for name in folder.names() if is_image_name(name)}
    return find_all(folder, [by_id.get(name, f"{name}.png") for name in ids], key, list_file, split.problems)


def _exported_classes(root: Folder) -> tuple[CategoryConfig, ...] | None:
    """Return the classes that a tool wrote beside the folders: lines of "name", or of "name:r,g,b:parts:actions".

    Classes are numbered from 0; "__ignore__" is not counted.
    """
    file = root.find_file("labelmap.txt") or root.find_file("class_names.txt")
    if file is None:
        return None
    lines = [line.strip() for line in file.read().decode("utf-8-sig").splitlines()]
    fields = [line.split(":") for line in lines if line and not line.startswith("#")]
    classes = [CategoryConfig(id=_BORDER, name="border", ignore=True)]
    for number, (name, *rest) in enumerate(field for field in fields if field[0] != "__ignore__"):
        color = tuple(map(int, rest[0].split(","))) if rest and rest[0].count(",") == 2 else None
        is_thing = name.lower() not in _BACKGROUND
        classes.append(CategoryConfig(id=number, name=name, is_thing=is_thing, color=color))
    return tuple(classes)


def detect(root: Folder) -> Detection:
    """Detect SegmentationClass with lists; without a train or val list, the first list is used."""
    lists = search_folder(root, "ImageSets/Segmentation")
    if search_folder(root, "SegmentationClass") is None:
        return Detection()
    names = _list_names(lists) if lists else []
    if not names:
        return Detection(mismatch="there is SegmentationClass, but no list like ImageSets/Segmentation/train.txt")
    tasks = ("panoptic", "semantic") if search_folder(root, "SegmentationObject") else ("semantic",)
    present = {name: name in names for name in ("train", "val")}
    if any(present.values()):
        return Detection(detected_tasks(root, "voc", **dict.fromkeys(tasks, present)))
    splits = {"train": {"subsets": names[:1]}, "val": None}
    return Detection(tuple(detected(root.root, "voc", task, splits) for task in tasks))
