"""What every format gives: the annotated images of one split, as the recipe's task wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch

from maskwright.config.schema import DataConfig, SplitConfig
from maskwright.data.images.multichannel import load_pixels
from maskwright.data.problems import ProblemHandler
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Category, Target, Task


class Split(NamedTuple):
    """One split of a data set, before it is opened.

    Attributes:
        config: the recipe's `data` section.
        name: "train", "val" or "test".
        files: what the recipe says about the split.
        root: the data set.
        problems: hears what is wrong with the annotations.
        channels: of the pictures, see `load_pixels`.
    """

    config: DataConfig
    name: str
    files: SplitConfig
    root: Folder
    problems: ProblemHandler
    channels: int | None = None

    @property
    def key(self) -> str:
        """The split's place in the recipe, for messages."""
        return f"data.{self.name}"


class Images(Protocol):
    """The images of a split; `ImageList` is the usual kind."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def image_id(self, index: int) -> int | str:
        """What the annotations call the image."""
        ...

    def file(self, index: int) -> File:
        """Its picture."""
        ...

    def keep(self, indices: Sequence[int]) -> None:
        """Leave out all images but these."""
        ...


class Format(Protocol):
    """A reader of one format; indices count its images."""

    @property
    def images(self) -> Images:
        """Its images."""
        ...

    def target(self, index: int) -> Target:
        """All annotated objects, crowds included, at the size that the annotations state."""
        ...

    def has_object(self, index: int) -> bool:
        """Whether the image has an object of a trained class that is no crowd."""
        ...


@dataclass(frozen=True)
class AnnotatedImages:
    """The images of one split with their annotations, read when asked for.

    Attributes:
        categories: what labels mean; for the task "instance" the things only.
        task: which objects `target` gives.
        source: the reader of the format.
        channels: of the pictures; None reads all as RGB.
    """

    categories: tuple[Category, ...]
    task: Task
    source: Format
    channels: int | None = None

    def __len__(self) -> int:
        return len(self.source.images)

    def file(self, index: int) -> File:
        """The picture's file, on disk or in an archive."""
        return self.source.images.file(index)

    def image_id(self, index: int) -> int | str:
        """The picture's name in the annotations: a number in COCO files, else its path without folder and suffixes."""
        return self.source.images.image_id(index)

    def target(self, index: int) -> Target:
        """The annotated objects as the task wants them, crowds included.

        Raises:
            DatasetError: the annotations of this image are broken.
        """
        return for_task(self.source.target(index), self.task, self.categories)

    def sample(self, index: int) -> tuple[np.ndarray, Target]:
        """The picture, (H, W, 3) uint8 RGB or as `load_channels` gives it, and its `target`, checked to be of one size.

        Raises:
            ImageError: the picture cannot be read.
            DatasetError: the annotations are broken, or made for another size.
        """
        image, target = self.image(index), self.target(index)
        self.compare_sizes(index, image, target)
        return image, target

    def image(self, index: int) -> np.ndarray:
        """The picture alone; raises as `sample`."""
        return load_pixels(self.file(index), self.channels)

    def compare_sizes(self, index: int, image: np.ndarray, target: Target) -> None:
        """Raises a DatasetError if the annotations of an image are made for another size."""
        found, stated = image.shape[:2], tuple(target.original_size)
        if found != stated:
            turned = " (turned: one of them ignores the picture's EXIF rotation)" if found == stated[::-1] else ""
            raise DatasetError(
                f"{self.file(index)}: the picture has {found[0]} x {found[1]} pixels (height x width), its annotation "
                f"{stated[0]} x {stated[1]}{turned}; annotations are never resized, so mend one of them"
            )


def for_task(target: Target, task: Task, categories: tuple[Category, ...]) -> Target:
    """The objects that a task is about: one per class (semantic), things (instance), or all (panoptic)."""
    if task == "semantic":
        return replace(target, areas=None, boxes=None) if _is_merged(target) else target.merge_classes()
    if task == "instance" and not all(category.is_thing for category in categories):
        is_thing = torch.tensor([category.is_thing for category in categories])
        return target.select(is_thing[target.labels])
    return target


def _is_merged(target: Target) -> bool:
    """Whether there is one object per class already, as in label maps; saves a third of their reading time."""
    ascending = bool((target.labels[1:] > target.labels[:-1]).all())
    return ascending and len(target.id_maps) == 1 and not target.is_crowd.any()
