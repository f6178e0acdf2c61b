"""`maskwright plot`: plot the curves of several training runs together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.training.curves import runs_figure, save_png
from maskwright.training.read_logs import read_log


def plot(sources: Sequence[Path], output: Path, patterns: Sequence[str] = (), smoothing: int | None = None) -> None:
    """Plot losses, scores, learning rates and gradient norms of all runs as a PNG, one color per run.

    Args:
        sources: log files or run folders; at least one.
        output: the PNG to write.
        patterns: regular expressions for text logs, see `read_log`.
        smoothing: logged values in the moving average, 1 for none; None takes a thirtieth of each curve.

    Raises:
        MaskwrightError: a log cannot be read, or the PNG cannot be written.
    """
    figure = runs_figure([read_log(source, patterns) for source in sources], smoothing)
    write_file_atomically(output, lambda temporary: save_png(figure, temporary))
