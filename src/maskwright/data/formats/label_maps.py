"""Label maps: one picture of class ids per image, as CamVid, ADE20K, Cityscapes and most home-made sets have them.

Unusual here: a value that is neither a class id nor declared as "ignore" is an error, since it would otherwise train
the wrong class in silence; and there is no connected-component search, so all pixels of a class are one object.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from maskwright.data.formats.coco import PackedRows, check_files, inside
from maskwright.data.image import find_images, read_label
from maskwright.errors import DatasetError, ImageError, RecipeError
from maskwright.recipe import DataConfig, SplitConfig
from maskwright.structures import Target

logger = logging.getLogger(__name__)

_LARGEST_VALUE = 65535
_IGNORE, _UNKNOWN = -1, -2


class LabelMaps:
    """Reader of label pictures, found by their names or by a list file."""

    def __init__(self, root: Path, files: SplitConfig, key: str, labels: dict[int, int | None], config: DataConfig):
        """Pair pictures with labels.

        Args:
            root: what the paths of `files` are relative to.
            files: folders or list of the split.
            key: what errors call it, e.g. "data.train".
            labels: category id -> label; None for classes that the task leaves out.
            config: the recipe's ignore_values, label_map, image_suffix and label_suffix.

        Raises:
            DatasetError: a folder or file is missing, a picture has no label, or names are ambiguous.
            RecipeError: label_map names a class id that does not exist.
        """
        self._table, self._explanation = _value_table(labels, config)
        self._ignored = frozenset(config.ignore_values)
        self._told = False
        if files.list is not None:
            rows = _read_list(root, root / files.list, f"{key}.list")
        else:
            rows = _pair(root, files, key, config)
        self._rows = PackedRows(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, index: int) -> Path:
        """The picture's file."""
        return Path(self._rows[index][1])

    def image_id(self, index: int) -> str:
        """The picture's path below its folder, without suffixes."""
        return self._rows[index][0]

    def target(self, index: int) -> Target:
        """One object per class that occurs, in the order of labels.

        Raises:
            DatasetError: the label picture cannot be read, or has a value that is no class id and not to be ignored.
        """
        image_id, _, path = self._rows[index]
        values = read_label(path)
        if values.min() < 0 or values.max() > _LARGEST_VALUE:
            raise DatasetError(f"{path}: values from {values.min()} to {values.max()}, expected 0..{_LARGEST_VALUE}")
        counts = np.bincount(values.ravel())
        self._check(counts, path)
        present = np.flatnonzero(counts)
        labels = np.unique(self._table[present])
        labels = labels[labels >= 0]
        numbers = np.zeros(len(counts), dtype=np.int32)
        is_object = self._table[present] >= 0
        numbers[present[is_object]] = np.searchsorted(labels, self._table[present][is_object]) + 1
        return Target(
            id_maps=torch.from_numpy(numbers[values])[None],
            labels=torch.from_numpy(labels.astype(np.int64)),
            is_crowd=torch.zeros(len(labels), dtype=torch.bool),
            image_id=image_id,
            original_size=values.shape,
        )

    def _check(self, counts: np.ndarray, path: str) -> None:
        present = np.flatnonzero(counts)
        unknown = present[self._table[present] == _UNKNOWN]
        if len(unknown):
            more = f" (and {len(unknown) - 1} more values)" if len(unknown) > 1 else ""
            raise DatasetError(
                f"{path}: {counts[unknown[0]]} pixels have the value {unknown[0]}{more}, which is {self._explanation}; "
                "add it to data.ignore_values or data.label_map, or correct data.categories"
            )
        if not self._told and present.tolist() == [0, 255] and 255 in self._ignored:
            self._told = True
            logger.warning(
                "%s: has only the values 0 and 255, and 255 is ignored; if 255 marks objects here (a binary mask), "
                "map it to a class with data.label_map; other files like it will not be mentioned",
                path,
            )


def _value_table(labels: dict[int, int | None], config: DataConfig) -> tuple[np.ndarray, str]:
    """Raw value -> label, _IGNORE or _UNKNOWN, and what a value that is unknown should have been."""
    table = np.full(_LARGEST_VALUE + 1, _UNKNOWN, dtype=np.int32)
    meanings: dict[int, int | str] = {category: category for category in labels}
    meanings |= dict.fromkeys(config.ignore_values, "ignore") | config.label_map
    for value, meaning in meanings.items():
        if not 0 <= value <= _LARGEST_VALUE:
            raise RecipeError(f"data: label pictures hold 0..{_LARGEST_VALUE}, but {value} is mapped; remove it")
        if meaning != "ignore" and meaning not in labels:
            raise RecipeError(f"data.label_map: {value} becomes {meaning}, which is no class id; correct it")
        label = None if meaning == "ignore" else labels[meaning]
        table[value] = _IGNORE if label is None else label
    ids = sorted(labels)
    return table, f"neither a class id ({ids[0]}..{ids[-1]}) nor in data.ignore_values or data.label_map"


def _read_list(root: Path, path: Path, key: str) -> list[tuple[str, str, str]]:
    """(image id, picture, label) of each line."""
    if not path.is_file():
        raise DatasetError(f"{key}: no file {path}; correct the path")
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        parts = line.split("\t") if "\t" in line else line.split()
        if not parts:
            continue
        if len(parts) != 2:
            raise DatasetError(
                f"{path}, line {number}: found {len(parts)} names, expected '<image> <label>' "
                "(with a tab between names that have spaces); mend the line"
            )
        image, label = (inside(root, part, path) for part in parts)
        rows.append((Path(parts[0]).with_suffix("").as_posix(), str(image), str(label)))
    if not rows:
        raise DatasetError(f"{key}: {path} is empty; expected lines of '<image> <label>'")
    check_files([name for row in rows for name in row[1:]], key, path)
    return rows


def _pair(root: Path, files: SplitConfig, key: str, config: DataConfig) -> list[tuple[str, str, str]]:
    """(image id, picture, label) of each picture, sorted by image id."""
    if files.annotations is None:
        raise RecipeError(f"{key}.annotations is missing; name the folder of the label pictures, or give {key}.list")
    apart = files.images != files.annotations
    folder = root / files.annotations
    images = _by_name(root / files.images, config.image_suffix, f"{key}.images", "" if apart else config.label_suffix)
    labels = _by_name(folder, config.label_suffix, f"{key}.annotations", "")
    without = sorted(set(images) - set(labels))
    if without:
        raise DatasetError(
            f"{key}.annotations: {len(without)} of {len(images)} pictures have no label in {folder}, the first is "
            f"{images[without[0]]}; names must agree after removing data.image_suffix and data.label_suffix"
        )
    if len(labels) > len(images):
        logger.warning("%s: %d labels have no picture and are not used", folder, len(labels) - len(images))
    return [(name, str(path), str(labels[name])) for name, path in sorted(images.items())]


def _by_name(folder: Path, suffix: str, key: str, other_suffix: str) -> dict[str, Path]:
    """Pictures below a folder by their relative path without the file suffix and without `suffix`."""
    if not folder.is_dir():
        raise DatasetError(f"{key}: no folder {folder}; correct the path")
    try:
        paths = find_images(folder)
    except ImageError as error:
        raise DatasetError(f"{key}: {error}") from None
    named: dict[str, Path] = {}
    for path in paths:
        if not path.stem.endswith(suffix) or (other_suffix and path.stem.endswith(other_suffix)):
            continue
        name = path.relative_to(folder).with_name(path.stem.removesuffix(suffix)).as_posix()
        if name in named:
            raise DatasetError(f"{key}: {named[name]} and {path} are both called '{name}'; remove one of them")
        named[name] = path
    if not named:
        raise DatasetError(f"{key}: no picture in {folder} has a name that ends in '{suffix}'; correct the suffix")
    return named
