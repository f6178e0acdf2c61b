"""Hugging Face `datasets` with a column of pictures and one of masks: parquet files, `save_to_disk` folders, the Hub.

A mask of one channel holds classes. A mask in colours holds the class in red and the object's number in green, as the
training examples of transformers have it. Pictures stay encoded until they are asked for, and are read by our rules.

The package `datasets` is needed (maskwright[huggingface]); of parquet files it keeps a copy in its cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import Classes, classes_of
from maskwright.data.formats.label_maps import instance_target, read_values, semantic_target
from maskwright.data.images.load import read_colours
from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError, RecipeError
from maskwright.structures.annotations import Target, Task
from maskwright.structures.id_maps import present_values

_NAMES = {"train": ("train", "training"), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}
_LABEL_NAMES = ("label", "annotation", "mask", "segmentation", "semantic", "seg")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)?")


class TableImages:
    """The images of a table, in the place of an `ImageList`; `annotation` is the mask's file."""

    def __init__(self, images: Any, labels: Any, name: str):
        """Of two data sets of one column with encoded pictures, and what messages call the table."""
        self._images, self._labels, self._name = images, labels, name

    def __len__(self) -> int:
        return len(self._images)

    def image_id(self, index: int) -> str:
        """The picture's file name without its suffix, or the number of the row."""
        path = self._row(self._images, index).get("path")
        return PurePosixPath(path).stem if path else str(index)

    def file(self, index: int) -> File:
        """The picture."""
        return self._file(self._images, index)

    def annotation(self, index: int) -> File:
        """The mask."""
        return self._file(self._labels, index)

    def keep(self, indices: Sequence[int]) -> None:
        """Leave out all rows but these."""
        self._images, self._labels = self._images.select(indices), self._labels.select(indices)

    def _row(self, table: Any, index: int) -> dict:
        (value,) = table[index].values()
        return value or {}

    def _file(self, table: Any, index: int) -> File:
        row = self._row(table, index)
        name = f"{self._name}/{table.column_names[0]} {index}"
        if row.get("bytes") is not None:
            return File(f"{name} ({row['path']})" if row.get("path") else name, row["bytes"])
        if row.get("path"):
            return File(row["path"])
        raise DatasetError(f"{name}: the cell is empty; remove the row")


class HuggingFaceMasks:
    """Reader of the masks of a table."""

    def __init__(self, images: TableImages, classes: Classes, task: Task):
        self.images, self._task = images, task
        self._meanings, self._stuff = classes.meanings, classes.stuff

    def target(self, index: int) -> Target:
        """One object per class; for the tasks with objects, one per pair of class and number.

        Raises:
            DatasetError: the mask cannot be read, or has a class that does not exist.
        """
        file, image_id = self.images.annotation(index), self.images.image_id(index)
        if self._task == "semantic":
            values = _classes_in(file)
            present = present_values(values)
            return semantic_target(values, present, self._meanings.labels(present, values, file), image_id)
        colours = read_colours(file)
        values = colours[..., 1].astype(np.uint16) << 8 | colours[..., 0]
        present = present_values(values)
        labels = self._meanings.labels(present & 255, colours[..., 0], file)
        is_crowd = (present < 256) & ~np.isin(labels, list(self._stuff))
        return instance_target(values, present, labels, is_crowd, self._stuff, image_id)

    def has_object(self, index: int) -> bool:
        """Whether there is an object that is no crowd."""
        return bool((~self.target(index).is_crowd).any())


def _classes_in(file: File) -> np.ndarray:
    """The classes of a mask of one channel, or the red channel of one in colours."""
    try:
        return read_values(file)
    except DatasetError:
        colours = read_colours(file)
        if colours[..., 2].any():
            raise
        return np.ascontiguousarray(colours[..., 0])


def open_huggingface(split: Split) -> AnnotatedImages:
    """The rows of the split's part of a table, by the recipe's columns or the first two that hold pictures."""
    root = split.config.root
    table = _table(split)
    columns = _picture_columns(table)
    image, label = _columns(split, columns, table.column_names)
    if split.config.categories is None and (own := _own_classes(root)):
        split = split._replace(config=split.config.model_copy(update={"categories": own}))
    classes = classes_of(split)
    images = TableImages(_encoded(table, image), _encoded(table, label), f"{root}/{split.name}")
    return AnnotatedImages(classes.kept, split.config.task, HuggingFaceMasks(images, classes, split.config.task))


def _table(split: Split) -> Any:
    try:
        import datasets
    except ImportError:
        raise RecipeError("data.format huggingface needs datasets; pip install 'maskwright[huggingface]'") from None
    root, path = split.config.root, split.root.root
    tables: Any
    try:
        if (path / "dataset_dict.json").is_file():
            tables = datasets.load_from_disk(str(path))
        elif (path / "state.json").is_file():
            tables = {"train": datasets.load_from_disk(str(path))}
        elif files := _parquet_files(path):
            tables = datasets.load_dataset("parquet", data_files=files)
        elif not path.exists() and _HUB_ID.fullmatch(root):
            owner, name, config = (*root.split("/"), None)[:3]
            tables = datasets.load_dataset(f"{owner}/{name}", config)
        else:
            raise DatasetError(
                f"data.root: {root} is no folder of save_to_disk or of parquet files, no parquet file, and no "
                "'owner/name' on the Hub; correct it"
            )
    except DatasetError:
        raise
    except Exception as error:  # the library raises many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DatasetError(f"data.root: {root} cannot be opened by datasets ({reason}); check it") from None
    wanted = split.files.subsets or _NAMES[split.name]
    found: list[Any] = [tables[name] for name in wanted if name in tables]
    if not found or (split.files.subsets and len(found) < len(wanted)):
        raise DatasetError(
            f"{split.key}.parts: {root} has {', '.join(map(str, tables))}, not {' or '.join(wanted)}; name one of "
            f"them, or set {split.key}=null"
        )
    return datasets.concatenate_datasets(found) if split.files.subsets and len(found) > 1 else found[0]


def _parquet_files(path: Path) -> dict[str, list[str]]:
    """Split name -> parquet files, by the names that the Hub gives them ("train-00000-of-00002.parquet")."""
    files = [path] if path.is_file() and path.suffix == ".parquet" else sorted(path.rglob("*.parquet"))
    splits: dict[str, list[str]] = {}
    for file in files:
        name = re.split(r"[-_.]", file.name)[0]
        splits.setdefault(name if any(name in names for names in _NAMES.values()) else "train", []).append(str(file))
    return splits


def _picture_columns(table: Any) -> list[str]:
    """Columns of pictures, or of what a parquet file without a description has in place of them."""
    kinds = {name: str(feature) for name, feature in table.features.items()}
    return [name for name, kind in kinds.items() if kind.startswith("Image(") or ("bytes" in kind and "path" in kind)]


def _columns(split: Split, pictures: list[str], all_columns: list[str]) -> tuple[str, str]:
    config = split.config
    for key, name in (("image_column", config.image_column), ("label_column", config.label_column)):
        if name is not None and name not in all_columns:
            raise RecipeError(f"data.{key}: no column '{name}', only {', '.join(all_columns)}; correct it")
    looks_like_label = [name for name in pictures if name.lower().startswith(_LABEL_NAMES)]
    others = [name for name in pictures if name not in looks_like_label]
    image = config.image_column or next(iter(others or pictures), None)
    label = config.label_column or next((name for name in (*looks_like_label, *others) if name != image), None)
    if image is None or label is None:
        raise DatasetError(
            f"data.root: {config.root} has the columns {', '.join(all_columns)}, {len(pictures)} of them pictures; "
            "expected one of pictures and one of masks; name them with data.image_column and data.label_column"
        )
    return image, label


def _encoded(table: Any, column: str) -> Any:
    import datasets

    return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _own_classes(root: str) -> tuple[CategoryConfig, ...] | None:
    """The classes in an id2label.json beside the data, as many data sets on the Hub have it."""
    path = Path(root).expanduser() / "id2label.json"
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text("utf-8"))
        return tuple(CategoryConfig(id=int(number), name=str(name)) for number, name in names.items())
    except (ValueError, TypeError, AttributeError):
        raise DatasetError(f"{path}: expected numbers and names of classes; mend it, or set data.categories") from None
