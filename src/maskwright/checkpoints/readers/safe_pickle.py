"""Pickles of other programs, read without calling anything of theirs.

A pickle is a program of small steps, some of which call things by name. Here each name that a weight file needs has a
stand-in of our own, what training programs put beside weights becomes empty placeholders, and any other name is refused
before it is even imported. Unusual: the steps are read through once before they are done, because harmless steps alone
can fill a memory (a far place in the memo) or never end (the hash of tuples that hold one another twice).
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

_MOST_STEPS = 2_000_000  # a large model with its optimizer takes 100,000
_MOST_IN_A_TUPLE = 10_000  # values, counted through all tuples inside it

Names = Mapping[str, Any]


class Array:
    """Stands for a `numpy.ndarray`: what a pickle says of it."""

    shape: Any = None
    kind: Any = None
    data: Any = None
    order: Any = "C"

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.kind, by_columns, self.data = state
        self.order = "F" if by_columns else "C"

    def tensor(self) -> Tensor:
        """A fresh tensor of its numbers.

        Raises:
            ValueError: it holds something else than numbers, or its shape is not that of its data.
        """
        if not isinstance(self.kind, Kind):
            raise ValueError("is an array of nothing")
        dtype = self.kind.numbers()
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data  # Python 2 had no bytes
        shape = counts(self.shape if isinstance(self.shape, tuple) else (self.shape,))
        if not isinstance(data, bytes | bytearray) or self.order not in ("C", "F"):
            raise ValueError("is an array without data")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"has the shape {printable(shape)} of {dtype} and {len(data)} bytes, which do not agree")
        array = np.frombuffer(data, dtype).reshape(shape, order=self.order)
        return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))


class Kind:
    """Stands for a `numpy.dtype`."""

    code: Any = None
    order: Any = "="

    def __init__(self, code: object = None, *options: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def numbers(self) -> np.dtype:
        """The kind of number.

        Raises:
            ValueError: it is none.
        """
        if self.code not in _NUMBERS or self.order not in ("<", ">", "|", "="):
            raise ValueError(f"holds {printable(self.code)} values, not numbers")
        return np.dtype(self.code).newbyteorder(self.order)


_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def counts(values: object) -> tuple[int, ...]:
    """A list or tuple of whole numbers that are not negative, as sizes are.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(values, tuple | list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"sizes {printable(values)}")
    return tuple(values)


def _reconstruct(*arguments: object) -> Array:
    return Array()


def _scalar(kind: object, data: object = None) -> Array:
    array = Array()
    array.shape, array.kind, array.data = (), kind, data
    return array


def _frombuffer(data: object, kind: object, shape: object, order: object, *axes: object) -> Array:
    array = Array()
    array.shape, array.kind, array.data, array.order = shape, kind, data, order
    return array


def _encode(text: object, encoding: object) -> bytes:
    """`_codecs.encode` as protocol 2 uses it for bytes; other encodings could double a text again and again."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError(f"a text in the encoding {printable(encoding)}")
    return text.encode("latin1")


def _bytes(data: object = b"", encoding: object = None) -> bytes:
    """`bytearray` of what is there already; of a number, it could fill a memory."""
    if isinstance(data, str):
        return _encode(data, encoding)
    if not isinstance(data, bytes):
        raise ValueError("bytes out of something else")
    return data


class _Dictionary(dict):
    """Stands for an `OrderedDict` or a dictionary with another name; keeps no attributes."""

    def __setstate__(self, state: object) -> None:
        pass


class Inert:
    """Stands for an object of another program: takes any arguments and any state, keeps none, does nothing."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


ALLOWED: dict[str, Callable] = {
    "collections.OrderedDict": _Dictionary,
    "collections.Counter": Inert,
    "collections.defaultdict": Inert,
    "_codecs.encode": _encode,
    "builtins.bytearray": _bytes,
    "builtins.set": Inert,
    "builtins.complex": Inert,
    "numpy.ndarray": Array,
    "numpy.dtype": Kind,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
    "mmengine.logging.history_buffer.HistoryBuffer": Inert,
    "builtins.getattr": Inert,  # how a HistoryBuffer names its own methods; asks nothing of anything here
    "argparse.Namespace": Inert,
    "pathlib.Path": Inert,
    "pathlib.PosixPath": Inert,
    "pathlib.WindowsPath": Inert,
    "pathlib._local.PosixPath": Inert,
    "pathlib._local.WindowsPath": Inert,
    # Dictionaries with another name.
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


def read_pickle(file: BinaryIO, names: Names, stored: Callable[[Any], Any] | None = None) -> Any:
    """The content of one pickle, from where the file stands; the file then stands behind it.

    Args:
        file: can be sought.
        names: what a pickle may name, as "module.name", and what stands there instead.
        stored: makes something of a persistent id, if there may be such.

    Raises:
        CheckpointError: the pickle names something else, or would grow beyond all bounds.
        Exception: nearly any other, where it is broken.
    """
    start = file.tell()
    check_steps(file)
    end = file.tell()
    file.seek(start)
    content = _Unpickler(file, names, stored).load()
    file.seek(end)  # the unpickler reads ahead
    return content


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, names: Names, stored: Callable[[Any], Any] | None) -> None:
        super().__init__(file, fix_imports=False, encoding="latin1")
        self.names, self.stored = names, stored

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if full not in self.names:
            raise CheckpointError(
                f"refused: it calls {printable(full)}, which weights never need; nothing of it was run. If you trust "
                "it, save the model's state_dict() alone"
            )
        return self.names[full]

    def persistent_load(self, pid: Any) -> Any:
        if self.stored is None:
            raise ValueError("a persistent id")
        return self.stored(pid)


_MARK, _NAMED = -1, 0  # beside sizes of 1 and more, on the stack of `check_steps`


def check_steps(file: BinaryIO) -> None:
    """Read the steps of one pickle without doing them.

    Raises:
        CheckpointError: they would take far more memory or time than the file has bytes, or change what they name.
        Exception: ValueError, IndexError, KeyError and others, where they are broken.
    """
    stack: list[int] = []  # how many values each thing holds if it is a tuple, else 1
    memo: dict[int, int] = {}
    for number, (step, argument, _) in enumerate(pickletools.genops(file), 1):
        if number > _MOST_STEPS:
            raise _refusal(f"more than {_MOST_STEPS:,} steps")
        match step.name:
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                if (place := cast(int, argument)) > number:
                    raise _refusal(f"a memo with a place {place:,} after {number:,} steps")
                memo[place] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[cast(int, argument)])
            case "DUP":
                stack.append(stack[-1])
            case "GLOBAL" | "STACK_GLOBAL":
                _take(stack, step)
                stack.append(_NAMED)
            case "BUILD" if stack[-2] == _NAMED:
                raise _refusal("a step that changes a function or a class")
            case name:
                taken = _take(stack, step)
                size = 1 + sum(taken) if name.startswith("TUPLE") or name == "FROZENSET" else 1
                if size > _MOST_IN_A_TUPLE:
                    raise _refusal(f"a tuple that holds more than {_MOST_IN_A_TUPLE:,} values")
                stack += [_MARK if made is pickletools.markobject else size for made in step.stack_after]


def _take(stack: list[int], step: pickletools.OpcodeInfo) -> list[int]:
    """Take from the stack what a step takes."""
    needed, taken = len(step.stack_before), []
    if pickletools.markobject in step.stack_before:
        needed = step.stack_before.index(pickletools.markobject)
        while (top := stack.pop()) != _MARK:
            taken.append(top)
    return taken + [stack.pop() for _ in range(needed)]


def _refusal(what: str) -> CheckpointError:
    return CheckpointError(f"refused: its pickle has {what}, which weights never need. Do not use it")
