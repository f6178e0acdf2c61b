"""A model divided over the processes of a run (FSDP2, `fully_shard`), and checkpoints that each writes its part of.

Weights, gradients and optimizer state of each block lie in slices on all processes, and are put together while the
block is at work. A sharded checkpoint is a folder of PyTorch's distributed checkpoint (DCP), which any other number of
processes can read, one too. Numbers are those of whole models, up to the order of sums.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from maskwright.errors import CheckpointError, MaskwrightError, one_line
from maskwright.models.blocks import find_blocks
from maskwright.runtime.atomic_write import cannot_write, partial_path, remove, write_file_atomically
from maskwright.runtime.device import gather_objects

_HEADER = "header.json"  # written last: a folder without it is not whole


def shard(model: nn.Module, engine: Accelerator) -> None:
    """Divide the model over all processes, in place, block by block.

    Raises:
        MaskwrightError: there is one process alone, or the precision is fp16.
    """
    if engine.num_processes == 1:
        raise MaskwrightError(
            "train.fsdp divides the model over several processes, but there is one; start several with torchrun, or "
            "set train.fsdp=false"
        )
    if engine.scaler:
        raise MaskwrightError("train.fsdp does not go with train.precision=fp16; use bf16 or fp32")
    mesh = init_device_mesh(engine.device.type, (engine.num_processes,))
    for _, block in find_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def reduce_gradients(engine: Accelerator, model: nn.Module, *, now: bool) -> Generator[None]:
    """Whether the backward pass within it averages gradients over processes, or only adds up each one's own."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        yield
        return
    with contextlib.nullcontext() if now else engine.no_sync(model):
        yield


def is_sharded(tensors: dict[str, Tensor]) -> bool:
    """Whether any of the tensors lies in slices."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor, put together where it lies in slices; all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_into(target: Tensor, source: Tensor) -> None:
    """Fill a tensor, or this process's slice of it, with a whole one."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)


def save_shards(folder: Path, tensors: dict[str, Tensor], header: dict[str, Any], engine: Accelerator) -> None:
    """Write a sharded checkpoint; all processes call it. The folder is absent, or whole.

    Where it is whole already, as after the evaluation of a step that was saved, only its header is written anew.

    Raises:
        MaskwrightError: it cannot be written, the same in all processes.
    """
    if any(gather_objects(engine, engine.is_main_process and is_whole(folder))):
        with _together(engine, folder):
            if engine.is_main_process:
                rewrite_header(folder, header)
        return
    temporary = partial_path(folder, "shards")  # the same in all processes
    with _together(engine, folder):
        if engine.is_main_process:
            remove(temporary)
            temporary.mkdir(parents=True)
    with _together(engine, folder):
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(temporary), no_dist=engine.num_processes == 1)
    digests: dict[str, str] = {}
    with _together(engine, folder):
        files = sorted(path for path in temporary.iterdir() if path.is_file())
        digests = {path.name: _digest(path) for path in files[engine.process_index :: engine.num_processes]}
    every = gather_objects(engine, digests)
    with _together(engine, folder):
        if engine.is_main_process:
            joined = {name: digest for part in every for name, digest in part.items()}
            (temporary / _HEADER).write_text(json.dumps(header | {"files": joined}), encoding="utf-8")
            remove(folder)
            temporary.replace(folder)


def rewrite_header(folder: Path, header: dict[str, Any]) -> None:
    """Say something else of a checkpoint whose tensors stay."""
    files = json.loads((folder / _HEADER).read_text(encoding="utf-8"))["files"]
    text = json.dumps(header | {"files": files})
    write_file_atomically(folder / _HEADER, lambda file: file.write_text(text, encoding="utf-8"))


def read_header(folder: Path) -> dict[str, Any]:
    """What a sharded checkpoint says of itself, after its files were compared with their digests.

    Raises:
        CheckpointError: it is not whole.
    """
    try:
        header = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
        damaged = [name for name, digest in header["files"].items() if _digest(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: not a whole sharded checkpoint ({' '.join(str(error).split())})") from None
    if damaged:
        raise CheckpointError(f"{folder}: damaged: {damaged[0]} has changed since it was written")
    return header


def is_whole(folder: Path) -> bool:
    """Whether a sharded checkpoint lies there undamaged."""
    try:
        read_header(folder)
    except CheckpointError:
        return False
    return True


def read_names(folder: Path) -> list[str]:
    """Names of the tensors in a sharded checkpoint."""
    return list(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


def load_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, whole or in slices, from a sharded checkpoint of any number of processes."""
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=not dist.is_initialized())


@contextlib.contextmanager
def _together(engine: Accelerator, folder: Path) -> Generator[None]:
    """What fails in one process fails in all of them, so that none waits for another."""
    failure = ""
    try:
        yield
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        failure = one_line(error)[:300]
    if reasons := [reason for reason in gather_objects(engine, failure) if reason]:
        raise cannot_write(folder, reasons[0])


def _digest(path: Path) -> str:
    """CRC-32 of a file, 8 hexadecimal digits."""
    digest = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest = zlib.crc32(part, digest)
    return f"{digest:08x}"


def remove_shards(folder: Path) -> None:
    """Remove a sharded checkpoint: first what makes it whole, so that an interrupted removal leaves none."""
    (folder / _HEADER).unlink(missing_ok=True)
    remove(folder)
