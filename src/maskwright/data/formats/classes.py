"""The mapping from ids and values in annotations to labels 0..K-1; ids become labels here and nowhere else."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from maskwright.config.categories import annotated_categories, category_entries, ignored_ids, load_categories
from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import Split
from maskwright.data.formats.color_tables import Color, ColorTable, colors_of_classes
from maskwright.data.formats.edge_values import edge_pixels
from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError, RecipeError
from maskwright.structures.annotations import Category

MAX_VALUE = 65535
OUT_OF_RANGE = MAX_VALUE + 1  # stands for values that no class can have and that are ignored, such as -9999
_IGNORED, _UNKNOWN = -1, -2


class ValueToLabel:
    """Look-up table from the values of label images to labels.

    Every value must be declared as a class id or as ignored: an undeclared one would otherwise train the wrong class
    silently.
    """

    def __init__(
        self,
        labels: Mapping[int, int | None],
        ignored: Iterable[int],
        label_map: Mapping[int, int | str],
        colors: Mapping[Color, int] | None = None,
    ):
        """Fill the table.

        Args:
            labels: category id -> label; None for classes that the task does not train. The value of a class is its id.
            ignored: ignored values.
            label_map: value -> category id or "ignore", for values that are not category ids; overrides the others.
            colors: color -> value, for label images that are painted in colors.

        Raises:
            RecipeError: a value is out of range, or label_map names a category id that does not exist.
        """
        self.colors = ColorTable(colors or {})
        self._table = np.full(OUT_OF_RANGE + 1, _UNKNOWN, dtype=np.int32)
        self._table[OUT_OF_RANGE] = _IGNORED
        self._category_ids = sorted(labels)
        categories: dict[int, int | str] = {category: category for category in labels}
        categories |= dict.fromkeys(ignored, "ignore") | dict(label_map)
        self.ignored = frozenset(value for value, category in categories.items() if category == "ignore")
        self.ignored_out_of_range = frozenset(value for value in self.ignored if not 0 <= value <= MAX_VALUE)
        for value, category in categories.items():
            if value in self.ignored_out_of_range:
                continue
            if not 0 <= value <= MAX_VALUE:
                raise RecipeError(
                    f"{value} is out of range, classes have values 0..{MAX_VALUE}",
                    where="data.categories, data.ignore_values and data.label_map",
                    remedy="remove the value",
                )
            if isinstance(category, int) and category not in labels:
                raise _unknown_category(value, category)
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
        labels = self._table[np.minimum(present, OUT_OF_RANGE)]
        unknown = present[labels == _UNKNOWN]
        if len(unknown):
            is_unknown = np.isin(values, unknown)
            on_edges = len(unknown) > 2 and is_unknown.any() and np.mean(edge_pixels(values)[is_unknown]) > 0.7
            others = ", ".join(map(str, unknown[1:7])) + (", ..." if len(unknown) > 7 else "")
            more = f" (and others {others})" if len(unknown) > 1 else ""
            more += ", mostly on edges, as after resizing with interpolation or JPEG" if on_edges else ""
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
        colors: color -> category id, of the classes whose color is stated.
    """

    categories: tuple[Category, ...]
    labels: dict[int, int | None]
    ignored: frozenset[int]
    label_map: dict[int, int | Literal["ignore"]]
    colors: dict[Color, int]

    @property
    def stuff(self) -> frozenset[int]:
        """The labels of stuff classes."""
        return frozenset(label for label, category in enumerate(self.categories) if not category.is_thing)

    @property
    def value_to_label(self) -> ValueToLabel:
        """The mapping for label images."""
        return ValueToLabel(self.labels, self.ignored, self.label_map, self.colors)

    @property
    def json_labels(self) -> dict[int, int | None]:
        """The mapping for a COCO JSON: category id -> label; None for ignored classes and those not trained.

        Raises:
            RecipeError: label_map names a category id that does not exist.
        """
        known = self.labels | dict.fromkeys(self.ignored)
        mapped: dict[int, int | None] = {}
        for value, category in self.label_map.items():
            if isinstance(category, int) and category not in known:
                raise _unknown_category(value, category)
            mapped[value] = known[category] if isinstance(category, int) else None
        return known | mapped


def _unknown_category(value: int, category: int) -> RecipeError:
    return RecipeError(
        f"{value} is mapped to {category}, which is not a category id",
        where="data.label_map",
        remedy="use an id of data.categories",
    )


def resolve_classes(
    split: Split,
    default: str | None = None,
    annotations: Sequence[dict | CategoryConfig] | None = None,
    where: str | None = None,
) -> ClassMapping:
    """Return the classes of the recipe, else those of the annotations, else a built-in list.

    A built-in list takes the place of annotations that list no other classes, as it has colors and groups. Classes of
    the recipe are found in the annotations by name, whatever their ids there; classes with new names, by id.

    Args:
        split: the split.
        default: the format's built-in list, if it has one.
        annotations: the classes that the annotations list, such as "categories" of a COCO JSON.
        where: name of the annotations in messages.

    Raises:
        DatasetError: there is no list, or it is malformed, or contradicts that of the annotations.
        RecipeError: there is no class for the task.
    """
    where = where or f"data.format {split.config.format}"
    config = split.config
    found = annotated_categories(annotations, where) if annotations else []
    label_map = dict(config.label_map)
    source: str | Sequence[CategoryConfig] | None = config.categories
    if source is None and default is not None and (not found or _lists_classes_of(default, found, label_map)):
        source = default
    if source is None and found:
        ignored = frozenset(entry.id for entry in found if entry.ignore)
    else:
        ignored = ignored_ids(source)
    known = load_categories(source, found, where)
    if source is not None and found:
        label_map = _match_names(category_entries(source), found, split, where) | label_map
    categories = tuple(category for category in known if category.is_thing or config.task != "instance")
    if not categories:
        raise RecipeError(
            "the task is instance, but no class of data.categories has is_thing: true",
            where="data.task",
            remedy="correct one of them",
        )
    labels: dict[int, int | None] = {category.id: None for category in known}
    labels.update((category.id, label) for label, category in enumerate(categories))
    colors = colors_of_classes(found if source is None else category_entries(source))
    return ClassMapping(categories, labels, ignored | set(config.ignore_values), label_map, colors)


def _lists_classes_of(default: str, found: Sequence[CategoryConfig], label_map: Mapping[int, int | str]) -> bool:
    """Return whether annotations list only classes of a built-in list, under the ids that `label_map` maps to its."""
    entries = category_entries(default)
    expected = {(entry.id, _letters(entry.name)) for entry in entries if not entry.ignore}
    ignored = {entry.id for entry in entries if entry.ignore} | {"ignore"}
    ids = {entry: label_map.get(entry.id, entry.id) for entry in found}
    return {(ids[entry], _letters(entry.name)) for entry in found if ids[entry] not in ignored} <= expected


def _match_names(
    listed: Sequence[CategoryConfig], found: Sequence[CategoryConfig], split: Split, where: str
) -> dict[int, int | Literal["ignore"]]:
    """Find the classes of annotations in a class list.

    Returns:
        The id in the list of each class that has another id in the annotations, as entries of `data.label_map`.

    Raises:
        DatasetError: the names contradict the ids; or no class has the same name.
    """
    mapped = split.config.label_map.keys()
    found = [entry for entry in found if entry.id not in mapped and not entry.ignore]
    by_id, by_name = {entry.id: entry for entry in listed}, _by_unique_name(listed)
    unique = _by_unique_name(found)
    moved: dict[CategoryConfig, CategoryConfig] = {}
    same_name: list[CategoryConfig] = []
    renamed: list[CategoryConfig] = []
    for entry in found:
        name, namesake = _letters(entry.name), by_id.get(entry.id)
        if namesake is not None and _letters(namesake.name) == name:
            same_name.append(entry)
        elif name in by_name and name in unique:
            moved[entry] = by_name[name]
        elif namesake is not None:
            renamed.append(entry)
    _refuse_contradictions(moved, renamed, by_id, split, where)
    if moved:
        first, target = next(iter(moved.items()))
        split.problems.warning(
            f"{len(moved)} classes have other ids in data.categories and are matched by name: '{first.name}' is "
            f"{target.id} there and {first.id} here",
            where=where,
            remedy="nothing to do if equal names mean the same class",
            items=[f"category {entry.id}" for entry in moved],
        )
    if differing := renamed + [entry for entry in same_name if entry.name != by_id[entry.id].name]:
        same_ids = {entry.id for entry in found} == {entry.id for entry in listed if not entry.ignore}
        if same_ids or mapped or same_name or moved:
            _warn_of_new_names(differing, by_id, split, where)
        else:
            _refuse_other_list(renamed, by_id, split, where)
    return {entry.id: "ignore" if target.ignore else target.id for entry, target in moved.items()}


def _refuse_contradictions(
    moved: Mapping[CategoryConfig, CategoryConfig],
    renamed: Sequence[CategoryConfig],
    by_id: Mapping[int, CategoryConfig],
    split: Split,
    where: str,
) -> None:
    """Refuse a class that could only be matched by id, where its id belongs to a class that was matched by name."""
    by_target = {target.id: entry for entry, target in moved.items()}
    for entry in renamed:
        if (other := by_target.get(entry.id)) is not None:
            error = DatasetError(
                f"category {entry.id} is '{entry.name}' here and '{by_id[entry.id].name}' in data.categories, which is "
                f"category {other.id} here",
                where=where,
                remedy=f"add '{entry.name}' to data.categories, or data.label_map={{{entry.id}: ignore}}",
            )
            split.problems.error(error, [f"category {entry.id}"])


def _warn_of_new_names(
    renamed: Sequence[CategoryConfig], by_id: Mapping[int, CategoryConfig], split: Split, where: str
) -> None:
    first = renamed[0]
    split.problems.warning(
        f"{len(renamed)} classes have other names in data.categories: id {first.id} is '{by_id[first.id].name}' there "
        f"and '{first.name}' here",
        where=where,
        remedy="correct data.categories if it is the list of another dataset",
        items=[f"category {entry.id}" for entry in renamed],
    )


def _refuse_other_list(
    renamed: Sequence[CategoryConfig], by_id: Mapping[int, CategoryConfig], split: Split, where: str
) -> None:
    first = renamed[0]
    error = DatasetError(
        f"all {len(renamed)} classes have other names in data.categories, which has {len(by_id)}: id {first.id} is "
        f"'{by_id[first.id].name}' there and '{first.name}' here",
        where=where,
        remedy="use the list of this dataset, or data.categories=null for the file's own",
    )
    split.problems.error(error, [f"category {entry.id}" for entry in renamed])


def _by_unique_name(entries: Iterable[CategoryConfig]) -> dict[str, CategoryConfig]:
    """Return the entries whose names differ in their letters, by these letters."""
    counts = Counter(_letters(entry.name) for entry in entries)
    return {name: entry for entry in entries if counts[name := _letters(entry.name)] == 1}


def _letters(name: str) -> str:
    """Return a name for comparison, without regard to case, spaces and punctuation."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(letter for letter in folded if letter.isalnum()) or folded
