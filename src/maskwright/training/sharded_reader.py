"""Read sharded checkpoints, folders of PyTorch's distributed checkpoint (DCP), without executing anything in them.

PyTorch's own reader unpickles the folder's `.metadata`, and so runs whatever a stranger put there. Here that pickle is
read through an allow-list, its contents are checked, and tensors are read like those of any foreign weight file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from maskwright.checkpoints.readers.safe_pickle import Placeholder, read_pickle, sizes
from maskwright.checkpoints.readers.torch_archive import StoredTensor, read_zip_bytes
from maskwright.errors import CheckpointError, one_line, printable

METADATA_NAME = ".metadata"
_DCP = "torch.distributed.checkpoint"


class NotATrainingCheckpointError(CheckpointError):
    """A file or folder among the checkpoints of a run is not one that training wrote."""


class _Record:
    """Stand-in for a dataclass in the metadata: its attributes, as stored."""

    values: dict[str, Any]

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise ValueError("a record without attributes")
        self.values = state


class _Metadata(_Record):
    pass


class _Tensor(_Record):
    pass


class _Chunk(_Record):
    pass


class _Index(_Record):
    pass


class _Storage(_Record):
    pass


class _Properties:
    """Stand-in for `TensorProperties`, whose state is a tuple that begins with the dtype."""

    dtype: Any = None

    def __setstate__(self, state: object) -> None:
        self.dtype = state[0] if isinstance(state, tuple) and state else None


_ALLOWED = {
    f"{_DCP}.metadata.Metadata": _Metadata,
    f"{_DCP}.metadata.TensorStorageMetadata": _Tensor,
    f"{_DCP}.metadata.ChunkStorageMetadata": _Chunk,
    f"{_DCP}.metadata.MetadataIndex": _Index,
    f"{_DCP}.filesystem._StorageInfo": _Storage,
    f"{_DCP}.metadata.TensorProperties": _Properties,
    f"{_DCP}.metadata.StorageMeta": Placeholder,
    f"{_DCP}.metadata._MEM_FORMAT_ENCODING": Placeholder,
    "torch.serialization._get_layout": Placeholder,
    "torch.Size": sizes,
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{f"pathlib.{kind}": Placeholder for kind in ("PosixPath", "WindowsPath")},
    **{f"pathlib._local.{kind}": Placeholder for kind in ("PosixPath", "WindowsPath")},
}


class SafeReader(dcp.FileSystemReader):
    """Reader of a sharded checkpoint for `dcp.load`.

    Args:
        folder: of the checkpoint.
        metadata: of `read_metadata`.
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._folder, self._metadata = folder, metadata

    def read_metadata(self) -> Metadata:
        """Return the checked metadata."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of a plan."""
        for item in plan.items:
            tensor = _read_tensor(self._folder, self.storage_data[item.storage_index])
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                tensor = tensor.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            if target.shape != tensor.shape:
                raise ValueError(f"{item.storage_index.fqn} has shape {tuple(tensor.shape)}")
            target.copy_(tensor)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def read_metadata(folder: Path) -> Metadata:
    """Read and check the metadata of a sharded checkpoint: it lists tensors only, in plain files of the folder.

    Raises:
        NotATrainingCheckpointError: it is something else.
    """
    try:
        with (folder / METADATA_NAME).open("rb") as file:
            return _convert(read_pickle(file, _ALLOWED), folder)
    except CheckpointError as error:
        reason = error.found
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = f"its content is not that of a sharded checkpoint ({printable(one_line(error))})"
    where = folder / METADATA_NAME
    raise NotATrainingCheckpointError(reason, where=where, remedy="do not use this run folder") from None


def _convert(metadata: object, folder: Path) -> Metadata:
    """Make PyTorch's metadata of the stand-ins."""
    if not isinstance(metadata, _Metadata):
        raise ValueError("not the metadata of a checkpoint")
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    tensors = {_text(name): _convert_tensor(tensor) for name, tensor in metadata.values["state_dict_metadata"].items()}
    storage = dict(_convert_storage(*pair, files) for pair in metadata.values["storage_data"].items())
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in storage:
                raise ValueError(f"part of '{name}' is in no file")
    return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta())  # ty: ignore[invalid-argument-type]


def _convert_tensor(tensor: object) -> TensorStorageMetadata:
    if not isinstance(tensor, _Tensor):
        raise ValueError("an entry that is not a tensor")
    properties, size = tensor.values["properties"], sizes(tensor.values["size"])
    if not isinstance(properties, _Properties) or not isinstance(properties.dtype, torch.dtype):
        raise ValueError("a tensor without a dtype")
    chunks = [_convert_chunk(chunk, size) for chunk in tensor.values["chunks"]]
    return TensorStorageMetadata(TensorProperties(properties.dtype), torch.Size(size), chunks)


def _convert_chunk(chunk: object, size: tuple[int, ...]) -> ChunkStorageMetadata:
    if not isinstance(chunk, _Chunk):
        raise ValueError("a part that is not a chunk")
    offsets, lengths = sizes(chunk.values["offsets"]), sizes(chunk.values["sizes"])
    if any(start + length > side for start, length, side in zip(offsets, lengths, size, strict=True)):
        raise ValueError("a part outside its tensor")
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(lengths))


def _convert_storage(index: object, storage: object, files: dict[str, int]) -> tuple[MetadataIndex, _StorageInfo]:
    if not isinstance(index, _Index) or not isinstance(storage, _Storage):
        raise ValueError("an entry that is not the position of a tensor")
    offsets = index.values.get("offset")
    name = _text(storage.values["relative_path"])
    start, length = sizes((storage.values["offset"], storage.values["length"]))
    if name not in files or start + length > files[name]:
        raise ValueError(f"a position outside the files of the folder: '{printable(name)}'")
    if storage.values.get("transform_descriptors"):
        raise ValueError("a transformed tensor")
    key = MetadataIndex(_text(index.values["fqn"]), None if offsets is None else sizes(offsets))
    return key, _StorageInfo(name, start, length)


def _read_tensor(folder: Path, storage: _StorageInfo) -> torch.Tensor:
    """Read one tensor, which is stored as a file of `torch.save` inside a file."""
    with (folder / storage.relative_path).open("rb") as file:
        file.seek(storage.offset)
        content = file.read(storage.length)
    stored = read_zip_bytes(content)
    if not isinstance(stored, StoredTensor):
        raise ValueError(f"{storage.relative_path} holds something other than a tensor at {storage.offset}")
    return stored.tensor()


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a name that is not text")
    return value
