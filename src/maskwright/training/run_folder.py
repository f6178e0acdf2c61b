"""What a run leaves behind, and how it goes on: recipe, log and resumable checkpoints. Every file whole or absent."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from maskwright.config.recipe import Recipe, dump_recipe, read_recipe
from maskwright.errors import CheckpointError, RecipeError, one_line
from maskwright.runtime.atomic_write import cannot_write, remove, write_file_atomically
from maskwright.training.fsdp import remove_shards
from maskwright.training.log_files import log_parts, rotate
from maskwright.training.training_checkpoint import NoCheckpoint, Progress, Resumable, read_resumable, save_resumable

logger = logging.getLogger(__name__)

# May change between parts of a run: they change nothing that is learned, or no more than the order of sums does.
LOG = "log.jsonl"
_FREE_KEYS = (
    "log_every",
    "max_log_megabytes",
    "evaluate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "num_workers",
    "check_data",
    "probe_memory",
    "base_batch_size",
    "gradient_accumulation_steps",
    "auto_gradient_accumulation",
    "gradient_checkpointing",
    "fsdp",
    "deterministic",
    "early_stopping_patience",
    "trackers",
    "hang_timeout_seconds",
)


class RunFolder:
    """One run's folder. Nothing is written before `begin`, which only the main process calls.

    Args:
        path: of the folder, which may be absent.
        recipe: resolved; compared with the one that is there, if the folder holds a checkpoint.

    Raises:
        RecipeError: the folder holds a run of another recipe.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.log_file = path / LOG
        self.checkpoints = path / "checkpoints"
        self.recipe = recipe
        if self._saved() and (path / "recipe.yaml").is_file():
            _compare(read_recipe(path / "recipe.yaml"), recipe, path)

    def begin(self, progress: Progress, start: list[str]) -> None:
        """Write recipe.yaml, forget what was logged after `progress`, and remove what a killed process left half-done.

        Args:
            progress: where the run stands.
            start: what became of its first weights, with which the log begins; empty where they were random.

        Raises:
            MaskwrightError: the folder cannot be written to.
        """
        write_file_atomically(
            self.path / "recipe.yaml", lambda file: file.write_text(dump_recipe(self.recipe), encoding="utf-8")
        )
        for folder in (self.path, self.checkpoints):
            for partial in folder.glob(".*.partial"):
                remove(partial)
        told = [{"step": 0, "start": start}] if start else []
        for part in log_parts(self.log_file) or [self.log_file]:
            there = _rows(part)
            rows = told + [row for row in there if "start" not in row and _is_before(row, progress)]
            if rows != there or not part.is_file():
                _write_rows(part, rows)
            told = []

    def log(self, row: dict[str, Any]) -> None:
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

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the log, of all its files; half-written ones are left out."""
        return read_rows(self.path)

    def start(self) -> list[str]:
        """What became of the first weights, as the log tells."""
        return next((row["start"] for row in self.rows() if "start" in row), [])

    def is_finished(self, progress: Progress) -> bool:
        """Whether all is done that a run does, up to its last file."""
        if progress.step < self.recipe.train.steps and not progress.stopped:
            return False
        if self.recipe.data.val:
            return progress.evaluated == progress.step
        return (self.path / "best.safetensors").is_file()

    def save(self, tensors: dict[str, Tensor], progress: Progress, engine: Accelerator) -> None:
        """Write a resumable checkpoint and drop older ones beyond `train.keep_checkpoints`; every process calls it.

        Raises:
            MaskwrightError: it cannot be written; the older ones are kept.
        """
        save_resumable(self.checkpoints, tensors, progress, engine)
        if not engine.is_main_process:
            return
        done = [saved for saved in self._saved() if int(saved.stem) <= progress.step]  # later ones could not be read
        newest = {int(saved.stem): saved for saved in done}  # by step: a run may have changed to sharded checkpoints
        kept = [newest[step] for step in sorted(newest)[-self.recipe.train.keep_checkpoints :]]
        for old in done:
            if old not in kept:
                _remove(old)

    def newest(self) -> Resumable | None:
        """The newest whole checkpoint; None without one.

        Raises:
            CheckpointError: a file among the checkpoints is none.
        """
        for path in reversed(self._saved()):
            try:
                return read_resumable(path)
            except NoCheckpoint:
                raise
            except CheckpointError as error:
                logger.warning("%s; trying the one before it", error)
        return None

    def _saved(self) -> list[Path]:
        """Checkpoints of both kinds, oldest first."""
        return sorted(
            path for path in self.checkpoints.glob("[0-9]*") if path.is_dir() or path.suffix == ".safetensors"
        )


def _rows(log_file: Path) -> list[dict[str, Any]]:
    """Rows of one file; a half-written one is left out."""
    rows = []
    for line in log_file.read_text(encoding="utf-8").splitlines() if log_file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _write_rows(log_file: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_file_atomically(log_file, lambda file: file.write_text(text, encoding="utf-8"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the log of the run in a folder, see `RunFolder.rows`."""
    return [row for part in log_parts(path / LOG) for row in _rows(part)]


def last_scores(path: Path) -> dict[str, Any] | None:
    """The scores of the last evaluation in the log of the run in a folder."""
    return next((row["evaluation"] for row in reversed(read_rows(path)) if "evaluation" in row), None)


def _is_before(row: dict[str, Any], progress: Progress) -> bool:
    """Whether a row speaks of what `progress` knows; an evaluation may have been logged, but not yet saved."""
    if row.get("step", 0) == progress.step and "evaluation" in row:
        return progress.evaluated == progress.step
    return row.get("step", 0) <= progress.step


def _remove(path: Path) -> None:
    if path.is_dir():
        remove_shards(path)
    else:
        path.unlink()


def _compare(old: Recipe, new: Recipe, path: Path) -> None:
    """Refuse to go on with other settings than the run began with."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for key in _FREE_KEYS:
        before["train"].pop(key), after["train"].pop(key)
    for section in ("model", "data", "train", "evaluate"):
        changed = [key for key in before[section] if before[section][key] != after[section][key]]
        if changed:
            key = f"{section}.{changed[0]}"
            was, now = before[section][changed[0]], after[section][changed[0]]
            raise RecipeError(
                f"{path} holds a run with {key}={was}, now it is {now}: choose another --output, or the old setting"
            )
