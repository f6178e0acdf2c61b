"""Definition of a key map: how one other implementation names its weights. There is one file per implementation.

A row of a map is a pair of prefixes. What follows the prefix (`.weight`, `.norm.running_mean`) is kept, so few rows
cover models of any depth. Rows are read from left to right to load, and from right to left to write.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Conversion:
    """Weights whose values are stored in another order.

    Attributes:
        pattern: of our names.
        load: the stored tensor to ours.
        save: our tensor to the stored one.
    """

    pattern: str
    load: Callable[[Tensor], Tensor]
    save: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Buffer:
    """An entry that the other implementation stores and our model does not have.

    Attributes:
        pattern: of our name of the weight that the buffer belongs to.
        name: name of the buffer in our terms, as a replacement for `pattern`.
        make: the weight to the buffer's value.
    """

    pattern: str
    name: str
    make: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class KeyMap:
    """How one implementation names its weights. `{i}` and `{j}` stand for numbers.

    Attributes:
        name: for messages and provenance.
        signatures: keys, one of which every model of this implementation has, possibly after the prefix of a wrapper.
        prefixes: (foreign prefix, our prefix); the first row that matches a name counts, in either direction.
        split_qkv: (foreign prefix, our prefix) of query, key and value stored as one tensor, which are three here.
        fused_qkv: (foreign prefix with `{part}`, names of the parts, our prefix) of tensors that are one here.
        renames: (pattern, replacement) from the keys of other releases to those in `prefixes`.
        conversions: weights whose values are stored differently.
        dropped: (pattern, reason) of entries that are not parameters.
        buffers: entries among those that a written file must have.
    """

    name: str
    signatures: tuple[str, ...]
    prefixes: tuple[tuple[str, str], ...]
    split_qkv: tuple[tuple[str, str], ...] = ()
    fused_qkv: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    conversions: tuple[Conversion, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    buffers: tuple[Buffer, ...] = ()


NOT_PARAMETERS = (
    (r"criterion\.empty_weight", "class weights of the loss, set by the recipe"),
    (r".*\.relative_position_index", "follows from the window size"),
    (r".*\.attn_mask", "follows from the image size"),
    (r"pixel_(mean|std)", "normalization constants, set by the recipe"),
)

CLASS_WEIGHTS = ("criterion.empty_weight", "criterion.empty_weight")  # a row: dropped when read, but written


def torchvision_resnet(foreign: str) -> tuple[tuple[str, str], ...]:
    """Return the rows of a ResNet with torchvision's names, which timm shares."""
    parts = ("conv1", "bn1", "layer{i}")
    return tuple((f"{foreign}.{part}", f"backbone.network.{part}") for part in parts)


def _relative_position_index(table: Tensor) -> Tensor:
    """Return the row of the (side * side)-row bias table for each pair of cells of a window: (cells, cells)."""
    window = (math.isqrt(len(table)) + 1) // 2
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij"))
    down, right = (place[:, None] - place + window - 1 for place in (rows, columns))
    return down * (2 * window - 1) + right


RELATIVE_POSITION_INDEX = Buffer(
    r"(backbone\..*\.attn)\.relative_position_bias_table", r"\1.relative_position_index", _relative_position_index
)
NUM_BATCHES_TRACKED = Buffer(
    r"(backbone\..*)\.running_var", r"\1.num_batches_tracked", lambda _: torch.zeros((), dtype=torch.int64)
)
