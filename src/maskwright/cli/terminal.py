"""Shared by several commands: the main process, a progress bar, and the --output option."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cyclopts import Parameter, Token

from maskwright.errors import MaskwrightError


def _parse_path(_type: object, tokens: Sequence[Token]) -> Path:
    """Refuse an empty text, which `Path` takes for the current folder, and a URL, whose double slash it drops."""
    if not tokens[0].value:
        raise MaskwrightError(
            "an empty text, expected a path",
            where=tokens[0].keyword or "--output",
            remedy="check the shell variable that it comes from",
        )
    if "://" in tokens[0].value:
        raise MaskwrightError(
            "is a URL, expected a path", where=tokens[0].value, remedy="write to a folder, and upload it afterwards"
        )
    return Path(tokens[0].value)


def path_option(*names: str) -> Parameter:
    """Return an option that takes a path."""
    return Parameter(name=names, converter=_parse_path, n_tokens=1)


OUTPUT = path_option("--output", "-o")


def is_main_process() -> bool:
    """Return whether this is the main process of the run; only it prints."""
    return os.environ.get("RANK", "0") == "0"


class ProgressBar:
    """A progress bar, shown only on a terminal."""

    def __init__(self, title: str) -> None:
        self.bar = None
        if sys.stderr.isatty():  # otherwise rich need not be imported
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(file=sys.stderr), transient=True)  # also while Ray is silenced
            self.task = self.bar.add_task(title, total=None)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self.advance

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, images: int, total: int | None = None) -> None:
        """Add finished images."""
        if self.bar:
            self.bar.update(self.task, advance=images, total=total)
