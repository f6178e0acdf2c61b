"""COCO-Stuff 10k as downloaded: images/*.jpg, annotations/*.mat and imageLists/{train,test}.txt; semantic."""

from __future__ import annotations

import io

import numpy as np
import scipy.io

from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import ValueToLabel, resolve_classes
from maskwright.data.formats.image_list import ImageAndLabel, ImageList, find_all
from maskwright.data.formats.label_maps import semantic_target, warn_of_joined_objects
from maskwright.data.formats.layouts import Detection, detected_tasks, search_file, search_folder, single_subset
from maskwright.data.storage.folders import File, Folder
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError, one_line
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import present_values

_SUBSETS = {"train": ("train",), "val": ("test",), "test": ("test",)}
_VARIABLE = "S"  # the label map among the variables of a file


class MatlabReader:
    """Reader of label maps in MATLAB files."""

    def __init__(self, entries: list[ImageAndLabel], values: ValueToLabel):
        self.images, self._values = ImageList(entries), values

    def target(self, index: int) -> Target:
        """Return one object per class that occurs.

        Raises:
            DatasetError: the file cannot be read, or has a class that does not exist.
        """
        image_id, _, file = self.images.entries[index]
        values = _read_label_map(file)
        present = present_values(values)
        return semantic_target(values, present, self._values.look_up(present, values, file), image_id)


def _read_label_map(file: File) -> np.ndarray:
    content = file.read()
    try:
        values = scipy.io.loadmat(io.BytesIO(content), variable_names=[_VARIABLE])[_VARIABLE]
    except Exception as error:  # a damaged file makes it raise almost any type
        raise DatasetError(
            f"not a MATLAB file with a label map '{_VARIABLE}' ({one_line(error)})",
            where=file.name,
            remedy="download it again",
        ) from None
    if values.ndim != 2 or values.dtype.kind not in "ui" or values.size == 0:
        raise DatasetError(
            f"'{_VARIABLE}' is {values.dtype} of shape {values.shape}, expected a label map",
            where=file.name,
            remedy="download it again",
        )
    return np.ascontiguousarray(values, dtype=np.uint16)


def open_coco_stuff_10k(split: Split) -> AnnotatedImages:
    """Open the images in the list of the subset "train" or "test"."""
    key, root = split.key, split.root
    list_file = root.file(split.files.list or f"imageLists/{single_subset(split, _SUBSETS)}.txt", f"{key}.list")
    names = read_text(list_file).split()
    images = root.folder(split.files.images or "images", f"{key}.images")
    labels = root.folder(split.files.annotations or "annotations", f"{key}.annotations")
    image_files = find_all(images, [f"{name}.jpg" for name in names], f"{key}.images", list_file, split.problems)
    label_files = find_all(labels, [f"{name}.mat" for name in names], f"{key}.annotations", list_file, split.problems)
    classes = resolve_classes(split, "coco_stuff")
    warn_of_joined_objects(split, classes)
    entries = list(zip(names, image_files, label_files, strict=True))
    return AnnotatedImages(classes.categories, split.config.task, MatlabReader(entries, classes.value_to_label))


def detect(root: Folder) -> Detection:
    """Detect imageLists beside MATLAB files."""
    present = {split: search_file(root, f"imageLists/{_SUBSETS[split][0]}.txt") for split in ("train", "val")}
    if not any(present.values()):
        return Detection()
    labels = search_folder(root, "annotations")
    if labels is None or not any(name.endswith(".mat") for name in labels.names()):
        return Detection(mismatch="COCO-Stuff 10k needs a folder annotations with .mat files beside imageLists")
    return Detection(detected_tasks(root, "coco_stuff_10k", semantic=present))
