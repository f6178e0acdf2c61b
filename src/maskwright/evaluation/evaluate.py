"""`maskwright evaluate`: run a model over a split and score it image by image; masks are never collected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import PIL.Image

from maskwright.config.recipe import Recipe
from maskwright.data.build import evaluation_loader, open_dataset
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.images.tiled_tiff import ArrayImage
from maskwright.errors import CheckpointError, DatasetError, RecipeError
from maskwright.evaluation.evaluation_targets import EvaluationTargets
from maskwright.evaluation.metrics.base import Metric, Scores, combine_scores
from maskwright.evaluation.metrics.build import build_metrics
from maskwright.inference.nothing_found import NothingFound, first_hint, merge_all
from maskwright.inference.pipeline import Pipeline
from maskwright.models.segmenter import Segmenter
from maskwright.results.draw import overlay_target, to_display_rgb
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.background import prefetch
from maskwright.structures.annotations import Category, Target, Task


@dataclass
class Evaluation:
    """Scores, and a few example results.

    Attributes:
        scores: plain values for JSON; see `metrics.base.Scores`.
        examples: (title, prediction, ground truth, image), as PIL images, followed by the semantic maps of the
            backbone's stages, if it has any.
        hint: what to change, if no image of this process has a segment; None otherwise.
    """

    scores: Scores
    examples: list[tuple] = field(default_factory=list)
    hint: str | None = None


@dataclass
class OpenSplit:
    """A split whose annotations are open, and the metrics that score it.

    Attributes:
        recipe: of the data and the metrics.
        split: "train", "val" or "test".
        annotated: the images.
        targets: what each metric is scored on.
        count: number of images to score.
    """

    recipe: Recipe
    split: str
    annotated: AnnotatedImages
    targets: EvaluationTargets
    count: int


@dataclass
class Share:
    """Outcome of a part of a split. Picklable, so that workers can send theirs.

    Attributes:
        metrics: of its images.
        images: number of its images.
        nothing_found: see `Pipeline.nothing_found`.
        examples: see `Evaluation`.
    """

    metrics: list[Metric]
    images: int = 0
    nothing_found: dict[Task, NothingFound] = field(default_factory=dict)
    examples: list[tuple] = field(default_factory=list)


def evaluate(
    model: Segmenter,
    recipe: Recipe,
    split: str = "val",
    *,
    precision: str = "fp32",
    rank: int = 0,
    world: int = 1,
    gather: Callable[[object], list] | None = None,
    examples: int = 0,
    on_image: Callable[[int], None] | None = None,
    on_result: Callable[[Segmentation, int | str], None] | None = None,
) -> Evaluation:
    """Score a model on a split of the recipe's data.

    Args:
        model: in evaluation mode or not; its mode is restored.
        recipe: its `data` and `evaluate` sections are used.
        split: "train", "val" or "test".
        precision: "fp32", "bf16" or "fp16".
        rank: index of this process; each scores its share, which may be empty.
        world: number of processes.
        gather: collects one object from every process, if world > 1.
        examples: number of example results to keep, evenly spread over the split.
        on_image: called with 1 after each image.
        on_result: called with each result of the recipe's task, and the image id of the annotations.

    Raises:
        CheckpointError: the classes of the model and the data differ.
        DatasetError: the split has no images, or annotations are invalid.
        MaskwrightError: the model does not support the task.
    """
    opened = open_split(model, recipe, split)
    share = score_share(
        model, opened, rank, world, precision=precision, examples=examples, on_image=on_image, on_result=on_result
    )
    per_process = gather(share.metrics) if gather else [share.metrics]
    merged = [_merge(parts) for parts in zip(*per_process, strict=True)]
    return Evaluation(_combine(merged), share.examples, first_hint(share.nothing_found))


def open_split(model: Segmenter, recipe: Recipe, split: str) -> OpenSplit:
    """Open the annotations of a split, and check that the model fits them.

    Raises:
        CheckpointError, DatasetError, MaskwrightError: see `evaluate`.
    """
    annotated = open_dataset(recipe, split)
    name = f"data.{split} of recipe '{recipe.name}'"
    check_classes(model.categories, annotated.categories, name)
    metrics = build_metrics(recipe.evaluate, annotated.categories)
    targets = EvaluationTargets(recipe, split, annotated, (metric.target_task for metric in metrics))
    for metric in metrics:
        model.check_task(metric.task)
    check_not_empty(annotated, name)
    count = min(len(annotated), recipe.evaluate.max_images or len(annotated))
    return OpenSplit(recipe, split, annotated, targets, count)


def score_share(
    model: Segmenter,
    opened: OpenSplit,
    rank: int = 0,
    world: int = 1,
    *,
    precision: str = "fp32",
    examples: int = 0,
    on_image: Callable[[int], None] | None = None,
    on_result: Callable[[Segmentation, int | str], None] | None = None,
) -> Share:
    """Score the images rank, rank + world, ... of a split; see `evaluate`."""
    settings = opened.recipe.evaluate
    images = evaluation_loader(opened.recipe, opened.split, rank, world, opened.annotated)
    metrics = build_metrics(settings, images.categories)
    tasks = tuple(dict.fromkeys([*(metric.task for metric in metrics), *([settings.task] if on_result else [])]))
    pipeline = Pipeline(
        model,
        settings,
        tasks,
        precision=precision,
        batch_size=settings.batch_size,
        confidence=any(metric.needs_confidence for metric in metrics),
    )
    stride = max(1, len(images) // examples) if examples else 0
    share = Share(metrics, len(images), pipeline.nothing_found)
    training = model.training
    model.eval()
    prepared = (
        (pipeline.prepare(ArrayImage(image.numpy())), (index, target, opened.targets.for_image(target)))
        for index, (image, target, _) in enumerate(images)
    )
    try:
        for result, (index, target, targets) in pipeline.segment(prefetch(prepared)):
            result.categories = images.categories  # a converted checkpoint may have no class names and ids
            for metric in metrics:
                if metric.task == result.task:
                    metric.update(result, targets[metric.target_task])
            if on_result and result.task == settings.task:
                on_result(result, target.image_id)
            if result.task != tasks[0]:
                continue
            if stride and index % stride == 0 and len(share.examples) < examples:
                share.examples.append(_example(result, target, pipeline))
            if on_image:
                on_image(1)
    finally:
        model.train(training)
    return share


def merge_shares(shares: Sequence[Share]) -> Evaluation:
    """Return the scores of shares that together are a split."""
    merged = [_merge(parts) for parts in zip(*(share.metrics for share in shares), strict=True)]
    return Evaluation(_combine(merged), hint=first_hint(merge_all(share.nothing_found for share in shares)))


def _combine(metrics: Sequence[Metric]) -> Scores:
    return combine_scores([metric.compute() for metric in metrics])


def check_evaluation(recipe: Recipe, split: str, annotated: AnnotatedImages, best: str | None = None) -> None:
    """Raise the errors that `evaluate` would raise for a recipe: a missing package or file, or classes that do not fit.

    Args:
        recipe: see `evaluate`.
        split: "train", "val" or "test".
        annotated: the opened split.
        best: name of the score that decides which model is best; None is the first.

    Raises:
        DatasetError: the split has no images; or see `EvaluationTargets`.
        MaskwrightError: see `build_metrics`.
        RecipeError: there is no score of that name.
    """
    check_not_empty(annotated, f"data.{split}")
    metrics = build_metrics(recipe.evaluate, annotated.categories)
    decisive = [metric.compute() for metric in metrics if metric.higher_is_better]
    names = [name for name, value in combine_scores(decisive).items() if _is_score(value)]
    if best is not None and best not in names:
        raise RecipeError(f"train.best_metric is '{best}', but evaluate.metrics gives the scores {', '.join(names)}")
    EvaluationTargets(recipe, split, annotated, (metric.target_task for metric in metrics))


def check_not_empty(annotated: AnnotatedImages, where: str) -> None:
    """Raise a DatasetError if a split has no images."""
    if not len(annotated):
        raise DatasetError("the split has no images", where=where, remedy="correct its files in the recipe")


def _is_score(value: object) -> bool:
    """Return whether a value is a score, by which models can be compared, and not a table or a count."""
    return not isinstance(value, dict | int)


def _merge(parts: Sequence[Metric]) -> Metric:
    first, *others = parts
    for other in others:
        first.merge(other)
    return first


def _example(result: Segmentation, target: Target, pipeline: Pipeline) -> tuple:
    """Return title, prediction, ground truth and image, and the semantic map of each stage that has one."""
    assert result.image is not None
    image = to_display_rgb(result.image)
    ground_truth = overlay_target(target, image, result.categories, result.task)
    stages = [stage.overlay() for stage in pipeline.semantic_stages(result.image)]
    return str(target.image_id), result.overlay(image), ground_truth, PIL.Image.fromarray(image), *stages


def check_classes(model: Sequence[Category], data: Sequence[Category], where: str) -> None:
    """Raise an error if the classes of model and data differ.

    Names such as "class 7", which checkpoints without class names get, match any name.

    Args:
        model: classes of the model, in label order.
        data: classes of the annotations, in label order.
        where: name of the data in errors.

    Raises:
        CheckpointError: number or names of the classes differ.
    """
    ours, theirs = ([category.name for category in categories] for categories in (model, data))
    if len(ours) != len(theirs):
        difference = f"{_classes(ours)}, but {where} has {_classes(theirs)}"
    else:
        pairs = enumerate(zip(ours, theirs, strict=True))
        named = [(i, a, b) for i, (a, b) in pairs if a != b and not re.fullmatch(r"class \d+", a)]
        if not named:
            return
        label, a, b = named[0]
        difference = f"{_classes(ours)}, and label {label} is '{a}', but in {where} it is '{b}'"
    raise CheckpointError(
        f"the checkpoint has {difference}",
        remedy="use the recipe it was trained with, or set data.categories and data.task",
    )


def _classes(names: list[str]) -> str:
    more = ", ..." if len(names) > 4 else ""
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({', '.join(names[:4])}{more})"


def headline(scores: Scores, best: str | None = None) -> tuple[str, float | None]:
    """Return name and value of the score that decides which model is best: `best`, or the first; None without data."""
    name = best or next(iter(scores))
    value = scores[name]
    return name, None if value is None or math.isnan(value) else float(value)
