"""Read files of `torch.save` as views of the memory-mapped file, without PyTorch's own unpickler.

Both formats are read: the zip archive, and the one before PyTorch 1.6 (pickles, then the bytes of one storage after
another). Nothing but the pickle is read until a tensor is asked for, so the optimizer's state costs nothing.

Not `torch.load(weights_only=True, mmap=True)`: archives of a few hundred bytes make it allocate gigabytes
(`_codecs.encode` and `bytearray`, whose entries in its allow-list a caller cannot replace) or never return (nested
tuples), it ignores the archive's checksums, and it cannot read plain pickles or protocols 4 and 5.
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

from maskwright.checkpoints.readers.safe_pickle import ALLOWED, Placeholder, read_pickle, sizes
from maskwright.errors import CheckpointError, printable

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_DOWNLOAD_AGAIN = "download or copy it again"


class _Sealed:
    """Base of stand-ins whose attributes a pickle must not set."""

    def __setstate__(self, state: object) -> None:
        raise ValueError("a tensor with attributes of its own")


@dataclass
class Storage(_Sealed):
    """A range of the file with values of one dtype.

    Attributes:
        name: for messages.
        dtype: of the values.
        count: number of values.
        file: all bytes of the file.
        start: offset of the first byte; -1 if the file's table has no such storage.
        crc32: of the bytes; 0 if none was stored.
    """

    name: str
    dtype: torch.dtype
    count: int
    file: torch.UntypedStorage
    start: int = -1
    crc32: int = 0

    @cached_property
    def bytes(self) -> torch.UntypedStorage:
        """The bytes, checked against their CRC-32.

        Raises:
            ValueError: they are not within the file, or have changed.
        """
        end = self.start + self.count * self.dtype.itemsize
        if self.start < 0 or end > self.file.nbytes():
            raise ValueError("has a storage outside the file")
        view = self.file[self.start : end]
        if self.crc32 and zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(view).numpy()) != self.crc32:
            raise ValueError(f"is damaged: the bytes of '{printable(self.name)}' have changed")
        return view


@dataclass
class StoredTensor(_Sealed):
    """Stand-in for a tensor: a view of a storage. Offset and strides count values."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """Return the tensor, a view of the mapped file.

        Raises:
            ValueError: its shape does not fit into its storage, or its bytes have changed.
        """
        if 0 in self.size:
            return torch.empty(self.size, dtype=self.dtype)
        capacity = self.storage.count * self.storage.dtype.itemsize // self.dtype.itemsize
        last = self.offset + sum((side - 1) * step for side, step in zip(self.size, self.stride, strict=True))
        if max(math.prod(self.size), last + 1) > capacity:
            raise ValueError(f"has shape {printable(self.size)}, but its storage holds {capacity} values")
        view = self.storage.bytes
        tensor = torch.empty(0, dtype=self.dtype).set_(view, self.offset, self.size, self.stride)
        return tensor if view.data_ptr() % self.dtype.itemsize == 0 else tensor.clone()


def _rebuild(storage: object, offset: object, size: object, stride: object, *others: object) -> StoredTensor:
    """`_rebuild_tensor`, `_rebuild_tensor_v2`, and `_v3`, whose storage is bytes and whose dtype is an argument."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    dtype = next((value for value in others if isinstance(value, torch.dtype)), storage.dtype)
    return StoredTensor(storage, *sizes((offset,)), sizes(size), sizes(stride), dtype)


def _first(value: object, *others: object) -> object:
    """`Parameter`, and the functions that rebuild one: the tensor inside."""
    return value


def _rebuild_from_type(function: Callable, kind: object, arguments: tuple, state: object) -> object:
    """Rebuild a tensor that has attributes, dropping the attributes."""
    if function not in (_rebuild, _first):
        raise ValueError("a tensor that is rebuilt in an unknown way")
    return function(*arguments)


def _unsupported(what: str) -> Callable:
    def refuse(*arguments: object) -> None:
        raise CheckpointError(f"holds {what}", remedy="save its weights as plain dense tensors of floats")

    return refuse


_STORAGES = {
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
    "QInt8": torch.int8,  # quantized storages come before the quantized tensor, which is then refused by name
    "QUInt8": torch.uint8,
    "QInt32": torch.int32,
}
_ALLOWED = {
    **ALLOWED,
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
    **{f"torch._utils._rebuild_tensor{version}": _rebuild for version in ("", "_v2", "_v3")},
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    # Tensors of accelerators that have no storage class of their own.
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Tensor": Placeholder,
    "torch.Size": Placeholder,
    "torch.device": Placeholder,
    "torch._utils._rebuild_qtensor": _unsupported("quantized tensors"),
    "torch._utils._rebuild_sparse_tensor": _unsupported("sparse tensors"),
    "torch.serialization._get_layout": Placeholder,
    "torch._utils._rebuild_meta_tensor_no_storage": _unsupported("tensors without data (of the meta device)"),
    "torch._utils._rebuild_wrapper_subclass": _unsupported("tensor subclasses"),
    "torch.distributed.tensor.DTensor": _unsupported("shards of tensors"),
    **{
        f"torch.{scheme}": Placeholder for scheme in ("per_tensor_affine", "per_channel_affine", "per_tensor_symmetric")
    },
}


def read_zip(path: Path) -> Any:
    """Read a zip archive of `torch.save`; its tensors are returned as `StoredTensor`s.

    Raises:
        CheckpointError: it is compressed, damaged, or holds something other than weights.
        Exception: nearly any other, if it is damaged.
    """
    with path.open("rb") as file:
        return _read_zip(file, _map(path))


def read_zip_bytes(content: bytes) -> Any:
    """Read a zip archive in memory, see `read_zip`."""
    return _read_zip(io.BytesIO(content), torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage())


def read_legacy(path: Path) -> Any:
    """Read a file that PyTorch wrote before 1.6; its tensors are returned as `StoredTensor`s.

    Raises:
        CheckpointError: it holds something other than weights.
        Exception: nearly any other, if it is damaged.
    """
    with path.open("rb") as file:
        return _read_legacy(file, _map(path))


def read_plain(path: Path) -> Any:
    """Read a plain pickle; the tensors in it, if any, are embedded files of PyTorch's earlier format.

    Raises:
        CheckpointError: it holds something other than weights.
        Exception: nearly any other, if it is damaged.
    """
    loaded: dict[int, tuple[bytes, Any]] = {}

    def load_from_bytes(content: bytes) -> Any:
        if id(content) not in loaded:
            if not content.startswith(LEGACY_MAGIC):
                raise ValueError("an embedded tensor is not in PyTorch's format")
            held = torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage()
            loaded[id(content)] = content, _read_legacy(io.BytesIO(content), held)
        return loaded[id(content)][1]

    with path.open("rb") as file:
        return read_pickle(file, _ALLOWED | {"torch.storage._load_from_bytes": load_from_bytes})


def _map(path: Path) -> torch.UntypedStorage:
    """Map a file into memory; writing to the tensors does not change the file."""
    return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(path), False, path.stat().st_size))


def _read_zip(file: BinaryIO, content: torch.UntypedStorage) -> Any:
    storages: dict[str, Storage] = {}
    with _open_zip(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        folder = _find_folder(entries)
        _check_entries(archive.infolist(), content.nbytes())
        if (name := f"{folder}byteorder") in entries:
            _check_byte_order(_read_entry(file, entries[name]) == b"little")

        def load_storage(pid: Any) -> Storage:
            dtype, key, count = _parse_storage_id(pid)
            if key not in storages:
                entry = entries[f"{folder}data/{key}"]
                if entry.file_size != count * dtype.itemsize:
                    raise ValueError(f"storage {key} has {entry.file_size} bytes, expected {count} of {dtype}")
                storages[key] = Storage(entry.filename, dtype, count, content, _data_offset(file, entry), entry.CRC)
            return storages[key]

        return read_pickle(io.BytesIO(_read_entry(file, entries[f"{folder}data.pkl"])), _ALLOWED, load_storage)


def _read_legacy(file: BinaryIO, content: torch.UntypedStorage) -> Any:
    storages: dict[str, Storage] = {}

    def load_storage(pid: Any) -> Storage:
        dtype, key, count = _parse_storage_id(pid)
        return storages.setdefault(key, Storage(key, dtype, count, content))

    read_pickle(file, {})  # magic number
    read_pickle(file, {})  # protocol version
    _check_byte_order(read_pickle(file, {}).get("little_endian", True))
    loaded = read_pickle(file, _ALLOWED, load_storage)
    for key in read_pickle(file, {}):
        storage, count = storages[key], int.from_bytes(file.read(8), "little")
        if count != storage.count:
            raise ValueError(f"storage {key} has {count} values, expected {storage.count}")
        storage.start = file.tell()
        file.seek(count * storage.dtype.itemsize, 1)
    if file.tell() > content.nbytes():
        raise CheckpointError("truncated", remedy=_DOWNLOAD_AGAIN)
    return loaded


def _parse_storage_id(pid: Any) -> tuple[torch.dtype, str, int]:
    """Return (dtype, key, count) of a persistent id; the device that it names is ignored."""
    kind, dtype, key, _, count, *view = pid
    if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
        raise ValueError("a persistent id that is not a storage")
    if any(part is not None for part in view):
        raise ValueError("a view of a storage, as PyTorch wrote it before 0.4")
    return dtype, key, sizes((count,))[0]


def _check_byte_order(is_little_endian: bool) -> None:
    if not is_little_endian:
        raise CheckpointError(
            "was written on a big-endian machine, which is not supported", remedy="save it again on a little-endian one"
        )


def _open_zip(file: BinaryIO) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise CheckpointError(
            "truncated: a zip archive without its central directory", remedy=_DOWNLOAD_AGAIN
        ) from None


def _find_folder(entries: dict[str, zipfile.ZipInfo]) -> str:
    """Return the folder of the archive that holds the weights, with a trailing slash."""
    found = [name.removesuffix("data.pkl") for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if not found:
        names = ", ".join(printable(name, 40) for name in list(entries)[:3]) or "nothing"
        raise CheckpointError(f"a zip archive without PyTorch weights (it contains {names})", remedy="unpack it first")
    folder = min(found, key=len)
    if f"{folder}constants.pkl" in entries:
        raise CheckpointError(
            "a TorchScript program, not weights", remedy="save the state_dict() of its model with torch.save"
        )
    return folder


def _check_entries(entries: list[zipfile.ZipInfo], file_size: int) -> None:
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise CheckpointError(
                f"refused: its entry '{printable(entry.filename)}' is compressed ({entry.compress_size:,} bytes to "
                f"{entry.file_size:,}), which torch.save never does",
                remedy="if you trust it, load it and save it again",
            )
    if (total := sum(entry.file_size for entry in entries)) > file_size:
        raise CheckpointError(
            f"refused: claims {total:,} bytes of content in a file of {file_size:,}", remedy="download it again"
        )


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Return the offset of an entry's data, which follows its local header."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if not header.startswith(ZIP_MAGIC):
        raise ValueError(f"no local header of entry '{entry.filename}' where the central directory says")
    return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


def _read_entry(file: BinaryIO, entry: zipfile.ZipInfo) -> bytes:
    file.seek(_data_offset(file, entry))
    content = file.read(entry.file_size)
    if entry.CRC not in (0, zlib.crc32(content)):  # 0 if torch.save was told not to compute checksums
        raise CheckpointError(
            f"damaged: its entry '{printable(entry.filename)}' has changed", remedy="download it again"
        )
    return content
