"""Annotation formats: whatever lies on disk becomes `Target`s with labels 0..K-1, and nowhere else.

One reader per format, each in its file; all give the same things, and `AnnotatedImages` puts the recipe's task on top:
semantic data sets train on one object per class, instance data sets on things only, panoptic ones on everything.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from maskwright.data.category_lists import load_categories
from maskwright.data.formats.coco import read_json
from maskwright.data.formats.coco_instance import CocoInstance
from maskwright.data.formats.coco_panoptic import CocoPanoptic
from maskwright.data.formats.label_maps import LabelMaps
from maskwright.data.image import load_image
from maskwright.errors import DatasetError, RecipeError
from maskwright.recipe import DataConfig, SplitConfig, data_root
from maskwright.structures import Category, Target, Task

logger = logging.getLogger(__name__)


class Format(Protocol):
    """What a reader of one format gives; indices count the images of the split."""

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def path(self, index: int) -> Path:
        """The picture's file."""
        ...

    def image_id(self, index: int) -> int | str:
        """The picture's name in the annotations."""
        ...

    def target(self, index: int) -> Target:
        """All annotated objects, crowds included, at the size that the annotations state."""
        ...


@dataclass(frozen=True)
class AnnotatedImages:
    """The images of one split with their annotations, read when asked for.

    Attributes:
        categories: what labels mean; for the task "instance" the things only.
        task: which objects `target` gives.
        source: the reader of the format.
    """

    categories: tuple[Category, ...]
    task: Task
    source: Format

    def __len__(self) -> int:
        return len(self.source)

    def path(self, index: int) -> Path:
        """The picture's file."""
        return self.source.path(index)

    def image_id(self, index: int) -> int | str:
        """The picture's name in the annotations: a number in COCO files, else its path without folder and suffixes."""
        return self.source.image_id(index)

    def target(self, index: int) -> Target:
        """The annotated objects as the task wants them, crowds included.

        Raises:
            DatasetError: the annotations of this image are broken.
        """
        return for_task(self.source.target(index), self.task, self.categories)

    def sample(self, index: int) -> tuple[np.ndarray, Target]:
        """The picture, (H, W, 3) uint8 RGB, and its `target`, checked to be of one size.

        Raises:
            ImageError: the picture cannot be read.
            DatasetError: the annotations are broken, or made for another size.
        """
        image, target = load_image(self.path(index)), self.target(index)
        found, stated = image.shape[:2], tuple(target.original_size)
        if found != stated:
            turned = " (turned: one of them ignores the picture's EXIF rotation)" if found == stated[::-1] else ""
            raise DatasetError(
                f"{self.path(index)}: the picture has {found[0]} x {found[1]} pixels (height x width), its annotation "
                f"{stated[0]} x {stated[1]}{turned}; annotations are never resized, so mend one of them"
            )
        return image, target


def open_annotations(config: DataConfig, split: str) -> AnnotatedImages:
    """The images of one split ("train", "val" or "test").

    Raises:
        DatasetError: a file or folder is missing (the message names the recipe's key), or the annotations are broken.
        RecipeError: the recipe has no such split, or its keys contradict each other or the data.
    """
    files: SplitConfig | None = getattr(config, split, None)
    if files is None:
        raise RecipeError(f"the recipe has no data.{split}; add it, with images and annotations")
    root, key = data_root(config.root), f"data.{split}"
    if not root.is_dir():
        raise DatasetError(f"data.root: no folder {root}; correct the path")
    if config.format == "label_maps":
        categories, labels = _categories(config, None, "data.format label_maps")
        source = LabelMaps(root, files, key, labels, config)
        return AnnotatedImages(categories, config.task, source)
    if files.annotations is None:
        raise RecipeError(f"{key}.annotations is missing; name the json of {key}")
    path = root / files.annotations
    document = read_json(path, f"{key}.annotations")
    categories, labels = _categories(config, document.get("categories"), str(path))
    images = _folder(root / files.images, f"{key}.images")
    if config.format == "coco_instance":
        source = CocoInstance(document, path, images, key, labels)
    else:
        masks = _folder(root / files.masks if files.masks else path.with_suffix(""), f"{key}.masks")
        stuff = frozenset(label for label, category in enumerate(categories) if not category.is_thing)
        source = CocoPanoptic(document, path, images, masks, key, labels, stuff, config.image_suffix)
    if split == "train" and config.skip_empty:
        count, dropped = len(source), source.drop_empty()
        logger.info("%s: %d of %d images have no object to train on and are left out", key, dropped, count)
    return AnnotatedImages(categories, config.task, source)


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


def _categories(config: DataConfig, annotations, where: str) -> tuple[tuple[Category, ...], dict[int, int | None]]:
    """The classes to be trained, and category id -> label; None stands for known classes that are left out."""
    known = load_categories(config.categories, annotations, where)
    if config.categories is not None and annotations:
        _compare_names(known, load_categories(None, annotations, where), where)
    kept = tuple(category for category in known if category.is_thing) if config.task == "instance" else known
    if not kept:
        raise RecipeError(
            "data.task is instance, but no class of data.categories has is_thing: true; correct one of them"
        )
    labels: dict[int, int | None] = {category.id: None for category in known}
    labels.update((category.id, label) for label, category in enumerate(kept))
    return kept, labels


def _compare_names(wanted: tuple[Category, ...], found: tuple[Category, ...], where: str) -> None:
    names = {category.id: category.name for category in found}
    other = [category for category in wanted if names.get(category.id, category.name) != category.name]
    if other:
        logger.warning(
            "%s: %d classes are named otherwise in data.categories, the first is id %d: '%s' there, '%s' here",
            where,
            len(other),
            other[0].id,
            other[0].name,
            names[other[0].id],
        )


def _folder(path: Path, key: str) -> Path:
    if not path.is_dir():
        raise DatasetError(f"{key}: no folder {path}; correct the path")
    return path
