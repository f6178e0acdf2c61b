"""Hugging Face `datasets` with a column of images and one of masks: parquet files, `save_to_disk` folders, the Hub.

A mask with one channel holds classes. A color mask holds the class in red and the object number in green, as in the
training examples of transformers. Images stay encoded until they are used, and are read by our rules.

Needs the package `datasets` (maskwright[huggingface]), which copies parquet files to its cache.
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
from maskwright.data.formats.classes import ClassMapping, resolve_classes
from maskwright.data.formats.label_maps import instance_target, read_label_values, semantic_target
from maskwright.data.formats.layouts import SPLIT_NAMES, Detection, detected
from maskwright.data.images.label_images import read_rgb_values
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError, RecipeError, one_line
from maskwright.structures.annotations import Target, Task
from maskwright.structures.id_maps import present_values

_SPLIT_NAMES = {"train": ("train", "training"), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}
_LABEL_NAMES = ("label", "annotation", "mask", "segmentation", "semantic", "seg")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w.-]+)?")


class TableImages:
    """The images of a table; `annotation` is the file of the mask."""

    def __init__(self, images: Any, labels: Any, name: str):
        """Store two datasets of one column each with encoded images, and the name of the table for messages."""
        self._images, self._labels, self._name = images, labels, name

    def __len__(self) -> int:
        return len(self._images)

    def image_id(self, index: int) -> str:
        """Return the image's file name without its suffix, or the number of the row."""
        path = self._cell(self._images, index).get("path")
        return PurePosixPath(path).stem if path else str(index)

    def file(self, index: int) -> File:
        """Return the image file."""
        return self._file(self._images, index)

    def annotation(self, index: int) -> File:
        """Return the mask file."""
        return self._file(self._labels, index)

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all rows except these."""
        self._images, self._labels = self._images.select(indices), self._labels.select(indices)

    def _cell(self, table: Any, index: int) -> dict:
        (value,) = table[index].values()
        return value or {}

    def _file(self, table: Any, index: int) -> File:
        cell = self._cell(table, index)
        name = f"{self._name}/{table.column_names[0]} {index}"
        if cell.get("bytes") is not None:
            return File(f"{name} ({cell['path']})" if cell.get("path") else name, cell["bytes"])
        if cell.get("path"):
            return File(cell["path"])
        raise DatasetError("the cell is empty", where=name, remedy="remove the row")


class TableReader:
    """Reader of the masks of a table."""

    def __init__(self, images: TableImages, classes: ClassMapping, task: Task):
        self.images, self._task = images, task
        self._values, self._stuff = classes.value_to_label, classes.stuff

    def target(self, index: int) -> Target:
        """Return one object per class; for the other tasks, one per pair of class and number.

        Raises:
            DatasetError: the mask cannot be read, or has a class that does not exist.
        """
        file, image_id = self.images.annotation(index), self.images.image_id(index)
        if self._task == "semantic":
            values = _read_classes(file)
            present = present_values(values)
            return semantic_target(values, present, self._values.look_up(present, values, file), image_id)
        colors = read_rgb_values(file)
        values = colors[..., 1].astype(np.uint16) << 8 | colors[..., 0]
        present = present_values(values)
        labels = self._values.look_up(present & 255, colors[..., 0], file)
        is_crowd = (present < 256) & ~np.isin(labels, list(self._stuff))
        return instance_target(values, present, labels, is_crowd, self._stuff, image_id)


def _read_classes(file: File) -> np.ndarray:
    """Return the values of a mask with one channel, or the red channel of a color mask."""
    try:
        return read_label_values(file)
    except DatasetError:
        colors = read_rgb_values(file)
        if colors[..., 2].any():
            raise
        return np.ascontiguousarray(colors[..., 0])


def open_huggingface(split: Split) -> AnnotatedImages:
    """Open the split's rows of a table, with the recipe's columns or the first two that hold images."""
    root = split.config.root
    table = _split_table(split)
    image_column, label_column = _choose_columns(split, _image_columns(table), table.column_names)
    classes = resolve_classes(split, None, _id2label_classes(root), root)
    images = TableImages(_encoded(table, image_column), _encoded(table, label_column), f"{root}/{split.name}")
    return AnnotatedImages(classes.categories, split.config.task, TableReader(images, classes, split.config.task))


def _split_table(split: Split) -> Any:
    """Return the table of a split."""
    tables = _load_tables(split)
    names = split.files.subsets or _SPLIT_NAMES[split.name]
    found: list[Any] = [tables[name] for name in names if name in tables]
    if not found or (split.files.subsets and len(found) < len(names)):
        raise DatasetError(
            f"{split.config.root} has {', '.join(map(str, tables))}, not {' or '.join(names)}",
            where=f"{split.key}.subsets",
            remedy=f"name one of them, or set {split.key}=null",
        )
    if split.files.subsets and len(found) > 1:
        import datasets

        return datasets.concatenate_datasets(found)
    return found[0]


def _load_tables(split: Split) -> Any:
    """Return the tables of a dataset by split name."""
    try:
        import datasets
    except ImportError:
        raise RecipeError(
            "needs the package datasets",
            where="data.format huggingface",
            remedy="pip install 'maskwright[huggingface]'",
        ) from None
    root, path = split.config.root, split.root.root
    try:
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        if (path / "state.json").is_file():
            return {"train": datasets.load_from_disk(str(path))}
        if files := _parquet_files(path):
            return datasets.load_dataset("parquet", data_files=files)
        if not path.exists() and _HUB_ID.fullmatch(root):
            owner, name, config = (*root.split("/"), None)[:3]
            return datasets.load_dataset(f"{owner}/{name}", config)
    except Exception as error:  # the library raises many types
        reason = one_line(error)[:200]
        raise DatasetError(
            f"{root} cannot be opened by datasets ({reason})", where="data.root", remedy="check it"
        ) from None
    raise DatasetError(
        f"{root} is neither a folder of save_to_disk or of parquet files, nor a parquet file, nor 'owner/name' on the "
        "Hub",
        where="data.root",
        remedy="correct it",
    )


def _parquet_files(path: Path) -> dict[str, list[str]]:
    """Return parquet files by split, the start of their names on the Hub ("train-00000-of-00002.parquet")."""
    files = [path] if path.is_file() and path.suffix == ".parquet" else sorted(path.rglob("*.parquet"))
    splits: dict[str, list[str]] = {}
    for file in files:
        name = re.split(r"[-_.]", file.name)[0]
        splits.setdefault(name if _is_split_name(name, _SPLIT_NAMES) else "train", []).append(str(file))
    return splits


def _is_split_name(name: str, names: dict[str, tuple[str, ...]]) -> bool:
    return any(name in known for known in names.values())


def _image_columns(table: Any) -> list[str]:
    """Return the columns of images, including those of parquet files without a description of their columns."""
    kinds = {name: str(feature) for name, feature in table.features.items()}
    return [name for name, kind in kinds.items() if kind.startswith("Image(") or ("bytes" in kind and "path" in kind)]


def _choose_columns(split: Split, image_columns: list[str], all_columns: list[str]) -> tuple[str, str]:
    """Return the columns of images and of masks."""
    config = split.config
    for key, name in (("image_column", config.image_column), ("label_column", config.label_column)):
        if name is not None and name not in all_columns:
            raise RecipeError(
                f"no column '{name}', only {', '.join(all_columns)}", where=f"data.{key}", remedy="name one of these"
            )
    named_label = [name for name in image_columns if name.lower().startswith(_LABEL_NAMES)]
    others = [name for name in image_columns if name not in named_label]
    image = config.image_column or next(iter(others or image_columns), None)
    label = config.label_column or next((name for name in (*named_label, *others) if name != image), None)
    if image is None or label is None:
        raise DatasetError(
            f"{config.root} has the columns {', '.join(all_columns)}, {len(image_columns)} of them with images; "
            "expected one of images and one of masks",
            where="data.root",
            remedy="name them with data.image_column and data.label_column",
        )
    return image, label


def _encoded(table: Any, column: str) -> Any:
    import datasets

    return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _id2label_classes(root: str) -> tuple[CategoryConfig, ...] | None:
    """Return the classes in an id2label.json beside the data, as in many datasets on the Hub."""
    path = Path(root).expanduser() / "id2label.json"
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text("utf-8"))
        numbered = enumerate(names) if isinstance(names, list) else names.items()
        return tuple(CategoryConfig(id=int(number), name=str(name)) for number, name in numbered)
    except (ValueError, TypeError, AttributeError):
        raise DatasetError(
            "expected a mapping from numbers to class names", where=path, remedy="correct it, or set data.categories"
        ) from None


def detect(root: Folder) -> Detection:
    """Detect a folder of `save_to_disk`, or of parquet files at the top or in `data`."""
    if root.disk is None:
        return Detection()
    names = ["train"] if (root.disk / "state.json").is_file() else _parquet_names(root.disk)
    description = root.disk / "dataset_dict.json"
    if description.is_file():
        try:
            names = json.loads(description.read_text("utf-8")).get("splits", [])
        except (ValueError, AttributeError):
            return Detection(mismatch="dataset_dict.json is not a JSON of Hugging Face datasets")
    if not names:
        return Detection()
    is_one_split = not any(_is_split_name(name, SPLIT_NAMES) for name in names)
    splits = {
        split: {} if set(names) & set(known) or (split == "train" and is_one_split) else None
        for split, known in SPLIT_NAMES.items()
    }
    return Detection((detected(root.root, "huggingface", "semantic", splits),))


def detect_file(path: Path) -> Detection:
    """Detect a single parquet file."""
    return Detection((detected(path, "huggingface", "semantic", {"train": {}, "val": None}),))


def _parquet_names(folder: Path) -> list[str]:
    return [re.split(r"[-.]", path.name)[0] for below in (folder, folder / "data") for path in below.glob("*.parquet")]
