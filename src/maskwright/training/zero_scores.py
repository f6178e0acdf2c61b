"""Why the scores of a training stay at zero: the usual causes, as far as they can be checked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from maskwright.data.build import open_dataset
from maskwright.data.loader import SampleRequest, TrainingDataset
from maskwright.data.transforms import Augment
from maskwright.errors import printable_list
from maskwright.structures.annotations import Category, Target
from maskwright.training.optimizer import learning_rate_advice
from maskwright.training.setup import Session

ZERO = 0.0005  # scores below are shown as 0.000
_IMAGES = 64  # of each split that are read
_SECONDS = 10.0  # for each split
_FEW_EPOCHS = 5


def explain_zero_scores(session: Session, hint: str | None) -> str:
    """Return the causes found, on one line.

    Checked are: samples without an object, classes of one split that the other does not have, thresholds (`hint`, of
    the evaluation), and the learning rate for its batch size and its warm-up.
    """
    causes = [*_causes_in_data(session), *([hint] if hint else []), *_causes_in_schedule(session)]
    return "; ".join(causes) or (
        "objects and classes of both splits, thresholds and learning rate look right; see the examples in report.html "
        "and whether the loss falls"
    )


def _causes_in_data(session: Session) -> Iterator[str]:
    config, split = session.recipe.train, session.dataset
    samples = TrainingDataset(split, Augment(config.augment), config.seed)
    trained = _count_labels((samples[SampleRequest(0, i)].target for i in _spread(len(split))), split.categories)
    if not trained.any():
        yield (
            "no training sample that was looked at has an object: all pixels are ignored or cut off "
            "(data.categories, data.label_map, data.ignore_values, train.augment)"
        )
        return
    validation = open_dataset(session.recipe, "val")
    scored = _count_labels((validation.target(i) for i in _spread(len(validation))), split.categories)
    if not (trained.astype(bool) & scored.astype(bool)).any():
        yield (
            f"the training samples have only {_names(trained, split.categories)}, the validation images only "
            f"{_names(scored, split.categories)}"
        )


def _causes_in_schedule(session: Session) -> Iterator[str]:
    config, step = session.recipe.train, session.progress.step
    if advice := learning_rate_advice(config):
        yield advice
    if step < config.warmup_steps:
        yield f"the learning rate is still growing (step {step} of train.warmup_steps={config.warmup_steps})"
    epochs = step * config.batch_size / len(session.dataset)
    if epochs < _FEW_EPOCHS and not session.start:
        yield f"the weights started at random and have seen {epochs:.1f} epochs; train longer, or start from weights"


def _count_labels(targets: Iterator[Target], categories: Sequence[Category]) -> np.ndarray:
    """(K,) objects of each class, without crowds, in as many targets as can be read in time."""
    counts, deadline = np.zeros(len(categories), dtype=np.int64), time.perf_counter() + _SECONDS
    for target in targets:
        counts += np.bincount(target.labels[~target.is_crowd].numpy(), minlength=len(categories))
        if time.perf_counter() > deadline:
            break
    return counts


def _spread(length: int) -> list[int]:
    return [number * length // _IMAGES for number in range(_IMAGES)] if length > _IMAGES else list(range(length))


def _names(counts: np.ndarray, categories: Sequence[Category]) -> str:
    return printable_list(categories[label].name for label in np.flatnonzero(counts)) or "no object"
