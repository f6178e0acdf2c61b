"""Label pictures: one number per pixel, which is a class (CamVid, ADE20K, most home-made sets) or stands for an object.

Unusual here: a value that is neither a class id nor declared as "ignore" is an error, since it would otherwise train
the wrong class in silence; and there is no connected-component search, so all pixels of a class are one object.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from maskwright.data.formats.image_list import ImageList, Row
from maskwright.data.images.load import read_label
from maskwright.data.problems import ProblemHandler
from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError, RecipeError
from maskwright.structures.annotations import Target, id_type, look_up
from maskwright.structures.id_maps import look_up_values, present_values

LARGEST_VALUE = 65535
_IGNORE, _UNKNOWN = -1, -2


class Meanings:
    """Raw value -> class or ignore: one explicit map, in which a value that is not named is an error."""

    def __init__(self, labels: Mapping[int, int | None], ignored: Iterable[int], label_map: Mapping[int, int | str]):
        """Set the map.

        Args:
            labels: class id -> label; None for classes that the task leaves out. An id means its class.
            ignored: values that are to be ignored.
            label_map: value -> class id or "ignore", for values that are not class ids; overrules the others.

        Raises:
            RecipeError: a value is out of range, or label_map names a class id that does not exist.
        """
        self._table = np.full(LARGEST_VALUE + 1, _UNKNOWN, dtype=np.int32)
        self._ids = sorted(labels)
        meanings: dict[int, int | str] = {category: category for category in labels}
        meanings |= dict.fromkeys(ignored, "ignore") | dict(label_map)
        self.ignored = frozenset(value for value, meaning in meanings.items() if meaning == "ignore")
        for value, meaning in meanings.items():
            if not 0 <= value <= LARGEST_VALUE:
                raise RecipeError(f"data: label pictures hold 0..{LARGEST_VALUE}, but {value} is mapped; remove it")
            if isinstance(meaning, int) and meaning not in labels:
                raise RecipeError(f"data.label_map: {value} becomes {meaning}, which is no class id; correct it")
            label = labels[meaning] if isinstance(meaning, int) else None
            self._table[value] = _IGNORE if label is None else label

    def labels(self, present: np.ndarray, values: np.ndarray, where: File) -> np.ndarray:
        """The label of each of some values, -1 for those to be ignored or left out.

        Args:
            present: (V,) the different values.
            values: the picture that they are from.
            where: its file, for the message.

        Raises:
            DatasetError: a value has no meaning.
        """
        labels = self._table[np.minimum(present, LARGEST_VALUE)]
        unknown = present[labels == _UNKNOWN]
        if len(unknown):
            others = ", ".join(map(str, unknown[1:7])) + (", ..." if len(unknown) > 7 else "")
            more = f" (and others {others})" if len(unknown) > 1 else ""
            raise DatasetError(
                f"{where}: {np.count_nonzero(values == unknown[0])} pixels have the value {unknown[0]}{more}, which is "
                f"neither a class id ({self._ids[0]}..{self._ids[-1]}) nor in data.ignore_values or data.label_map; "
                "add it to data.ignore_values or data.label_map, or correct data.categories"
            )
        return labels


class LabelMaps:
    """Reader of label pictures whose numbers are classes."""

    def __init__(self, rows: Iterable[Row], meanings: Meanings, problems: ProblemHandler):
        """Of (image id, picture, label picture); `problems` hears what is odd in a label."""
        self.images, self._meanings, self._problems = ImageList(rows), meanings, problems

    def target(self, index: int) -> Target:
        """One object per class that occurs, in the order of labels.

        Raises:
            DatasetError: the label picture cannot be read, or has a value that is no class id and not to be ignored.
        """
        image_id, _, file = self.images.rows[index]
        values = read_values(file)
        present = present_values(values)
        labels = self._meanings.labels(present, values, file)
        if present.tolist() == [0, 255] and 255 in self._meanings.ignored:
            self._problems.warning(
                f"{file}: has only the values 0 and 255, and 255 is ignored; if 255 marks objects here (a binary "
                "mask), map it to a class with data.label_map"
            )
        return semantic_target(values, present, labels, image_id)

    def has_object(self, index: int) -> bool:
        """Whether there is something to train on."""
        return len(self.target(index)) > 0


def read_values(file: File) -> np.ndarray:
    """The numbers in a label picture, (H, W) uint8, uint16 or int32, all in 0..65535.

    Raises:
        DatasetError: see `read_label`; or a number is out of range.
    """
    values = read_label(file)
    if values.dtype not in (np.uint8, np.uint16) and (values.min() < 0 or values.max() > LARGEST_VALUE):
        raise DatasetError(
            f"{file}: values from {values.min()} to {values.max()}, expected 0..{LARGEST_VALUE}; export it again"
        )
    return values


def semantic_target(values: np.ndarray, present: np.ndarray, labels: np.ndarray, image_id: int | str) -> Target:
    """One object per label; `labels` are those of the values `present`, -1 for none."""
    classes = np.unique(labels[labels >= 0])
    numbers = np.where(labels >= 0, np.searchsorted(classes, labels) + 1, 0)
    return numbered_target(values, present, numbers, classes, np.zeros(len(classes), dtype=bool), image_id)


def instance_target(
    values: np.ndarray,
    present: np.ndarray,
    labels: np.ndarray,
    is_crowd: np.ndarray,
    stuff: frozenset[int],
    image_id: int | str,
) -> Target:
    """One object per value, but one per class for stuff.

    Args:
        values: (H, W) numbers that stand for objects.
        present: (V,) the different values.
        labels: (V,) what they mean, -1 for no object.
        is_crowd: (V,) bool.
        stuff: the labels that are stuff.
        image_id: the image's.
    """
    numbers, objects, merged = np.zeros(len(present), dtype=np.int32), [], {}
    for i, (label, crowd) in enumerate(zip(labels.tolist(), is_crowd.tolist(), strict=True)):
        if label < 0:
            continue
        if label in stuff and label in merged:
            numbers[i] = merged[label]
            continue
        objects.append((label, crowd))
        numbers[i] = merged[label] = len(objects)
    kept = np.array([label for label, _ in objects], dtype=np.int64)
    return numbered_target(values, present, numbers, kept, np.array([c for _, c in objects], dtype=bool), image_id)


def numbered_target(
    values: np.ndarray,
    present: np.ndarray,
    numbers: np.ndarray,
    labels: np.ndarray,
    is_crowd: np.ndarray,
    image_id: int | str,
) -> Target:
    """A target whose id map has, for each of the values `present`, its number: 0 for none, n for object n-1."""
    table = np.zeros(int(present[-1]) + 1, dtype=id_type(len(labels)))
    table[present] = numbers
    ids = look_up(table, values) if values.dtype == table.dtype else look_up_values(table, values)
    return Target(
        id_maps=torch.from_numpy(ids)[None],
        labels=torch.from_numpy(labels.astype(np.int64)),
        is_crowd=torch.from_numpy(is_crowd),
        image_id=image_id,
        original_size=values.shape,
    )
