"""What a run tells and logs: rows of log.jsonl, TensorBoard events, and the progress line."""

from __future__ import annotations

import logging
import platform
import subprocess
import time
from pathlib import Path

import torch
import torchvision
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from maskwright import __version__
from maskwright.device import describe, peak_memory_gb
from maskwright.evaluate import headline
from maskwright.losses import Criterion, Losses
from maskwright.recipe import Recipe
from maskwright.run_folder import RunFolder

logger = logging.getLogger(__name__)


def is_due(step: int, every: int | None, last: int) -> bool:
    """Whether something done every so many steps, and at the end, is due after `step` steps."""
    return step == last or (every is not None and step % every == 0)


class Journal:
    """Rows of log.jsonl, TensorBoard events, and the progress line. Only the main process writes."""

    def __init__(self, run: RunFolder, recipe: Recipe, engine: Accelerator, start_step: int) -> None:
        self.run, self.config, self.engine = run, recipe.train, engine
        self.started = self.mark = time.perf_counter()
        self.marked_step, self.start_step = start_step, start_step
        self.seconds_before = max((row.get("seconds", 0.0) for row in run.rows()), default=0.0)
        self.events = SummaryWriter(str(run.path), purge_step=start_step or None) if engine.is_main_process else None
        console = Console(stderr=True)
        self.live = engine.is_main_process and console.is_terminal
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
        if self.events:
            self.events.close()

    def step(self, step: int, criterion: Criterion, losses: Losses, gradient_norm: Tensor, rate: float) -> None:
        """Count a step, and log it where `train.log_every` says so."""
        self.progress.update(self.task, completed=step)
        if self.events is None or not is_due(step, self.config.log_every, self.config.steps):
            return
        terms = {term: criterion.weights[term] * values.sum().item() for term, values in losses.items()}
        now = time.perf_counter()
        speed = (step - self.marked_step) * self.config.batch_size / max(now - self.mark, 1e-9)
        self.mark, self.marked_step = now, step
        row = {
            "step": step,
            "loss": sum(terms.values()),
            **{f"loss_{term}": value for term, value in terms.items()},
            "learning_rate": rate,
            "gradient_norm": gradient_norm.item(),
            "images_per_second": round(speed, 3),
            "memory_gb": round(peak_memory_gb(self.engine.device), 3),
            "seconds": round(self.seconds_before + now - self.started, 2),
        }
        self.run.log(row)
        for key, value in row.items():
            self.events.add_scalar(f"train/{key}", value, step)
        parts = " ".join(f"{term} {value:.2f}" for term, value in terms.items())
        line = f"loss {row['loss']:.2f} ({parts})  {speed:.2f} images/s"
        self.progress.update(self.task, description=line)
        if not self.live:
            left = (self.config.steps - step) * self.config.batch_size / max(speed, 1e-9)
            logger.info("step %d/%d  %s  %s left", step, self.config.steps, line, _duration(left))

    def pause(self, seconds: float) -> None:
        """Leave time that was not training out of the speed."""
        self.mark += seconds

    def evaluation(self, step: int, scores: dict, better: bool) -> None:
        """Log the scores of an evaluation, and how it compares with those before."""
        if self.events is None:
            return
        seconds = round(self.seconds_before + time.perf_counter() - self.started, 2)
        plain = {key: score for key, score in scores.items() if isinstance(score, int | float)}
        self.run.log({"step": step, "seconds": seconds, "evaluation": plain})
        for key, score in plain.items():
            self.events.add_scalar(f"evaluation/{key}", score, step)
        best = "  (best so far)" if better else ""
        logger.info("step %d  %s %.4f%s", step, *headline(scores), best)

    def facts(self, step: int) -> dict[str, str]:
        """What the report says about the run."""
        return {
            "steps": f"{step} of {self.config.steps}, {self.config.batch_size} images each",
            "duration": _duration(self.seconds_before + time.perf_counter() - self.started),
            "device": describe(self.engine.device),
            "processes": str(self.engine.num_processes),
            "precision": self.config.precision,
            "versions": f"maskwright {__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
            f"Python {platform.python_version()}",
            "revision": _revision(),
        }


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _revision() -> str:
    """The git revision of the source, where it is a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a checkout"
