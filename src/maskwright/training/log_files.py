"""The files of a run's log: `log.jsonl`, with one JSON object per row, and the older `log.1.jsonl`, `log.2.jsonl`, ...

A log that has grown large is renamed to the next number, and a new one is started.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from maskwright.errors import MaskwrightError, printable

logger = logging.getLogger(__name__)

LogRow = dict[str, Any]

LOG_NAME = "log.jsonl"


def list_log_files(log_file: Path) -> list[Path]:
    """List the existing files of a log, oldest first."""
    older = sorted(log_file.parent.glob(f"{log_file.stem}.[0-9]*{log_file.suffix}"), key=_number)
    return [path for path in (*older, log_file) if path.is_file()]


def rotate(log_file: Path, max_bytes: int) -> None:
    """Start a new file if this one has reached a size."""
    if log_file.is_file() and log_file.stat().st_size >= max_bytes:
        older = list_log_files(log_file)[:-1]
        number = _number(older[-1]) + 1 if older else 1
        log_file.replace(log_file.with_name(f"{log_file.stem}.{number}{log_file.suffix}"))


def read_rows(log_file: Path) -> list[LogRow]:
    """Read all rows of a log, from all its files; without files there are none."""
    return [row for file in list_log_files(log_file) for _, row in read_json_lines(file)]


def read_json_lines(file: Path) -> Iterator[tuple[int, LogRow]]:
    """Yield line numbers and JSON objects. Broken lines are skipped with a warning, a broken last one silently."""
    broken: tuple[int, str] | None = None
    with open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            if broken:
                warn_skipped(file, *broken)
                broken = None
            try:
                row = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError):
                broken = number, line
                continue
            if not isinstance(row, dict):
                broken = number, line
            elif row:
                yield number, row


def open_text(file: Path) -> TextIO:
    """Open a log.

    Raises:
        MaskwrightError: it cannot be read.
    """
    try:
        return file.open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise MaskwrightError(f"cannot be read: {error.strerror}", where=file) from None


def warn_skipped(file: Path, number: int, line: str) -> None:
    """Warn about a line that is not a row."""
    logger.warning("%s, line %d: not a row of a log, skipped: %s", file, number, printable(line.strip(), 60))


def _number(path: Path) -> int:
    return int(path.stem.rpartition(".")[2])
