"""Resumable checkpoints: all that a step changes, in one file, or in a folder of which each process wrote its part.

Nothing random is in them: what a step draws depends on the seed and the step alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from maskwright.checkpoints.checkpoint import checksum
from maskwright.checkpoints.readers.weight_file import read_safetensors
from maskwright.errors import CheckpointError
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.training import fsdp as sharding
from maskwright.training.ema import MovingAverage

_FORMAT = "maskwright-training-2"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: steps done.
        evaluated: step of the last evaluation that is in the log; 0 before the first.
        best: the best score so far.
        waited: evaluations since the best one.
        stopped: whether it ended early, for want of a better score.
        accumulate: parts of a step, where they were searched for.
        scaler: state of the fp16 loss scaler.
    """

    step: int = 0
    evaluated: int = 0
    best: float = -1.0
    waited: int = 0
    stopped: bool = False
    accumulate: int | None = None
    scaler: dict[str, Any] | None = None


@dataclass
class Resumable:
    """A whole checkpoint on disk.

    Attributes:
        path: of the file or folder.
        progress: where the run stood.
        names: of its tensors.
        tensors: by name; None where they lie in parts.
    """

    path: Path
    progress: Progress
    names: list[str]
    tensors: dict[str, Tensor] | None

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage | None) -> None:
        """Give a run's parts what the checkpoint holds of them.

        Raises:
            CheckpointError: a tensor of theirs is not in it.
        """
        parameters = dict(model.named_parameters())
        for name in self.names:
            section, _, key = name.partition(".")
            if section == "optimizer":
                key, kind = key.rsplit(".", 1)
                optimizer.state[parameters[key]][kind] = _room(parameters[key], kind, optimizer)
        wanted = training_tensors(model, optimizer, average)
        if missing := wanted.keys() - set(self.names):
            raise CheckpointError(f"{self.path} has no {min(missing)}, and {len(missing) - 1} more are missing")
        if self.tensors is None:
            sharding.load_shards(self.path, {name: tensor.detach() for name, tensor in wanted.items()})
            return
        for name, tensor in wanted.items():
            sharding.copy_into(tensor.detach(), self.tensors[name])


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage | None
) -> dict[str, Tensor]:
    """All tensors that a step changes: `model.*`, `optimizer.PARAMETER.*` and, with a moving average, `average.*`."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}.{kind}": torch.as_tensor(value) for kind, value in state.items()}
    if average:
        tensors |= {f"average.{key}": value for key, value in average.tensors.items()}
    return tensors


def save_resumable(folder: Path, tensors: dict[str, Tensor], progress: Progress, engine: Accelerator) -> None:
    """Write a checkpoint, whole or not at all; every process calls it.

    Raises:
        MaskwrightError: it cannot be written.
    """
    header = {"format": _FORMAT, "progress": json.dumps(asdict(progress))}
    name = f"{progress.step:08d}"
    if sharding.is_sharded(tensors):
        sharding.save_shards(folder / name, tensors, header, engine)
    elif engine.is_main_process:
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        header["crc32"] = checksum(plain, header)
        write_file_atomically(
            folder / f"{name}.safetensors", lambda file: safetensors.torch.save_file(plain, file, header)
        )
    engine.wait_for_everyone()


def read_resumable(path: Path) -> Resumable:
    """A checkpoint, after its content was compared with its checksum.

    Raises:
        CheckpointError: it is not whole; or it is no checkpoint of a run at all.
    """
    tensors: dict[str, Tensor] | None = None
    if path.is_dir():
        header, names = sharding.read_header(path), sharding.read_names(path)
    else:
        tensors, header = read_safetensors(path)
        names = list(tensors)
    if header.get("format") != _FORMAT:
        raise NoCheckpoint(f"{path} is not a checkpoint of a run, or of another version; move it elsewhere")
    if tensors is not None and header.get("crc32") != checksum(tensors, header):
        raise CheckpointError(f"{path}: damaged: its content has changed since it was written")
    return Resumable(path, Progress(**json.loads(header["progress"])), names, tensors)


class NoCheckpoint(CheckpointError):
    """A file that lies among the checkpoints of a run, and is none."""


def _room(parameter: Tensor, kind: str, optimizer: torch.optim.Optimizer) -> Tensor:
    """An empty place for a part of a parameter's optimizer state."""
    if kind != "step":
        return torch.zeros_like(parameter, memory_format=torch.preserve_format)
    fused = optimizer.param_groups[0].get("fused")
    return torch.zeros((), device=parameter.device if fused else "cpu")
