"""Problems of a dataset. Training stops at the first error; `maskwright check` collects them all.

Readers report to a `ProblemHandler` and do not know which of the two they work for.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os import PathLike, fspath
from typing import Any, Literal, NamedTuple, Protocol

from maskwright.errors import MaskwrightError

logger = logging.getLogger(__name__)

MAX_PER_KIND = 1000
_NAMES_AND_NUMBERS = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\S*[/\\]\S*|[-+]?\d[\d.,]*")

Severity = Literal["error", "warning"]


class Problem(NamedTuple):
    """One problem of a dataset: the fields of a `MaskwrightError`, its severity, and the entries concerned.

    Attributes:
        severity: "error" if training would fail or learn nonsense, else "warning".
        where: the file or recipe key concerned; empty for the dataset as a whole.
        items: the entries concerned, e.g. "annotation 17", or the names of other files.
        found: what was found.
        remedy: what to do.
    """

    severity: Severity
    where: str
    items: tuple[str, ...]
    found: str
    remedy: str

    @property
    def kind(self) -> tuple[Severity, str]:
        """A key that is equal for problems whose texts differ only in names and numbers."""
        return self.severity, _NAMES_AND_NUMBERS.sub("…", self.found)

    def __str__(self) -> str:
        return f"{self.where}: {self.found}" if self.where else self.found

    def to_json(self) -> dict[str, Any]:
        """Return the problem as values that `json.dumps` accepts."""
        return {
            "severity": self.severity,
            "file": self.where,
            "items": self.items,
            "found": self.found,
            "remedy": self.remedy,
        }


class ProblemHandler(Protocol):
    """Receiver of the problems that a reader finds."""

    def error(self, error: MaskwrightError, items: Sequence[str] = ()) -> None:
        """Handle an error; if this returns, the reader skips the entry."""
        ...

    def warning(
        self, found: str, *, where: str | PathLike[str] = "", remedy: str = "", items: Sequence[str] = ()
    ) -> None:
        """Handle something unusual that is still usable."""
        ...

    def skipping(self, *items: str) -> AbstractContextManager[object]:
        """Return a context for reading one entry of many, which is skipped if it raises an error that is collected."""
        ...


class RaiseFirst:
    """Raise the first error, and log the first warning of each kind."""

    def __init__(self) -> None:
        self._logged: set[tuple[str, str]] = set()

    def error(self, error: MaskwrightError, items: Sequence[str] = ()) -> None:
        """Raise the error."""
        raise error

    def warning(
        self, found: str, *, where: str | PathLike[str] = "", remedy: str = "", items: Sequence[str] = ()
    ) -> None:
        """Log the warning, unless one of its kind has been logged."""
        problem = Problem("warning", fspath(where), tuple(items), found, remedy)
        if problem.kind not in self._logged:
            self._logged.add(problem.kind)
            logger.warning("%s", f"{problem}; {remedy}" if remedy else problem)

    def skipping(self, *items: str) -> AbstractContextManager[object]:
        """Propagate every error."""
        return nullcontext()


class ProblemCollector:
    """Collect all problems, keeping up to `MAX_PER_KIND` of each kind.

    Attributes:
        problems: in the order in which they were found.
        counts: problems of each kind, including those that were not kept.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, problem: Problem) -> None:
        """Add a problem."""
        self.counts[problem.kind] += 1
        if self.counts[problem.kind] <= MAX_PER_KIND:
            self.problems.append(problem)

    def drain(self) -> list[Problem]:
        """Return the problems collected so far, and start over."""
        problems, self.problems = self.problems, []
        self.counts.clear()
        return problems

    def error(self, error: MaskwrightError, items: Sequence[str] = ()) -> None:
        """Add an error."""
        self.add(Problem("error", error.where, tuple(map(str, items)), error.found, error.remedy))

    def warning(
        self, found: str, *, where: str | PathLike[str] = "", remedy: str = "", items: Sequence[str] = ()
    ) -> None:
        """Add a warning."""
        self.add(Problem("warning", fspath(where), tuple(map(str, items)), found, remedy))

    @contextmanager
    def skipping(self, *items: str) -> Generator[None]:
        """Collect an error raised inside the block, and continue after it."""
        try:
            yield
        except MaskwrightError as error:
            self.error(error, items)
