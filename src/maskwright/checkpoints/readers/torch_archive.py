"""Files of `torch.save`, mapped into memory, without PyTorch's own unpickler.

Both forms are read: the zip archive, and what PyTorch wrote before 1.6 (pickles, then the bytes of one storage after
another). Why not `torch.load`: it can call more than weights need, trusts the sizes that a file tells, does not notice
a flipped bit, and reads everything, the optimizer's state too. Here a tensor is a place in the file until it is wanted.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from maskwright.checkpoints.readers.safe_pickle import ALLOWED, Inert, counts, read_pickle
from maskwright.errors import CheckpointError, printable

ZIP = b"PK\x03\x04"
LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_BIG_ENDIAN = "was written on a big-endian machine, whose numbers are not read here; save it again on another"


class Mapped:
    """A file's bytes as storages, without reading them; writing to one changes the memory alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size

    @cached_property
    def whole(self) -> torch.UntypedStorage:
        """All bytes."""
        return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(self.path), False, self.size))


class Held:
    """The same for bytes that are in memory already."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)

    @cached_property
    def whole(self) -> torch.UntypedStorage:
        """All bytes."""
        return torch.frombuffer(bytearray(self.content), dtype=torch.uint8).untyped_storage()


@dataclass
class Storage:
    """Numbers of one kind in a file.

    Attributes:
        name: for messages.
        dtype: of the numbers.
        count: of the numbers.
        file: where they are.
        start: their first byte; -1 until the file's table has been read.
        digest: CRC-32 of their bytes; 0 where none was stored.
    """

    name: str
    dtype: torch.dtype
    count: int
    file: Mapped | Held
    start: int = -1
    digest: int = 0

    @cached_property
    def bytes(self) -> torch.UntypedStorage:
        """The bytes, compared with their digest.

        Raises:
            ValueError: they are not all there, or have changed.
        """
        end = self.start + self.count * self.dtype.itemsize
        if self.start < 0 or end > self.file.size:
            raise ValueError("has no place in the file")
        part = self.file.whole[self.start : end]
        found = zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(part).numpy()) if self.digest else 0
        if found != self.digest:
            raise ValueError(f"is damaged: the bytes of '{printable(self.name)}' have changed")
        return part


@dataclass
class StoredTensor:
    """Stands for a tensor: a view of a storage. Strides and offset count numbers."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """The tensor, mapped into memory.

        Raises:
            ValueError: its shape does not fit into its storage, or the bytes there are not what they were.
        """
        if 0 in self.size:
            return torch.empty(self.size, dtype=self.dtype)
        room = self.storage.count * self.storage.dtype.itemsize // self.dtype.itemsize
        last = self.offset + sum((side - 1) * step for side, step in zip(self.size, self.stride, strict=True))
        if max(math.prod(self.size), last + 1) > room:
            raise ValueError(f"has the shape {printable(self.size)}, but its storage holds {room} numbers")
        part = self.storage.bytes
        tensor = torch.empty(0, dtype=self.dtype).set_(part, self.offset, self.size, self.stride)
        return tensor if part.data_ptr() % self.dtype.itemsize == 0 else tensor.clone()


def _rebuild(storage: object, offset: object, size: object, stride: object, *further: object) -> StoredTensor:
    """`_rebuild_tensor`, `_rebuild_tensor_v2`, and `_v3`, whose storage is bytes and whose kind comes later."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor of something that is no storage")
    dtype = next((part for part in further if isinstance(part, torch.dtype)), storage.dtype)
    return StoredTensor(storage, *counts((offset,)), counts(size), counts(stride), dtype)


def _first(value: object, *further: object) -> object:
    """`Parameter` and what rebuilds one: the tensor inside."""
    return value


def _rebuild_from_type(function: Callable, kind: object, arguments: tuple, state: object) -> object:
    """A tensor with attributes, without them."""
    if function not in (_rebuild, _first):
        raise ValueError("a tensor that is rebuilt in another way")
    return function(*arguments)


def _other(what: str) -> Callable:
    def refuse(*arguments: object) -> None:
        raise CheckpointError(f"holds {what}; save its weights as plain dense tensors of floats")

    return refuse


def _dtypes() -> dict[str, torch.dtype]:
    """What names a kind of number: dtypes, and the classes of storages."""
    named = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    storages = {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
        "Untyped": torch.uint8,
        "QInt8": torch.int8,  # these three only until the quantized tensor that follows is refused
        "QUInt8": torch.uint8,
        "QInt32": torch.int32,
    }
    named |= {f"torch.{name}Storage": dtype for name, dtype in storages.items()}
    return named | {"torch.storage.UntypedStorage": torch.uint8}


_NAMES = {
    **ALLOWED,
    **_dtypes(),
    **{f"torch._utils._rebuild_tensor{version}": _rebuild for version in ("", "_v2", "_v3")},
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    # How accelerators without a storage of their own are saved.
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Tensor": Inert,
    "torch.Size": Inert,
    "torch.device": Inert,
    "torch._utils._rebuild_qtensor": _other("quantized tensors"),
    "torch._utils._rebuild_sparse_tensor": _other("sparse tensors"),
    "torch.serialization._get_layout": Inert,
    "torch._utils._rebuild_meta_tensor_no_storage": _other("tensors without data (of the meta device)"),
    "torch._utils._rebuild_wrapper_subclass": _other("tensors of another class"),
    "torch.distributed.tensor.DTensor": _other("shards of tensors"),
    **{f"torch.{kind}": Inert for kind in ("per_tensor_affine", "per_channel_affine", "per_tensor_symmetric")},
}


def read_zip(path: Path) -> Any:
    """The content of a zip archive of `torch.save`; tensors are `StoredTensor`s.

    Raises:
        CheckpointError: it is packed, damaged, or something else than weights.
        Exception: nearly any other, where it is broken.
    """
    mapped, storages = Mapped(path), {}
    with path.open("rb") as file, _opened(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        folder = _folder(entries)
        _check_entries(archive.infolist(), mapped.size)
        if (order := f"{folder}byteorder") in entries and _read(file, entries[order]) != b"little":
            raise CheckpointError(_BIG_ENDIAN)

        def stored(pid: Any) -> Storage:
            dtype, key, count = _storage_id(pid)
            if key not in storages:
                entry = entries[f"{folder}data/{key}"]
                if entry.file_size != count * dtype.itemsize:
                    raise ValueError(f"storage {key} has {entry.file_size} bytes, expected {count} of {dtype}")
                storages[key] = Storage(entry.filename, dtype, count, mapped, _start(file, entry), entry.CRC)
            return storages[key]

        return read_pickle(io.BytesIO(_read(file, entries[f"{folder}data.pkl"])), _NAMES, stored)


def _opened(file: BinaryIO) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise CheckpointError("a zip archive whose table, at its end, is missing; download or copy it again") from None


def _folder(entries: dict[str, zipfile.ZipInfo]) -> str:
    """The folder, with a slash, in which everything of the archive is."""
    found = [name.removesuffix("data.pkl") for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if not found:
        names = ", ".join(printable(name, 40) for name in list(entries)[:3]) or "nothing"
        raise CheckpointError(f"a zip archive without weights of PyTorch (in it: {names}); unpack it first")
    folder = min(found, key=len)
    if f"{folder}constants.pkl" in entries:
        raise CheckpointError("a TorchScript program, not weights; save the state_dict() of its model with torch.save")
    return folder


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise CheckpointError(
                f"refused: '{printable(entry.filename)}' in it is packed ({entry.compress_size:,} bytes become "
                f"{entry.file_size:,}), as torch.save never does; where you trust it, load it and save it again"
            )
    if (total := sum(entry.file_size for entry in entries)) > size:
        raise CheckpointError(f"refused: claims {total:,} bytes of content in a file of {size:,}; download it again")


def _start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if not header.startswith(ZIP):
        raise ValueError(f"no entry where '{entry.filename}' should be")
    return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


def _read(file: BinaryIO, entry: zipfile.ZipInfo) -> bytes:
    file.seek(_start(file, entry))
    content = file.read(entry.file_size)
    if entry.CRC not in (0, zlib.crc32(content)):  # 0 where torch.save was asked to compute none
        raise CheckpointError(f"damaged: '{printable(entry.filename)}' in it has changed; download it again")
    return content


def read_legacy(path: Path) -> Any:
    """The content of a file that PyTorch wrote before 1.6; tensors are `StoredTensor`s.

    Raises:
        CheckpointError: it is something else than weights.
        Exception: nearly any other, where it is broken.
    """
    with path.open("rb") as file:
        return _read_legacy(file, Mapped(path))


def read_plain(path: Path) -> Any:
    """The content of a plain pickle, whose tensors, if there are any, are files of their own in it.

    Raises:
        CheckpointError: it is something else than weights.
        Exception: nearly any other, where it is broken.
    """
    loaded: dict[int, tuple[bytes, Any]] = {}

    def load_from_bytes(content: bytes) -> Any:
        if id(content) not in loaded:
            if not content.startswith(LEGACY):
                raise ValueError("the numbers of a tensor are not as PyTorch writes them")
            loaded[id(content)] = content, _read_legacy(io.BytesIO(content), Held(content))
        return loaded[id(content)][1]

    with path.open("rb") as file:
        return read_pickle(file, _NAMES | {"torch.storage._load_from_bytes": load_from_bytes})


def _read_legacy(file: BinaryIO, held: Mapped | Held) -> Any:
    storages: dict[str, Storage] = {}

    def stored(pid: Any) -> Storage:
        dtype, key, count = _storage_id(pid)
        return storages.setdefault(key, Storage(key, dtype, count, held))

    read_pickle(file, {})
    read_pickle(file, {})
    system = read_pickle(file, {})
    if not system.get("little_endian", True):
        raise CheckpointError(_BIG_ENDIAN)
    content = read_pickle(file, _NAMES, stored)
    for key in read_pickle(file, {}):
        storage, count = storages[key], int.from_bytes(file.read(8), "little")
        if count != storage.count:
            raise ValueError(f"storage {key} has {count} numbers, expected {storage.count}")
        storage.start = file.tell()
        file.seek(count * storage.dtype.itemsize, 1)
    if file.tell() > held.size:
        raise CheckpointError("its end is missing; download or copy it again")
    return content


def _storage_id(pid: Any) -> tuple[torch.dtype, str, int]:
    """(kind, key, count) of a persistent id; where it lay, a CPU or a GPU, does not matter."""
    kind, dtype, key, _, count, *view = pid
    if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
        raise ValueError("a persistent id that is no storage")
    if any(part is not None for part in view):
        raise ValueError("a view of a storage, as PyTorch wrote it before 0.4")
    return dtype, key, counts((count,))[0]
