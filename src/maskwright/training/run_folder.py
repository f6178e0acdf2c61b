"""The folder of a run: recipe, log and training checkpoints, and how a run resumes from them. All writes are atomic."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from maskwright.config.recipe import Recipe, dump_recipe, read_recipe
from maskwright.errors import CheckpointError, RecipeError, one_line, printable
from maskwright.runtime.atomic_write import cannot_write, remove, write_file_atomically
from maskwright.training.fsdp import remove_sharded_checkpoint
from maskwright.training.log_files import LOG_NAME, LogRow, list_log_files, read_json_lines, read_rows, rotate
from maskwright.training.sharded_reader import NotATrainingCheckpointError
from maskwright.training.training_checkpoint import (
    Progress,
    TrainingCheckpoint,
    read_training_checkpoint,
    save_training_checkpoint,
)

logger = logging.getLogger(__name__)

# A resumed run may change these keys and sections. None of them changes what is learned, beyond the order of sums, as
# long as the files of data.train are the same.
_CHANGEABLE = {
    "evaluate",
    *("data.root", "data.train", "data.val", "data.test"),
    "train.log_every",
    "train.max_log_megabytes",
    "train.evaluate_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.num_workers",
    "train.check_data",
    "train.probe_memory",
    "train.base_batch_size",
    "train.gradient_accumulation_steps",
    "train.auto_gradient_accumulation",
    "train.gradient_checkpointing",
    "train.fsdp",
    "train.deterministic",
    "train.best_metric",
    "train.early_stopping_patience",
    "train.trackers",
    "train.hang_timeout_seconds",
}
_CHECKPOINT_NAME = re.compile(r"[0-9]{8,}(\.safetensors)?")


class RunFolder:
    """The folder of one run. Nothing is written before `begin`, which only the main process calls.

    Args:
        path: of the folder, which may not exist yet.
        recipe: resolved; compared with the recipe of the run that the folder holds, if it has a checkpoint.

    Attributes:
        changes: keys with other values than the folder's run has had so far: (key, old value, new value).

    Raises:
        RecipeError: the folder holds a run with another recipe.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.log_file = path / LOG_NAME
        self.checkpoints = path / "checkpoints"
        self.recipe = recipe
        stored = stored_recipe(path)
        self.changes = _compare_recipes(stored, recipe, path) if stored else []

    def begin(self, progress: Progress, start: list[str]) -> None:
        """Write recipe.yaml, drop log rows later than `progress`, and remove partial files of a killed process.

        Args:
            progress: of the checkpoint that the run resumes from.
            start: how the weights were initialized, the first row of the log; empty if at random.

        Raises:
            MaskwrightError: the folder cannot be written to.
        """
        write_file_atomically(
            self.path / "recipe.yaml", lambda file: file.write_text(dump_recipe(self.recipe), encoding="utf-8")
        )
        for folder in (self.path, self.checkpoints):
            for partial in folder.glob(".*.partial"):
                remove(partial)
        head: list[LogRow] = [{"step": 0, "start": start}] if start else []
        for file in list_log_files(self.log_file) or [self.log_file]:
            rows = [row for _, row in read_json_lines(file)] if file.is_file() else []
            kept = [row for row in rows if "start" not in row and _is_covered(row, progress)]
            _write_rows(file, head + kept)
            head = []

    def log(self, row: LogRow) -> None:
        """Append one row to log.jsonl.

        Raises:
            MaskwrightError: it cannot be written.
        """
        try:
            rotate(self.log_file, self.recipe.train.max_log_megabytes * 1_000_000)
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise cannot_write(self.log_file, one_line(error)) from None

    def rows(self) -> list[LogRow]:
        """Read the rows of the log."""
        return read_rows(self.log_file)

    def start(self) -> list[str]:
        """Return how the weights were initialized, according to the log."""
        lines = next((row["start"] for row in self.rows() if "start" in row), [])
        return [str(line) for line in lines] if isinstance(lines, list) else []

    def is_finished(self, progress: Progress) -> bool:
        """Return whether the run is complete, up to its last file."""
        if progress.step < self.recipe.train.steps and not progress.stopped_early:
            return False
        if self.recipe.data.val:
            return progress.evaluated_step == progress.step
        return (self.path / "best.safetensors").is_file()

    def save(self, tensors: dict[str, Tensor], progress: Progress, accelerator: Accelerator) -> None:
        """Write a training checkpoint and drop those beyond `train.keep_checkpoints`; all processes call it.

        Raises:
            MaskwrightError: it cannot be written; older ones are kept.
        """
        save_training_checkpoint(self.checkpoints, tensors, progress, accelerator)
        if not accelerator.is_main_process:
            return
        # Later checkpoints were damaged, or the run would have resumed from them.
        past = [path for path in list_checkpoints(self.path) if int(path.stem) <= progress.step]
        by_step = {int(path.stem): path for path in past}  # a run may have switched to sharded checkpoints
        kept = [by_step[step] for step in sorted(by_step)[-self.recipe.train.keep_checkpoints :]]
        for path in past:
            if path not in kept:
                _remove(path)

    def latest_checkpoint(self) -> TrainingCheckpoint | None:
        """Read the latest undamaged checkpoint; None without one.

        Raises:
            CheckpointError: a file among the checkpoints is not a training checkpoint.
        """
        for path in self.checkpoints.glob("[0-9]*"):
            if not _CHECKPOINT_NAME.fullmatch(path.name):
                logger.warning("%s is ignored: its name is not that of a checkpoint", path)
        for path in reversed(list_checkpoints(self.path)):
            try:
                return read_training_checkpoint(path)
            except NotATrainingCheckpointError:
                raise
            except CheckpointError as error:
                logger.warning("%s; trying the checkpoint before it", error)
        return None


def list_checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run's folder, oldest first."""
    found = [path for path in (run / "checkpoints").glob("[0-9]*") if _CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.suffix or path.is_dir()), key=lambda path: (int(path.stem), path))


def stored_recipe(run: Path) -> Recipe | None:
    """Return the recipe of the run that a folder holds; None if it has no checkpoint."""
    file = run / "recipe.yaml"
    return read_recipe(file) if list_checkpoints(run) and file.is_file() else None


def last_scores(run: Path) -> dict[str, Any] | None:
    """Return the scores of the last evaluation in the log of a run's folder."""
    return next((row["evaluation"] for row in reversed(read_rows(run / LOG_NAME)) if "evaluation" in row), None)


def _write_rows(log_file: Path, rows: list[LogRow]) -> None:
    """Write the rows, unless the file holds exactly these."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not log_file.is_file() or log_file.read_text(encoding="utf-8", errors="replace") != text:
        write_file_atomically(log_file, lambda file: file.write_text(text, encoding="utf-8"))


def _is_covered(row: LogRow, progress: Progress) -> bool:
    """Return whether a log row is from before the checkpoint; an evaluation may have been logged but not yet saved."""
    step = row.get("step", 0)
    if step == progress.step and "evaluation" in row:
        return progress.evaluated_step == progress.step
    return isinstance(step, int) and step <= progress.step


def _remove(path: Path) -> None:
    if path.is_dir():
        remove_sharded_checkpoint(path)
    else:
        path.unlink()


def _compare_recipes(old: Recipe, new: Recipe, path: Path) -> list[tuple[str, object, object]]:
    """Return the keys that a resumed run changes: (key, old value, new value).

    Raises:
        RecipeError: one of them must not change.
    """
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    changes = [
        (f"{section}.{key}", before[section][key], after[section][key])
        for section in ("model", "data", "train", "evaluate")
        for key in before[section]
        if before[section][key] != after[section][key]
    ]
    for key, was, now in changes:
        if not _CHANGEABLE & {key, key.partition(".")[0]}:
            raise RecipeError(
                f"holds a run with {key}={printable(was)}, but now it is {printable(now)}",
                where=path,
                remedy="choose another --output, or set it back",
            )
    return changes
