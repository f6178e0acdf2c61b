"""Shared parts of the formats that are folder layouts: their subsets, and how they are detected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from maskwright.config.categories import category_entries
from maskwright.config.schema import DataConfig
from maskwright.data.formats.base import Split
from maskwright.data.formats.folder_names import SPLIT_NAMES
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError, RecipeError

Subsets = Mapping[str, tuple[str, ...]]  # split -> the dataset's own names of its parts
SplitSections = Mapping[str, Mapping[str, Any] | None]  # split -> its section in a recipe


class Detection(NamedTuple):
    """The answer of a format's `detect` function.

    Attributes:
        configs: a `data` section for each task that has its own annotations, the task that uses most of them
            first; empty if the dataset does not have this format.
        mismatch: why a dataset that looks like this format cannot be read as it is; empty if it does not look like it.
        notes: what was guessed, or is not used, one sentence each.
    """

    configs: tuple[DataConfig, ...] = ()
    mismatch: str = ""
    notes: tuple[str, ...] = ()


def detected(root: Path, format: str, task: str, splits: SplitSections, **keys: Any) -> DataConfig:
    """Return the `data` section of a detected dataset."""
    return DataConfig.model_validate({"root": str(root), "format": format, "task": task, **keys, **splits})


def detected_tasks(root: Folder, format: str, **present: Mapping[str, object]) -> tuple[DataConfig, ...]:
    """Return the `data` sections of a published layout.

    Args:
        root: the dataset.
        format: its format.
        present: for each task, the splits that are there; tasks without a split are omitted.
    """
    configs = ()
    for task, found in present.items():
        if any(found.values()):
            # A layout has a train and a val split unless they are null.
            splits = {split: {} if found.get(split) else None for split in SPLIT_NAMES}
            configs += (detected(root.root, format, task, splits),)
    return configs


def split_of_folder(name: str) -> str | None:
    """Return the split that a folder is named after, ignoring case; None for other names."""
    return next((split for split, names in SPLIT_NAMES.items() if name.casefold() in names), None)


def search_folder(root: Folder, name: str) -> Folder | None:
    """Return the folder that the readers would use for this name, at the root or below; None if there is none."""
    try:
        return root.folder(name, "")
    except DatasetError:
        return None


def search_file(root: Folder, name: str) -> File | None:
    """Return the file that the readers would use for this name, at the root or below; None if there is none."""
    try:
        return root.file(name, "")
    except DatasetError:
        return None


def folders_below(root: Folder, depth: int) -> Iterator[Folder]:
    """Yield `root` and the folders below it, level by level."""
    level = [root]
    for _ in range(depth + 1):
        yield from level
        level = [child for folder in level for name in folder.folders() if (child := folder.find_folder(name))]


def subset_names(split: Split, usual: Subsets) -> tuple[str, ...]:
    """Return the dataset's own names of the parts of a split: those in the recipe, else the usual ones."""
    return split.files.subsets or usual[split.name]


def single_subset(split: Split, usual: Subsets) -> str:
    """Return the single name in `subset_names`, for datasets whose parts cannot be joined."""
    names = subset_names(split, usual)
    if len(names) != 1:
        raise RecipeError(
            f"names {len(names)} subsets, but data.format {split.config.format} reads one",
            where=f"{split.key}.subsets",
            remedy="name one of them",
        )
    return names[0]


def known_targets(label_map: Mapping[int, int | str], split: Split) -> dict[int, int | str]:
    """Return the entries of a format's own `label_map` whose class is in the recipe's list, if it has one."""
    if split.config.categories is None:
        return dict(label_map)
    known = {entry.id for entry in category_entries(split.config.categories)} | {"ignore"}
    return {value: category for value, category in label_map.items() if category in known}


def with_defaults(split: Split, files: Mapping[str, str], **config: Any) -> Split:
    """Return the split with these values for general formats; files and categories of the recipe take precedence."""
    own = {name: value for name, value in split.files.model_dump().items() if value is not None and name in files}
    if split.config.categories is not None:
        config["categories"] = split.config.categories
    return split._replace(
        files=split.files.model_copy(update={**files, **own}), config=split.config.model_copy(update=config)
    )
