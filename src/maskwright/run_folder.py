"""What a run leaves behind, and how it goes on: recipe, log and resumable checkpoints. Every file whole or absent."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from maskwright.checkpoint import read_safetensors, write_whole
from maskwright.errors import CheckpointError, RecipeError
from maskwright.recipe import Recipe, dump_recipe, load_recipe

logger = logging.getLogger(__name__)

_FORMAT = "maskwright-training-1"
_FREE_KEYS = ("log_every", "evaluate_every", "checkpoint_every", "keep", "workers")  # may change between parts of a run


@dataclass
class Progress:
    """Where a run stands: steps done, the best score so far, and the fp16 loss scaler's state."""

    step: int = 0
    best: float = -1.0
    scaler: dict[str, Any] | None = None


class RunFolder:
    """One run's folder.

    Args:
        path: created if absent.
        recipe: resolved; written to `recipe.yaml`, or compared with the one that is there.

    Raises:
        RecipeError: the folder holds a run of another recipe.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.log_file = path / "log.jsonl"
        self.checkpoints = path / "checkpoints"
        self.keep = recipe.train.keep
        if (path / "recipe.yaml").is_file():
            _compare(load_recipe(path / "recipe.yaml"), recipe, path)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_whole(path / "recipe.yaml", lambda file: file.write_text(dump_recipe(recipe), encoding="utf-8"))

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to log.jsonl."""
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

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

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write a resumable checkpoint and drop those beyond `train.keep`."""
        tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
        for name, state in _named_state(model, optimizer).items():
            tensors |= {f"optimizer.{name}.{kind}": torch.as_tensor(value) for kind, value in state.items()}
        tensors["random.torch"] = torch.get_rng_state()
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        metadata = {
            "format": _FORMAT,
            "progress": json.dumps({"step": progress.step, "best": progress.best, "scaler": progress.scaler}),
        }
        path = self.checkpoints / f"{progress.step:08d}.safetensors"
        write_whole(path, lambda file: safetensors.torch.save_file(tensors, file, metadata))
        for old in self._saved()[: -self.keep]:
            old.unlink()

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Load the newest whole checkpoint and forget what was logged after it; a fresh `Progress` without one."""
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
            self._forget_after(progress.step)
            return progress
        self._forget_after(0)
        return Progress()

    def _saved(self) -> list[Path]:
        return sorted(self.checkpoints.glob("[0-9]*.safetensors"))

    def _forget_after(self, step: int) -> None:
        rows = [row for row in self.rows() if row.get("step", 0) <= step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(self.log_file, lambda file: file.write_text(text, encoding="utf-8"))


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Optimizer state by parameter name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
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
