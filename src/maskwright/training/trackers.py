"""Where the numbers of a run are shown, by name: TensorBoard, and others that accelerate knows.

Each gets what log.jsonl gets; the log remains the only thing that a run itself reads.
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
    """Raise where one cannot be used.

    Raises:
        MaskwrightError: its package is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MaskwrightError(
                f"train.trackers has {name}, but the package '{name}' is not installed; pip install {name}, or leave "
                "it out"
            )


def open_trackers(recipe: Recipe, run: Path, step: int) -> list[GeneralTracker]:
    """The recipe's trackers, begun; only the main process has any.

    Args:
        recipe: names them, in `train.trackers`, and is shown with the run.
        run: the run's folder, whose name it has there.
        step: after which the run goes on; TensorBoard forgets what came later.
    """
    trackers = [_open(name, recipe, run, step) for name in recipe.train.trackers]
    for tracker in trackers:
        tracker.start()
        if not isinstance(tracker, TensorBoardTracker):  # which would write a folder of its own for them
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
    raise ValueError(f"'{name}' is no tracker")


def _settings(recipe: Recipe) -> dict[str, str | float]:
    """The recipe as one level of names and plain values."""
    return {
        f"{section}.{key}": value if isinstance(value, int | float | str) else str(value)
        for section in ("model", "data", "train", "evaluate")
        for key, value in recipe.model_dump(mode="json")[section].items()
        if value is not None
    }
