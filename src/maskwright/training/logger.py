"""What a run tells and logs: rows of log.jsonl, what trackers show, and the progress line."""

from __future__ import annotations

import logging
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from maskwright import __version__
from maskwright.config.recipe import Recipe
from maskwright.evaluation.evaluate import headline
from maskwright.runtime.device import describe_device, peak_memory_gb, usable_precision
from maskwright.structures.annotations import Batch
from maskwright.training.losses.criterion import Criterion, Losses
from maskwright.training.memory_probe import duration
from maskwright.training.run_folder import RunFolder
from maskwright.training.trackers import open_trackers

logger = logging.getLogger(__name__)


def is_due(step: int, every: int | None, last: int) -> bool:
    """Whether something done every so many steps, and at the end, is due after `step` steps."""
    return step == last or (every is not None and step % every == 0)


class Journal:
    """Rows of log.jsonl, what trackers show, and the progress line. Only the main process writes."""

    def __init__(self, run: RunFolder, recipe: Recipe, engine: Accelerator, start_step: int) -> None:
        self.run, self.config, self.engine = run, recipe.train, engine
        self.speaks = engine.is_main_process
        self.started = self.mark = time.perf_counter()
        self.marked_step, self.start_step = start_step, start_step
        self.seconds_before = max((row.get("seconds", 0.0) for row in run.rows()), default=0.0)
        self.waited = 0.0
        self.trackers = open_trackers(recipe, run.path, start_step) if self.speaks else []
        console = Console(stderr=True)
        self.live = self.speaks and console.is_terminal
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self.task = self.progress.add_task("", total=self.config.steps, completed=start_step)

    def __enter__(self) -> Journal:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
        for tracker in self.trackers:
            tracker.finish()

    def awaited(self, loader: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """What the loader gives, while the time is counted that it takes."""
        batches = iter(loader)
        while True:
            start = time.perf_counter()
            parts = next(batches)
            self.waited += time.perf_counter() - start
            yield parts

    def step(self, step: int, criterion: Criterion, losses: Losses, gradient_norm: Tensor, rate: float) -> None:
        """Count a step, and log it where `train.log_every` says so."""
        self.progress.update(self.task, completed=step)
        if not self.speaks or not is_due(step, self.config.log_every, self.config.steps):
            return
        terms = {term: criterion.weights[term] * values.sum().item() for term, values in losses.items()}
        now = time.perf_counter()
        seconds = max(now - self.mark, 1e-9)
        speed = (step - self.marked_step) * self.config.batch_size / seconds
        waiting = min(self.waited / seconds, 1.0)
        memory = peak_memory_gb(self.engine.device)
        self.mark, self.marked_step, self.waited = now, step, 0.0
        row = {
            "step": step,
            "loss": sum(terms.values()),
            **{f"loss_{term}": value for term, value in terms.items()},
            "learning_rate": rate,
            "gradient_norm": gradient_norm.item(),
            "images_per_second": round(speed, 3),
            "data_wait": round(waiting, 4),
            "memory_gb": round(memory, 3),
            "seconds": round(self.seconds_before + now - self.started, 2),
        }
        self.run.log(row)
        self._track("train", row, step)
        parts = " ".join(f"{term} {value:.2f}" for term, value in terms.items())
        line = (
            f"loss {row['loss']:.2f} ({parts})  rate {rate:.2e}  {speed:.2f} images/s  data wait {waiting:.0%}  "
            f"{memory:.1f} GB"
        )
        self.progress.update(self.task, description=line)
        if not self.live:
            left = (self.config.steps - step) * self.config.batch_size / max(speed, 1e-9)
            logger.info("step %d/%d  %s  %s left", step, self.config.steps, line, duration(left))

    def pause(self, seconds: float) -> None:
        """Leave time that was not training out of the speed."""
        self.mark += seconds

    def _track(self, kind: str, values: dict[str, Any], step: int) -> None:
        for tracker in self.trackers:
            tracker.log({f"{kind}/{key}": value for key, value in values.items()}, step=step)

    def evaluation(self, step: int, scores: dict, better: bool) -> None:
        """Log the scores of an evaluation, and how it compares with those before."""
        if not self.speaks:
            return
        seconds = round(self.seconds_before + time.perf_counter() - self.started, 2)
        plain = {key: score for key, score in scores.items() if isinstance(score, int | float)}
        self.run.log({"step": step, "seconds": seconds, "evaluation": plain})
        self._track("evaluation", plain, step)
        best = "  (best so far)" if better else ""
        logger.info("step %d  %s %.4f%s", step, *headline(scores, self.config.best_metric), best)

    def facts(self, step: int) -> dict[str, str]:
        """What the report says about the run."""
        return {
            "steps": f"{step} of {self.config.steps}, {self.config.batch_size} images each",
            "duration": duration(self.seconds_before + time.perf_counter() - self.started),
            "device": describe_device(self.engine.device),
            "processes": str(self.engine.num_processes),
            "precision": usable_precision(self.engine.device, self.config.precision),
            "versions": f"maskwright {__version__}, torch {torch.__version__}, torchvision {version('torchvision')}, "
            f"Python {platform.python_version()}",
            "revision": _revision(),
        }


def _revision() -> str:
    """The git revision of the source, where it is a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a checkout"
