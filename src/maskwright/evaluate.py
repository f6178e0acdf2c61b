"""`maskwright evaluate`: run a model over a split and score it, image by image; masks are never collected."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import PIL.Image
import torch

from maskwright.data import evaluation_loader
from maskwright.data.image import load_image
from maskwright.device import autocast
from maskwright.draw import paint_target
from maskwright.errors import CheckpointError, DatasetError
from maskwright.metrics import build_metric
from maskwright.models.mask2former import Mask2Former
from maskwright.postprocess import segment
from maskwright.recipe import Recipe
from maskwright.structures import Batch, Category, Segmentation, Task

HEADLINE = {"semantic": "mIoU", "panoptic": "PQ", "instance": "AP"}


@dataclass
class Evaluation:
    """Scores, and a few results to look at.

    Attributes:
        scores: JSON-able; see `metrics`.
        examples: (title, prediction, truth, plain image), pictures of PIL.
    """

    scores: dict
    examples: list[tuple] = field(default_factory=list)


def evaluate(
    model: Mask2Former,
    recipe: Recipe,
    split: str = "val",
    *,
    precision: str = "fp32",
    rank: int = 0,
    world: int = 1,
    gather: Callable[[object], list] | None = None,
    examples: int = 0,
    on_image: Callable[[int], None] | None = None,
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
        on_image: called with the number of images of each batch.

    Raises:
        CheckpointError: the model's classes are not those of the data.
        DatasetError: the split has no images, or annotations are broken.
    """
    loader = evaluation_loader(recipe, split, rank=rank, world=world)
    check_classes(model.categories, loader.categories, f"data.{split} of recipe '{recipe.name}'")
    metric = build_metric(recipe.evaluate.task, model.categories)
    device = next(model.parameters()).device
    if not len(loader):
        raise DatasetError(f"data.{split} of recipe '{recipe.name}' has no images")
    stride = max(1, len(loader) // examples) if examples else 0
    pictures = []
    training = model.training
    model.eval()
    try:
        for number, batch in enumerate(loader):
            results = predict_batch(model, batch, recipe, device, precision)
            for result, target in zip(results, batch.targets, strict=True):
                metric.update(result, target)
            if stride and number % stride == 0 and len(pictures) < examples:
                pictures.append(_picture(results[0], batch, recipe))
            if on_image:
                on_image(len(batch))
    finally:
        model.train(training)
    if gather:
        first, *others = gather(metric)
        for other in others:
            first.merge(other)
        metric = first
    return Evaluation(metric.compute(), pictures)


@torch.no_grad()
def predict_batch(
    model: Mask2Former, batch: Batch, recipe: Recipe, device: torch.device, precision: str
) -> list[Segmentation]:
    """Results of a batch, each at its image's original size."""
    height, width = batch.images.shape[-2:]
    moved = batch.to(device)
    with autocast(device, precision):
        output = model(moved.images, moved.padding)
    return [
        segment(
            output.final.image(index),
            recipe.evaluate.task,
            padded_size=(height, width),
            input_size=size,
            output_size=target.original_size,
            categories=model.categories,
            config=recipe.evaluate,
        )
        for index, (size, target) in enumerate(zip(batch.sizes, batch.targets, strict=True))
    ]


def _picture(result: Segmentation, batch: Batch, recipe: Recipe) -> tuple:
    """Title, prediction, truth and the plain image of a batch's first image."""
    target, result.image = batch.targets[0], load_image(batch.paths[0])
    truth = paint_target(target, result.image, result.categories, recipe.evaluate.task)
    return str(target.image_id), result.overlay(), truth, PIL.Image.fromarray(result.image)


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


def headline(scores: dict, task: Task) -> float:
    """The score that decides which checkpoint is best; -1 where there is no data for it."""
    value = scores.get(HEADLINE[task])
    return -1.0 if value is None else float(value)
