"""Shared by several commands: the main process, a progress bar, and the --output option."""

from __future__ import annotations

import os
import sys

from cyclopts import Parameter

OUTPUT = Parameter(name=["--output", "-o"])


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

            self.bar = Progress(console=Console(stderr=True), transient=True)
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
