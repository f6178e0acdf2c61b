"""Read YAML from files and overrides that anybody may have written.

YAML's aliases can make a few hundred bytes stand for terabytes, and PyYAML ends in errors of all kinds for values such
as an impossible date. So the text is scanned once before its values are built.
"""

from __future__ import annotations

from typing import Any, ClassVar

import yaml

from maskwright.errors import one_line

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, if PyYAML was built with it


class _TextLoader(LOADER):
    """Reads every value without a tag as text."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


_MAX_DEPTH = 50
_MAX_ALIAS_CHARACTERS = 1_000_000  # that all aliases together may stand for


def load_yaml(text: str, *, as_texts: bool = False) -> Any:
    """Return the values of a YAML document.

    Args:
        text: the document.
        as_texts: return single values as they are written, so that a name such as no or 010 stays one.

    Raises:
        yaml.YAMLError: it is not valid YAML, is nested too deeply, or its aliases stand for too much.
    """
    try:
        _check_size(text)
        return yaml.load(text, _TextLoader if as_texts else LOADER)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise yaml.MarkedYAMLError(problem=f"a value cannot be read: {one_line(error)}") from None


def _check_size(text: str) -> None:
    """Limit the depth, and what aliases stand for."""
    sizes: dict[str, int] = {}  # characters that each anchor stands for
    open_collections: list[tuple[str | None, int]] = []  # anchor, and characters before its first value
    characters = from_aliases = 0
    for event in yaml.parse(text, LOADER):
        match event:
            case yaml.ScalarEvent():
                characters += len(event.value) + 1
                if event.anchor:
                    sizes[event.anchor] = len(event.value) + 1
            case yaml.AliasEvent():
                if event.anchor in (anchor for anchor, _ in open_collections):
                    raise yaml.MarkedYAMLError(problem="an alias contains itself", problem_mark=event.start_mark)
                size = sizes.get(event.anchor, 1)  # an unknown alias is an error later
                characters, from_aliases = characters + size, from_aliases + size
                if from_aliases > _MAX_ALIAS_CHARACTERS:
                    raise yaml.MarkedYAMLError(problem="aliases stand for too much", problem_mark=event.start_mark)
            case yaml.CollectionStartEvent():
                open_collections.append((event.anchor, characters))
                characters += 1
                if len(open_collections) > _MAX_DEPTH:
                    raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
            case yaml.CollectionEndEvent():
                anchor, before = open_collections.pop()
                if anchor:
                    sizes[anchor] = characters - before
