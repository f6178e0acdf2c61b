"""What a run leaves behind, and how it goes on: recipe, log and resumable checkpoints. Every file whole or absent."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from maskwright.checkpoint import read_safetensors, write_whole
from maskwright.errors import CheckpointError, MaskwrightError, RecipeError
from maskwright.recipe import Recipe, dump_recipe, load_recipe

logger = logging.getLogger(__name__)

_FORMAT = "maskwright-training-1"
# May change between parts of a run.
_FREE_KEYS = ("log_every", "evaluate_every", "checkpoint_every", "keep", "workers", "check", "learning_rate_batch")


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: steps done.
        evaluated: step of the last evaluation that is in the log; 0 before the first.
        best: the best score so far.
        scaler: state of the fp16 loss scaler.
    """

    step: int = 0
    evaluated: int = 0
    best: float = -1.0
    scaler: dict[str, Any] | None = None


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
        self.log_file = path / "log.jsonl"
        self.checkpoints = path / "checkpoints"
        self.recipe = recipe
        if self._saved() and (path / "recipe.yaml").is_file():
            _compare(load_recipe(path / "recipe.yaml"), recipe, path)

    def begin(self, progress: Progress, start: list[str]) -> None:
        """Write recipe.yaml, forget what was logged after `progress`, and remove what a killed process left half-done.

        Args:
            progress: where the run stands.
            start: what became of its first weights, with which the log begins; empty where they were random.

        Raises:
            MaskwrightError: the folder cannot be written to.
        """
        write_whole(self.path / "recipe.yaml", lambda file: file.write_text(dump_recipe(self.recipe), encoding="utf-8"))
        for folder in (self.path, self.checkpoints):
            for partial in folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)
        rows = [row for row in self.rows() if "start" not in row and _is_before(row, progress)]
        if start:
            rows.insert(0, {"step": 0, "start": start})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(self.log_file, lambda file: file.write_text(text, encoding="utf-8"))

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to log.jsonl.

        Raises:
            MaskwrightError: it cannot be written.
        """
        try:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise MaskwrightError(f"{self.log_file}: cannot be written: {error.strerror}; free some space") from None

    def rows(self) -> list[dict[str, Any]]:
        """The rows of log.jsonl; a half-written last one is left out."""
        if not self.log_file.is_file():
            return []
        rows = []
        for line in self.log_file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def start(self) -> list[str]:
        """What became of the first weights, as the log tells."""
        return next((row["start"] for row in self.rows() if "start" in row), [])

    def last_scores(self) -> dict[str, Any] | None:
        """The scores of the last evaluation in the log."""
        return next((row["evaluation"] for row in reversed(self.rows()) if "evaluation" in row), None)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write a resumable checkpoint and drop older ones beyond `train.keep`.

        Raises:
            MaskwrightError: it cannot be written; the older ones are kept.
        """
        tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
        for name, state in _named_state(model, optimizer).items():
            tensors |= {f"optimizer.{name}.{kind}": torch.as_tensor(value) for kind, value in state.items()}
        tensors["random.torch"] = torch.get_rng_state()
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        metadata = {
            "format": _FORMAT,
            "progress": json.dumps(asdict(progress)),
        }
        path = self.checkpoints / f"{progress.step:08d}.safetensors"
        write_whole(path, lambda file: safetensors.torch.save_file(tensors, file, metadata))
        done = [saved for saved in self._saved() if int(saved.stem) <= progress.step]  # later ones could not be read
        for old in done[: -self.recipe.train.keep]:
            old.unlink()

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Load the newest whole checkpoint; a fresh `Progress` without one.

        Raises:
            CheckpointError: a file among the checkpoints is none.
        """
        for path in reversed(self._saved()):
            try:
                tensors, metadata = read_safetensors(path)
            except CheckpointError as error:
                logger.warning("%s; trying the one before it", error)
                continue
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(f"{path} is not a checkpoint of a run")
            progress = Progress(**json.loads(metadata["progress"]))
            _restore(tensors, model, optimizer)
            return progress
        return Progress()

    def _saved(self) -> list[Path]:
        return sorted(self.checkpoints.glob("[0-9]*.safetensors"))


def _is_before(row: dict[str, Any], progress: Progress) -> bool:
    """Whether a row speaks of what `progress` knows; an evaluation may have been logged, but not yet saved."""
    if row.get("step", 0) == progress.step and "evaluation" in row:
        return progress.evaluated == progress.step
    return row.get("step", 0) <= progress.step


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Optimizer state by parameter name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: state for parameter, state in optimizer.state.items()}


def _restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    model.load_state_dict(weights)
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            name, kind = key.removeprefix("optimizer.").rsplit(".", 1)
            parameter = parameters[name]
            on_device = value if kind == "step" and parameter.device.type == "cpu" else value.to(parameter.device)
            optimizer.state[parameter][kind] = on_device
    torch.set_rng_state(tensors["random.torch"])


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
