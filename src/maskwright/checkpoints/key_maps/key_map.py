"""What a table of foreign names is. The tables themselves are in one file per implementation beside this one.

Unusual: a row is a prefix. What follows it (`.weight`, `.norm.running_mean`) is kept, so few rows cover any depth. A
table is read from left to right to load, and from right to left to write.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Change:
    """Values that are stored in another order or form.

    Attributes:
        names: pattern of our names.
        change: the stored tensor to ours.
        undo: our tensor to the stored one.
        reason: why it differs.
    """

    names: str
    change: Callable[[Tensor], Tensor]
    undo: Callable[[Tensor], Tensor]
    reason: str


@dataclass(frozen=True)
class Buffer:
    """An entry that another implementation stores and ours does without.

    Attributes:
        beside: pattern of our name that it stands beside.
        name: what it is called in our names, a replacement for `beside`.
        make: the tensor that it stands beside to its value.
    """

    beside: str
    name: str
    make: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """How one implementation names its weights. `{i}` and `{j}` stand for numbers in every table.

    Attributes:
        name: for messages and provenance.
        marks: keys, one of which every model of this layout has; what stands before it is the name of a wrapper.
        names: (foreign prefix, our prefix); the first row that fits a name decides, in either direction.
        packed: (foreign prefix, our prefix) of query, key and value stored as one tensor, and as three here.
        joined: (foreign prefix with `{part}`, the three parts, our prefix) of tensors stored as three, and as one here.
        renamed: (pattern, replacement) from the names of other releases to those of `names`.
        changes: values that are not stored as ours are.
        dropped: (pattern, reason) of entries that are not parameters.
        buffers: those of them that a written file must hold.
    """

    name: str
    marks: tuple[str, ...]
    names: tuple[tuple[str, str], ...]
    packed: tuple[tuple[str, str], ...] = ()
    joined: tuple[tuple[str, tuple[str, str, str], str], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    changes: tuple[Change, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    buffers: tuple[Buffer, ...] = ()


NOT_PARAMETERS = (
    (r"criterion\.empty_weight", "class weights of the loss, set by the recipe"),
    (r".*\.relative_position_index", "follows from the window size"),
    (r".*\.attn_mask", "follows from the image size"),
    (r"pixel_(mean|std)", "normalisation constants, set by the recipe"),
)

CLASS_WEIGHTS = ("criterion.empty_weight", "criterion.empty_weight")  # a row: dropped when read, and written


def torchvision_resnet(foreign: str) -> tuple[tuple[str, str], ...]:
    """Rows of a ResNet with torchvision's names, which timm shares."""
    parts = ("conv1", "bn1", "layer{i}")
    return tuple((f"{foreign}.{part}", f"backbone.network.{part}") for part in parts)


def _relative_positions(table: Tensor) -> Tensor:
    """Row of the position table, (side * side rows), for each pair of cells of a window, (cells, cells)."""
    window = (math.isqrt(len(table)) + 1) // 2
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij"))
    down, right = (place[:, None] - place + window - 1 for place in (rows, columns))
    return down * (2 * window - 1) + right


RELATIVE_POSITION_INDEX = Buffer(
    r"(backbone\..*\.attn)\.relative_position_bias_table", r"\1.relative_position_index", _relative_positions
)
NUM_BATCHES_TRACKED = Buffer(
    r"(backbone\..*)\.running_var", r"\1.num_batches_tracked", lambda _: torch.zeros((), dtype=torch.int64)
)
