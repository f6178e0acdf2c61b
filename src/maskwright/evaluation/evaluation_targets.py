"""What a score is measured against, where a data set annotates each task on its own.

COCO has instances in one file and panoptic segments in another, which differ where objects overlap; ADE20K has a
picture of classes and one of objects. Published scores are on the annotations of their own task, whatever the model was
trained on, and so are ours: one run of a panoptic model is scored by AP on the instances and by IoU on the classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from maskwright.config.recipe import Recipe
from maskwright.config.schema import DataConfig
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.formats.dispatch import open_annotations
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Category, Target, Task

# For each task the annotations that it is read from; formats that are not here have the same for all.
_ANNOTATIONS: Mapping[str, Mapping[Task, str]] = {
    "ade20k": {"semantic": "classes", "instance": "objects", "panoptic": "both"},
    "cityscapes": {"semantic": "labelIds", "instance": "instanceIds", "panoptic": "instanceIds"},
    "coco": {"semantic": "panoptic", "instance": "instances", "panoptic": "panoptic"},
    "mapillary": {"semantic": "labels", "instance": "panoptic", "panoptic": "panoptic"},
}


class Truths:
    """The annotations of each wanted task, found by the image and with the labels of the recipe's classes."""

    def __init__(self, recipe: Recipe, split: str, annotated: AnnotatedImages, tasks: Iterable[Task]):
        """Open what is annotated on its own.

        Args:
            recipe: `data` says what is read.
            split: "train", "val" or "test".
            annotated: the split as `data.task` reads it, which serves all other tasks.
            tasks: those that scores are about.

        Raises:
            DatasetError: a file is missing, or annotates classes that the recipe's data has not.
        """
        config: DataConfig = recipe.data
        files = getattr(config, split)
        kinds = _ANNOTATIONS.get(config.format, {}) if files is None or files.annotations is None else {}
        self.tasks = tuple(dict.fromkeys(tasks))
        self._own: dict[Task, _Own] = {}
        for task in self.tasks:
            if kinds and kinds[task] != kinds[config.task]:
                other = config.model_copy(update={"task": task, "filter_empty": False})
                self._own[task] = _Own(open_annotations(other, split), annotated.categories, f"data.{split}, {task}")

    def of(self, target: Target) -> dict[Task, Target]:
        """For each task the annotated objects of the image that `target` is of.

        Raises:
            DatasetError: the annotations of a task lack the image, or are broken.
        """
        return {task: self._own[task].of(target) if task in self._own else target for task in self.tasks}


class _Own:
    def __init__(self, annotated: AnnotatedImages, categories: tuple[Category, ...], where: str):
        self.annotated, self.where = annotated, where
        self.index = {annotated.image_id(index): index for index in range(len(annotated))}
        known = {category.name: label for label, category in enumerate(categories)}
        foreign = [category.name for category in annotated.categories if category.name not in known]
        if foreign:
            raise DatasetError(
                f"{where}: has the class '{foreign[0]}', which the data as trained on has not; leave its score out of "
                "evaluate.metrics, or correct data.categories"
            )
        self.labels = torch.tensor([known[category.name] for category in annotated.categories], dtype=torch.int64)

    def of(self, target: Target) -> Target:
        if target.image_id not in self.index:
            raise DatasetError(f"{self.where}: image {target.image_id!r} has no annotation; fetch the files again")
        own = replace(self.annotated, task="panoptic").target(self.index[target.image_id])
        if tuple(own.original_size) != tuple(target.original_size):
            found, expected = (" x ".join(map(str, one.original_size)) for one in (own, target))
            raise DatasetError(f"{self.where}: image {target.image_id!r} is {found} pixels, expected {expected}")
        return replace(own, labels=self.labels[own.labels])
