"""What is wrong with a data set. The first error ends training; `maskwright check` goes on and keeps them all.

Every message of the house reads "WHERE: what was found; what to do", so an error that any reader raises can be taken
apart again; readers need not know who listens.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, Protocol

from maskwright.errors import MaskwrightError

logger = logging.getLogger(__name__)

MAX_PER_KIND = 1000
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\S*[/\\]\S*|[-+]?\d[\d.,]*")


class Problem(NamedTuple):
    """One thing that is wrong.

    Attributes:
        severity: "error" for what would stop training or make it nonsense, "warning" for what only may.
        file: the file concerned; empty where it is the data set as a whole.
        items: what in it, e.g. "annotation 17" or the names of other files.
        found: what was found.
        remedy: what to do.
    """

    severity: Literal["error", "warning"]
    file: str
    items: tuple[str, ...]
    found: str
    remedy: str

    @property
    def sort(self) -> tuple[str, str]:
        """Equal for problems that differ only in the names and numbers of their messages."""
        return self.severity, _PARTICULAR.sub("…", self.found)


class ProblemHandler(Protocol):
    """Who hears what a reader finds."""

    def error(self, error: MaskwrightError, items: Sequence[str] = ()) -> None:
        """Something is wrong; the reader leaves it out if this returns."""
        ...

    def warning(self, message: str, items: Sequence[str] = ()) -> None:
        """Something is odd but usable."""
        ...

    def skipping(self, *items: str) -> AbstractContextManager[object]:
        """A context for reading one entry of many, which is left out if it raises an error that does not pass."""
        ...


class RaiseFirst:
    """Raises the first error. Of warnings that are alike, one is logged."""

    def __init__(self) -> None:
        self._logged: set[tuple[str, str]] = set()

    def error(self, error: MaskwrightError, items: Sequence[str] = ()) -> None:
        """Raises it."""
        raise error

    def warning(self, message: str, items: Sequence[str] = ()) -> None:
        """Logs it, unless one like it was."""
        sort = problem_of("warning", message).sort
        if sort not in self._logged:
            self._logged.add(sort)
            logger.warning("%s", message)

    def skipping(self, *items: str) -> AbstractContextManager[object]:
        """Lets every error pass."""
        return nullcontext()


class ProblemCollector:
    """Keeps all problems, up to `MAX_PER_KIND` that are alike.

    Attributes:
        found: the problems, in the order in which they were found.
        counts: how many there were of each sort, those that were not kept included.
    """

    def __init__(self) -> None:
        self.found: list[Problem] = []
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, problem: Problem) -> None:
        """Keep a problem."""
        self.counts[problem.sort] += 1
        if self.counts[problem.sort] <= MAX_PER_KIND:
            self.found.append(problem)

    def drain(self) -> list[Problem]:
        """What was found since the last time."""
        found, self.found = self.found, []
        self.counts.clear()
        return found

    def error(self, error: MaskwrightError, items: Sequence[str] = ()) -> None:
        """Keeps it."""
        self.add(problem_of("error", str(error), items))

    def warning(self, message: str, items: Sequence[str] = ()) -> None:
        """Keeps it."""
        self.add(problem_of("warning", message, items))

    def skipping(self, *items: str) -> AbstractContextManager[object]:
        """Keeps an error that is raised inside, and goes on behind the block."""
        return _Skipping(self, items)


class _Skipping:
    def __init__(self, problems: ProblemCollector, items: tuple[str, ...]) -> None:
        self.problems, self.items = problems, items

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, MaskwrightError):
            return False
        self.problems.error(error, self.items)
        return True


def problem_of(severity: Literal["error", "warning"], message: str, items: Sequence[str] = ()) -> Problem:
    """A message taken apart. Without a path in front of its first colon it concerns no file."""
    where, colon, rest = message.partition(": ")
    is_file = bool(colon) and ("/" in where or "\\" in where)
    found, semicolon, remedy = (rest if is_file else message).rpartition("; ")
    if not semicolon:
        found, remedy = remedy, ""
    return Problem(severity, where if is_file else "", tuple(map(str, items)), found, remedy)
