"""Class lists: built-in ones (`categories/*.yaml`), a YAML file, a list in the recipe, or the list of a COCO json."""

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

_GOLDEN_ANGLE = 0.618033988749895


def load_categories(
    source: str | Sequence[CategoryConfig] | None,
    annotations: Sequence[dict] | None = None,
    where: str = "the data set",
) -> tuple[Category, ...]:
    """The classes, in the order of their labels 0..K-1, without entries that say "ignore".

    Classes that share a name get their id behind it.

    Args:
        source: a built-in name (see `category_list_names`), a YAML file of the same form, or the list itself; None
            takes that of the annotations, sorted by id.
        annotations: the "categories" of a COCO json; without "isthing" all are things.
        where: what errors call the annotations.

    Raises:
        DatasetError: no list is given, it is not found or malformed, or two classes share an id.
    """
    if source is not None:
        entries, where = _entries(source)
    elif annotations:
        entries = _from_coco(annotations, where)
    else:
        names = ", ".join(category_list_names())
        raise DatasetError(f"{where} names no classes; set data.categories to a YAML file, a list, or one of: {names}")
    _check_ids(entries, where)
    entries = [entry for entry in entries if not entry.ignore]
    if not entries:
        raise DatasetError(f"{where}: the list of classes is empty; name at least one")
    names, colors = _distinct_names(entries), distinct_colors(len(entries))
    return tuple(
        Category(entry.id, name, entry.is_thing, entry.color or color, entry.group)
        for entry, name, color in zip(entries, names, colors, strict=True)
    )


def ignored_ids(source: str | Sequence[CategoryConfig] | None) -> frozenset[int]:
    """The ids that a list of classes declares as "ignore"; empty for None.

    Raises:
        DatasetError: as `load_categories`.
    """
    return frozenset(entry.id for entry in _entries(source)[0] if entry.ignore) if source is not None else frozenset()


def category_list_names() -> list[str]:
    """The class lists that come with the package."""
    return sorted(file.name[:-5] for file in _folder().iterdir() if file.name.endswith(".yaml"))


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """`count` RGB colours 0..255 that are far apart, always the same: hues by the golden angle, four shades in turn."""
    shades = ((0.75, 0.95), (0.95, 0.70), (0.50, 1.00), (0.85, 0.45))
    colors = []
    for i in range(count):
        saturation, value = shades[i % len(shades)]
        red, green, blue = colorsys.hsv_to_rgb(i * _GOLDEN_ANGLE % 1.0, saturation, value)
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
        raise DatasetError(f"data.categories: '{source}' is neither a file nor a built-in list; {hint}")
    return _parsed(path), str(path)


@cache
def _packaged(path: Path) -> tuple[CategoryConfig, ...]:
    """A built-in list; each split of a data set asks for it several times."""
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
            f"{path}: expected a list of {{id, name, is_thing, color, group, ignore}}, but {reason}; mend it"
        ) from None


def _from_coco(annotations: Sequence[dict], where: str) -> list[CategoryConfig]:
    entries = []
    for entry in annotations:
        try:
            values = {"id": entry["id"], "name": entry["name"], "is_thing": bool(entry.get("isthing", 1))}
            entries.append(CategoryConfig(**values, color=entry.get("color"), group=entry.get("supercategory")))
        except (KeyError, TypeError, AttributeError, ValidationError):
            raise DatasetError(
                f"{where}: category {entry!r}, expected a number as 'id' and a text as 'name'; mend the file"
            ) from None
    return sorted(entries, key=lambda entry: entry.id)


def _check_ids(entries: Sequence[CategoryConfig], where: str) -> None:
    ids = [entry.id for entry in entries]
    twice = sorted({number for number in ids if ids.count(number) > 1})
    if twice:
        raise DatasetError(f"{where}: more than one class has the id {twice[0]}; give each its own")


def _distinct_names(entries: Sequence[CategoryConfig]) -> list[str]:
    names = [entry.name for entry in entries]
    return [
        name if names.count(name) == 1 else f"{name} {entry.id}" for name, entry in zip(names, entries, strict=True)
    ]
