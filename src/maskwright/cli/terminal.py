"""What several commands share: who speaks, a progress bar, and where results go."""

from __future__ import annotations

import os
import sys

from cyclopts import Parameter

OUTPUT = Parameter(name=["--output", "-o"])


def speaks() -> bool:
    """Whether this is the main process; of several that torchrun starts, the others are silent."""
    return os.environ.get("RANK", "0") == "0"


class ProgressBar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, title: str) -> None:
        self.bar = None
        if sys.stderr.isatty():  # else the import of rich would be waited for in vain
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
        """Count images."""
        if self.bar:
            self.bar.update(self.task, advance=images, total=total)
