"""Classes and tasks; imports no torch, so that exported files can be used without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["semantic", "instance", "panoptic"]


@dataclass(frozen=True, slots=True)
class Category:
    """One class of a dataset. Its position in the list of categories is its label 0..K-1.

    Attributes:
        id: as in the annotation files; ids need not be contiguous.
        name: as shown to users.
        is_thing: True for countable objects, False for stuff (regions without instances).
        color: RGB, 0..255, for drawing.
        group: the superclass, such as "vehicle" for a car, if the dataset has any.
    """

    id: int
    name: str
    is_thing: bool
    color: tuple[int, int, int]
    group: str | None = None
