"""Interface of all annotation formats: the annotated images of one split, as targets for the recipe's task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from maskwright.config.schema import DataConfig, SplitConfig
from maskwright.data.images.multichannel import load_pixels
from maskwright.data.problems import ProblemHandler
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Category, Target, Task


class Split(NamedTuple):
    """One split of a dataset, to be opened by the reader of its format.

    Attributes:
        config: the recipe's `data` section.
        name: "train", "val" or "test".
        files: the recipe's section for the split.
        root: folder or archive of the dataset.
        problems: receives problems of the annotations.
        channels: channels of the images, see `load_pixels`.
    """

    config: DataConfig
    name: str
    files: SplitConfig
    root: Folder
    problems: ProblemHandler
    channels: int | None = None

    @property
    def key(self) -> str:
        """The split's key in the recipe, for messages."""
        return f"data.{self.name}"


class Images(Protocol):
    """The images of a split; `ImageList` is the usual implementation."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def image_id(self, index: int) -> int | str:
        """Return the image's id in the annotations."""
        ...

    def file(self, index: int) -> File:
        """Return the image file."""
        ...

    def annotation(self, index: int) -> Any:
        """Return what the reader stores for the image: among others its label file, if it has one of its own."""
        ...

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all images except these."""
        ...


class AnnotationReader(Protocol):
    """A reader of one format. `index` counts `images`."""

    @property
    def images(self) -> Images:
        """The images of the split."""
        ...

    def target(self, index: int) -> Target:
        """Return all annotated objects, crowds included, at the size that the annotations state."""
        ...


@dataclass(frozen=True)
class AnnotatedImages:
    """The images of one split with their annotations, which are read on demand.

    Attributes:
        categories: the classes of the labels; things only for the task "instance".
        task: the task that `target` prepares objects for.
        reader: the reader of the format.
        channels: channels of the images; None reads every image as RGB.
    """

    categories: tuple[Category, ...]
    task: Task
    reader: AnnotationReader
    channels: int | None = None

    def __len__(self) -> int:
        return len(self.reader.images)

    def file(self, index: int) -> File:
        """Return the image file, on disk or in an archive."""
        return self.reader.images.file(index)

    def image_id(self, index: int) -> int | str:
        """Return the image's id: the one in a COCO JSON, else the path without the root folder and suffixes."""
        return self.reader.images.image_id(index)

    def target(self, index: int) -> Target:
        """Return the annotated objects for the task, crowds included.

        Raises:
            DatasetError: the annotations of this image are damaged.
        """
        return for_task(self.reader.target(index), self.task, self.categories)

    def sample(self, index: int) -> tuple[np.ndarray, Target]:
        """Return the image, (H, W, 3) uint8 RGB or as `load_channels` reads it, and its target of the same size.

        Raises:
            ImageError: the image cannot be read.
            DatasetError: the annotations are damaged, or made for another size.
        """
        image, target = self.image(index), self.target(index)
        self.compare_sizes(index, image, target)
        return image, target

    def image(self, index: int) -> np.ndarray:
        """Return the image alone; raises as `sample`."""
        return load_pixels(self.file(index), self.channels)

    def compare_sizes(self, index: int, image: np.ndarray, target: Target) -> None:
        """Raise a DatasetError if the annotations of an image are made for another size."""
        actual, annotated = image.shape[:2], tuple(target.original_size)
        if actual != annotated:
            rotated = " (rotated: one of them ignores the EXIF orientation)" if actual == annotated[::-1] else ""
            raise DatasetError(
                f"the image has {actual[0]} x {actual[1]} pixels (height x width), its annotation "
                f"{annotated[0]} x {annotated[1]}{rotated}",
                where=str(self.file(index)),
                remedy="annotations are never resized, so correct one of the files",
            )


def for_task(target: Target, task: Task, categories: tuple[Category, ...]) -> Target:
    """Return the objects of a task: one per class (semantic), things (instance), or all (panoptic)."""
    if task == "semantic":
        return replace(target, areas=None, boxes=None) if _is_semantic(target) else target.merge_classes()
    if task == "instance" and not all(category.is_thing for category in categories):
        is_thing = torch.tensor([category.is_thing for category in categories])
        return target.select(is_thing[target.labels])
    return target


def _is_semantic(target: Target) -> bool:
    """Return whether there is one object per class already, as in label maps; saves a third of their reading time."""
    ascending = bool((target.labels[1:] > target.labels[:-1]).all())
    return ascending and len(target.id_maps) == 1 and not target.is_crowd.any()
