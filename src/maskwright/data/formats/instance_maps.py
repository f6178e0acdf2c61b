"""Instance maps: label images whose values number the objects of an image (Cellpose, StarDist, HoVer-Net).

0, or black, is the background. Every other value or color is one object, and all objects are of one class. With the
task semantic, or with a class called "background", the pixels of the background have a class too.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from maskwright.config.categories import category_entries
from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import MAX_VALUE, resolve_classes
from maskwright.data.formats.color_tables import color_codes
from maskwright.data.formats.image_list import ImageAndLabel, ImageList
from maskwright.data.formats.label_maps import instance_target, pair_label_images
from maskwright.data.images.label_images import read_label_image
from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError, RecipeError
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import present_values

OBJECT, BACKGROUND = "object", "background"


class InstanceMapReader:
    """Reader of label images whose values number objects."""

    def __init__(self, entries: Iterable[ImageAndLabel], label: int, background: int | None, ignored: Iterable[int]):
        """Define the files.

        Args:
            entries: of each image.
            label: of all objects.
            background: label of the pixels of value 0; None if they have none.
            ignored: values of pixels that belong to no object and not to the background.
        """
        self.images, self._label, self._background = ImageList(entries), label, background
        self._ignored = sorted(ignored)

    def target(self, index: int) -> Target:
        """Return one object per value, ascending, after the background if it has a label.

        Raises:
            DatasetError: the label image cannot be read, or has negative values that are not ignored.
        """
        image_id, _, file = self.images.entries[index]
        values = read_object_numbers(file)
        if values.min() < 0 or values.max() > MAX_VALUE:
            present, inverse = np.unique(values, return_inverse=True)
            numbers, codes = inverse.reshape(values.shape), np.arange(len(present))
        else:
            present = codes = present_values(values)
            numbers = values
        is_ignored = np.isin(present, self._ignored)
        if present[0] < 0 and not is_ignored[0]:
            raise DatasetError(
                f"has the value {present[0]}, expected 0 for the background and positive numbers of objects",
                where=file.name,
                remedy="add it to data.ignore_values if it means no data, else export the file again",
            )
        labels = np.full(len(present), self._label)
        labels[present == 0] = -1 if self._background is None else self._background
        labels[is_ignored] = -1
        stuff = frozenset() if self._background is None else frozenset({self._background})
        return instance_target(numbers, codes, labels, np.zeros(len(present), dtype=bool), stuff, image_id)


def read_object_numbers(file: File) -> np.ndarray:
    """Return the number of the object of each pixel, (H, W); of a color image, one number per color, 0 for black.

    Raises:
        DatasetError: see `read_label_image`.
    """
    values = read_label_image(file, allow_colors=True)
    return color_codes(values) if values.ndim == 3 else values


def open_instance_maps(split: Split) -> AnnotatedImages:
    """Open a split of images and instance maps, which are paired as those of `label_maps`."""
    config = split.config
    if config.label_map:
        raise RecipeError(
            "has no meaning with data.format instance_maps, whose values are no classes",
            where="data.label_map",
            remedy="remove it; data.ignore_values lists values that are no objects",
        )
    listed = None
    if config.categories is None:
        background = [CategoryConfig(id=0, name=BACKGROUND, is_thing=False)] if config.task == "semantic" else []
        listed = [*background, CategoryConfig(id=1, name=OBJECT)]
    entries = category_entries(config.categories) if config.categories is not None else listed or []
    objects = [entry for entry in entries if entry.name.casefold() != BACKGROUND and not entry.ignore]
    if len(objects) != 1:
        raise RecipeError(
            f"lists {len(objects)} classes of objects, but instance maps do not tell classes apart",
            where="data.categories",
            remedy="list one, and 'background' if it is a class",
        )
    classes = resolve_classes(split, None, listed)
    labels = {entry.name.casefold(): classes.labels.get(entry.id) for entry in entries}
    reader = InstanceMapReader(
        pair_label_images(split),
        _label_of_objects(labels[objects[0].name.casefold()]),
        labels.get(BACKGROUND),
        config.ignore_values,
    )
    return AnnotatedImages(classes.categories, config.task, reader)


def _label_of_objects(label: int | None) -> int:
    if label is None:
        raise RecipeError(
            "the class of the objects has is_thing: false, so the task instance has no objects",
            where="data.categories",
            remedy="set is_thing: true",
        )
    return label
