"""The annotated images to convert: one dataset, or the objects of one combined with the stuff of another."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from maskwright.config.recipe import change_data, data_root, load_recipe
from maskwright.config.schema import GENERAL_FORMATS, DataConfig
from maskwright.data.check.check import SPLITS, is_data_set
from maskwright.data.convert.report import ConversionReport
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.formats.detect import detect_format
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Category, Target, Task
from maskwright.structures.id_maps import id_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A dataset to convert.

    Attributes:
        place: its folder, archive or file.
        task: the task of its annotations.
        categories: its classes, of all splits.
        splits: the opened splits by name.
    """

    place: Path
    task: Task
    categories: tuple[Category, ...]
    splits: dict[str, AnnotatedImages]

    def file(self, split: str, index: int) -> File:
        """Return the file of an image."""
        return self.splits[split].file(index)

    def target(self, split: str, index: int, report: ConversionReport) -> Target:
        """Return all annotated objects of an image."""
        return self.splits[split].target(index)


@dataclass(frozen=True)
class Combined(Source):
    """Objects of one dataset on top of the stuff of another.

    Attributes:
        stuff: the dataset of the stuff; images are found by their names, without suffixes.
        labels: for each class of `stuff`, its label here; -1 for classes of objects.
        indices: for each split, the index in `stuff` of each image.
    """

    stuff: Source
    labels: tuple[int, ...]
    indices: dict[str, list[int]]

    def target(self, split: str, index: int, report: ConversionReport) -> Target:
        """Return the objects, and one segment of each stuff class in the pixels without an object."""
        objects = self.splits[split].target(index)
        stuff = self.stuff.splits[split].target(self.indices[split][index]).merge_classes()
        if stuff.original_size != objects.original_size:
            sizes = " and ".join(
                f"{height} x {width}" for height, width in (objects.original_size, stuff.original_size)
            )
            raise DatasetError(
                f"its annotations have different sizes, {sizes} (height x width)",
                where=str(self.file(split, index)),
                remedy="export both for the same image",
            )
        free = objects.id_maps.amax(0).numpy() == 0
        numbers = stuff.id_maps[0].numpy()  # n is class n-1 of stuff.labels
        labels = np.array(self.labels)[stuff.labels.numpy()]
        is_left = free & np.concatenate([[False], labels < 0])[numbers]
        report.add("pixels of an object's class outside of all objects become unlabeled", int(is_left.sum()))
        kept = np.flatnonzero(labels >= 0)
        table = np.zeros(len(labels) + 1, dtype=np.int64)
        table[kept + 1] = len(objects) + 1 + np.arange(len(kept))
        ids = objects.id_maps.numpy().astype(id_dtype(len(objects) + len(kept)))
        ids[0] = np.where(free, table[numbers], ids[0])
        return replace(
            objects,
            id_maps=torch.from_numpy(ids),
            labels=torch.cat([objects.labels, torch.from_numpy(labels[kept])]),
            is_crowd=torch.cat([objects.is_crowd, torch.zeros(len(kept), dtype=torch.bool)]),
            areas=None,
            boxes=None,
        )


def open_source(source: str, overrides: Sequence[str], tasks: Sequence[Task]) -> Source:
    """Open all splits of a dataset.

    Args:
        source: what `check` takes: a folder, archive or COCO JSON, whose layout is detected; or a recipe.
        overrides: see `check`.
        tasks: kinds of annotations that can be used, the best first.

    Raises:
        DatasetError: it has no such annotations, they are damaged, or splits have different classes.
        RecipeError: the recipe is wrong.
    """
    if is_data_set(source, overrides):
        configs = [change_data(config, overrides, source) for config in detect_format(source)]
    else:
        configs = [load_recipe(source, tuple(overrides)).data]
    config = _best(configs, tasks, source)
    splits = {name: open_annotations(config, name) for name in SPLITS if getattr(config, name) is not None}
    if "test" not in splits and config.format not in GENERAL_FORMATS:  # recipes of published sets do not name it
        try:
            splits["test"] = open_annotations(config, "test")
        except DatasetError as error:
            logger.warning("the test split is not converted: %s", error)
    if not splits:
        raise DatasetError("has no train, val or test split", where=source)
    first = next(iter(splits.values()))
    for name, images in splits.items():
        if images.categories != first.categories:
            raise DatasetError(
                f"has other classes than data.{next(iter(splits))}",
                where=f"data.{name}",
                remedy="use one list of classes, data.categories, for all splits",
            )
    return Source(data_root(config.root), config.task, first.categories, splits)


def _best(configs: Sequence[DataConfig], tasks: Sequence[Task], source: str) -> DataConfig:
    for task in tasks:
        for config in configs:
            if config.task == task:
                return config
    found = " and ".join(config.task for config in configs)
    remedy = "annotations of classes do not tell objects apart; convert a dataset of objects"
    if "panoptic" in tasks:
        remedy += ", and add this one with --add"
    raise DatasetError(f"has annotations for {found}, expected {' or '.join(tasks)}", where=source, remedy=remedy)


def combine(objects: Source, stuff: Source) -> Combined:
    """Return the objects of one dataset on top of the stuff of another.

    Classes of `stuff` with the name of a thing class of `objects` are not used: their pixels without an object stay
    unlabeled, because the object is unknown. All others become stuff.

    Raises:
        DatasetError: an image of `objects` has no partner, or more than one.
    """
    known = {category.name: label for label, category in enumerate(objects.categories)}
    categories = list(objects.categories)
    ids = {category.id for category in categories}
    labels = []
    for category in stuff.categories:
        label = known.get(category.name)
        if label is None:
            label = len(categories)
            own_id = category.id if category.id not in ids else max(ids) + 1
            ids.add(own_id)
            categories.append(replace(category, id=own_id, is_thing=False))
        labels.append(-1 if categories[label].is_thing else label)
    indices = {name: _partners(name, images, stuff) for name, images in objects.splits.items()}
    return Combined(objects.place, "panoptic", tuple(categories), objects.splits, stuff, tuple(labels), indices)


def _partners(split: str, images: AnnotatedImages, stuff: Source) -> list[int]:
    """Return the index in `stuff` of each image."""
    by_name: dict[str, list[int]] = {}
    others = stuff.splits.get(split)
    for index in range(len(others) if others else 0):
        by_name.setdefault(_stem(stuff.file(split, index)), []).append(index)
    found = []
    for index in range(len(images)):
        file = images.file(index)
        partners = by_name.get(_stem(file), [])
        if len(partners) != 1:
            raise DatasetError(
                f"{len(partners)} images of {stuff.place} (split {split}) have its name, expected one",
                where=str(file),
                remedy="both datasets need the same images, with the same names, in the same splits",
            )
        found.append(partners[0])
    return found


def _stem(file: File) -> str:
    return PurePosixPath(str(file).replace("\\", "/")).stem
