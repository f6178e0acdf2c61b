"""Read the weights in a file of any program.

The format is recognized by the file's first bytes, because suffixes are often changed. Nothing in the file is ever
executed (`safe_pickle`), and a file cannot yield more weights than its size justifies.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.readers import torch_archive
from maskwright.checkpoints.readers.safe_pickle import Array
from maskwright.checkpoints.readers.torch_archive import StoredTensor
from maskwright.errors import CheckpointError, printable, printable_list

_MAX_ENTRIES = 100_000  # a large model has 2,000
_MAX_SHARING = 8  # size of all tensors relative to the file, since several may share a storage
_DOWNLOAD_AGAIN = "download or copy it again"
_SAVE_STATE_DICT = "save the model's state_dict()"


@dataclass
class WeightFile:
    """Content of a weight file.

    Attributes:
        state: tensors by the names that the file uses.
        header: metadata of a safetensors file.
        class_names: of labels 0..K-1, if the file has them.
        dropped: (key, reason) of further copies of the weights.
    """

    state: State
    header: dict[str, str] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    dropped: list[tuple[str, str]] = field(default_factory=list)


def read_weight_file(path: Path) -> WeightFile:
    """Read the weights of a safetensors file, a pickle of arrays (detectron2), or a file that PyTorch wrote.

    Tensors are mapped from the file where its format allows: it may be replaced while they are in use, but must not be
    changed in place.

    Raises:
        CheckpointError: the file cannot be read, is damaged, calls code, or holds no weights.
    """
    start = _first_bytes(path)
    if start[8:9] == b"{" or (path.suffix == ".safetensors" and not start.startswith(torch_archive.ZIP_MAGIC)):
        return WeightFile(*read_safetensors(path))
    try:
        layers, dropped = _unwrap(_read_pickle(path, start))
        state = _tensors(layers[-1], path.stat().st_size)
    except CheckpointError as error:
        raise error.located_in(path) from None
    return WeightFile(state, class_names=_class_names(layers[0]), dropped=dropped)


def read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    """Return the tensors, mapped from the file, and the metadata of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or has an invalid header.
    """
    start = _first_bytes(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            _check_count(len(keys := file.keys()))
            mapped = _map_tensors(path)
            return {key: mapped[key] if key in mapped else file.get_tensor(key) for key in keys}, file.metadata() or {}
    except CheckpointError as error:
        raise error.located_in(path) from None
    except Exception as error:  # an invalid header can raise nearly anything
        problem = _other_file_type(start) or CheckpointError(
            f"truncated or not a safetensors file: {printable(error)}", remedy=_DOWNLOAD_AGAIN
        )
        raise problem.located_in(path) from None


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _map_tensors(path: Path) -> State:
    """Map the non-empty tensors of the dtypes above; the file must have a valid header.

    `get_tensor` of safetensors is four times as slow: 10 -> 4 ms of loading an R50.
    """
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(header_size))
    entries.pop("__metadata__", None)
    # Copy-on-write: changing a weight does not change the file. Unlike `mmap`, it keeps no file open.
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    state = {}
    for key, entry in entries.items():
        is_known = isinstance(entry, dict) and entry["dtype"] in _SAFETENSORS_DTYPES
        if is_known and (count := math.prod(entry["shape"])):
            offset = 8 + header_size + entry["data_offsets"][0]
            flat = torch.frombuffer(content, dtype=_SAFETENSORS_DTYPES[entry["dtype"]], count=count, offset=offset)
            state[key] = flat.view(entry["shape"])
    return state


def _read_pickle(path: Path, start: bytes) -> Any:
    """Read a plain pickle or a file that PyTorch wrote, with stand-ins for arrays and tensors."""
    try:
        if start.startswith(torch_archive.ZIP_MAGIC):
            return torch_archive.read_zip(path)
        if start.startswith(torch_archive.LEGACY_MAGIC):
            return torch_archive.read_legacy(path)
        return torch_archive.read_plain(path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _other_file_type(start) or CheckpointError(
            f"damaged or not a weight file: it begins with {start[:16]!r} and raised {type(error).__name__}: "
            f"{printable(error)}",
            remedy=_DOWNLOAD_AGAIN,
        ) from None


# Files that are often mistaken for weights: (pattern of the first bytes, what the file is, remedy).
_OTHER_FILE_TYPES = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with: git lfs pull"),
    (
        rb"(?i)\s*(<!doctype|<html|<head|<\?xml)",
        "a web page",
        "open its address in a browser and download the file there",
    ),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "a compressed archive", "unpack it first"),
    (rb"(?s).{257}ustar", "a tar archive", "unpack it first"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\0|MM\0\*", "an image", "name the weight file"),
    (rb"\x89HDF|GGUF", "weights of another framework (HDF5 or GGUF)", "use a file of PyTorch or safetensors"),
    (rb"\s*[{\[]\s*[\"{}\[\]]", "JSON text", "name the weight file next to it, or the folder of both"),
    (rb"\0{16}", "begins with zeros, so a copy or download was interrupted", _DOWNLOAD_AGAIN),
    (rb"[\t\n\r -~]{12}", "text, not weights", "download the file itself"),
)


def _other_file_type(start: bytes) -> CheckpointError | None:
    for pattern, description, remedy in _OTHER_FILE_TYPES:
        if re.match(pattern, start):
            return CheckpointError(description, remedy=remedy)
    return None


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}", where=path, remedy="check the path and permissions"
        ) from None
    if not start:
        raise CheckpointError("is empty (0 bytes)", where=path, remedy=_DOWNLOAD_AGAIN)
    return start


def _check_count(entries: int) -> None:
    if entries > _MAX_ENTRIES:
        raise CheckpointError(
            f"holds {entries:,} entries, a model has at most {_MAX_ENTRIES:,}", remedy="use another file"
        )


_WRAPPERS = ("state_dict", "model", "model_state_dict", "network", "net", "module", "weights")
_AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema")


def _unwrap(content: Any) -> tuple[list[Any], list[tuple[str, str]]]:
    """Return the nested dictionaries around a state dict, outermost first, and the entries dropped around it."""
    layers, dropped = [content], []
    while isinstance(content, dict) and len(layers) < 6:
        names = [key for key in (*_WRAPPERS, *_AVERAGES) if isinstance(content.get(key), dict) and content[key]]
        names = names or _only_weights(content)
        if not names:
            break
        dropped += [(name, "a second copy of the weights") for name in names[1:]]
        content = content[names[0]]
        layers.append(content)
    return layers, dropped


def _only_weights(content: dict) -> list[Any]:
    """Return the key of the only dictionary of tensors in a dictionary without tensors; it may have any name."""
    if any(isinstance(value, Array | StoredTensor) for value in content.values()):
        return []
    inner = {key: value.values() for key, value in content.items() if isinstance(value, dict)}
    found = [key for key, values in inner.items() if any(isinstance(value, Array | StoredTensor) for value in values)]
    found = [key for key in found if "ema" not in str(key)] or found
    return found if len(found) == 1 else []


def _tensors(content: Any, file_size: int) -> State:
    """Return the entries of a dictionary that are tensors or arrays."""
    if not isinstance(content, dict) or not content:
        kind = "an empty dictionary" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise CheckpointError(f"holds {kind}, not a dictionary of weights", remedy=_SAVE_STATE_DICT)
    _check_count(len(content))
    state, remaining = {}, _MAX_SHARING * file_size
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Array | StoredTensor):
            state[key] = _tensor(key, value)
            remaining -= state[key].nbytes
            if remaining < 0:
                raise CheckpointError(
                    "refused: its tensors claim far more bytes than the file has", remedy="download it again"
                )
    if not state:
        keys = printable_list(content, 6)
        raise CheckpointError(f"holds no weights, its keys are {keys}", remedy=_SAVE_STATE_DICT)
    return state


def _tensor(key: str, value: Array | StoredTensor) -> Tensor:
    try:
        return value.tensor()
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:  # of false sizes or data
        raise CheckpointError(f"entry '{printable(key)}' {printable(error)}", remedy=_DOWNLOAD_AGAIN) from None


def _class_names(content: Any) -> tuple[str, ...] | None:
    """Return the class names that OpenMMLab and EasyCV write into `meta`."""
    meta = content.get("meta") if isinstance(content, dict) else None
    for names in _class_name_candidates(meta):
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return None


def _class_name_candidates(meta: Any) -> Iterator[Any]:
    for place in (meta.get("dataset_meta"), meta) if isinstance(meta, dict) else ():
        if isinstance(place, dict):
            yield from (place.get(key) for key in ("classes", "CLASSES"))
