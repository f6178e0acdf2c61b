"""Read pickles that other programs wrote, without calling any of their code.

A pickle is a small program, some of whose instructions call functions by name. Here every name that weight files need
has a stand-in of our own, anything else that training programs save with the weights becomes an empty placeholder, and
any other name is refused before it is imported.

The instructions are scanned once before they are executed, because harmless ones suffice to fill the memory (a high
memo index) or to run forever (the hash of tuples nested in one another twice).
"""

from __future__ import annotations

import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from maskwright.errors import CheckpointError, printable

_MAX_INSTRUCTIONS = 2_000_000  # a large model with its optimizer takes 100,000
_MAX_TUPLE_VALUES = 10_000  # counted through all nested tuples

Globals = Mapping[str, Any]


class Array:
    """Stand-in for `numpy.ndarray`."""

    shape: Any = None
    dtype: Any = None
    data: Any = None
    order: Any = "C"

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, fortran_order, self.data = state
        self.order = "F" if fortran_order else "C"

    def tensor(self) -> Tensor:
        """Return the values as a new tensor.

        Raises:
            ValueError: the values are not numeric, or their shape and data disagree.
        """
        if not isinstance(self.dtype, Dtype):
            raise ValueError("is an array without a dtype")
        dtype = self.dtype.resolve()
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data  # Python 2 had no bytes
        shape = sizes(self.shape if isinstance(self.shape, tuple) else (self.shape,))
        if not isinstance(data, bytes | bytearray) or self.order not in ("C", "F"):
            raise ValueError("is an array without data")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"has shape {printable(shape)} and dtype {dtype}, but {len(data)} bytes of data")
        array = np.frombuffer(data, dtype).reshape(shape, order=self.order)
        return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))


class Dtype:
    """Stand-in for `numpy.dtype`."""

    code: Any = None
    byte_order: Any = "="

    def __init__(self, code: object = None, *options: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = state[1]

    def resolve(self) -> np.dtype:
        """Return the numpy dtype.

        Raises:
            ValueError: it is not numeric.
        """
        if self.code not in _NUMERIC_CODES or self.byte_order not in ("<", ">", "|", "="):
            raise ValueError(f"has dtype {printable(self.code)}, which is not numeric")
        return np.dtype(self.code).newbyteorder(self.byte_order)


_NUMERIC_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def sizes(values: object) -> tuple[int, ...]:
    """Check that `values` is a list or tuple of non-negative integers, and return it as a tuple.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(values, tuple | list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"invalid sizes {printable(values)}")
    return tuple(values)


def _reconstruct(*arguments: object) -> Array:
    return Array()


def _scalar(dtype: object, data: object = None) -> Array:
    array = Array()
    array.shape, array.dtype, array.data = (), dtype, data
    return array


def _frombuffer(data: object, dtype: object, shape: object, order: object, *axes: object) -> Array:
    array = Array()
    array.shape, array.dtype, array.data, array.order = shape, dtype, data, order
    return array


def _encode(text: object, encoding: object) -> bytes:
    """Stand-in for `_codecs.encode`, which protocol 2 uses for bytes; other encodings could double a text each time."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError(f"text in encoding {printable(encoding)}")
    return text.encode("latin1")


def _bytes(data: object = b"", encoding: object = None) -> bytes:
    """Stand-in for `bytes` and `bytearray`; given an integer, those would allocate as many bytes."""
    if isinstance(data, str):
        return _encode(data, encoding)
    if not isinstance(data, bytes):
        raise ValueError("bytearray of something other than bytes")
    return data


class _Dictionary(dict):
    """Stand-in for `OrderedDict` and other subclasses of dict; keeps no attributes."""

    def __setstate__(self, state: object) -> None:
        pass


class Placeholder:
    """Stand-in for an object that weights do not need: accepts any arguments and any state, and keeps none."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


ALLOWED: dict[str, Callable] = {
    "collections.OrderedDict": _Dictionary,
    "collections.Counter": Placeholder,
    "collections.defaultdict": Placeholder,
    "_codecs.encode": _encode,
    "builtins.bytes": _bytes,  # of an empty array, in protocol 2
    "builtins.bytearray": _bytes,
    "builtins.set": Placeholder,
    "builtins.complex": Placeholder,
    "numpy.ndarray": Array,
    "numpy.dtype": Dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
    "mmengine.logging.history_buffer.HistoryBuffer": Placeholder,
    "builtins.getattr": Placeholder,  # how a HistoryBuffer refers to its methods; looks nothing up here
    "argparse.Namespace": Placeholder,
    "pathlib.Path": Placeholder,
    "pathlib.PosixPath": Placeholder,
    "pathlib.WindowsPath": Placeholder,
    "pathlib._local.PosixPath": Placeholder,
    "pathlib._local.WindowsPath": Placeholder,
    "mmengine.config.config.ConfigDict": _Dictionary,
    "mmcv.utils.config.ConfigDict": _Dictionary,
    "addict.addict.Dict": _Dictionary,
    "fvcore.common.config.CfgNode": _Dictionary,
    "yacs.config.CfgNode": _Dictionary,
    "detectron2.config.config.CfgNode": _Dictionary,
    "lightning_fabric.utilities.data.AttributeDict": _Dictionary,
    "lightning.fabric.utilities.data.AttributeDict": _Dictionary,
    "pytorch_lightning.utilities.parsing.AttributeDict": _Dictionary,
}


def read_pickle(file: BinaryIO, allowed: Globals, load_storage: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle from the current position of `file`, and leave the file positioned after it.

    Args:
        file: a seekable file.
        allowed: stand-ins by the name that the pickle may use for them, as "module.name".
        load_storage: resolves a persistent id; None refuses pickles that have any.

    Raises:
        CheckpointError: the pickle uses another name, or would need excessive memory or time.
        Exception: nearly any other, if the pickle is damaged.
    """
    start = file.tell()
    scan_instructions(file)
    end = file.tell()
    file.seek(start)
    content = _Unpickler(file, allowed, load_storage).load()
    file.seek(end)  # the unpickler reads ahead
    return content


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, allowed: Globals, load_storage: Callable[[Any], Any] | None) -> None:
        super().__init__(file, fix_imports=False, encoding="latin1")
        self.allowed, self.load_storage = allowed, load_storage

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if full_name not in self.allowed:
            raise CheckpointError(
                f"refused: it calls {printable(full_name)}, which weights never need; nothing in it was run",
                remedy="if you trust it, save the model's state_dict() alone",
            )
        return self.allowed[full_name]

    def persistent_load(self, pid: Any) -> Any:
        if self.load_storage is None:
            raise ValueError("unexpected persistent id")
        return self.load_storage(pid)


_MARK, _GLOBAL = -1, 0  # on the stack of `scan_instructions`, besides sizes from 1


def scan_instructions(file: BinaryIO) -> None:
    """Go through the instructions of one pickle without executing them.

    Raises:
        CheckpointError: they would need far more memory or time than the file's size justifies, or modify a global.
        Exception: ValueError, IndexError, KeyError and others, if the pickle is damaged.
    """
    stack: list[int] = []  # for each object, how many values it has if it is a tuple, else 1
    memo: dict[int, int] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file), 1):
        if count > _MAX_INSTRUCTIONS:
            raise _refusal(f"more than {_MAX_INSTRUCTIONS:,} instructions")
        match opcode.name:
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                if (index := cast(int, argument)) > count:
                    raise _refusal(f"memo index {index:,} after {count:,} instructions")
                memo[index] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[cast(int, argument)])
            case "DUP":
                stack.append(stack[-1])
            case "GLOBAL" | "STACK_GLOBAL":
                _pop(stack, opcode)
                stack.append(_GLOBAL)
            case "BUILD" if stack[-2] == _GLOBAL:
                raise _refusal("an instruction that modifies a function or class")
            case name:
                popped = _pop(stack, opcode)
                size = 1 + sum(popped) if name.startswith("TUPLE") or name == "FROZENSET" else 1
                if size > _MAX_TUPLE_VALUES:
                    raise _refusal(f"a tuple of more than {_MAX_TUPLE_VALUES:,} nested values")
                stack += [_MARK if pushed is pickletools.markobject else size for pushed in opcode.stack_after]


def _pop(stack: list[int], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Remove from the stack what an instruction consumes."""
    count, popped = len(opcode.stack_before), []
    if pickletools.markobject in opcode.stack_before:
        count = opcode.stack_before.index(pickletools.markobject)
        while (top := stack.pop()) != _MARK:
            popped.append(top)
    return popped + [stack.pop() for _ in range(count)]


def _refusal(reason: str) -> CheckpointError:
    return CheckpointError(f"refused: its pickle has {reason}, which weights never need", remedy="do not use this file")
