"""Remedies for rare classes: weights in the loss (`class_weights`) and repeated images (`repeat_threshold`)."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence

import numpy as np
from accelerate import Accelerator

from maskwright.config.recipe import Recipe
from maskwright.config.schema import TrainConfig
from maskwright.data.class_frequencies import ClassFrequencies, count_classes
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.loader import epoch_length
from maskwright.errors import MaskwrightError, RecipeError, printable, printable_list
from maskwright.runtime.device import gather_objects
from maskwright.structures.annotations import Category

logger = logging.getLogger(__name__)

_MIN_WEIGHT, _MAX_WEIGHT = 0.1, 10.0
_SHOWN = 6  # classes of each end of a list in the log


def balance_classes(
    recipe: Recipe, train: AnnotatedImages, stored: Recipe | None, accelerator: Accelerator
) -> tuple[Recipe, np.ndarray | None]:
    """Prepare class weights and repeat factors; all processes call it, and the first reads the annotations.

    Args:
        recipe: of the run.
        train: the training split.
        stored: recipe of the run that is resumed; its weights are used even if the split has changed.
        accelerator: of this process.

    Returns:
        The recipe with weights by class name in place of "balanced", and the repeat factor of each image, (N,)
        float64, or None.

    Raises:
        RecipeError: `train.class_weights` names an unknown class.
        DatasetError: annotations have to be read, and cannot be.
    """
    weights, threshold = recipe.train.class_weights, recipe.train.repeat_threshold
    check_class_names(recipe.train, train.categories)
    if weights == "balanced" and stored and isinstance(stored.train.class_weights, dict):
        weights = stored.train.class_weights
        logger.info("train.class_weights are kept from the run so far: %s", _describe(weights))
    if weights != "balanced" and threshold is None:
        return _with_weights(recipe, weights), None
    frequencies = _count_in_main_process(train, accelerator)
    if weights == "balanced":
        weights = _balanced_weights(recipe, frequencies, train.categories)
    if threshold is None:
        return _with_weights(recipe, weights), None
    factors = frequencies.repeat_factors(threshold)
    by_class = frequencies.class_repeat_factors(threshold)
    repeated = {train.categories[label].name: by_class[label] for label in np.flatnonzero(by_class > 1)}
    logger.info(
        "train.repeat_threshold=%g: an epoch has %d samples of %d images; %s",
        threshold,
        epoch_length(factors),
        len(train),
        f"factors {_describe(repeated)}" if repeated else "no class is rarer, so no image is repeated",
    )
    return _with_weights(recipe, weights), factors


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """(K,) float64 weights inversely proportional to (K,) counts, whose mean over everything counted is 1.

    A class without a count has weight 1. Weights are limited to 0.1..10: beyond, a single object of a rare class would
    outweigh its mask in the matching.
    """
    present = counts > 0
    weights = np.ones(len(counts))
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights.clip(_MIN_WEIGHT, _MAX_WEIGHT)


def weights_of_classes(config: TrainConfig, categories: Sequence[Category]) -> list[float] | None:
    """Return the weight of each class, in label order; None if the recipe has none.

    `train.class_weights` must be resolved by `balance_classes`, and is None or a mapping then.
    """
    if config.class_weights is None:
        return None
    assert isinstance(config.class_weights, dict), "balanced weights are counted by balance_classes"
    return [config.class_weights.get(category.name, 1.0) for category in categories]


def check_class_names(config: TrainConfig, categories: Sequence[Category]) -> None:
    """Raise a RecipeError if `train.class_weights` names a class that the training split does not have."""
    names = [category.name for category in categories]
    if not isinstance(config.class_weights, dict):
        return
    for unknown in config.class_weights:
        if unknown not in names:
            near = difflib.get_close_matches(unknown, names, 3, 0.4)
            hint = f"the nearest are {', '.join(map(printable, near))}" if near else f"classes: {printable_list(names)}"
            raise RecipeError(f"no class is called '{printable(unknown)}'; {hint}", where="train.class_weights")


def _count_in_main_process(train: AnnotatedImages, accelerator: Accelerator) -> ClassFrequencies:
    """Return the counts of the main process, or raise its error, in all processes."""
    outcome: ClassFrequencies | MaskwrightError | None = None
    if accelerator.is_main_process:
        try:
            outcome = count_classes(train)
        except MaskwrightError as error:
            outcome = error
    outcome = gather_objects(accelerator, outcome)[0]
    if isinstance(outcome, MaskwrightError):
        raise outcome
    return outcome


def _balanced_weights(
    recipe: Recipe, frequencies: ClassFrequencies, categories: Sequence[Category]
) -> dict[str, float]:
    counted, counts = "objects", frequencies.objects
    if recipe.model.family == "semantic_fpn":
        counted, counts = "pixels", frequencies.pixels
    elif recipe.data.task == "semantic":
        counted = "images with the class"
    values = balanced_weights(counts)
    weights = {category.name: float(f"{value:.4g}") for category, value in zip(categories, values, strict=True)}
    images = len(frequencies.labels_of_images)
    logger.info("train.class_weights=balanced by %s in %d images: %s", counted, images, _describe(weights))
    return weights


def _with_weights(recipe: Recipe, weights: dict[str, float] | str | None) -> Recipe:
    if weights == recipe.train.class_weights:
        return recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"class_weights": weights})})


def _describe(values: dict[str, float]) -> str:
    """Format values by class name, largest first; of many classes only both ends."""
    texts = [f"{printable(name)} {value:.3g}" for name, value in sorted(values.items(), key=lambda item: -item[1])]
    if len(texts) > 2 * _SHOWN:
        texts[_SHOWN:-_SHOWN] = [f"... {len(texts) - 2 * _SHOWN} more, see recipe.yaml ..."]
    return ", ".join(texts)
