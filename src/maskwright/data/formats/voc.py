"""Folders as Pascal VOC has them: JPEGImages, SegmentationClass, SegmentationObject and lists in ImageSets.

Palette pictures of class numbers, and of object numbers for the other tasks; 255 is the rim between objects, which is
ignored. An object's class is the one that most of its pixels have. Tools that export this layout write their class
names beside it, `labelmap.txt` (CVAT) or `class_names.txt` (Labelme); without either the classes are VOC's own 21.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np

from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import classes_of
from maskwright.data.formats.coco import find_all
from maskwright.data.formats.image_list import ImageList, Row
from maskwright.data.formats.label_maps import LabelMaps, Meanings, instance_target, read_values
from maskwright.data.formats.published import parts_of
from maskwright.data.images.load import is_image_name
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import present_values

_PARTS = {"train": ("train",), "val": ("val",), "test": ("test",)}
_RIM = 255
_BACKGROUND = ("background", "_background_")


class VocObjects:
    """Reader of object pictures, with class pictures beside them."""

    def __init__(self, rows: list[tuple[str, File, tuple[File, File]]], meanings: Meanings, stuff: frozenset[int]):
        """Of (image id, picture, (object picture, class picture)); `stuff` are the labels that are stuff."""
        self.images, self._meanings, self._stuff = ImageList(rows), meanings, stuff

    def target(self, index: int) -> Target:
        """The background where it is a class, then objects by number.

        Raises:
            DatasetError: a picture cannot be read, sizes differ, or a class does not exist.
        """
        image_id, _, (objects_file, classes_file) = self.images.rows[index]
        numbers, classes = read_values(objects_file), read_values(classes_file)
        if numbers.shape != classes.shape:
            raise DatasetError(
                f"{objects_file}: {numbers.shape[0]} x {numbers.shape[1]} pixels (height x width), but {classes_file} "
                f"has {classes.shape[0]} x {classes.shape[1]}; export them again"
            )
        if max(int(numbers.max()), int(classes.max())) > _RIM:
            raise DatasetError(f"{objects_file}: numbers above 255 in it or in {classes_file}; expected 8-bit pictures")
        values = numbers.astype(np.uint16) << 8 | classes.astype(np.uint16)
        pairs = present_values(values)
        labels = self._meanings.labels(pairs & 255, values & 255, classes_file)
        owners = pairs >> 8
        counts = np.bincount(values.ravel(), minlength=int(pairs[-1]) + 1)[pairs]
        for owner in np.unique(owners[(owners > 0) & (owners < _RIM)]):
            own = owners == owner
            labels[own] = labels[own][np.argmax(np.where(labels[own] >= 0, counts[own], -1))]
        labels[owners == _RIM] = -1
        labels[(owners == 0) & ~np.isin(labels, list(self._stuff))] = -1
        return self._numbered(values, pairs, owners, labels, image_id)

    def _numbered(self, values, pairs, owners, labels, image_id) -> Target:
        """One number per object; the background's pixels have none of their own and go by their class."""
        table = np.zeros(int(pairs[-1]) + 1, dtype=np.uint16)
        keys = np.where(owners > 0, owners, np.where(labels >= 0, 256 + (pairs & 255), 0))
        table[pairs] = keys
        present, first = np.unique(keys, return_index=True)
        is_crowd = np.zeros(len(present), dtype=bool)
        return instance_target(table.take(values), present, labels[first], is_crowd, self._stuff, image_id)

    def has_object(self, index: int) -> bool:
        """Whether there is something to train on."""
        return len(self.target(index)) > 0


def open_voc(split: Split) -> AnnotatedImages:
    """The images of the split's lists, e.g. train.txt in ImageSets/Segmentation."""
    files, key, task = split.files, split.key, split.config.task
    lists = split.root.folder("ImageSets/Segmentation", f"{key}.list")
    listed = [_list(lists, part, f"{key}.parts") for part in parts_of(split, _PARTS)]
    ids = list(dict.fromkeys(name for file in listed for name in file.read().decode("utf-8-sig").split()))
    if not ids:
        raise DatasetError(f"{listed[0]}: names no picture; expected one name per line")

    def found(folder: str, part: str) -> list[File]:
        return _by_id(split, split.root.folder(folder, f"{key}.{part}"), ids, f"{key}.{part}", listed[0])

    pictures = found(files.images or "JPEGImages", "images")
    classes_files = found(files.annotations or "SegmentationClass", "annotations")
    if split.config.categories is None:
        config = split.config.model_copy(update={"categories": _own_classes(split.root) or "voc"})
        split = split._replace(config=config)
    classes = classes_of(split)
    meanings = classes.meanings
    if task == "semantic":
        rows: list[Row] = list(zip(ids, pictures, classes_files, strict=True))
        return AnnotatedImages(classes.kept, task, LabelMaps(rows, meanings, split.problems))
    objects_files = found(files.masks or "SegmentationObject", "masks")
    pairs = zip(objects_files, classes_files, strict=True)
    source = VocObjects(list(zip(ids, pictures, pairs, strict=True)), meanings, classes.stuff)
    return AnnotatedImages(classes.kept, task, source)


def _list(lists: Folder, part: str, key: str) -> File:
    file = lists.find_file(f"{part}.txt")
    if file is None:
        names = ", ".join(name.removesuffix(".txt") for name in lists.names() if name.endswith(".txt"))
        raise DatasetError(f"{key}: {lists} has no list '{part}.txt', only: {names or 'none'}; name one of them")
    return file


def _by_id(split: Split, folder: Folder, ids: list[str], key: str, listed: File) -> list[File]:
    """The picture of each id, whatever its suffix."""
    by_id = {str(PurePosixPath(name).with_suffix("")): name for name in folder.names() if is_image_name(name)}
    return find_all(folder, [by_id.get(name, f"{name}.png") for name in ids], key, listed, split.problems)


def _own_classes(root: Folder) -> tuple[CategoryConfig, ...] | None:
    """The classes that an exporting tool wrote beside the folders."""
    for name in ("labelmap.txt", "class_names.txt"):
        file = root.find_file(name)
        if file is not None:
            lines = [line.strip() for line in file.read().decode("utf-8-sig").splitlines()]
            return _listed_classes([line for line in lines if line and not line.startswith("#")])
    return None


def _listed_classes(lines: list[str]) -> tuple[CategoryConfig, ...]:
    """Names, one per line, maybe with ":r,g,b:..." behind; numbered from 0, but "__ignore__" is not counted."""
    named = [line.split(":") for line in lines if line.split(":")[0] != "__ignore__"]
    classes = [CategoryConfig(id=_RIM, name="rim", ignore=True)]
    for number, (name, *rest) in enumerate(named):
        color = tuple(map(int, rest[0].split(","))) if rest and rest[0].count(",") == 2 else None
        is_thing = name.lower() not in _BACKGROUND
        classes.append(CategoryConfig(id=number, name=name, is_thing=is_thing, color=color))
    return tuple(classes)
