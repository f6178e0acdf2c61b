"""What a table of foreign names is. The tables themselves are in one file per implementation beside this one.

Unusual: a row is a prefix. What follows it (`.weight`, `.norm.running_mean`) is kept, so few rows cover any depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Change:
    """Values that are stored in another order or form.

    Attributes:
        names: pattern of our names.
        change: the stored tensor to ours.
        reason: why it differs.
    """

    names: str
    change: Callable[[Tensor], Tensor]
    reason: str


@dataclass(frozen=True)
class Layout:
    """How one implementation names its weights. `{i}` and `{j}` stand for numbers in every table.

    Attributes:
        name: for messages and provenance.
        marks: keys, one of which every model of this layout has; what stands before it is the name of a wrapper.
        names: (foreign prefix, our prefix).
        packed: (foreign prefix, our prefix) of query, key and value stored as one tensor, and as three here.
        joined: (foreign prefix with `{part}`, the three parts, our prefix) of tensors stored as three, and as one here.
        renamed: (pattern, replacement) from the names of other releases to those of `names`.
        changes: values that are not stored as ours are.
        dropped: (pattern, reason) of entries that are not parameters.
    """

    name: str
    marks: tuple[str, ...]
    names: tuple[tuple[str, str], ...]
    packed: tuple[tuple[str, str], ...] = ()
    joined: tuple[tuple[str, tuple[str, str, str], str], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    changes: tuple[Change, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()


NOT_PARAMETERS = (
    (r"criterion\.empty_weight", "class weights of the loss, set by the recipe"),
    (r".*\.relative_position_index", "follows from the window size"),
    (r".*\.attn_mask", "follows from the image size"),
    (r"pixel_(mean|std)", "normalisation constants, set by the recipe"),
)


def torchvision_resnet(foreign: str) -> tuple[tuple[str, str], ...]:
    """Rows of a ResNet with torchvision's names, which timm shares."""
    parts = ("conv1", "bn1", "layer{i}")
    return tuple((f"{foreign}.{part}", f"backbone.network.{part}") for part in parts)
