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

from maskwright.config.safe_yaml import load_yaml
from maskwright.config.schema import CategoryConfig
from maskwright.config.text import decode_text
from maskwright.errors import DatasetError, one_line, printable
from maskwright.structures.annotations import Category

_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_GOLDEN_RATIO = 0.618033988749895  # hues at multiples of it stay far apart


def load_categories(
    source: str | Sequence[CategoryConfig] | None,
    annotations: Sequence[dict | CategoryConfig] | None = None,
    where: str = "the dataset",
) -> tuple[Category, ...]:
    """Return the classes in the order of their labels 0..K-1, without the ignored entries.

    Names that occur more than once get the id appended.

    Args:
        source: a built-in name (see `category_list_names`), a YAML file of the same form, or the list itself; None
            takes the list of the annotations, sorted by id.
        annotations: the dataset's own list, such as "categories" of a COCO JSON file; see `annotated_categories`.
        where: name of the annotations in errors.

    Raises:
        DatasetError: no list is given, it is not found or malformed, or two classes have the same id.
    """
    if source is not None:
        entries, where = _entries(source)
    elif annotations:
        entries = annotated_categories(annotations, where)
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


def category_entries(source: str | Sequence[CategoryConfig]) -> Sequence[CategoryConfig]:
    """Return the entries of a class list as they are written, with the ignored ones.

    Raises:
        DatasetError: as `load_categories`.
    """
    return _entries(source)[0]


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
    """Return `count` distinct RGB colors 0..255, always the same: hues by the golden ratio, in four shades."""
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
    """Return a built-in list; cached, because each split of a dataset reads it several times."""
    return tuple(_parsed(path))


def _parsed(path: Path) -> list[CategoryConfig]:
    try:
        return TypeAdapter(list[CategoryConfig]).validate_python(load_yaml(decode_text(path.read_bytes(), str(path))))
    except (yaml.YAMLError, UnicodeError, ValidationError) as error:
        if isinstance(error, ValidationError):
            problem = error.errors(include_url=False)[0]
            reason = printable(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}")
        else:
            reason = one_line(error)
        raise DatasetError(
            f"not a class list: {reason}",
            where=path,
            remedy="write a list of {id, name, is_thing, color, group, ignore}",
        ) from None


def annotated_categories(annotations: Sequence[dict | CategoryConfig], where: str) -> list[CategoryConfig]:
    """Return the classes that annotations list themselves, sorted by id.

    Args:
        annotations: entries of a COCO JSON, where a class without "isthing" is a thing; or entries that are parsed.
        where: name of the annotations in errors.

    Raises:
        DatasetError: an entry is malformed.
    """
    entries = [entry if isinstance(entry, CategoryConfig) else _parsed_entry(entry, where) for entry in annotations]
    return sorted(entries, key=lambda entry: entry.id)


def _parsed_entry(entry: dict, where: str) -> CategoryConfig:
    try:
        is_thing, color = entry.get("isthing"), entry.get("color")
        parsed = CategoryConfig(
            id=entry["id"],
            name=entry["name"],
            is_thing=is_thing is None or _require_flag(is_thing),
            group=entry.get("supercategory"),
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        raise DatasetError(
            f"category {printable(entry)}, expected an integer 'id', a string 'name', and 0 or 1 as 'isthing'",
            where=where,
            remedy="fix the file",
        ) from None
    try:
        return CategoryConfig.model_validate(parsed.model_dump() | {"color": _parsed_color(color)})
    except ValueError:
        raise DatasetError(
            f"category {parsed.id} ('{printable(parsed.name)}') has the color {printable(color)}, expected three "
            "numbers 0..255",
            where=where,
            remedy="fix the file, or remove the color",
        ) from None


def parse_flag(value: object) -> bool | None:
    """Parse a boolean in JSON, which some tools write as text; None if it is neither true nor false."""
    if isinstance(value, str):
        return _FLAGS.get(value.strip().casefold())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _require_flag(value: object) -> bool:
    flag = parse_flag(value)
    if flag is None:
        raise ValueError(value)
    return flag


def _parsed_color(color: object) -> object:
    """Return the numbers of "#rrggbb"; other values as they are."""
    if isinstance(color, str) and color.startswith("#") and len(color) == 7:
        return tuple(bytes.fromhex(color[1:]))
    return color


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
