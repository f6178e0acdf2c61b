"""Open a split of the recipe's dataset: as annotated images, for training, or for evaluation."""

from __future__ import annotations

from functools import partial

import numpy as np

from maskwright.config.recipe import Recipe
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.loader import (
    EvaluationDataset,
    EvaluationLoader,
    TrainingDataset,
    TrainingLoader,
    TrainingSampler,
)
from maskwright.data.transforms import Augment, progressive_scale
from maskwright.errors import DatasetError


def open_dataset(recipe: Recipe, split: str) -> AnnotatedImages:
    """Open one split, "train", "val" or "test", with the objects of `data.task`.

    Raises:
        DatasetError, RecipeError: see `open_annotations`.
    """
    return open_annotations(recipe.data, split, channels=recipe.model.channels)


def train_loader(
    recipe: Recipe,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    annotated: AnnotatedImages | None = None,
    repeat_factors: np.ndarray | None = None,
) -> TrainingLoader:
    """Create the endless training steps of one process, each a list of `train.gradient_accumulation_steps` batches.

    Args:
        recipe: `data` and `train` are used.
        rank: of this process.
        world_size: number of processes.
        start_step: the first step; it has the samples that it would have in a run from step 0.
        annotated: the training split, if it is open already.
        repeat_factors: (N,) of its images, see `TrainingSampler`; None draws all equally.

    Raises:
        DatasetError, RecipeError: see `open_annotations`; or the split has no images, or the batch cannot be split
            evenly. While iterating, damaged files raise a DatasetError or ImageError that names them.
    """
    train = recipe.train
    annotated = open_dataset(recipe, "train") if annotated is None else annotated
    if not len(annotated):
        raise DatasetError("lists no images", where="data.train", remedy="name images to train on")
    sampler = TrainingSampler(
        len(annotated),
        train.batch_size,
        train.seed,
        rank,
        world_size,
        start_step,
        train.gradient_accumulation_steps,
        partial(progressive_scale, train),
        repeat_factors,
    )
    return TrainingLoader(TrainingDataset(annotated, Augment(train.augment), train.seed), sampler, train.num_workers)


def evaluation_loader(
    recipe: Recipe,
    split: str = "val",
    rank: int = 0,
    world_size: int = 1,
    annotated: AnnotatedImages | None = None,
) -> EvaluationLoader:
    """Create the loader of the images that one process evaluates, each once, in order.

    Images and targets have the size of the files; targets have all annotated objects, crowds included.

    Args:
        recipe: `data`, `evaluate` and `train.num_workers` are used.
        split: "train", "val" or "test".
        rank: of this process.
        world_size: number of processes.
        annotated: the split, if it is open already.

    Raises:
        DatasetError, RecipeError: see `train_loader`.
    """
    annotated = open_dataset(recipe, split) if annotated is None else annotated
    count = min(len(annotated), recipe.evaluate.max_images or len(annotated))
    return EvaluationLoader(EvaluationDataset(annotated), count, recipe.train.num_workers, rank, world_size)
