"""Folders in the layout of Pascal VOC: JPEGImages, SegmentationClass, SegmentationObject and lists in ImageSets.

Palette images hold class numbers, and object numbers for the other tasks; 255 is the border between objects, which is
ignored. An object has the class of most of its pixels. Tools that export this layout write class names beside it,
`labelmap.txt` (CVAT, which paints classes and objects in colors) or `class_names.txt` (labelme2voc, which writes no
lists). With lists and without names, the classes are VOC's own 21.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import numpy as np

from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import ValueToLabel, resolve_classes
from maskwright.data.formats.color_tables import color_code, color_codes, read_color_table
from maskwright.data.formats.detect_classes import find_classes
from maskwright.data.formats.image_list import ImageList, find_all
from maskwright.data.formats.label_maps import LabelMapReader, instance_target, read_label_values, require_same_size
from maskwright.data.formats.layouts import Detection, detected, detected_tasks, search_folder, subset_names
from maskwright.data.formats.split_lists import split_of_list
from maskwright.data.images.find import is_image_name
from maskwright.data.images.label_images import read_label_image
from maskwright.data.storage.folders import File, Folder
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import present_values

_SUBSETS = {"train": ("train",), "val": ("val",), "test": ("test",)}
_BORDER, _BORDER_COLOR = 255, (224, 224, 192)
_PUBLISHED_NAME = re.compile(r"(20\d\d_)?\d{6}")
_SAMPLED = 200  # class images that are read to find the classes
# Earlier versions of labelme2voc write arrays to SegmentationClass, and images to the other folder.
_CLASS_FOLDERS = ("SegmentationClassPNG", "SegmentationClass")
_OBJECT_FOLDERS = ("SegmentationObjectPNG", "SegmentationObject")


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
        numbers, classes = _read_objects(objects_file), read_label_values(classes_file, self._values)
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


def _read_objects(file: File) -> np.ndarray:
    """Return the number of the object of each pixel, also of an image where each object has its own color."""
    values = read_label_image(file, allow_colors=True)
    if values.ndim == 2:
        return read_label_values(file)
    codes = color_codes(values)
    colors = np.setdiff1d(codes, (0, color_code(_BORDER_COLOR)))
    if len(colors) >= _BORDER:
        raise DatasetError(f"has {len(colors)} colors of objects, expected fewer than {_BORDER}", where=file.name)
    numbers = np.searchsorted(colors, codes).astype(np.uint8) + np.uint8(1)
    numbers[codes == 0] = 0
    numbers[codes == color_code(_BORDER_COLOR)] = _BORDER
    return numbers


def open_voc(split: Split) -> AnnotatedImages:
    """Open the images in the split's lists, e.g. train.txt in ImageSets/Segmentation."""
    files, key, task = split.files, split.key, split.config.task
    classes_folder = split.root.folder(files.annotations or _classes_folder(split.root), f"{key}.annotations")
    ids, listed_in = _listed_ids(split, classes_folder)

    def files_by_id(folder: Folder, kind: str) -> list[File]:
        return _files_by_id(split, folder, ids, f"{key}.{kind}", listed_in)

    images = files_by_id(split.root.folder(files.images or "JPEGImages", f"{key}.images"), "images")
    classes_files = files_by_id(classes_folder, "annotations")
    exported = _exported_classes(split.root)
    if exported is None and split.config.categories is None and search_folder(split.root, "ImageSets") is None:
        split.problems.warning(
            "there are neither class names nor lists, so the classes are taken to be the 21 of Pascal VOC",
            where=key,
            remedy="set data.categories to your classes, or to voc if they are these",
        )
    classes = resolve_classes(split, None if exported else "voc", exported, "the class names beside the folders")
    if task == "semantic":
        pairs = list(zip(ids, images, classes_files, strict=True))
        return AnnotatedImages(classes.categories, task, LabelMapReader(pairs, classes.value_to_label, split.problems))
    objects_files = files_by_id(split.root.folder(files.masks or _objects_folder(split.root), f"{key}.masks"), "masks")
    entries = list(zip(ids, images, zip(objects_files, classes_files, strict=True), strict=True))
    return AnnotatedImages(classes.categories, task, VocObjectReader(entries, classes.value_to_label, classes.stuff))


def _classes_folder(root: Folder) -> str:
    return next((name for name in _CLASS_FOLDERS if search_folder(root, name)), _CLASS_FOLDERS[-1])


def _objects_folder(root: Folder) -> str:
    return next((name for name in _OBJECT_FOLDERS if search_folder(root, name)), _OBJECT_FOLDERS[-1])


def _listed_ids(split: Split, classes_folder: Folder) -> tuple[list[str], File]:
    """Return the names of the split's images without file extension, and the file or folder that has them.

    A dataset without lists, as labelme2voc writes it, is a training split.
    """
    if split.name == "train" and not split.files.subsets and search_folder(split.root, "ImageSets") is None:
        names = [name for name in classes_folder.names() if is_image_name(name)]
        return [str(PurePosixPath(name).with_suffix("")) for name in names], File(str(classes_folder))
    lists = split.root.folder("ImageSets/Segmentation", f"{split.key}.list")
    list_files = [_list_file(lists, subset, f"{split.key}.subsets") for subset in subset_names(split, _SUBSETS)]
    known = {str(PurePosixPath(name).with_suffix("")) for name in classes_folder.names()}
    lines = [line.strip() for file in list_files for line in read_text(file).splitlines()]
    ids = [_listed_id(line, known) for line in dict.fromkeys(lines) if line]
    if not ids:
        raise DatasetError("is empty, expected one image name per line", where=list_files[0].name, remedy="add names")
    return list(dict.fromkeys(ids)), list_files[0]


def _listed_id(line: str, known: set[str]) -> str:
    """Return the name in a line of a list: the whole line, or without file extension, or its first column."""
    first_column = line.split()[0]
    candidates = (line, str(PurePosixPath(line).with_suffix("")), PurePosixPath(line).stem, first_column)
    return next((name for name in candidates if name in known), line)


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
    """Return the classes that a tool wrote beside the folders, and the border of objects."""
    table = read_color_table(root)
    if table is None:
        return None
    has_border = any(entry.id == _BORDER or entry.color == _BORDER_COLOR for entry in table)
    border = CategoryConfig(id=_BORDER, name="border", ignore=True, color=None if has_border else _BORDER_COLOR)
    return table if any(entry.id == _BORDER for entry in table) else (*table, border)


def detect(root: Folder) -> Detection:
    """Detect SegmentationClass; without a train or val list, the first list is used, and without any, all images."""
    lists = search_folder(root, "ImageSets/Segmentation")
    if search_folder(root, _classes_folder(root)) is None:
        return Detection()
    has_objects = search_folder(root, _objects_folder(root)) is not None
    tasks = ("panoptic", "semantic") if has_objects else ("semantic",)
    names = _list_names(lists) if lists else []
    if not names and (search_folder(root, "ImageSets") or not search_folder(root, "JPEGImages")):
        return Detection(mismatch="there is SegmentationClass, but no list like ImageSets/Segmentation/train.txt")
    notes = ()
    if _exported_classes(root) is None:
        if not names and not has_objects and any(map(split_of_list, root.names())):
            return Detection()  # label images with lists at other places
        if not names:
            return _numbered_classes(root, tasks)
        notes = _note_on_names(root)
    present = {name: name in names for name in ("train", "val")}
    if any(present.values()):
        return Detection(detected_tasks(root, "voc", **dict.fromkeys(tasks, present)), notes=notes)
    splits = {"train": {"subsets": names[:1]}, "val": None}
    return Detection(tuple(detected(root.root, "voc", task, splits) for task in tasks), notes=notes)


def _note_on_names(root: Folder) -> tuple[str, ...]:
    """Say that the classes are guessed, unless the images are named like those of Pascal VOC."""
    folder = search_folder(root, _classes_folder(root))
    if folder is None or any(_PUBLISHED_NAME.fullmatch(PurePosixPath(name).stem) for name in folder.names()):
        return ()
    return ("classes are taken to be the 21 of Pascal VOC, whose layout this is; for others set data.categories",)


def _numbered_classes(root: Folder, tasks: tuple[str, ...]) -> Detection:
    """Return a dataset without class names and lists: its classes are the values or colors of the class images.

    The palette does not tell: annotation tools use that of Pascal VOC for any classes.
    """
    folder = root.folder(_classes_folder(root), "annotations")
    labels = [f"{folder.path}/{name}" for name in folder.names() if is_image_name(name)][:_SAMPLED]
    notes: list[str] = []
    try:
        keys = find_classes(root, labels, notes)
    except DatasetError as error:
        return Detection(mismatch=error.found)
    notes.append(
        "classes are numbered, as there are no names; if they are those of Pascal VOC, set data.categories=voc"
    )
    categories = keys["categories"]
    if "panoptic" in tasks and isinstance(categories, tuple):
        keys["categories"] = tuple(entry.model_copy(update={"is_thing": entry.id != 0}) for entry in categories)
        notes.append("class 0 is taken for the background, and all others for things")
    configs = (detected(root.root, "voc", task, {"train": {}, "val": None}, **keys) for task in tasks)
    return Detection(tuple(configs), notes=tuple(notes))
