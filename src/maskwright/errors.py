"""Errors that a user can cause and can fix: what was found, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike, fspath
from typing import Self


class MaskwrightError(Exception):
    """Base of all errors that the user can fix; the command line prints them as one line and exits with status 1.

    Its text is "WHERE: FOUND; REMEDY", without the parts that are empty.

    Args:
        found: what was found, and what was expected in its place.
        where: the file, recipe key, option or object concerned.
        remedy: what to do.
    """

    def __init__(self, found: str, *, where: str | PathLike[str] = "", remedy: str = "") -> None:
        self.found, self.where, self.remedy = found, fspath(where), remedy
        super().__init__(found)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.found}" + (f"; {self.remedy}" if self.remedy else "")

    def located_in(self, where: str | PathLike[str]) -> Self:
        """Return this error with `where` in front of the place it names, unless that begins with it already."""
        place = fspath(where)
        if str(self).startswith(place):
            return self
        found = f"{self.where}: {self.found}" if self.where else self.found
        return type(self)(found, where=place, remedy=self.remedy)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.found, self.where, self.remedy)


def _rebuild(kind: type[MaskwrightError], found: str, where: str, remedy: str) -> MaskwrightError:
    """Unpickle an error that comes from another process."""
    return kind(found, where=where, remedy=remedy)


class RecipeError(MaskwrightError):
    """A recipe or an override has an unknown key, a wrong type, or a value that contradicts another."""


class DatasetError(MaskwrightError):
    """Annotations, label images or their folders are missing, damaged, or contradict each other."""


class ImageError(MaskwrightError):
    """An image cannot be read, or a network cannot use it."""


class CheckpointError(MaskwrightError):
    """A weight file is damaged, unsafe, of an unknown layout, or does not fit the model."""


class TrainingError(MaskwrightError):
    """A run cannot continue, for example because a loss is not finite."""


class RunInterrupted(MaskwrightError):
    """A run was stopped by SIGTERM and has saved its state; the command line exits with status 75."""


def printable(text: object, max_length: int = 120) -> str:
    """Format text from a file for a message: on one line, without control characters, and not too long."""
    shown = str(text)[: max_length + 1]
    shown = shown if shown.isprintable() else repr(shown)[1:-1]
    return shown if len(shown) <= max_length else f"{shown[:max_length]}..."


def one_line(error: BaseException) -> str:
    """Return the reason of an exception on one line, without the path that the operating system's errors repeat."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def printable_list(names: Iterable[object], max_count: int = 12) -> str:
    """Format names from a file for a message: the first ones in sorted order, and how many more there are."""
    shown = sorted(printable(name) for name in names)
    more = f" and {len(shown) - max_count} more" if len(shown) > max_count else ""
    return ", ".join(shown[:max_count]) + more
