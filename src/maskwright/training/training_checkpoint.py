"""Training checkpoints: everything that a step changes, in one file, or in a folder that all processes wrote.

They hold no state of a random generator: what a step draws depends on the seed and the step only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from maskwright.checkpoints.adapter_file import Base
from maskwright.checkpoints.checkpoint import checksum, is_undamaged
from maskwright.checkpoints.readers.weight_file import read_safetensors
from maskwright.errors import CheckpointError, one_line, printable
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.training import fsdp
from maskwright.training.ema import ExponentialMovingAverage
from maskwright.training.sharded_reader import NotATrainingCheckpointError

_FORMAT = "maskwright-training-2"
_OLD_FIELDS = {
    "evaluated": "evaluated_step",
    "best": "best_score",
    "waited": "evaluations_without_improvement",
    "stopped": "stopped_early",
    "accumulate": "gradient_accumulation_steps",
}


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        step: steps done.
        evaluated_step: step of the last evaluation in the log; 0 before the first.
        best_score: best score so far.
        evaluations_without_improvement: since the best score.
        stopped_early: the run ended early because its score did not improve.
        gradient_accumulation_steps: as found by `train.auto_gradient_accumulation`.
        scaler: state of the fp16 loss scaler.
        data: fingerprints of the splits, by their names; None in checkpoints of earlier versions.
        base: of a LoRA run.
    """

    step: int = 0
    evaluated_step: int = 0
    best_score: float = -1.0
    evaluations_without_improvement: int = 0
    stopped_early: bool = False
    gradient_accumulation_steps: int | None = None
    scaler: dict[str, Any] | None = None
    data: dict[str, str] | None = None
    base: Base | None = None


@dataclass
class TrainingCheckpoint:
    """A complete training checkpoint on disk.

    Attributes:
        path: of the file or folder.
        progress: of the run.
        names: of its tensors.
        tensors: by name; None if sharded.
    """

    path: Path
    progress: Progress
    names: list[str]
    tensors: dict[str, Tensor] | None

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ExponentialMovingAverage | None) -> None:
        """Load the checkpoint into a model, its optimizer and its average.

        Raises:
            CheckpointError: it lacks one of their tensors.
        """
        parameters = dict(model.named_parameters())
        for name in self.names:
            section, _, key = name.partition(".")
            if section == "optimizer":
                key, _, kind = key.rpartition(".")
                if key not in parameters:
                    raise CheckpointError(f"does not fit the model: it has no {printable(key)}", where=self.path)
                optimizer.state[parameters[key]][kind] = _empty_state(parameters[key], kind, optimizer)
        tensors = training_tensors(model, optimizer, ema)
        if missing := tensors.keys() - set(self.names):
            raise CheckpointError(f"{min(missing)} and {len(missing) - 1} more tensors are missing", where=self.path)
        if self.tensors is None:
            fsdp.load_sharded_checkpoint(self.path, {name: tensor.detach() for name, tensor in tensors.items()})
            return
        for name, tensor in tensors.items():
            if self.tensors[name].shape != tensor.shape:
                shapes = f"{tuple(self.tensors[name].shape)}, expected {tuple(tensor.shape)}"
                raise CheckpointError(f"does not fit the model: {name} has shape {shapes}", where=self.path)
            fsdp.copy_into(tensor.detach(), self.tensors[name])


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: ExponentialMovingAverage | None
) -> dict[str, Tensor]:
    """Collect the tensors that a step changes: `model.*`, `optimizer.PARAMETER.*` and, with an EMA, `average.*`."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}.{kind}": torch.as_tensor(value) for kind, value in state.items()}
    if ema:
        tensors |= {f"average.{key}": value for key, value in ema.tensors.items()}
    return tensors


def save_training_checkpoint(
    folder: Path, tensors: dict[str, Tensor], progress: Progress, accelerator: Accelerator
) -> None:
    """Write a checkpoint atomically; all processes call it.

    Raises:
        MaskwrightError: it cannot be written.
    """
    header = {"format": _FORMAT, "progress": json.dumps(asdict(progress))}
    name = checkpoint_name(progress.step)
    if fsdp.is_sharded(tensors):
        fsdp.save_sharded_checkpoint(folder / name, tensors, header, accelerator)
    elif accelerator.is_main_process:
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        header["checksum"] = checksum(plain, header)
        write_file_atomically(
            folder / f"{name}.safetensors", lambda file: safetensors.torch.save_file(plain, file, header)
        )
    accelerator.wait_for_everyone()


def read_training_checkpoint(path: Path) -> TrainingCheckpoint:
    """Read a checkpoint and verify its checksum.

    Raises:
        CheckpointError: it is incomplete or damaged.
        NotATrainingCheckpointError: it is not a training checkpoint at all.
    """
    tensors: dict[str, Tensor] | None = None
    if path.is_dir():
        header = fsdp.read_header(path)
    elif not path.is_file():
        raise NotATrainingCheckpointError("neither a file nor a folder", where=path, remedy="remove it")
    else:
        tensors, header = read_safetensors(path)
    if header.get("format") != _FORMAT:
        raise NotATrainingCheckpointError(
            "not a training checkpoint, or one of another version", where=path, remedy="move it elsewhere"
        )
    if tensors is not None and not is_undamaged(tensors, header):
        raise CheckpointError("damaged: its content has changed since it was written", where=path)
    names = fsdp.read_names(path) if tensors is None else list(tensors)
    return TrainingCheckpoint(path, _read_progress(header, path), names, tensors)


def _read_progress(header: dict[str, Any], path: Path) -> Progress:
    try:
        values = {_OLD_FIELDS.get(key, key): value for key, value in json.loads(header["progress"]).items()}
        progress = TypeAdapter(Progress).validate_json(json.dumps(values), strict=True)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": one_line(error)}
        reason = printable(": ".join(map(str, (*problem["loc"], problem["msg"]))))
        raise NotATrainingCheckpointError(
            f"its progress cannot be read ({reason})", where=path, remedy="do not use this run folder"
        ) from None
    if path.stem != checkpoint_name(progress.step):
        remedy = f"call it {checkpoint_name(progress.step)}, or move it elsewhere"
        raise NotATrainingCheckpointError(f"is of step {progress.step}", where=path, remedy=remedy)
    return progress


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint of a step, without its suffix."""
    return f"{step:08d}"


def _empty_state(parameter: Tensor, kind: str, optimizer: torch.optim.Optimizer) -> Tensor:
    """Allocate one tensor of a parameter's optimizer state."""
    if kind != "step":
        return torch.zeros_like(parameter, memory_format=torch.preserve_format)
    fused = optimizer.param_groups[0].get("fused")
    return torch.zeros((), device=parameter.device if fused else "cpu")
