"""Experiment trackers: TensorBoard, and others that accelerate supports.

Each receives the values of log.jsonl; a run itself reads only its log.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    SwanLabTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

from maskwright.config.recipe import Recipe
from maskwright.errors import MaskwrightError

logger = logging.getLogger(__name__)


def check_trackers(names: Sequence[str]) -> None:
    """Check that the trackers can be used.

    Raises:
        MaskwrightError: the package of one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MaskwrightError(
                f"{name} is listed, but the package '{name}' is not installed",
                where="train.trackers",
                remedy=f"run pip install {name}, or remove it from the list",
            )


def open_trackers(recipe: Recipe, run: Path, step: int) -> list[GeneralTracker]:
    """Start the trackers of `train.trackers`; only the main process has any.

    Args:
        recipe: stored with the run.
        run: the run's folder; its name becomes the name of the run.
        step: step from which the run resumes; TensorBoard drops later values.
    """
    trackers = [_open(name, recipe, run, step) for name in recipe.train.trackers]
    for tracker in trackers:
        tracker.start()
        if not isinstance(tracker, TensorBoardTracker):  # it would write the settings to another folder
            tracker.store_init_configuration(_settings(recipe))
    return trackers


def _open(name: str, recipe: Recipe, run: Path, step: int) -> GeneralTracker:
    match name:
        case "tensorboard":
            return TensorBoardTracker("", run, purge_step=step or None)
        case "wandb":
            identity = "".join(letter if letter.isalnum() else "-" for letter in f"{run.resolve()}")[-64:]
            return WandBTracker("maskwright", name=run.name, dir=str(run), id=identity, resume="allow")
        case "mlflow":
            return MLflowTracker("maskwright", logging_dir=run / "mlruns", run_name=run.name)
        case "swanlab":
            return SwanLabTracker("maskwright", experiment_name=run.name, logdir=str(run / "swanlog"))
        case "trackio":
            return TrackioTracker("maskwright", name=run.name, resume="allow")
    raise ValueError(f"unknown tracker '{name}'")


def _settings(recipe: Recipe) -> dict[str, str | float]:
    """Flatten the recipe to one level of keys with plain values."""
    return {
        f"{section}.{key}": value if isinstance(value, int | float | str) else str(value)
        for section in ("model", "data", "train", "evaluate")
        for key, value in recipe.model_dump(mode="json")[section].items()
        if value is not None
    }
