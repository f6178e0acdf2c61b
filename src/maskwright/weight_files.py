"""Weight files of any program, read without running anything in them.

safetensors hold only tensors. Pickles hold calls: those of a short list are made, those of a second list (what training
programs put beside weights) become empty placeholders, and any other is refused by its name.
"""

from __future__ import annotations

import importlib
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from maskwright.errors import CheckpointError
from maskwright.layouts import State, listing


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
    """The weights of a `.safetensors`, a pickle with arrays (detectron2), or a file that PyTorch wrote.

    Raises:
        CheckpointError: the file is broken, calls something that weights do not need, or holds no weights.
    """
    if path.suffix == ".safetensors":
        return WeightFile(*read_safetensors(path))
    content, dropped = _unwrap(_read_pickle(path))
    return WeightFile(_tensors(path, content[-1]), class_names=_class_names(content[0]), dropped=dropped)


def read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        CheckpointError: the file is cut off or its header is wrong.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None


_ALLOWED = {
    ("collections", "OrderedDict"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class _Inert:
    """Stands for an object of another program: takes any arguments and any state, keeps none, does nothing."""

    def __new__(cls, *arguments: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_PLACEHOLDERS: dict[str, type] = {
    "mmengine.logging.history_buffer.HistoryBuffer": _Inert,
    "builtins.getattr": _Inert,  # how a HistoryBuffer names its own methods; asks nothing of anything here
    "argparse.Namespace": _Inert,
    "pathlib.Path": _Inert,
    "pathlib.PosixPath": _Inert,
    "pathlib.WindowsPath": _Inert,
    "pathlib._local.PosixPath": _Inert,
    "pathlib._local.WindowsPath": _Inert,
    # Dictionaries with another name.
    "mmengine.config.config.ConfigDict": OrderedDict,
    "mmcv.utils.config.ConfigDict": OrderedDict,
    "addict.addict.Dict": OrderedDict,
    "fvcore.common.config.CfgNode": OrderedDict,
    "yacs.config.CfgNode": OrderedDict,
    "detectron2.config.config.CfgNode": OrderedDict,
    "lightning_fabric.utilities.data.AttributeDict": OrderedDict,
    "lightning.fabric.utilities.data.AttributeDict": OrderedDict,
    "pytorch_lightning.utilities.parsing.AttributeDict": OrderedDict,
}


_TORCH_STARTS = (b"PK", pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))  # its zip, and what it wrote before


class _ArrayUnpickler(pickle.Unpickler):
    """Arrays, numbers, text and containers; any other name is refused before it is even imported."""

    def find_class(self, module: str, name: str) -> Any:
        placeholder = _PLACEHOLDERS.get(f"{module}.{name}".replace("__builtin__", "builtins"))
        if placeholder:
            return placeholder
        if (module, name) not in _ALLOWED:
            raise _refusal(f"{module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _torch_globals() -> list[Callable | tuple[Callable, str]]:
    """Both lists for PyTorch's own unpickler, which knows tensors but neither arrays nor their kinds of numbers."""
    arrays = [
        (getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), name), f"{module}.{name}")
        for module, name in sorted(_ALLOWED)
    ]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdgOSU"}
    return [
        *arrays,
        *((kind, f"numpy.dtypes.{kind.__name__}") for kind in kinds),
        *((placeholder, name) for name, placeholder in _PLACEHOLDERS.items()),
    ]


def _refusal(name: str) -> CheckpointError:
    return CheckpointError(f"refused: it calls {name}, which weights never need; nothing of it was run")


def _read_pickle(path: Path) -> Any:
    """The content of a pickle: plain with arrays (detectron2 `.pkl`), or PyTorch's with tensors.

    Which of them it is, the first bytes say, since suffixes are often changed.
    """
    with path.open("rb") as file:
        start = file.read(16)
    try:
        if start.startswith(_TORCH_STARTS):
            with torch.serialization.safe_globals(_torch_globals()):
                return torch.load(path, map_location="cpu", weights_only=True)
        return _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a broken pickle can raise nearly anything
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):  # how PyTorch's own unpickler refuses
            raise CheckpointError(f"{path}: {_refusal(name[1])}") from None
        raise CheckpointError(
            f"{path}: broken or not a weight file; it begins with {start!r} and reading it ends in "
            f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        ) from None


_WRAPPERS = ("state_dict", "model", "model_state_dict", "network", "net", "module", "weights")
_AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema")


def _unwrap(content: Any) -> tuple[list[Any], list[tuple[str, str]]]:
    """What training programs put around a state dict, from the outside in; and the further weights beside it."""
    layers, dropped = [content], []
    while isinstance(content, dict) and len(layers) < 6:
        names = [key for key in (*_WRAPPERS, *_AVERAGES) if isinstance(content.get(key), dict) and content[key]]
        if not names:
            break
        dropped += [(name, "a second copy of the weights") for name in names[1:]]
        content = content[names[0]]
        layers.append(content)
    return layers, dropped


def _tensors(path: Path, content: Any) -> State:
    """The entries of a dictionary that are tensors or arrays."""
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a dictionary of weights")
    state: State = {}
    for key, value in content.items():
        if isinstance(value, np.ndarray | np.generic):
            try:
                value = torch.from_numpy(np.array(value))
            except TypeError:
                raise CheckpointError(f"{path}: entry '{key}' holds {value.dtype} values, not numbers") from None
        if isinstance(value, Tensor):
            state[str(key)] = value.detach()
    if not state:
        raise CheckpointError(f"{path}: holds no weights; its keys are {listing(map(str, content), 6)}")
    return state


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
