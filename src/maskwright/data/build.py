"""A split of the recipe's data set: opened, as training batches, or as images to evaluate."""

from __future__ import annotations

from functools import partial

from maskwright.config.recipe import Recipe
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.loader import EvaluationImages, EvaluationSamples, SampleStream, TrainingBatches, TrainingSamples
from maskwright.data.transforms import Augment, relative_size
from maskwright.errors import DatasetError


def open_dataset(recipe: Recipe, split: str) -> AnnotatedImages:
    """The annotated images of one split, "train", "val" or "test", as `data.task` wants them.

    Raises:
        DatasetError, RecipeError: see `formats.open_annotations`.
    """
    return open_annotations(recipe.data, split, channels=recipe.model.channels)


def train_loader(
    recipe: Recipe, rank: int = 0, world: int = 1, start_step: int = 0, annotated: AnnotatedImages | None = None
) -> TrainingBatches:
    """Endless training steps of process `rank` of `world`, each a list of `train.gradient_accumulation_steps` batches.

    Steps count from `start_step`, and hold what they would hold in a run from step 0. `annotated` is the training
    split, where it is open already.

    Raises:
        DatasetError, RecipeError: see `formats.open_annotations`; while iterating, broken files raise a DatasetError or
            ImageError that names them. The split has no images, or the batch cannot be divided evenly.
    """
    train = recipe.train
    annotated = open_dataset(recipe, "train") if annotated is None else annotated
    if not len(annotated):
        raise DatasetError("data.train lists no image; name some to train on")
    size_at = partial(relative_size, train)
    stream = SampleStream(
        len(annotated),
        train.batch_size,
        train.seed,
        rank,
        world,
        start_step,
        train.gradient_accumulation_steps,
        size_at,
    )
    return TrainingBatches(TrainingSamples(annotated, Augment(train.augment), train.seed), stream, train.num_workers)


def evaluation_images(recipe: Recipe, split: str = "val", rank: int = 0, world: int = 1) -> EvaluationImages:
    """The images of a split for scoring, each once, in order; processes share them.

    Images and targets have the files' sizes; targets hold all annotated objects, crowds included.

    Raises:
        DatasetError, RecipeError: as `train_loader`.
    """
    annotated = open_dataset(recipe, split)
    samples = EvaluationSamples(annotated)
    count = min(len(annotated), recipe.evaluate.max_images or len(annotated))
    return EvaluationImages(samples, count, recipe.train.num_workers, rank, world)
