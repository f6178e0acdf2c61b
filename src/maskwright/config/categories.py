"""Class lists: built in (`categories/*.yaml`), a YAML file, a list in the recipe, or the list of a COCO JSON file."""

from __future__ import annotations

import colorsys
import difflib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from maskwright.config.schema import CategoryConfig
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Category

_GOLDEN_RATIO = 0.618033988749895  # hues at multiples of it stay far apart


def load_categories(
    source: str | Sequence[CategoryConfig] | None,
    annotations: Sequence[dict] | None = None,
    where: str = "the data set",
) -> tuple[Category, ...]:
    """Return the classes in the order of their labels 0..K-1, without the ignored entries.

    Names that occur more than once get the id appended.

    Args:
        source: a built-in name (see `category_list_names`), a YAML file of the same form, or the list itself; None
            takes the list of the annotations, sorted by id.
        annotations: "categories" of a COCO JSON file; without "isthing", all are things.
        where: name of the annotations in errors.

    Raises:
        DatasetError: no list is given, it is not found or malformed, or two classes have the same id.
    """
    if source is not None:
        entries, where = _entries(source)
    elif annotations:
        entries = _from_coco(annotations, where)
    else:
        names = ", ".join(category_list_names())
        raise DatasetError(
            "no class list", where=where, remedy=f"set data.categories to a YAML file, a list, or one of: {names}"
        )
    _check_ids(entries, where)
    entries = [entry for entry in entries if not entry.ignore]
    if not entries:
        raise DatasetError("the class list is empty", where=where, remedy="add at least one class")
    names, colors = _distinct_names(entries), distinct_colors(len(entries))
    return tuple(
        Category(entry.id, name, entry.is_thing, entry.color or color, entry.group)
        for entry, name, color in zip(entries, names, colors, strict=True)
    )


def ignored_ids(source: str | Sequence[CategoryConfig] | None) -> frozenset[int]:
    """Return the ids of the ignored entries of a class list; empty for None.

    Raises:
        DatasetError: as `load_categories`.
    """
    return frozenset(entry.id for entry in _entries(source)[0] if entry.ignore) if source is not None else frozenset()


def category_list_names() -> list[str]:
    """Return the names of the built-in class lists."""
    return sorted(file.name[:-5] for file in _folder().iterdir() if file.name.endswith(".yaml"))


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """Return `count` distinct RGB colours 0..255, always the same: hues by the golden ratio, in four shades."""
    shades = ((0.75, 0.95), (0.95, 0.70), (0.50, 1.00), (0.85, 0.45))
    colors = []
    for i in range(count):
        saturation, value = shades[i % len(shades)]
        red, green, blue = colorsys.hsv_to_rgb(i * _GOLDEN_RATIO % 1.0, saturation, value)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


def _folder():
    return resources.files("maskwright.config") / "categories"


def _entries(source: str | Sequence[CategoryConfig]) -> tuple[Sequence[CategoryConfig], str]:
    return _read(source) if isinstance(source, str) else (source, "data.categories")


def _read(source: str) -> tuple[Sequence[CategoryConfig], str]:
    if source in category_list_names():
        path = Path(str(_folder() / f"{source}.yaml"))
        return _packaged(path), str(path)
    path = Path(source).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(source, category_list_names(), 1, 0.4)
        hint = f"nearest built-in list: {near[0]}" if near else f"built-in lists: {', '.join(category_list_names())}"
        raise DatasetError(f"'{source}' is neither a file nor a built-in list", where="data.categories", remedy=hint)
    return _parsed(path), str(path)


@cache
def _packaged(path: Path) -> tuple[CategoryConfig, ...]:
    """Return a built-in list; cached, because each split of a data set reads it several times."""
    return tuple(_parsed(path))


def _parsed(path: Path) -> list[CategoryConfig]:
    try:
        return TypeAdapter(list[CategoryConfig]).validate_python(yaml.safe_load(path.read_text("utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        if isinstance(error, ValidationError):
            problem = error.errors(include_url=False)[0]
            error = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        reason = " ".join(str(error).split())
        raise DatasetError(
            f"not a class list: {reason}",
            where=path,
            remedy="write a list of {id, name, is_thing, color, group, ignore}",
        ) from None


def _from_coco(annotations: Sequence[dict], where: str) -> list[CategoryConfig]:
    entries = []
    for entry in annotations:
        try:
            values = {"id": entry["id"], "name": entry["name"], "is_thing": bool(entry.get("isthing", 1))}
            entries.append(CategoryConfig(**values, color=entry.get("color"), group=entry.get("supercategory")))
        except (KeyError, TypeError, AttributeError, ValidationError):
            raise DatasetError(
                f"category {entry!r}, expected an integer 'id' and a string 'name'", where=where, remedy="fix the file"
            ) from None
    return sorted(entries, key=lambda entry: entry.id)


def _check_ids(entries: Sequence[CategoryConfig], where: str) -> None:
    ids = [entry.id for entry in entries]
    duplicates = sorted({id_ for id_ in ids if ids.count(id_) > 1})
    if duplicates:
        raise DatasetError(
            f"more than one class has the id {duplicates[0]}", where=where, remedy="give each class its own id"
        )


def _distinct_names(entries: Sequence[CategoryConfig]) -> list[str]:
    """Return the names, with the id appended to those that occur more than once."""
    names = [entry.name for entry in entries]
    return [
        name if names.count(name) == 1 else f"{name} {entry.id}" for name, entry in zip(names, entries, strict=True)
    ]
