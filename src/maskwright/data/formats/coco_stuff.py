"""COCO-Stuff 10k as downloaded: images/*.jpg, annotations/*.mat and imageLists/{train,test}.txt; semantic."""

from __future__ import annotations

import io

import numpy as np
import scipy.io

from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import classes_of
from maskwright.data.formats.coco import find_all
from maskwright.data.formats.image_list import ImageList, Row
from maskwright.data.formats.label_maps import Meanings, semantic_target
from maskwright.data.formats.published import single_part
from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import present_values

_PARTS = {"train": ("train",), "val": ("test",), "test": ("test",)}
_VARIABLE = "S"  # the label map among a file's variables


class MatlabLabels:
    """Reader of label maps in Matlab files."""

    def __init__(self, rows: list[Row], meanings: Meanings):
        """Of (image id, picture, .mat file)."""
        self.images, self._meanings = ImageList(rows), meanings

    def target(self, index: int) -> Target:
        """One object per class that occurs.

        Raises:
            DatasetError: the file cannot be read, or has a class that does not exist.
        """
        image_id, _, file = self.images.rows[index]
        values = _read(file)
        present = present_values(values)
        return semantic_target(values, present, self._meanings.labels(present, values, file), image_id)

    def has_object(self, index: int) -> bool:
        """Whether there is something to train on."""
        return len(self.target(index)) > 0


def _read(file: File) -> np.ndarray:
    try:
        values = scipy.io.loadmat(io.BytesIO(file.read()), variable_names=[_VARIABLE])[_VARIABLE]
    except DatasetError:
        raise
    except Exception as error:  # a damaged file makes it raise almost any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(
            f"{file}: no Matlab file with a label map '{_VARIABLE}' ({reason}); fetch it again"
        ) from None
    if values.ndim != 2 or values.dtype.kind not in "ui" or values.size == 0:
        raise DatasetError(
            f"{file}: '{_VARIABLE}' is {values.dtype} of shape {values.shape}, expected a label map; fetch it again"
        )
    return np.ascontiguousarray(values, dtype=np.uint16)


def open_coco_stuff_10k(split: Split) -> AnnotatedImages:
    """The images that the list of the split's part names, "train" or "test"."""
    key = split.key
    part = single_part(split, _PARTS)
    listed = split.root.file(split.files.list or f"imageLists/{part}.txt", f"{key}.list")
    names = listed.read().decode("utf-8-sig").split()
    images = split.root.folder(split.files.images or "images", f"{key}.images")
    truth = split.root.folder(split.files.annotations or "annotations", f"{key}.annotations")
    pictures = find_all(images, [f"{name}.jpg" for name in names], f"{key}.images", listed, split.problems)
    labels = find_all(truth, [f"{name}.mat" for name in names], f"{key}.annotations", listed, split.problems)
    classes = classes_of(split, "coco_stuff")
    rows = list(zip(names, pictures, labels, strict=True))
    return AnnotatedImages(classes.kept, split.config.task, MatlabLabels(rows, classes.meanings))
