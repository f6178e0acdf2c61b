"""Label maps: images with one value per pixel, which is a class (CamVid, ADE20K, most custom data) or an object number.

There is no connected-component search: all pixels of a class are one object. Label images may be painted in the colors
of the classes.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

import numpy as np
import torch

from maskwright.config.categories import category_entries, category_list_names
from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import MAX_VALUE, OUT_OF_RANGE, ClassMapping, ValueToLabel, resolve_classes
from maskwright.data.formats.color_tables import (
    ColorTable,
    color_codes,
    color_of,
    colors_of_classes,
    read_color_table,
    read_value_table,
)
from maskwright.data.formats.edge_values import find_added_values
from maskwright.data.formats.image_list import ImageAndLabel, ImageList, pair_by_name, read_pair_list
from maskwright.data.formats.layouts import SPLIT_NAMES, Detection, detected, folders_below, split_of_folder
from maskwright.data.images.load import is_image_name, read_label_image
from maskwright.data.problems import ProblemHandler
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError, RecipeError
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import id_dtype, look_up, present_values

# In lower case, the most usual first.
_IMAGE_FOLDERS = ("images", "image", "imgs", "img", "img_dir", "jpegimages", "rgb", "photos", "image_2")
_LABEL_FOLDERS = (
    *("labels", "annotations", "masks", "annot", "label", "mask", "gt", "ann_dir", "groundtruth", "ground_truth"),
    *("segmentation", "segmentations", "semantic_masks", "semantic"),
)
# Ends of the names of label images in the folder of their images, and of images.
_LABEL_SUFFIXES, _IMAGE_SUFFIXES = (
    ("_mask", "_masks", "_label", "_labels", "_seg", "_gt"),
    ("", "_sat", "_image", "_img"),
)
_SAMPLED_LABELS = 200  # of each split, to detect the classes
_EDGE_SAMPLE = 20  # of these, to find values that were added on edges
_MIN_COLORS, _MAX_COLORS = 3, 256  # to take a built-in list for granted; of painted label images
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
    warn_of_joined_objects(split, classes)
    reader = LabelMapReader(pairs, classes.value_to_label, split.problems)
    return AnnotatedImages(classes.categories, config.task, reader)


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


def detect(root: Folder) -> Detection:
    """Detect images and label images in folders of any usual name, in any case, with or without splits.

    The classes are those of a table of colors beside the folders, or a built-in list whose colors are in the label
    images, or else the values or colors that occur in the first 200 label images of each split, with 255 ignored.
    """
    mismatch = ""
    for place in folders_below(root, 2):
        detection = _detect_in(place)
        if detection.configs:
            return detection
        mismatch = mismatch or detection.mismatch
    return Detection(mismatch=mismatch)


def _detect_in(place: Folder) -> Detection:
    folders = _kinds_of_folders(place)
    images, labels = folders.get("images", []), folders.get("labels", [])
    for image_folder in images:
        for label_folder in labels:
            splits = _splits_within(image_folder, label_folder)
            if splits:
                return _with_classes(place, splits)
    if splits := _splits_around(place):
        return _with_classes(place, splits)
    if images and labels:
        return _with_classes(place, {"train": _section(images[0], labels[0])})
    if splits := _splits_with_annot(place):
        return _with_classes(place, splits)
    if found := _pairs_in_folders(place):
        return _with_classes(place, *found)
    if images and not place.path:
        expected = ", ".join(_LABEL_FOLDERS)
        return Detection(mismatch=f"there is a folder {images[0].path}, but none of label images ({expected})")
    return Detection()


def _kinds_of_folders(place: Folder) -> dict[str, list[Folder]]:
    """Return the folders of images and of labels in a folder, the most usual names first."""
    by_name = {name.casefold(): name for name in place.folders()}
    kinds = {"images": _IMAGE_FOLDERS, "labels": _LABEL_FOLDERS}
    found = {
        kind: [place.find_folder(by_name[name]) for name in names if name in by_name] for kind, names in kinds.items()
    }
    return {kind: [folder for folder in folders if folder is not None] for kind, folders in found.items()}


def _splits_within(images: Folder, labels: Folder) -> dict[str, dict[str, str]]:
    """Return the splits of folders like images/train and labels/train."""
    image_splits, label_splits = _split_folders(images), _split_folders(labels)
    return {
        split: _section(folder, label_splits[split]) for split, folder in image_splits.items() if split in label_splits
    }


def _splits_around(place: Folder) -> dict[str, dict[str, str]]:
    """Return the splits of folders like train/images and train/labels."""
    found = {split: _kinds_of_folders(folder) for split, folder in _split_folders(place).items()}
    return {
        split: _section(kinds["images"][0], kinds["labels"][0])
        for split, kinds in found.items()
        if kinds["images"] and kinds["labels"]
    }


def _splits_with_annot(place: Folder) -> dict[str, dict[str, str]]:
    """Return the splits of folders like train and trainannot; of another name, one is a training split."""
    names = set(place.folders())
    pairs = [(name, place.find_folder(name), place.find_folder(f"{name}annot")) for name in sorted(names)]
    splits: dict[str, dict[str, str]] = {}
    for name, images, labels in pairs:
        if images and labels:
            splits.setdefault(split_of_folder(name) or "train", _section(images, labels))
    return splits


def _pairs_in_folders(place: Folder) -> tuple[dict[str, dict[str, str]], dict[str, str]] | None:
    """Return the splits of folders with images and label images, such as a.jpg and a_mask.png, and the suffixes."""
    for folders in (_split_folders(place), {"train": place}):
        stems = {split: {PurePosixPath(name).stem for name in folder.names()} for split, folder in folders.items()}
        for image, label in itertools.product(_IMAGE_SUFFIXES, _LABEL_SUFFIXES):
            if stems and all(_has_pairs(names, image, label) for names in stems.values()):
                splits = {split: _section(folder, folder) for split, folder in folders.items()}
                return splits, {"image_suffix": image, "label_suffix": label}
    return None


def _has_pairs(stems: set[str], image_suffix: str, label_suffix: str) -> bool:
    """Return whether at least half of the names, and at least one, are those of label images of others."""
    labels = [name for name in stems if name.endswith(label_suffix)]
    pairs = [name for name in labels if name.removesuffix(label_suffix) + image_suffix in stems]
    pairs = [name for name in pairs if not name.startswith("ADE_")]  # whose colors are no classes
    return len(pairs) > 0 and 2 * len(pairs) >= len(labels)


def _split_folders(place: Folder) -> dict[str, Folder]:
    by_name = {name.casefold(): name for name in place.folders()}
    found = {
        split: next((place.find_folder(by_name[name]) for name in names if name in by_name), None)
        for split, names in SPLIT_NAMES.items()
    }
    return {split: folder for split, folder in found.items() if folder is not None}


def _section(images: Folder, labels: Folder) -> dict[str, str]:
    return {"images": images.path, "annotations": labels.path}


def _with_classes(
    place: Folder, splits: dict[str, dict[str, str]], suffixes: dict[str, str] | None = None
) -> Detection:
    """Return the data section with the classes of the label images; `suffixes` are those of their names, if known."""
    root = Folder(place.root, place.index)
    sample: list[tuple[np.ndarray, np.ndarray]] = []  # image, and one number for each of its values or colors
    values: set[int] = set()
    colors: set[int] = set()
    first_error = ""
    for file in _sampled_labels(root, splits, (suffixes or {}).get("label_suffix", "")):
        try:
            image = read_label_image(file, allow_colors=True)
        except DatasetError as error:  # reported when all files are read, unless no file can be
            first_error = first_error or f"{error.where or file}: {error.found}"
            continue
        numbers = color_codes(image) if image.ndim == 3 else image
        (colors if image.ndim == 3 else values).update(np.unique(numbers).tolist())
        if len(sample) < _EDGE_SAMPLE:
            sample.append((image, numbers))
    folder = next(iter(splits.values()))["annotations"]
    if not values and not colors:
        has_texts = any(name.endswith(".txt") for name in root.folder(folder, "annotations").names())
        texts = ", but text files; YOLO needs a data.yaml with the names of the classes" if has_texts else ""
        return Detection(mismatch=first_error or f"the folder {folder} has no label images{texts}")
    is_painted = any(len(set(color_of(code))) > 1 for code in colors)  # else gray values in three channels
    added, count = find_added_values(sample)
    if added or (is_painted and len(colors) > _MAX_COLORS):
        return Detection(mismatch=_edge_mismatch(folder, added, count, is_painted))
    keys = _color_classes(place, colors) if is_painted else _value_classes(values | {code & 255 for code in colors})
    listed = read_value_table(root.folder(folder, "annotations"))
    if not is_painted and values - {_VOID} and values - {_VOID} <= {entry.id for entry in listed}:
        keys["categories"] = listed
    keys |= suffixes or _suffixes(root, splits)
    return Detection((detected(place.root, "label_maps", "semantic", splits, **keys),))


def _edge_mismatch(folder: str, added: list[int], count: int, is_painted: bool) -> str:
    kind = "colors" if is_painted else "values"
    found = f"{len(added)} of {count} {kind}" if added else f"{count} {kind}"
    return (
        f"the label images in {folder} have {found} that are only on edges between others, as after resizing with "
        "interpolation or lossy compression (JPEG); export them again with nearest-neighbor resizing, as PNG"
    )


def _value_classes(values: set[int]) -> dict[str, object]:
    ignored = {value for value in values if value < 0} | {_VOID}
    ids = sorted(values - ignored) or [0]
    categories = tuple(CategoryConfig(id=value, name=f"class {value}", is_thing=False) for value in ids)
    return {"categories": categories, "ignore_values": tuple(sorted(ignored, reverse=True))}


def _color_classes(place: Folder, codes: set[int]) -> dict[str, object]:
    """Return the classes of painted label images: those of a table, of the only built-in list that fits, or colors."""
    colors = {color_of(code) for code in codes}
    table = read_color_table(place) or read_color_table(Folder(place.root, place.index))
    if table is not None and any(entry.color for entry in table):
        return {"categories": tuple(entry.model_copy(update={"is_thing": False}) for entry in table)}
    lists = [name for name in category_list_names() if colors <= set(colors_of_classes(category_entries(name)))]
    if len(lists) == 1 and len(colors) >= _MIN_COLORS:
        return {"categories": lists[0]}
    named = [
        CategoryConfig(id=i, name=f"color {color}", is_thing=False, color=color)
        for i, color in enumerate(sorted(colors))
    ]
    return {"categories": tuple(named)}


def _suffixes(root: Folder, splits: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the ends of file names that images and labels do not share, such as _sat and _mask."""
    images, labels = (_stems(root.folder(folder, "images")) for folder in next(iter(splits.values())).values())
    if not images or not labels or set(images) & set(labels):
        return {}
    first = images[0]
    for label in labels:
        start = posixpath.commonprefix([first, label])
        ends = {"image_suffix": first[len(start) :], "label_suffix": label[len(start) :]}
        bases = {image.removesuffix(ends["image_suffix"]) for image in images if image.endswith(ends["image_suffix"])}
        if (
            start
            and start in bases
            and sum(name.removesuffix(ends["label_suffix"]) in bases for name in labels) == len(labels)
        ):
            return ends
    return {}


def _stems(folder: Folder) -> list[str]:
    return [PurePosixPath(name).stem for name in folder.names() if is_image_name(name)]


def _sampled_labels(root: Folder, splits: dict[str, dict[str, str]], suffix: str) -> Iterator[File]:
    for split in splits.values():
        folder = root.folder(split["annotations"], "annotations")
        names = [name for name in folder.names() if is_image_name(name) and PurePosixPath(name).stem.endswith(suffix)]
        names = names[:_SAMPLED_LABELS]
        yield from (file for file in folder.files(names) if file is not None)
