"""`maskwright evaluate`: run a model over a split and score it, image by image; masks are never collected."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import PIL.Image

from maskwright.config.recipe import Recipe
from maskwright.data.build import evaluation_loader
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.images.tiled_tiff import ArrayImage
from maskwright.errors import CheckpointError, DatasetError, RecipeError
from maskwright.evaluation.evaluation_targets import Truths
from maskwright.evaluation.metrics.base import Metric, Scores, join_scores
from maskwright.evaluation.metrics.build import build_metrics
from maskwright.inference.pipeline import Inference
from maskwright.inference.preprocess import prepare
from maskwright.models.segmenter import Segmenter
from maskwright.results.draw import overlay_target, to_display_rgb
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.background import prefetch
from maskwright.structures.annotations import Category, Target


@dataclass
class Evaluation:
    """Scores, and a few results to look at.

    Attributes:
        scores: JSON-able; see `metrics.metric.Scores`.
        examples: (title, prediction, truth, plain image), pictures of PIL, and the semantic maps of a backbone's stages
            where it has any.
    """

    scores: Scores
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
        recipe: `data` says what is read, `evaluate` how images are prepared, decided on and scored.
        split: "train", "val" or "test".
        precision: "fp32", "bf16" or "fp16".
        rank: number of this process; each scores its share.
        world: number of processes.
        gather: collects one object of every process, where world > 1.
        examples: how many pictures to keep, spread over the split.
        on_image: called with 1 after each image.
        on_result: called with each result of the recipe's task, and its image as the annotations name it.

    Raises:
        CheckpointError: the model's classes are not those of the data.
        DatasetError: the split has no images, or annotations are broken.
        MaskwrightError: the model cannot do the task.
    """
    settings = recipe.evaluate
    images = evaluation_loader(recipe, split, rank=rank, world_size=world)
    check_classes(model.categories, images.categories, f"data.{split} of recipe '{recipe.name}'")
    metrics = build_metrics(settings, images.categories)
    truths = Truths(recipe, split, images.annotated, (metric.truth for metric in metrics))
    tasks = tuple(dict.fromkeys([*(metric.task for metric in metrics), *([settings.task] if on_result else [])]))
    inference = Inference(model, settings, tasks, precision=precision, batch_size=settings.batch_size)
    if not len(images):
        raise DatasetError(f"data.{split} of recipe '{recipe.name}' has no images")
    stride = max(1, len(images) // examples) if examples else 0
    pictures = []
    training = model.training
    model.eval()
    prepared = (
        (prepare(ArrayImage(image.numpy()), settings), (number, target, truths.of(target)))
        for number, (image, target, _) in enumerate(images)
    )
    try:
        for result, (number, target, annotated) in inference.segment(prefetch(prepared)):
            result.categories = images.categories  # a foreign checkpoint may have no names and ids for them
            for metric in metrics:
                if metric.task == result.task:
                    metric.update(result, annotated[metric.truth])
            if on_result and result.task == settings.task:
                on_result(result, target.image_id)
            if result.task != tasks[0]:
                continue
            if stride and number % stride == 0 and len(pictures) < examples:
                pictures.append(_picture(result, target, inference))
            if on_image:
                on_image(1)
    finally:
        model.train(training)
    shares = gather(metrics) if gather else [metrics]
    whole = [_merged(parts) for parts in zip(*shares, strict=True)]
    return Evaluation(join_scores([metric.compute() for metric in whole]), pictures)


def check_evaluation(recipe: Recipe, split: str, annotated: AnnotatedImages, best: str | None = None) -> None:
    """Raise now what `evaluate` would raise for a recipe: a missing package or file, or classes that do not fit.

    Args:
        recipe: see `evaluate`.
        split: "train", "val" or "test".
        annotated: the split, open.
        best: name of the score that decides which model is best; None is the first.

    Raises:
        DatasetError, MaskwrightError: see `metrics.build_metrics` and `data.Truths`.
        RecipeError: there is no such score.
    """
    metrics = build_metrics(recipe.evaluate, annotated.categories)
    names = [name for name, value in join_scores([metric.compute() for metric in metrics]).items() if _decides(value)]
    if best is not None and best not in names:
        raise RecipeError(f"train.best_metric is '{best}', but the scores of evaluate.metrics are {', '.join(names)}")
    Truths(recipe, split, annotated, (metric.truth for metric in metrics))


def _decides(value: object) -> bool:
    """Whether a score is one by which models can be compared: not a table, nor a count."""
    return not isinstance(value, dict | int)


def _merged(parts: Sequence[Metric]) -> Metric:
    first, *others = parts
    for other in others:
        first.merge(other)
    return first


def _picture(result: Segmentation, target: Target, inference: Inference) -> tuple:
    """Title, prediction, truth, the plain image, and the semantic map of each stage that has one."""
    assert result.image is not None
    image = to_display_rgb(result.image)
    truth = overlay_target(target, image, result.categories, result.task)
    stages = [stage.overlay() for stage in inference.semantic_stages(result.image)]
    return str(target.image_id), result.overlay(image), truth, PIL.Image.fromarray(image), *stages


def check_classes(model: Sequence[Category], data: Sequence[Category], where: str) -> None:
    """Refuse to score a model on labels that mean something else to it.

    Names like "class 7", which foreign checkpoints get when nothing is known of their classes, fit any.

    Args:
        model: its classes, in label order.
        data: the classes of the annotations, in label order.
        where: what errors call the data.

    Raises:
        CheckpointError: their numbers or names differ.
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
        difference = f"{_classes(ours)}, of which label {label} is '{a}', but in {where} it is '{b}'"
    raise CheckpointError(
        f"the checkpoint has {difference}; use the recipe it was trained with, or set data.categories and data.task"
    )


def _classes(names: list[str]) -> str:
    more = ", ..." if len(names) > 4 else ""
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({', '.join(names[:4])}{more})"


def headline(scores: Scores, best: str | None = None) -> tuple[str, float]:
    """The score that decides which checkpoint is best: its name and value, -1 where there is no data for it.

    It is the one called `best`, or the first.
    """
    name = best or next(iter(scores))
    value = scores[name]
    return name, -1.0 if value is None else float(value)
