"""Label maps: images with one value per pixel, which is a class (CamVid, ADE20K, most custom data) or an object number.

There is no connected-component search: all pixels of a class are one object.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import MAX_VALUE, ValueToLabel, resolve_classes
from maskwright.data.formats.image_list import ImageAndLabel, ImageList, pair_by_name, read_pair_list
from maskwright.data.formats.layouts import SPLIT_NAMES, Detection, detected, search_folder
from maskwright.data.images.load import is_image_name, read_label_image
from maskwright.data.problems import ProblemHandler
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError, RecipeError
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import id_dtype, look_up, present_values

_IMAGE_FOLDERS = ("images", "image", "imgs", "img")
_LABEL_FOLDERS = ("labels", "annotations", "masks", "annot", "label", "mask", "gt")
_SAMPLED_LABELS = 200  # of each split, to detect the classes
_VOID = 255


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
        values = read_label_values(file)
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
    config, files, key = split.config, split.files, split.key
    classes = resolve_classes(split)
    if files.list is not None:
        list_file = split.root.file(files.list, f"{key}.list")
        pairs = read_pair_list(split.root, list_file, f"{key}.list", split.problems)
    else:
        for name in ("images", "annotations"):
            if getattr(files, name) is None:
                raise RecipeError(
                    "is missing", where=f"{key}.{name}", remedy=f"name the folder of the {name}, or give {key}.list"
                )
        images = split.root.folder(files.images or "", f"{key}.images")
        labels = split.root.folder(files.annotations or "", f"{key}.annotations")
        pairs = pair_by_name(images, labels, key, split.problems, config.image_suffix, config.label_suffix)
    reader = LabelMapReader(pairs, classes.value_to_label, split.problems)
    return AnnotatedImages(classes.categories, config.task, reader)


def read_label_values(file: File) -> np.ndarray:
    """Return the values of a label image, (H, W) uint8, uint16 or int32, all in 0..65535.

    Raises:
        DatasetError: see `read_label_image`; or a value is out of range.
    """
    values = read_label_image(file)
    if values.dtype not in (np.uint8, np.uint16) and (values.min() < 0 or values.max() > MAX_VALUE):
        raise DatasetError(
            f"has values from {values.min()} to {values.max()}, expected 0..{MAX_VALUE}",
            where=file.name,
            remedy="export it again",
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


def detect(root: Folder) -> Detection:
    """Detect images and label images in folders of any usual name, with or without splits.

    The classes are the values that occur in the first 200 label images of each split, with 255 ignored.
    """
    image_folders = [name for name in _IMAGE_FOLDERS if search_folder(root, name)]
    for images in _IMAGE_FOLDERS:
        for labels in _LABEL_FOLDERS:
            splits = _split_folders(root, images, labels)
            if not splits and images in image_folders and search_folder(root, labels):
                splits = {"train": {"images": images, "annotations": labels}}
            if splits:
                return _with_classes(root, splits)
    if image_folders:
        expected = ", ".join(_LABEL_FOLDERS)
        return Detection(mismatch=f"there is a folder {image_folders[0]}, but none of label images ({expected})")
    return Detection()


def _split_folders(root: Folder, images: str, labels: str) -> dict[str, dict[str, str]]:
    """Return the splits with two folders, like images/train and labels/train, or train/images and train/labels."""
    for pattern in ("{kind}/{split}", "{split}/{kind}"):
        found: dict[str, dict[str, str]] = {}
        for split, names in SPLIT_NAMES.items():
            for name in names:
                folders = [pattern.format(kind=kind, split=name) for kind in (images, labels)]
                if all(search_folder(root, folder) for folder in folders):
                    found.setdefault(split, {"images": folders[0], "annotations": folders[1]})
        if found:
            return found
    return {}


def _with_classes(root: Folder, splits: dict[str, dict[str, str]]) -> Detection:
    values: set[int] = set()
    first_error = ""
    for file in _sampled_labels(root, splits):
        try:
            values.update(present_values(read_label_values(file)).tolist())
        except DatasetError as error:  # reported when all files are read, unless no file can be
            first_error = first_error or f"{error.where or file}: {error.found}"
    if not values:
        folder = next(iter(splits.values()))["annotations"]
        return Detection(mismatch=first_error or f"the folder {folder} has no label images")
    ids = sorted(values - {_VOID}) or [0]
    categories = tuple(CategoryConfig(id=value, name=f"class {value}", is_thing=False) for value in ids)
    keys = {"categories": categories, "ignore_values": (_VOID,)}
    return Detection((detected(root.root, "label_maps", "semantic", splits, **keys),))


def _sampled_labels(root: Folder, splits: dict[str, dict[str, str]]) -> Iterator[File]:
    for split in splits.values():
        folder = root.folder(split["annotations"], "annotations")
        names = [name for name in folder.names() if is_image_name(name)][:_SAMPLED_LABELS]
        yield from (file for file in folder.files(names) if file is not None)
