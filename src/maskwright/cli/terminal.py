"""What several commands share: who speaks, a progress bar, and where results go."""

from __future__ import annotations

import os

from cyclopts import Parameter

OUTPUT = Parameter(name=["--output", "-o"])


def speaks() -> bool:
    """Whether this is the main process; of several that torchrun starts, the others are silent."""
    return os.environ.get("RANK", "0") == "0"


class ProgressBar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self.bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task(title, total=None)

    def __enter__(self):
        self.bar.start()
        return self.advance

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def advance(self, images: int, total: int | None = None) -> None:
        """Count images."""
        self.bar.update(self.task, advance=images, total=total)
