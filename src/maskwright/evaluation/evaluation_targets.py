"""The targets of each metric, for datasets that annotate tasks separately.

COCO has instances in one file and panoptic segments in another, which differ where objects overlap; ADE20K has an image
of classes and one of objects. Published scores use the annotations of their own task, whatever the model was trained
on. So do ours: a panoptic model is scored by AP on the instances and by IoU on the classes in the same run.
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

# The annotations from which each task is read; other formats have the same for all tasks.
_ANNOTATIONS: Mapping[str, Mapping[Task, str]] = {
    "ade20k": {"semantic": "classes", "instance": "objects", "panoptic": "both"},
    "cityscapes": {"semantic": "labelIds", "instance": "instanceIds", "panoptic": "instanceIds"},
    "coco": {"semantic": "panoptic", "instance": "instances", "panoptic": "panoptic"},
    "mapillary": {"semantic": "labels", "instance": "panoptic", "panoptic": "panoptic"},
}


class EvaluationTargets:
    """The targets of each task, by image, with the labels of the recipe's classes."""

    def __init__(self, recipe: Recipe, split: str, annotated: AnnotatedImages, tasks: Iterable[Task]):
        """Open the annotations of tasks that are annotated separately.

        Args:
            recipe: its `data` section is used.
            split: "train", "val" or "test".
            annotated: the split as read for `data.task`, used for all other tasks.
            tasks: the tasks of the metrics.

        Raises:
            DatasetError: a file is missing, or has classes that the recipe's data does not have.
        """
        config: DataConfig = recipe.data
        files = getattr(config, split)
        kinds = _ANNOTATIONS.get(config.format, {}) if files is None or files.annotations is None else {}
        self.tasks = tuple(dict.fromkeys(tasks))
        self._separate: dict[Task, _SeparateTargets] = {}
        for task in self.tasks:
            if kinds and kinds[task] != kinds[config.task]:
                other = config.model_copy(update={"task": task, "filter_empty": False})
                self._separate[task] = _SeparateTargets(
                    open_annotations(other, split), annotated.categories, f"data.{split}, {task}"
                )

    def for_image(self, target: Target) -> dict[Task, Target]:
        """Return the target of each task for the image of `target`.

        Raises:
            DatasetError: the annotations of a task do not have the image, or are invalid.
        """
        return {
            task: self._separate[task].for_image(target) if task in self._separate else target for task in self.tasks
        }


class _SeparateTargets:
    """The annotations of one task, indexed by image id."""

    def __init__(self, annotated: AnnotatedImages, categories: tuple[Category, ...], where: str):
        self.annotated, self.where = annotated, where
        self.index = {annotated.image_id(index): index for index in range(len(annotated))}
        known = {category.name: label for label, category in enumerate(categories)}
        unknown = [category.name for category in annotated.categories if category.name not in known]
        if unknown:
            raise DatasetError(
                f"the annotations have the class '{unknown[0]}', which the training data does not have",
                where=where,
                remedy="remove its metric from evaluate.metrics, or correct data.categories",
            )
        self.labels = torch.tensor([known[category.name] for category in annotated.categories], dtype=torch.int64)

    def for_image(self, target: Target) -> Target:
        if target.image_id not in self.index:
            raise DatasetError(
                f"image {target.image_id!r} has no annotation", where=self.where, remedy="download the files again"
            )
        own = replace(self.annotated, task="panoptic").target(self.index[target.image_id])
        if tuple(own.original_size) != tuple(target.original_size):
            found, expected = (" x ".join(map(str, one.original_size)) for one in (own, target))
            raise DatasetError(f"image {target.image_id!r} is {found} pixels, expected {expected}", where=self.where)
        return replace(own, labels=self.labels[own.labels])
