"""Files found by names that other systems and tools wrote: backslashes, other case or Unicode form, absolute paths."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from urllib.parse import unquote

_DRIVE = re.compile(r"[A-Za-z]:")
_UPLOAD_PREFIX = re.compile(r"[0-9a-f]{6,}-(?=.)")  # which Label Studio puts before the names of uploaded files


class SimilarNames:
    """The files of a folder, by the ends of their paths.

    A name matches the file whose path agrees with it in the most parts from the end, at least the last one, if there is
    exactly one such file. Separators, case, Unicode form and percent-encoding are not compared, nor is the prefix that
    Label Studio gives uploaded files.
    """

    def __init__(self, names: Iterable[str]):
        """Index the names, which are relative and have "/"."""
        self._by_last_part: dict[str, list[tuple[list[str], str]]] = {}
        for name in names:
            parts = comparable(name).split("/")
            self._by_last_part.setdefault(parts[-1], []).append((parts, name))

    def find(self, name: str) -> str | None:
        """Return the name of the file that matches, None if there is none, or more than one."""
        name = name.partition("?")[0] if "://" in name else name  # the signature of a URL
        for variant in dict.fromkeys((name, unquote(name))):
            *folders, last = comparable(relative_part(variant)).split("/")
            for base in dict.fromkeys((last, _UPLOAD_PREFIX.sub("", last, count=1))):
                if match := self._best([*folders, base]):
                    return match
        return None

    def _best(self, wanted: list[str]) -> str | None:
        candidates = self._by_last_part.get(wanted[-1], [])
        lengths = [_common_end(wanted, parts) for parts, _ in candidates]
        best = [name for (_, name), length in zip(candidates, lengths, strict=True) if length == max(lengths)]
        return best[0] if len(best) == 1 else None


def points_outside(name: str) -> bool:
    """Return whether a path is absolute or leads out of its folder, on any system."""
    parts = name.replace("\\", "/").split("/")
    depth = 0
    for part in parts:
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            return True
    return (parts[0] == "" and len(parts) > 1) or bool(_DRIVE.match(name))


def relative_part(name: str) -> str:
    """Return a path with "/" and without the parts that lead out of its folder: its drive, root and ".."."""
    parts = _DRIVE.sub("", name, count=1).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def comparable(name: str) -> str:
    """Return a name for comparison, without regard to case, Unicode form, percent-encoding and spaces around it."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", unquote(name)).casefold()).strip()


def _common_end(first: list[str], second: list[str]) -> int:
    """Return the number of equal parts at the ends of two paths."""
    count = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        count += 1
    return count
