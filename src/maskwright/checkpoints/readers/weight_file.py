"""Weight files of any program: what a file is, and the weights in it.

What is in a file, its first bytes say; suffixes are often changed. Nothing in it is ever run (`pickles`), and what it
claims must agree with its size: a file gives no more weights than it has bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.key_maps.translate import listing
from maskwright.checkpoints.readers import torch_archive as torch_files
from maskwright.checkpoints.readers.safe_pickle import Array
from maskwright.checkpoints.readers.torch_archive import StoredTensor
from maskwright.errors import CheckpointError, printable

_MOST_ENTRIES = 100_000  # a large model has 2,000
_MOST_SHARING = 8  # times the file's bytes that its tensors may have, where some share theirs


@dataclass
class WeightFile:
    """What a file holds.

    Attributes:
        state: names as they are in the file to tensors.
        header: free text of a safetensors file.
        class_names: of the labels 0..K-1, where the file tells them.
        dropped: (key, reason) of further sets of weights that were not taken.
    """

    state: State
    header: dict[str, str] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    dropped: list[tuple[str, str]] = field(default_factory=list)


def read_weight_file(path: Path) -> WeightFile:
    """The weights of a safetensors file, a pickle with arrays (detectron2), or a file that PyTorch wrote.

    Tensors are mapped into memory where the file allows it: it may be replaced while they are in use, but not be
    changed in place.

    Raises:
        CheckpointError: the file cannot be read, is broken, calls something, or holds no weights.
    """
    start = _first_bytes(path)
    if start[8:9] == b"{" or (path.suffix == ".safetensors" and not start.startswith(torch_files.ZIP)):
        return WeightFile(*read_safetensors(path))
    content, dropped = _unwrap(_read_pickle(path, start))
    return WeightFile(_tensors(path, content[-1]), class_names=_class_names(content[0]), dropped=dropped)


def read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    """Tensors, mapped into memory, and header of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read, is cut off, or its header is wrong.
    """
    start = _first_bytes(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            _check_count(len(keys := file.keys()))
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a wrong header can raise nearly anything
        reason = _stranger(start) or f"not a whole safetensors file: {printable(error)}; download or copy it again"
        raise CheckpointError(f"{path}: {reason}") from None


def _read_pickle(path: Path, start: bytes) -> Any:
    """The content of a plain pickle or of a file that PyTorch wrote, with stand-ins for arrays and tensors."""
    try:
        if start.startswith(torch_files.ZIP):
            return torch_files.read_zip(path)
        if start.startswith(torch_files.LEGACY):
            return torch_files.read_legacy(path)
        return torch_files.read_plain(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a broken pickle can raise nearly anything
        broken = f"begins with {start[:16]!r}, and reading it ends in {type(error).__name__}: {printable(error)}"
        reason = _stranger(start) or f"broken or not a weight file: it {broken}; download or copy it again"
        raise CheckpointError(f"{path}: {reason}") from None


# What is often found under the name of a weight file: (pattern of its first bytes, what it is and what to do).
_STRANGERS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with: git lfs pull"),
    (
        rb"(?i)\s*(<!doctype|<html|<head|<\?xml)",
        "a web page; open its address in a browser and download the file there",
    ),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "a packed archive; unpack it first"),
    (rb"(?s).{257}ustar", "a tar archive; unpack it first"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\0|MM\0\*", "a picture; name the weight file"),
    (rb"\x89HDF|GGUF", "weights of another framework (HDF5 or GGUF); use a file of PyTorch or safetensors"),
    (rb"\s*[{\[]\s*[\"{}\[\]]", "JSON text; name the weight file beside it, or the folder of both"),
    (rb"\0{16}", "begins with zeros, so a copy or download was interrupted; download or copy it again"),
    (rb"[\t\n\r -~]{12}", "text, not weights; download the file itself"),
)


def _stranger(start: bytes) -> str | None:
    return next((what for pattern, what in _STRANGERS if re.match(pattern, start)), None)


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check the path and permissions") from None
    if not start:
        raise CheckpointError(f"{path}: is empty (0 bytes); download or copy it again")
    return start


def _check_count(entries: int) -> None:
    if entries > _MOST_ENTRIES:
        raise CheckpointError(f"holds {entries:,} entries, a model has at most {_MOST_ENTRIES:,}; use another file")


_WRAPPERS = ("state_dict", "model", "model_state_dict", "network", "net", "module", "weights")
_AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema")


def _unwrap(content: Any) -> tuple[list[Any], list[tuple[str, str]]]:
    """What training programs put around a state dict, from the outside in; and the further weights beside it."""
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
    """The key of the one dictionary of tensors in a dictionary without any; wrappers may have any name."""
    if any(isinstance(value, Array | StoredTensor) for value in content.values()):
        return []
    inner = {key: value.values() for key, value in content.items() if isinstance(value, dict)}
    found = [key for key, values in inner.items() if any(isinstance(value, Array | StoredTensor) for value in values)]
    found = [key for key in found if "ema" not in str(key)] or found
    return found if len(found) == 1 else []


def _tensors(path: Path, content: Any) -> State:
    """The entries of a dictionary that are tensors or arrays."""
    if not isinstance(content, dict) or not content:
        kind = "an empty dictionary" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path}: holds {kind}, not a dictionary of weights; save the model's state_dict()")
    state, room = {}, _MOST_SHARING * path.stat().st_size
    try:
        _check_count(len(content))
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Array | StoredTensor):
                state[key] = _tensor(key, value)
                room -= state[key].nbytes
                if room < 0:
                    raise CheckpointError("refused: its tensors claim far more bytes than it has; download it again")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not state:
        keys = listing(map(str, content), 6)
        raise CheckpointError(f"{path}: holds no weights, its keys are {keys}; save the model's state_dict()")
    return state


def _tensor(key: str, value: Array | StoredTensor) -> Tensor:
    try:
        return value.tensor()
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"entry '{printable(key)}' {printable(error)}; download or copy it again") from None


def _class_names(content: Any) -> tuple[str, ...] | None:
    """The names that OpenMMLab and EasyCV write into `meta`."""
    meta = content.get("meta") if isinstance(content, dict) else None
    for names in _candidates(meta):
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return None


def _candidates(meta: Any) -> Iterator[Any]:
    for place in (meta.get("dataset_meta"), meta) if isinstance(meta, dict) else ():
        if isinstance(place, dict):
            yield from (place.get(key) for key in ("classes", "CLASSES"))
