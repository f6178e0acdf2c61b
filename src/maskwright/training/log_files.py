"""The parts of a run's log: when `log.jsonl` has grown large it becomes `log.1.jsonl`, the next one `log.2.jsonl`."""

from __future__ import annotations

from pathlib import Path


def log_parts(log_file: Path) -> list[Path]:
    """The files that hold a log, oldest first; those that are there."""
    older = sorted(log_file.parent.glob(f"{log_file.stem}.[0-9]*{log_file.suffix}"), key=_number)
    return [path for path in (*older, log_file) if path.is_file()]


def rotate(log_file: Path, most_bytes: int) -> None:
    """Begin a new file if this one has reached a size."""
    if log_file.is_file() and log_file.stat().st_size >= most_bytes:
        older = log_parts(log_file)[:-1]
        number = _number(older[-1]) + 1 if older else 1
        log_file.replace(log_file.with_name(f"{log_file.stem}.{number}{log_file.suffix}"))


def _number(path: Path) -> int:
    return int(path.stem.rpartition(".")[2])
