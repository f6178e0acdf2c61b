"""Fully sharded training (FSDP2, `fully_shard`), and checkpoints to which each process writes its shard.

Weights, gradients and optimizer state of each block are sharded over all processes, and gathered while the block
computes. A sharded checkpoint is a folder of PyTorch's distributed checkpoint (DCP), which any number of processes can
read, even one. Results equal those of unsharded models, up to the order of sums.
"""

from __future__ import annotations

import contextlib
import json
import stat
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

from maskwright.errors import CheckpointError, MaskwrightError, one_line, printable
from maskwright.models.blocks import find_blocks
from maskwright.runtime.atomic_write import cannot_write, partial_path, remove, write_file_atomically
from maskwright.runtime.device import gather_objects
from maskwright.training.sharded_reader import SafeReader, read_metadata

_HEADER = "header.json"  # written last: a folder without it is incomplete
_MAX_HEADER_BYTES = 1 << 24


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard the model over all processes, in place, block by block.

    Raises:
        MaskwrightError: there is only one process, or the precision is fp16.
    """
    if accelerator.num_processes == 1:
        raise MaskwrightError(
            "shards the model over several processes, but there is one",
            where="train.fsdp=true",
            remedy="start several with torchrun, or set train.fsdp=false",
        )
    if accelerator.scaler:
        raise MaskwrightError(
            "does not support train.precision=fp16", where="train.fsdp=true", remedy="use bf16 or fp32"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for _, block in find_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def gradient_sync(accelerator: Accelerator, model: nn.Module, *, enabled: bool) -> Generator[None]:
    """Make the backward pass inside the block average gradients over processes, or only accumulate them locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
        return
    with contextlib.nullcontext() if enabled else accelerator.no_sync(model):
        yield


def is_sharded(tensors: dict[str, Tensor]) -> bool:
    """Return whether any of the tensors is sharded."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor if it is sharded; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a full tensor into a tensor, or into this process's shard of it."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)


def save_sharded_checkpoint(
    folder: Path, tensors: dict[str, Tensor], header: dict[str, Any], accelerator: Accelerator
) -> None:
    """Write a sharded checkpoint atomically; all processes call it.

    If the folder holds a complete checkpoint, only its header is rewritten: a step is saved before its evaluation, and
    the header again after it.

    Raises:
        MaskwrightError: it cannot be written; the same in all processes.
    """
    if any(gather_objects(accelerator, accelerator.is_main_process and is_complete(folder))):
        with _fail_together(accelerator, folder):
            if accelerator.is_main_process:
                rewrite_header(folder, header)
        return
    temporary = partial_path(folder, "shards")  # the same in all processes
    with _fail_together(accelerator, folder):
        if accelerator.is_main_process:
            remove(temporary)
            temporary.mkdir(parents=True)
    with _fail_together(accelerator, folder):
        writer = dcp.FileSystemWriter(temporary)
        dcp.save(dict(tensors), storage_writer=writer, no_dist=accelerator.num_processes == 1)
    checksums: dict[str, str] = {}
    with _fail_together(accelerator, folder):
        files = sorted(path for path in temporary.iterdir() if path.is_file())
        own = files[accelerator.process_index :: accelerator.num_processes]
        checksums = {path.name: _crc32(path) for path in own}
    gathered = gather_objects(accelerator, checksums)
    with _fail_together(accelerator, folder):
        if accelerator.is_main_process:
            merged = {name: checksum for part in gathered for name, checksum in part.items()}
            (temporary / _HEADER).write_text(json.dumps(header | {"files": merged}), encoding="utf-8")
            remove(folder)
            temporary.replace(folder)


def rewrite_header(folder: Path, header: dict[str, Any]) -> None:
    """Replace the header of a checkpoint and keep its tensors."""
    files = json.loads((folder / _HEADER).read_text(encoding="utf-8"))["files"]
    text = json.dumps(header | {"files": files})
    write_file_atomically(folder / _HEADER, lambda file: file.write_text(text, encoding="utf-8"))


def read_header(folder: Path) -> dict[str, Any]:
    """Read the header of a sharded checkpoint and verify the checksums of its files.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """
    try:
        header = json.loads(_read_small_file(folder / _HEADER))
        damaged = [name for name, checksum in header["files"].items() if _crc32(_inside(folder, name)) != checksum]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"not a complete sharded checkpoint ({printable(one_line(error))})", where=folder
        ) from None
    if damaged:
        raise CheckpointError(f"damaged: {damaged[0]} has changed since it was written", where=folder)
    return header


def is_complete(folder: Path) -> bool:
    """Return whether the folder holds a complete, undamaged sharded checkpoint."""
    try:
        read_header(folder)
    except CheckpointError:
        return False
    return True


def read_names(folder: Path) -> list[str]:
    """Read the names of the tensors in a sharded checkpoint.

    Raises:
        NotATrainingCheckpointError: see `read_metadata`.
    """
    return list(read_metadata(folder).state_dict_metadata)


def load_sharded_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, full or sharded, from a sharded checkpoint of any number of processes.

    Raises:
        CheckpointError: it lacks one of them, or has it in another shape; the same in all processes.
    """
    reader = SafeReader(folder, read_metadata(folder))
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:
        reason = next((one_line(failure) for failure, _ in error.failures.values()), one_line(error))
        raise CheckpointError(
            f"does not fit the model: {printable(reason)}", where=folder, remedy="choose another --output"
        ) from None


def remove_sharded_checkpoint(folder: Path) -> None:
    """Remove a sharded checkpoint; its header first, so that an interrupted removal leaves an incomplete one."""
    (folder / _HEADER).unlink(missing_ok=True)
    remove(folder)


@contextlib.contextmanager
def _fail_together(accelerator: Accelerator, folder: Path) -> Generator[None]:
    """Raise an error of one process in all of them, so that none waits for another."""
    failure = ""
    try:
        yield
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        failure = one_line(error)[:300]
    if reasons := [reason for reason in gather_objects(accelerator, failure) if reason]:
        raise cannot_write(folder, reasons[0])


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a header names, which must be a regular file in the folder."""
    path = folder / name
    if path.name != name or not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"'{name}' is not a file of the checkpoint")
    return path


def _read_small_file(path: Path) -> bytes:
    information = path.lstat()
    if not stat.S_ISREG(information.st_mode) or information.st_size > _MAX_HEADER_BYTES:
        raise ValueError(f"{path.name} is not a header")
    return path.read_bytes()


def _crc32(path: Path) -> str:
    """Compute the CRC-32 of a file, as 8 hexadecimal digits."""
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            checksum = zlib.crc32(part, checksum)
    return f"{checksum:08x}"
