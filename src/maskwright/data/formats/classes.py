"""Which classes a split is trained on, and which label each category id becomes; nowhere else do ids become labels."""

from __future__ import annotations

from typing import Literal, NamedTuple

from maskwright.config.categories import ignored_ids, load_categories
from maskwright.data.formats.base import Split
from maskwright.data.formats.label_maps import Meanings
from maskwright.errors import DatasetError, RecipeError
from maskwright.structures.annotations import Category


class Classes(NamedTuple):
    """The classes of a split.

    Attributes:
        kept: those to be trained, in the order of their labels 0..K-1.
        labels: category id -> label; None stands for known classes that the task leaves out.
        ignored: ids that the list of classes or the recipe declares as "ignore".
        label_map: number in the annotations -> category id or "ignore", for numbers that are not category ids.
    """

    kept: tuple[Category, ...]
    labels: dict[int, int | None]
    ignored: frozenset[int]
    label_map: dict[int, int | Literal["ignore"]]

    @property
    def stuff(self) -> frozenset[int]:
        """The labels that are stuff."""
        return frozenset(label for label, category in enumerate(self.kept) if not category.is_thing)

    @property
    def meanings(self) -> Meanings:
        """What the raw values of label pictures mean."""
        return Meanings(self.labels, self.ignored, self.label_map)

    @property
    def json_labels(self) -> dict[int, int | None]:
        """Category id of a json -> label; None stands for classes that are left out or ignored."""
        known = self.labels | dict.fromkeys(self.ignored)
        mapped = {number: known.get(meant) for number, meant in self.label_map.items() if meant != "ignore"}
        return known | mapped | {number: None for number, meant in self.label_map.items() if meant == "ignore"}


def classes_of(split: Split, default: str | None = None, annotations=None, where: str | None = None) -> Classes:
    """The classes that the recipe names, or else those of the annotations, or else a built-in list.

    Args:
        split: the split.
        default: the built-in list of the format, where there is one.
        annotations: the "categories" of a COCO json.
        where: what errors call the annotations.

    Raises:
        DatasetError: no list is given, or it is malformed.
        RecipeError: there is no class for the task.
    """
    where = where or f"data.format {split.config.format}"
    source = split.config.categories if split.config.categories is not None else default
    known = load_categories(source, annotations, where)
    if source is not None and annotations:
        _compare_names(known, load_categories(None, annotations, where), split, where)
    kept = tuple(category for category in known if category.is_thing) if split.config.task == "instance" else known
    if not kept:
        raise RecipeError(
            "data.task is instance, but no class of data.categories has is_thing: true; correct one of them"
        )
    labels: dict[int, int | None] = {category.id: None for category in known}
    labels.update((category.id, label) for label, category in enumerate(kept))
    ignored = ignored_ids(source) | set(split.config.ignore_values)
    return Classes(kept, labels, ignored, split.config.label_map)


def _compare_names(wanted: tuple[Category, ...], found: tuple[Category, ...], split: Split, where: str) -> None:
    """Classes may be renamed on purpose; but a list that shares neither names nor ids is that of another data set."""
    mapped = split.config.label_map.keys()
    names = {category.id: category.name for category in found if category.id not in mapped}
    shared = [category for category in wanted if category.id in names]
    other = [category for category in shared if names[category.id] != category.name]
    if not other:
        return
    first = other[0]
    text = f"the first is id {first.id}: '{first.name}' there, '{names[first.id]}' here"
    items = [f"category {category.id}" for category in other]
    same_ids = names.keys() == {category.id for category in wanted}
    if not same_ids and not mapped and not any(_letters(one.name) == _letters(names[one.id]) for one in shared):
        split.problems.error(
            DatasetError(
                f"{where}: all of its {len(names)} classes are named otherwise in data.categories, which has "
                f"{len(wanted)}; {text}; name the list of this data set, or data.categories=null for the file's own"
            ),
            items,
        )
    else:
        split.problems.warning(
            f"{where}: {len(other)} classes are named otherwise in data.categories, {text}; correct data.categories if "
            "it is the list of another set",
            items,
        )


def _letters(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
