"""Logging of a run: rows of log.jsonl, the same values for trackers, and the progress line."""

from __future__ import annotations

import logging
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from maskwright import __version__
from maskwright.config.recipe import Recipe
from maskwright.evaluation.evaluate import headline
from maskwright.runtime.device import describe_device, peak_memory_gb, usable_precision
from maskwright.structures.annotations import Batch
from maskwright.training.log_files import LogRow
from maskwright.training.losses.criterion import Criterion
from maskwright.training.memory_probe import format_duration
from maskwright.training.nan_guard import StepResult
from maskwright.training.run_folder import RunFolder
from maskwright.training.trackers import open_trackers

logger = logging.getLogger(__name__)


def is_due(step: int, every: int | None, last: int) -> bool:
    """Return whether a periodic action, also taken after the last step, is due after `step` steps."""
    return step == last or (every is not None and step % every == 0)


class RunLogger:
    """Log the steps and evaluations of a run. Only the main process writes.

    Attributes:
        data_wait_seconds: time spent waiting for the data loader since the last logged step.
    """

    def __init__(self, run: RunFolder, recipe: Recipe, accelerator: Accelerator, start_step: int) -> None:
        self.run, self.config, self.accelerator = run, recipe.train, accelerator
        self.writes = accelerator.is_main_process
        self.started = self.last_time = time.perf_counter()
        self.last_step = start_step
        seconds = [row.get("seconds") for row in run.rows()]
        self.seconds_before = max((value for value in seconds if isinstance(value, int | float)), default=0.0)
        self.data_wait_seconds = 0.0
        self.trackers = open_trackers(recipe, run.path, start_step) if self.writes else []
        console = Console(stderr=True)
        self.shows_bar = self.writes and console.is_terminal
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.shows_bar,
        )
        self.task = self.progress.add_task("", total=self.config.steps, completed=start_step)

    def __enter__(self) -> RunLogger:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
        for tracker in self.trackers:
            tracker.finish()

    def time_data(self, loader: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """Yield from the loader, and add up the time spent waiting for it."""
        steps = iter(loader)
        while True:
            start = time.perf_counter()
            micro_batches = next(steps)
            self.data_wait_seconds += time.perf_counter() - start
            yield micro_batches

    def log_step(self, step: int, criterion: Criterion, result: StepResult, learning_rate: float) -> None:
        """Show progress, and log the step if `train.log_every` says so."""
        self.progress.update(self.task, completed=step)
        if not self.writes or not is_due(step, self.config.log_every, self.config.steps):
            return
        losses = {term: criterion.weights[term] * values.sum().item() for term, values in result.losses.items()}
        now = time.perf_counter()
        seconds = max(now - self.last_time, 1e-9)
        row = {
            "step": step,
            "loss": sum(losses.values()),
            **{f"loss_{term}": value for term, value in losses.items()},
            "learning_rate": learning_rate,
            "gradient_norm": result.gradient_norm.item(),
            "images_per_second": round((step - self.last_step) * self.config.batch_size / seconds, 3),
            "data_wait": round(min(self.data_wait_seconds / seconds, 1.0), 4),
            "memory_gb": round(peak_memory_gb(self.accelerator.device), 3),
            "seconds": self._run_seconds(),
        }
        self.last_time, self.last_step, self.data_wait_seconds = now, step, 0.0
        self.run.log(row)
        self._track("train", row, step)
        self._show(row, losses)

    def exclude_time(self, seconds: float) -> None:
        """Exclude time that was not training from the images per second."""
        self.last_time += seconds

    def log_evaluation(self, step: int, scores: dict, is_best: bool) -> None:
        """Log the scores of an evaluation."""
        if not self.writes:
            return
        values = {key: score for key, score in scores.items() if isinstance(score, int | float)}
        self.run.log({"step": step, "seconds": self._run_seconds(), "evaluation": values})
        self._track("evaluation", values, step)
        name, score = headline(scores, self.config.best_metric)
        if score is not None:
            logger.info("step %d  %s %.4f%s", step, name, score, "  (best so far)" if is_best else "")

    def facts(self, step: int) -> dict[str, str]:
        """Return facts about the run for its report."""
        return {
            "steps": f"{step} of {self.config.steps}, {self.config.batch_size} images each",
            "duration": format_duration(self._run_seconds()),
            "device": describe_device(self.accelerator.device),
            "processes": str(self.accelerator.num_processes),
            "precision": usable_precision(self.accelerator.device, self.config.precision),
            "versions": f"maskwright {__version__}, torch {torch.__version__}, torchvision {version('torchvision')}, "
            f"Python {platform.python_version()}",
            "revision": _git_revision(),
        }

    def _run_seconds(self) -> float:
        """Return the seconds of the run, including those before it was resumed."""
        return round(self.seconds_before + time.perf_counter() - self.started, 2)

    def _show(self, row: LogRow, losses: dict[str, float]) -> None:
        terms = " ".join(f"{term} {value:.2f}" for term, value in losses.items())
        line = (
            f"loss {row['loss']:.2f} ({terms})  lr {row['learning_rate']:.2e}  "
            f"{row['images_per_second']:.2f} images/s  data wait {row['data_wait']:.0%}  {row['memory_gb']:.1f} GB"
        )
        self.progress.update(self.task, description=line)
        if not self.shows_bar:
            images_left = (self.config.steps - row["step"]) * self.config.batch_size
            left = format_duration(images_left / max(row["images_per_second"], 1e-9))
            logger.info("step %d/%d  %s  %s left", row["step"], self.config.steps, line, left)

    def _track(self, section: str, values: LogRow, step: int) -> None:
        for tracker in self.trackers:
            tracker.log({f"{section}/{key}": value for key, value in values.items()}, step=step)


def _git_revision() -> str:
    """Return the git revision of the source, if it is a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a checkout"
