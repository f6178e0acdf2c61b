"""The mapping from ids and values in annotations to labels 0..K-1; ids become labels here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from maskwright.config.categories import ignored_ids, load_categories
from maskwright.data.formats.base import Split
from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError, RecipeError
from maskwright.structures.annotations import Category

MAX_VALUE = 65535
_IGNORED, _UNKNOWN = -1, -2


class ValueToLabel:
    """Look-up table from the values of label images to labels.

    Every value must be declared as a class id or as ignored: an undeclared one would otherwise train the wrong class
    silently.
    """

    def __init__(self, labels: Mapping[int, int | None], ignored: Iterable[int], label_map: Mapping[int, int | str]):
        """Fill the table.

        Args:
            labels: category id -> label; None for classes that the task does not train. The value of a class is its id.
            ignored: ignored values.
            label_map: value -> category id or "ignore", for values that are not category ids; overrides the others.

        Raises:
            RecipeError: a value is out of range, or label_map names a category id that does not exist.
        """
        self._table = np.full(MAX_VALUE + 1, _UNKNOWN, dtype=np.int32)
        self._category_ids = sorted(labels)
        categories: dict[int, int | str] = {category: category for category in labels}
        categories |= dict.fromkeys(ignored, "ignore") | dict(label_map)
        self.ignored = frozenset(value for value, category in categories.items() if category == "ignore")
        for value, category in categories.items():
            if not 0 <= value <= MAX_VALUE:
                raise RecipeError(
                    f"{value} is out of range, label images hold 0..{MAX_VALUE}",
                    where="data.categories, data.ignore_values and data.label_map",
                    remedy="remove the value",
                )
            if isinstance(category, int) and category not in labels:
                raise RecipeError(
                    f"{value} is mapped to {category}, which is not a category id",
                    where="data.label_map",
                    remedy="use an id of data.categories",
                )
            label = labels[category] if isinstance(category, int) else None
            self._table[value] = _IGNORED if label is None else label

    def look_up(self, present: np.ndarray, values: np.ndarray, file: File) -> np.ndarray:
        """Return the label of each value in `present`, -1 for ignored values and classes that are not trained.

        Args:
            present: (V,) the distinct values of the image.
            values: the label image.
            file: its file, for messages.

        Raises:
            DatasetError: a value is not declared.
        """
        labels = self._table[np.minimum(present, MAX_VALUE)]
        unknown = present[labels == _UNKNOWN]
        if len(unknown):
            others = ", ".join(map(str, unknown[1:7])) + (", ..." if len(unknown) > 7 else "")
            more = f" (and others {others})" if len(unknown) > 1 else ""
            raise DatasetError(
                f"{np.count_nonzero(values == unknown[0])} pixels have the value {unknown[0]}{more}, which is neither "
                f"a class id ({self._category_ids[0]}..{self._category_ids[-1]}) nor in data.ignore_values or "
                "data.label_map",
                where=file.name,
                remedy="add it to data.ignore_values or data.label_map, or correct data.categories",
            )
        return labels


class ClassMapping(NamedTuple):
    """The classes of a split.

    Attributes:
        categories: the classes to train, in the order of their labels 0..K-1.
        labels: category id -> label; None for known classes that the task does not train.
        ignored: ids that the class list or the recipe declares as "ignore".
        label_map: value in the annotations -> category id or "ignore", for values that are not category ids.
    """

    categories: tuple[Category, ...]
    labels: dict[int, int | None]
    ignored: frozenset[int]
    label_map: dict[int, int | Literal["ignore"]]

    @property
    def stuff(self) -> frozenset[int]:
        """The labels of stuff classes."""
        return frozenset(label for label, category in enumerate(self.categories) if not category.is_thing)

    @property
    def value_to_label(self) -> ValueToLabel:
        """The mapping for label images."""
        return ValueToLabel(self.labels, self.ignored, self.label_map)

    @property
    def json_labels(self) -> dict[int, int | None]:
        """The mapping for a COCO JSON: category id -> label; None for ignored classes and those not trained."""
        known = self.labels | dict.fromkeys(self.ignored)
        mapped = {value: known.get(category) for value, category in self.label_map.items() if category != "ignore"}
        return known | mapped | {value: None for value, category in self.label_map.items() if category == "ignore"}


def resolve_classes(
    split: Split, default: str | None = None, annotations=None, where: str | None = None
) -> ClassMapping:
    """Return the classes of the recipe, else those of the annotations, else a built-in list.

    Args:
        split: the split.
        default: the format's built-in list, if it has one.
        annotations: the "categories" of a COCO JSON.
        where: name of the annotations in messages.

    Raises:
        DatasetError: there is no list, or it is malformed.
        RecipeError: there is no class for the task.
    """
    where = where or f"data.format {split.config.format}"
    source = split.config.categories if split.config.categories is not None else default
    known = load_categories(source, annotations, where)
    if source is not None and annotations:
        _compare_names(known, load_categories(None, annotations, where), split, where)
    categories = tuple(category for category in known if category.is_thing or split.config.task != "instance")
    if not categories:
        raise RecipeError(
            "the task is instance, but no class of data.categories has is_thing: true",
            where="data.task",
            remedy="correct one of them",
        )
    labels: dict[int, int | None] = {category.id: None for category in known}
    labels.update((category.id, label) for label, category in enumerate(categories))
    ignored = ignored_ids(source) | set(split.config.ignore_values)
    return ClassMapping(categories, labels, ignored, split.config.label_map)


def _compare_names(expected: tuple[Category, ...], found: tuple[Category, ...], split: Split, where: str) -> None:
    """Warn about renamed classes; refuse a list that shares neither names nor ids with the annotations."""
    mapped = split.config.label_map.keys()
    names = {category.id: category.name for category in found if category.id not in mapped}
    shared = [category for category in expected if category.id in names]
    renamed = [category for category in shared if names[category.id] != category.name]
    if not renamed:
        return
    first = renamed[0]
    example = f"id {first.id} is '{first.name}' there and '{names[first.id]}' here"
    items = [f"category {category.id}" for category in renamed]
    same_ids = names.keys() == {category.id for category in expected}
    same_name = any(_letters(category.name) == _letters(names[category.id]) for category in shared)
    if not same_ids and not mapped and not same_name:
        error = DatasetError(
            f"all {len(names)} classes have other names in data.categories, which has {len(expected)}: {example}",
            where=where,
            remedy="use the list of this data set, or data.categories=null for the file's own",
        )
        split.problems.error(error, items)
    else:
        split.problems.warning(
            f"{len(renamed)} classes have other names in data.categories: {example}",
            where=where,
            remedy="correct data.categories if it is the list of another data set",
            items=items,
        )


def _letters(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
