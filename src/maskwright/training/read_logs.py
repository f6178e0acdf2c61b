"""Logs of trainings, ours and others', as rows in our terms.

What is read: our `log.jsonl`; `vis_data/scalars.json` of MMEngine and the `*.log.json` of mmcv before it;
`metrics.json` of detectron2; and any text through a regular expression. Which one a file is follows from its keys, not
from its name. A row has "step" (steps done, so the first is 1), "loss" (weighted, all terms), "loss_class" and other
terms summed over decoder layers, "learning_rate", "gradient_norm", and "evaluation", a mapping of scores; any of them
may be absent.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from maskwright.errors import MaskwrightError, printable
from maskwright.training.log_files import log_parts

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# What a folder of a run may hold, the first that is there; several files of one kind are parts of one run, in order.
_PLACES = ("log.jsonl", "metrics.json", "vis_data/scalars.json", "*/vis_data/scalars.json", "*.log.json")
_EXAMPLE = r"--pattern 'step (?P<step>\d+) .* loss (?P<loss>[\d.]+)'"

# `decode.d0.loss_cls`, `d0.loss_cls` and `loss_ce_0` are the first layer's share of the class loss.
_LOSS_TERM = re.compile(r"(?:decode\.)?(?:d\d+\.)?loss_([a-z]+)(?:_\d+)?")
_TERM_NAMES = {"ce": "class", "cls": "class"}
_NO_SCORES = re.compile(r"(?:.*[_/])?(?:time|eta_seconds|memory|epoch|iter|step|iteration|lr|mode|rank_data_time)")


@dataclass(frozen=True)
class TrainingLog:
    """What a training told.

    Attributes:
        source: file or folder that was named.
        layout: "maskwright", "mmengine", "mmcv", "detectron2" or "text".
        rows: one per step, ascending; where a step was logged twice, after a resume, the later values.
    """

    source: Path
    layout: str
    rows: list[Row]

    def series(self, key: str = "loss") -> dict[int, float]:
        """Step to value of one key, for the rows that have it."""
        return {row["step"]: float(row[key]) for row in self.rows if isinstance(row.get(key), int | float)}


def read_log(source: Path, patterns: Sequence[str] = ()) -> TrainingLog:
    """Read the log of a run.

    Values are as their writer smoothed them: ours are of the step itself, MMEngine's a mean over (by default) the last
    ten, detectron2's a median over the last twenty.

    Args:
        source: a log, or a folder that holds one.
        patterns: regular expressions with a group named `loss`, and `step` where the text tells it; else matches are
            counted. Other named groups become keys. A text is read with the first that matches anything in it.

    Raises:
        MaskwrightError: there is no log, nothing in it is known, no row has a loss, or a pattern is none.
    """
    files = find_logs(source)
    parts = [_read_file(file, patterns) for file in files]
    layout = parts[0][0]
    rows = _merge(row for _, part in parts for row in part)
    log = TrainingLog(source, layout, rows)
    if not log.series():
        raise MaskwrightError(f"{files[0]}: no row has both a step and a loss; is this the log of a training?")
    return log


def read_rows(file: Path) -> list[Row]:
    """The rows of a `log.jsonl` of ours, which may still be empty, or be written to; see `TrainingLog`."""
    return _merge(row for part in log_parts(file) for row in _with_steps(_objects(part), part))


def find_logs(source: Path) -> list[Path]:
    """The files of a run's log: the source itself, or what the folder holds.

    Raises:
        MaskwrightError: there are none.
    """
    if source.is_file():
        return _parts(source)
    if not source.is_dir():
        raise MaskwrightError(f"{source}: no such file or folder; expected a training's log, or the folder of a run")
    for place in _PLACES:
        if found := sorted(source.glob(place)):
            return [part for file in found for part in _parts(file)]
    raise MaskwrightError(f"{source}: holds none of {', '.join(_PLACES)}; name the log itself")


def _parts(file: Path) -> list[Path]:
    """The files of a log of ours, which goes on in new ones when it has grown large; the file itself of others."""
    return log_parts(file) if file.name == "log.jsonl" else [file]


def _read_file(file: Path, patterns: Sequence[str]) -> tuple[str, Iterable[Row]]:
    """Layout and rows."""
    with _opened(file) as lines:
        first = next((line for line in lines if line.strip()), "")
    if not first.lstrip().startswith("{"):
        return "text", _from_text(file, patterns, first)
    objects = list(_objects(file))
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
        f"{file}: its rows have no step, iter or iteration, only {printable(', '.join(sorted(keys)[:8]))}; "
        "expected a log of maskwright, MMEngine, mmcv or detectron2"
    )


def _opened(file: Path):
    try:
        return file.open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise MaskwrightError(f"{file}: cannot be read: {error.strerror}") from None


def _objects(file: Path) -> Iterable[tuple[int, Row]]:
    """Line numbers and JSON objects; broken lines are left out, with a warning for any but the last."""
    broken: tuple[int, str] | None = None
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if broken:
                _warn(file, *broken)
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


def _warn(file: Path, number: int, line: str) -> None:
    logger.warning("%s, line %d is not a row of a log and is left out: %s", file, number, printable(line.strip(), 60))


def _merge(rows: Iterable[Row]) -> list[Row]:
    merged: dict[int, Row] = {}
    for row in rows:
        merged[row["step"]] = {**merged.get(row["step"], {}), **row}
    return [merged[step] for step in sorted(merged)]


def _with_steps(objects: Iterable[tuple[int, Row]], file: Path) -> Iterable[Row]:
    for number, row in objects:
        if isinstance(row.get("step"), int):
            yield row
        else:
            _warn(file, number, json.dumps(row))


def _from_detectron2(objects: Iterable[tuple[int, Row]]) -> Iterable[Row]:
    """An `iteration` counts from 0 and is written after its step: iteration 19 is our step 20."""
    for _, row in objects:
        step = row.get("iteration")
        if isinstance(step, int):
            total = row.get("total_loss", row.get("loss"))
            yield {"step": step + 1, **_terms(row, total)} if total is not None else _scores(step + 1, row)


def _from_mmengine(objects: Iterable[tuple[int, Row]]) -> Iterable[Row]:
    """`step` counts done steps, but in rows of scores it is the epoch where training goes by epochs."""
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


def _from_mmcv(objects: Iterable[tuple[int, Row]]) -> Iterable[Row]:
    """`iter` begins anew in each epoch where training goes by epochs; an epoch is then as long as its last row says.

    Rows of scores hold the number of validation batches as `iter`; they belong to the training row before them.
    """
    rows = [row for _, row in objects if isinstance(row.get("iter"), int)]
    training = [row for row in rows if row.get("mode") == "train"]
    anew = any(b["iter"] <= a["iter"] for a, b in pairwise(training) if _epoch(b) > _epoch(a))
    length = max((row["iter"] for row in training), default=0) if anew else 0
    last = 0
    for row in rows:
        if row.get("mode") == "train":
            last = row["iter"] + length * (_epoch(row) - 1)
            yield {"step": last, **_terms(row, row.get("loss"))}
        else:
            yield _scores(last, row)


def _epoch(row: Row) -> int:
    return row["epoch"] if isinstance(row.get("epoch"), int) else 1


def _terms(row: Row, total: Any) -> Row:
    """Losses and rates of a foreign row, by our names."""
    values: Row = {"loss": total, "learning_rate": row.get("lr"), "gradient_norm": row.get("grad_norm")}
    for key, value in row.items():
        found = _LOSS_TERM.fullmatch(key)
        if found and isinstance(value, int | float):
            name = f"loss_{_TERM_NAMES.get(found[1], found[1])}"
            values[name] = values.get(name, 0.0) + value
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def _scores(step: int, row: Row) -> Row:
    """A row of scores; all are percentages there, but for the `mAP` of mmdet."""
    scores = {
        key: value if "map" in key.lower() else value / 100
        for key, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not _NO_SCORES.fullmatch(key)
    }
    return {"step": step, "evaluation": scores} if scores else {"step": step}


def _from_text(file: Path, patterns: Sequence[str], first: str) -> list[Row]:
    if not patterns:
        raise MaskwrightError(
            f"{file}: begins with '{printable(first.strip(), 60)}', which is not JSON; say how its lines are read, "
            f"like {_EXAMPLE}"
        )
    for pattern in patterns:
        expression = _compile(pattern)
        with _opened(file) as lines:
            matches = [(line, found) for line in lines if (found := expression.search(line))]
        if matches:
            return [_row_of(file, line, found, number) for number, (line, found) in enumerate(matches, start=1)]
    shown = " and ".join(f"'{pattern}'" for pattern in patterns)
    raise MaskwrightError(f"{file}: {shown} matches none of its lines; the first is '{printable(first.strip(), 60)}'")


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise MaskwrightError(f"--pattern '{pattern}' is not a regular expression: {error}; try {_EXAMPLE}") from None
    if "loss" not in expression.groupindex:
        raise MaskwrightError(f"--pattern '{pattern}' has no group named loss; write it like {_EXAMPLE}")
    return expression


def _row_of(file: Path, line: str, found: re.Match[str], number: int) -> Row:
    """The named groups of a match as numbers; without a step, matches are counted."""
    row: Row = {"step": number}
    for name, text in found.groupdict().items():
        if text is None:
            continue
        try:
            value = float(text)
        except ValueError:
            raise MaskwrightError(
                f"{file}: group {name} of --pattern found '{printable(text, 30)}' in '{printable(line.strip(), 60)}', "
                "which is no number; narrow the group"
            ) from None
        if name == "step":
            if not math.isfinite(value) or value != int(value):
                raise MaskwrightError(f"{file}: step {text} is not a whole number; narrow the group of --pattern")
            row["step"] = int(value)
        else:
            row[name] = value
    return row
