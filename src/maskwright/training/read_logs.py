"""Read training logs of maskwright and of other libraries into rows with our keys.

Supported are our `log.jsonl`, MMEngine's `vis_data/scalars.json`, `*.log.json` of the older mmcv, detectron2's
`metrics.json`, and any text through a regular expression. The format is detected from the keys of a file, not from its
name. A row has "step" (steps done, so the first is 1), "loss" (weighted, all terms), "loss_class" and other terms
summed over decoder layers, "learning_rate", "gradient_norm", and "evaluation", a mapping of scores; each may be absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from maskwright.errors import MaskwrightError, printable
from maskwright.training.log_files import (
    LOG_NAME,
    LogRow,
    list_log_files,
    open_text,
    read_json_lines,
    warn_skipped,
)

# Logs in a run's folder, in order of preference. Several files of one pattern belong to one run, in this order.
_PATTERNS = (LOG_NAME, "metrics.json", "vis_data/scalars.json", "*/vis_data/scalars.json", "*.log.json")
_EXAMPLE = r"--pattern 'step (?P<step>\d+) .* loss (?P<loss>[\d.]+)'"

# `decode.d0.loss_cls`, `d0.loss_cls` and `loss_ce_0` are the class loss of the first decoder layer.
_LOSS_TERM = re.compile(r"(?:decode\.)?(?:d\d+\.)?loss_([a-z]+)(?:_\d+)?")
_TERM_NAMES = {"ce": "class", "cls": "class"}
_NOT_A_SCORE = re.compile(r"(?:.*[_/])?(?:time|eta_seconds|memory|epoch|iter|step|iteration|lr|mode|rank_data_time)")


@dataclass(frozen=True)
class TrainingLog:
    """Log of a training run.

    Attributes:
        source: file or folder that the user gave.
        layout: "maskwright", "mmengine", "mmcv", "detectron2" or "text".
        rows: one per step, ascending; if a resumed run logged a step again, the later values.
    """

    source: Path
    layout: str
    rows: list[LogRow]

    def series(self, key: str = "loss") -> dict[int, float]:
        """Return the values of one key by step."""
        return {row["step"]: float(row[key]) for row in self.rows if isinstance(row.get(key), int | float)}


def read_log(source: Path, patterns: Sequence[str] = ()) -> TrainingLog:
    """Read the log of a run.

    Values are as their writer smoothed them: ours are of the step itself, MMEngine's a mean over (by default) the last
    ten steps, detectron2's a median over the last twenty.

    Args:
        source: a log, or a folder that holds one.
        patterns: regular expressions with a group named `loss`, and `step` if the text has it; else matches are
            counted. Other named groups become keys. A text is read with the first pattern that matches a line.

    Raises:
        MaskwrightError: there is no log, its format is unknown, no row has a loss, or a pattern is invalid.
    """
    files = find_logs(source)
    layouts, rows = zip(*[_read_file(file, patterns) for file in files], strict=True)
    log = TrainingLog(source, layouts[0], _merge(chain(*rows)))
    if not log.series():
        raise MaskwrightError(
            "no row has both a step and a loss", where=files[0], remedy="is this the log of a training run?"
        )
    return log


def read_merged_rows(log_file: Path) -> list[LogRow]:
    """Read our log, which may be empty or still being written, with one row per step; see `TrainingLog`."""
    return _merge(row for file in list_log_files(log_file) for row in _with_steps(read_json_lines(file), file))


def find_logs(source: Path) -> list[Path]:
    """Find the files of a run's log: the source itself, or those in the folder.

    Raises:
        MaskwrightError: there are none.
    """
    if source.is_file():
        return _with_older_files(source)
    if not source.is_dir():
        raise MaskwrightError("no such file or folder", where=source, remedy="give a training log or a run's folder")
    for pattern in _PATTERNS:
        if found := sorted(source.glob(pattern)):
            return [file for newest in found for file in _with_older_files(newest)]
    raise MaskwrightError(f"contains none of {', '.join(_PATTERNS)}", where=source, remedy="give the log file itself")


def _with_older_files(file: Path) -> list[Path]:
    """Add the older files of our log; logs of other libraries are single files."""
    return list_log_files(file) if file.name == LOG_NAME else [file]


def _read_file(file: Path, patterns: Sequence[str]) -> tuple[str, Iterable[LogRow]]:
    """Detect the layout and read the rows."""
    with open_text(file) as lines:
        first = next((line for line in lines if line.strip()), "")
    if not first.lstrip().startswith("{"):
        return "text", _from_text(file, patterns, first)
    objects = list(read_json_lines(file))
    keys = {key for _, row in objects for key in row}
    if "iteration" in keys:
        return "detectron2", _from_detectron2(objects)
    if {"mode", "iter"} <= keys:
        return "mmcv", _from_mmcv(objects)
    if {"step", "iter"} <= keys:
        return "mmengine", _from_mmengine(objects)
    if "step" in keys:
        return "maskwright", _with_steps(objects, file)
    raise MaskwrightError(
        f"its rows have no step, iter or iteration, only {printable(', '.join(sorted(keys)[:8]))}",
        where=file,
        remedy="give a log of maskwright, MMEngine, mmcv or detectron2",
    )


def _merge(rows: Iterable[LogRow]) -> list[LogRow]:
    merged: dict[int, LogRow] = {}
    for row in rows:
        merged[row["step"]] = {**merged.get(row["step"], {}), **row}
    return [merged[step] for step in sorted(merged)]


def _with_steps(objects: Iterable[tuple[int, LogRow]], file: Path) -> Iterable[LogRow]:
    for number, row in objects:
        if isinstance(row.get("step"), int):
            yield row
        else:
            warn_skipped(file, number, json.dumps(row))


def _from_detectron2(objects: Iterable[tuple[int, LogRow]]) -> Iterable[LogRow]:
    """Convert detectron2 rows: `iteration` counts from 0, so iteration 19 is our step 20."""
    for _, row in objects:
        step = row.get("iteration")
        if isinstance(step, int):
            total = row.get("total_loss", row.get("loss"))
            yield {"step": step + 1, **_terms(row, total)} if total is not None else _scores(step + 1, row)


def _from_mmengine(objects: Iterable[tuple[int, LogRow]]) -> Iterable[LogRow]:
    """Convert MMEngine rows: `step` counts finished steps; in score rows of epoch-based runs it is the epoch."""
    last, epoch = 0, None
    for _, row in objects:
        step = row.get("step")
        if not isinstance(step, int):
            continue
        if "loss" in row:
            last, epoch = step, row.get("epoch")
            yield {"step": step, **_terms(row, row["loss"])}
        else:
            yield _scores(last if step == epoch else step, row)


def _from_mmcv(objects: Iterable[tuple[int, LogRow]]) -> Iterable[LogRow]:
    """Convert mmcv rows: in epoch-based runs `iter` restarts in each epoch, whose last row gives its length.

    In rows of scores `iter` is the number of validation batches; they belong to the training row before them.
    """
    rows = [row for _, row in objects if isinstance(row.get("iter"), int)]
    training = [row for row in rows if row.get("mode") == "train"]
    by_epochs = any(b["iter"] <= a["iter"] for a, b in pairwise(training) if _epoch(b) > _epoch(a))
    length = max((row["iter"] for row in training), default=0) if by_epochs else 0
    last = 0
    for row in rows:
        if row.get("mode") == "train":
            last = row["iter"] + length * (_epoch(row) - 1)
            yield {"step": last, **_terms(row, row.get("loss"))}
        else:
            yield _scores(last, row)


def _epoch(row: LogRow) -> int:
    return row["epoch"] if isinstance(row.get("epoch"), int) else 1


def _terms(row: LogRow, total: Any) -> LogRow:
    """Translate the losses and the learning rate of a row to our keys."""
    values: LogRow = {"loss": total, "learning_rate": row.get("lr"), "gradient_norm": row.get("grad_norm")}
    for key, value in row.items():
        found = _LOSS_TERM.fullmatch(key)
        if found and isinstance(value, int | float):
            name = f"loss_{_TERM_NAMES.get(found[1], found[1])}"
            values[name] = values.get(name, 0.0) + value
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def _scores(step: int, row: LogRow) -> LogRow:
    """Translate a row of scores, which are percentages except for the `mAP` of mmdet."""
    scores = {
        key: value if "map" in key.lower() else value / 100
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not _NOT_A_SCORE.fullmatch(key)
    }
    return {"step": step, "evaluation": scores} if scores else {"step": step}


def _from_text(file: Path, patterns: Sequence[str], first: str) -> list[LogRow]:
    first = printable(first.strip(), 60)
    if not patterns:
        raise MaskwrightError(f"begins with '{first}', which is not JSON", where=file, remedy=f"add {_EXAMPLE}")
    for pattern in patterns:
        expression = _compile(pattern)
        with open_text(file) as lines:
            matches = [(line, match) for line in lines if (match := expression.search(line))]
        if matches:
            return [_row_from_match(file, line, match, number) for number, (line, match) in enumerate(matches, start=1)]
    tried = " and ".join(f"'{pattern}'" for pattern in patterns)
    raise MaskwrightError(f"{tried} matches none of its lines; the first is '{first}'", where=file)


def _compile(pattern: str) -> re.Pattern[str]:
    where = f"--pattern '{pattern}'"
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise MaskwrightError(f"not a regular expression: {error}", where=where, remedy=f"try {_EXAMPLE}") from None
    if "loss" not in expression.groupindex:
        raise MaskwrightError("has no group named loss", where=where, remedy=f"try {_EXAMPLE}")
    return expression


def _row_from_match(file: Path, line: str, match: re.Match[str], number: int) -> LogRow:
    """Convert the named groups of a match to numbers; without a step, matches are counted."""
    row: LogRow = {"step": number}
    for name, text in match.groupdict().items():
        if text is None:
            continue
        try:
            row[name] = float(text)
        except ValueError:
            raise MaskwrightError(
                f"group {name} of --pattern matched '{printable(text, 30)}' in '{printable(line.strip(), 60)}', which "
                "is not a number",
                where=file,
                remedy="narrow the group",
            ) from None
    if not float(row["step"]).is_integer():
        raise MaskwrightError(
            f"step {match['step']} is not a whole number", where=file, remedy="narrow the group of --pattern"
        )
    return row | {"step": int(row["step"])}
