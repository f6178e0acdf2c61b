"""ADE20K, SceneParsing benchmark, as downloaded, for all three tasks.

Classes come from `annotations` (0 is ignored, 1..150 are classes). Objects come from the benchmark's
`annotations_instance`, whose red byte is the number 1..100 of a thing class, in the order of the class list, and whose
green byte counts the objects of the image. Panoptic targets are things over stuff, combined as in the original's
datasets/prepare_ade20k_pan_seg.py; pixels that only `annotations` assigns to a thing are void. If that script was run,
its files are read.
"""

from __future__ import annotations

import numpy as np

from maskwright.config.categories import load_categories
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import ClassMapping, resolve_classes
from maskwright.data.formats.coco_panoptic import open_coco_panoptic
from maskwright.data.formats.image_list import ImageList, pair_by_name
from maskwright.data.formats.label_maps import LabelMapReader, instance_target, read_label_values, require_same_size
from maskwright.data.formats.layouts import (
    Detection,
    detected_tasks,
    known_targets,
    search_file,
    search_folder,
    single_subset,
    with_defaults,
)
from maskwright.data.images.label_images import read_rgb_values
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import present_values

_SUBSETS = {"train": ("training",), "val": ("validation",), "test": ("testing",)}
_NUM_CLASSES = 150
_OBJECT_OFFSET = 1 << 8  # class ids fit in one byte; larger values are object numbers


class Ade20kObjectReader:
    """Reader of objects, over stuff for the task "panoptic"."""

    def __init__(self, entries: list[tuple[str, File, tuple[File, File | None]]], classes: ClassMapping):
        """Each entry is (image id, image, (image of objects, image of classes or None))."""
        self.images, self._values, self._stuff = ImageList(entries), classes.value_to_label, classes.stuff
        self._category_ids = np.array([0, *_thing_ids()])  # by the number of a thing class

    def target(self, index: int) -> Target:
        """Return stuff by class, then objects by number.

        Raises:
            DatasetError: an image cannot be read, sizes differ, a class does not exist, or an object has two classes.
        """
        image_id, _, (objects_file, classes_file) = self.images.entries[index]
        colors = read_rgb_values(objects_file)
        thing_numbers, object_numbers = colors[..., 0], colors[..., 1]
        category_of_object = self._categories_of_objects(thing_numbers, object_numbers, objects_file)
        stuff = np.zeros(object_numbers.shape, dtype=np.uint16)
        if classes_file is not None:
            stuff = self._read_stuff(classes_file)
            require_same_size(object_numbers, objects_file, stuff, classes_file)
        values = np.where(object_numbers > 0, object_numbers.astype(np.uint16) + _OBJECT_OFFSET, stuff)
        present = present_values(values)
        numbers = np.maximum(present - _OBJECT_OFFSET, 0)
        category_ids = np.where(present > _OBJECT_OFFSET, category_of_object[numbers], present)
        labels = self._values.look_up(category_ids, values, objects_file)
        return instance_target(values, present, labels, np.zeros(len(present), dtype=bool), self._stuff, image_id)

    def _categories_of_objects(self, thing_numbers: np.ndarray, object_numbers: np.ndarray, file: File) -> np.ndarray:
        """Return (256,) the category id of each object number, 0 for numbers that do not occur."""
        pairs = present_values(object_numbers.astype(np.uint16) << 8 | thing_numbers)
        pairs = pairs[pairs >> 8 > 0]
        objects, things = pairs >> 8, pairs & 255
        repeated = np.flatnonzero(np.diff(objects) == 0)
        if len(repeated):
            first, second = things[repeated[0] : repeated[0] + 2]
            raise DatasetError(
                f"object {objects[repeated[0]]} has the classes {first} and {second}, expected one",
                where=file.name,
                remedy="download it again",
            )
        if len(things) and (things.max() >= len(self._category_ids) or things.min() == 0):
            wrong = things.min() if things.min() == 0 else things.max()
            raise DatasetError(
                f"an object has the class {wrong}, expected 1..{len(self._category_ids) - 1} (the thing classes of the "
                "instance benchmark)",
                where=file.name,
                remedy="use the benchmark's annotations_instance",
            )
        ids = np.zeros(256, dtype=np.intp)
        ids[objects] = self._category_ids[things]
        return ids

    def _read_stuff(self, file: File) -> np.ndarray:
        """Return (H, W) category ids of stuff, 0 elsewhere."""
        values = read_label_values(file)
        present = present_values(values)
        labels = self._values.look_up(present, values, file)
        table = np.zeros(int(present[-1]) + 1, dtype=np.uint16)
        table[present] = np.where(np.isin(labels, list(self._stuff)), present, 0)
        return table.take(values)


def open_ade20k(split: Split) -> AnnotatedImages:
    """Open the subset "training" or "validation"."""
    files, key, task = split.files, split.key, split.config.task
    subset = single_subset(split, _SUBSETS)
    if task != "semantic" and split.root.find_file(f"{_prepared_name(split)}.json") is not None:
        return _open_prepared(split, subset)
    images = split.root.folder(f"{files.images or 'images'}/{subset}", f"{key}.images")
    classes = resolve_classes(split, "ade20k")
    semantic = []
    if task != "instance":
        labels = split.root.folder(f"{files.annotations or 'annotations'}/{subset}", f"{key}.annotations")
        semantic = pair_by_name(images, labels, key, split.problems)
    if task == "semantic":
        return AnnotatedImages(
            classes.categories, task, LabelMapReader(semantic, classes.value_to_label, split.problems)
        )
    objects = split.root.folder(f"{files.masks or 'annotations_instance'}/{subset}", f"{key}.masks")
    classes_files = {image_id: file for image_id, _, file in semantic}
    entries = [
        (image_id, image, (objects_file, classes_files.get(image_id)))
        for image_id, image, objects_file in pair_by_name(images, objects, key, split.problems)
    ]
    return AnnotatedImages(classes.categories, task, Ade20kObjectReader(entries, classes))


def _prepared_name(split: Split) -> str:
    return f"ade20k_panoptic_{split.name}"


def _open_prepared(split: Split, subset: str) -> AnnotatedImages:
    """Open the JSON that the original's datasets/prepare_ade20k_pan_seg.py writes; it counts classes from 0."""
    name = _prepared_name(split)
    files = {"images": f"images/{subset}", "annotations": f"{name}.json", "masks": name}
    label_map = known_targets({number: number + 1 for number in range(_NUM_CLASSES)}, split) | split.config.label_map
    return open_coco_panoptic(
        with_defaults(split, files, format="coco_panoptic", categories="ade20k", label_map=label_map)
    )


def _thing_ids() -> list[int]:
    """Return the ids of the benchmark's thing classes, ascending, as the images of objects number them."""
    return sorted(category.id for category in load_categories("ade20k") if category.is_thing)


def detect(root: Folder) -> Detection:
    """Detect the benchmark's folders, if its objectInfo150 is there."""
    if not any(search_file(root, f"objectInfo150.{suffix}") for suffix in ("txt", "csv")):
        return Detection()
    panoptic, semantic = {}, {}
    for split, (subset,) in _SUBSETS.items():
        if split != "test" and search_folder(root, f"images/{subset}"):
            panoptic[split] = search_folder(root, f"annotations_instance/{subset}")
            semantic[split] = search_folder(root, f"annotations/{subset}")
    configs = detected_tasks(root, "ade20k", panoptic=panoptic, semantic=semantic)
    return Detection(configs, "" if configs else "ADE20K needs images/training and annotations/training")
