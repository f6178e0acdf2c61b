"""`maskwright train`: the loop, one step, and what is written on the way."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from maskwright import __version__, draw
from maskwright.check import check_before_training
from maskwright.checkpoint import checkpoint_of, save_checkpoint, write_whole
from maskwright.data import open_dataset, train_loader
from maskwright.data.formats import AnnotatedImages
from maskwright.data.statistics import measure_pixels
from maskwright.device import has_fused_optimizer, start_engine, synchronise_batch_norms
from maskwright.errors import TrainingError
from maskwright.evaluate import Evaluation, check_classes, check_evaluation, evaluate, headline
from maskwright.finite import StepNumbers, Unchecked, not_finite, poisoned, skip_from_now_on, skips_on_device
from maskwright.initial_weights import load_initial_weights
from maskwright.journal import Journal, is_due
from maskwright.losses import Criterion, Losses, Normalisers, RandomPoints, count_normalisers
from maskwright.models import build_model
from maskwright.models.segmenter import Segmenter
from maskwright.optimizer import advise_on_rate, build_optimizer, describe_steps, rate_factor, set_rate
from maskwright.recipe import Recipe, TrainConfig, dump_recipe
from maskwright.run_folder import Progress, RunFolder
from maskwright.structures import Batch, send

logger = logging.getLogger(__name__)

EXAMPLES = 6  # pictures in the report


@dataclass
class Session:
    """One process's part of a run.

    Attributes:
        recipe: complete and resolved.
        engine: of this process.
        run: the folder.
        model: bare, not wrapped for several processes.
        optimizer: bare.
        progress: where the run stands.
        journal: what is told and logged.
        start: what became of the weights that it began with, one line for each decision.
    """

    recipe: Recipe
    engine: Accelerator
    run: RunFolder
    model: Segmenter
    optimizer: torch.optim.Optimizer
    progress: Progress
    journal: Journal
    start: list[str]


def train(recipe: Recipe, output: Path) -> dict | None:
    """Train a recipe, or go on with it where `output` holds an unfinished run.

    Args:
        recipe: complete and resolved.
        output: the run's folder.

    Returns:
        The last evaluation's scores, of a finished run those in its log; None without a validation split.

    Raises:
        MaskwrightError: the recipe, the data or the device cannot be used.
        TrainingError: a loss is not finite; the last checkpoint is kept.
    """
    config = recipe.train
    engine = start_engine(config.precision)
    torch.manual_seed(config.seed)
    opened = {name: open_dataset(recipe, name) for name in ("train", "val") if getattr(recipe.data, name)}
    dataset = opened["train"]
    if recipe.data.val:
        check_classes(dataset.categories, opened["val"].categories, "data.val")
        check_evaluation(recipe, "val", opened["val"])
    if config.check and engine.is_main_process:
        check_before_training(recipe, opened)
    recipe = with_pixel_statistics(recipe, dataset)
    model = build_model(recipe.model, dataset.categories)
    for name, part in list(model.named_children()):  # decoders always, as published
        if name != "backbone" or recipe.model.backbone_norm in ("sync", "statistics"):
            setattr(model, name, synchronise_batch_norms(part, engine))
    model.to(engine.device).train()
    optimizer = build_optimizer(model, config, fused=has_fused_optimizer(engine.device))
    run = RunFolder(output, recipe)
    progress = run.resume(model, optimizer)
    if is_finished(run, progress):
        logger.info("%s is finished: %d of %d steps; nothing to do", output, progress.step, config.steps)
        return run.last_scores()
    if progress.step:
        logger.info("going on after step %d of %d", progress.step, config.steps)
        start = run.start()
    else:
        start = load_initial_weights(model, recipe)
        for line in start:
            logger.info("%s", line)
    logger.info("%s", describe_steps(config, len(dataset), engine.num_processes))
    if advice := advise_on_rate(config):
        logger.warning("%s", advice)
    if engine.is_main_process:
        run.begin(progress, start)
    if progress.scaler and engine.scaler:
        engine.scaler.load_state_dict(progress.scaler)
    wrapped, stepper = engine.prepare(model, optimizer)
    criterion = build_criterion(config)
    rank, world = engine.process_index, engine.num_processes
    loader = train_loader(recipe, rank=rank, world=world, start_step=progress.step, annotated=dataset)
    journal = Journal(run, recipe, engine, progress.step)
    session = Session(recipe, engine, run, model, optimizer, progress, journal, start)
    scores = None
    with journal, Unchecked() as unchecked:
        if progress.step and is_evaluation_due(session):  # the process was ended before or during it
            scores = score(session)
        for step, parts in zip(range(progress.step, config.steps), loader, strict=False):
            rate = set_rate(optimizer, rate_factor(step, config))
            numbers = train_step(engine, wrapped, stepper, criterion, parts, config, step)
            progress.step = step + 1
            unchecked.add(numbers, at_once=is_looked_at(session))
            journal.step(progress.step, criterion, numbers.losses, numbers.gradient_norm, rate)
            if is_due(progress.step, config.checkpoint_every, config.steps):
                save_progress(session)
            if is_evaluation_due(session):
                scores = score(session)
    if engine.is_main_process and not recipe.data.val:
        export_model(run.path / "last.safetensors", session, None)
        write_report(session, Evaluation({}))
        export_model(run.path / "best.safetensors", session, None)
    engine.wait_for_everyone()
    return scores


def with_pixel_statistics(recipe: Recipe, train: AnnotatedImages) -> Recipe:
    """The recipe with numbers where `model.pixel_mean` or `pixel_std` is to be measured."""
    config = recipe.model
    if config.pixel_mean and config.pixel_std:
        return recipe
    measured = measure_pixels(train)
    values = {"pixel_mean": config.pixel_mean or measured.mean, "pixel_std": config.pixel_std or measured.std}
    for name, numbers in values.items():
        logger.info("model.%s is %s, of %d training pictures", name, list(numbers), measured.pictures)
    return recipe.model_copy(update={"model": config.model_copy(update=values)})


def train_step(
    engine: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: Criterion,
    parts: list[Batch],
    config: TrainConfig,
    step: int,
) -> StepNumbers:
    """One step over this process's share of the batch, in `config.accumulate` parts.

    Returns:
        Losses of the whole step, unweighted, see `Criterion`; and the gradient's norm before clipping. They have
        been checked, unless the device left out a damaged step by itself: then it is for the caller to do so.

    Raises:
        TrainingError: a loss or the gradient is not finite; names the terms, the step and the samples. Weights are
            unchanged.
    """
    normalisers = step_normalisers(engine, parts, model, config)
    optimizer.zero_grad(set_to_none=True)
    losses: list[Losses] = []
    for number, batch in enumerate(parts):
        batch = batch.to(engine.device)
        points = RandomPoints(config.seed, step, batch.keys, engine.device)
        last = number == len(parts) - 1
        with contextlib.nullcontext() if last else engine.no_sync(model):
            with engine.autocast():
                output = model(batch.images, batch.padding, intermediate=True)
            try:
                losses.append(criterion(output, batch.targets, points, normalisers))
            except TrainingError as error:
                raise not_finite(step, str(error), [target.image_id for target in batch.targets]) from None
            # Each process divides by the whole step's sums; DDP averages gradients, so the mean is undone here.
            engine.backward(poisoned(criterion.total(losses[-1])) * engine.num_processes)
    norm = engine.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf)
    numbers = StepNumbers(step, parts, losses, whole_step(engine, losses), norm, scaled=bool(engine.scaler))
    bare = getattr(optimizer, "optimizer", optimizer)
    if engine.scaler or not skips_on_device(bare):
        numbers.check()
    else:
        skip_from_now_on(bare, ~norm.isfinite())
    optimizer.step()
    return numbers


def whole_step(engine: Accelerator, parts: list[Losses]) -> Losses:
    """The sums of the losses over all parts and processes."""
    sizes = {term: len(values) for term, values in parts[0].items()}
    rows = [torch.cat([values.detach() for values in losses.values()]) for losses in parts]
    total = engine.reduce(torch.stack(rows).sum(0), "sum")
    return dict(zip(sizes, total.split(list(sizes.values())), strict=True))


def step_normalisers(engine: Accelerator, parts: list[Batch], model: nn.Module, config: TrainConfig) -> Normalisers:
    """Normalisers of the whole step: over all parts and processes."""
    targets = [target for batch in parts for target in batch.targets]
    queries = engine.unwrap_model(model).config.queries
    own = count_normalisers(targets, queries, config.no_object_weight)
    if engine.num_processes == 1:
        return own
    counts = send(torch.tensor(astuple(own), dtype=torch.float32), engine.device)
    return Normalisers(*engine.reduce(counts, "sum").unbind())


def build_criterion(config: TrainConfig) -> Criterion:
    """The criterion that a recipe describes."""
    return Criterion(
        class_weight=config.class_weight,
        mask_weight=config.mask_weight,
        dice_weight=config.dice_weight,
        no_object_weight=config.no_object_weight,
        points=config.points,
        oversample_ratio=config.oversample_ratio,
        importance_ratio=config.importance_ratio,
        semantic_weight=config.semantic_weight,
        hard_pixels=config.hard_pixels,
    )


def is_evaluation_due(session: Session) -> bool:
    """Whether the validation split is to be scored now, and has not been."""
    step, config = session.progress.step, session.recipe.train
    due = session.recipe.data.val is not None and is_due(step, config.evaluate_every, config.steps)
    return due and session.progress.evaluated < step


def is_looked_at(session: Session) -> bool:
    """Whether something of the step that was just made is logged, kept or scored."""
    step, config = session.progress.step, session.recipe.train
    dates = (config.log_every, config.checkpoint_every)
    return any(is_due(step, every, config.steps) for every in dates) or is_evaluation_due(session)


def is_finished(run: RunFolder, progress: Progress) -> bool:
    """Whether all is done that a run does, up to its last file."""
    if progress.step < run.recipe.train.steps:
        return False
    if run.recipe.data.val:
        return progress.evaluated == progress.step
    return (run.path / "best.safetensors").is_file()


def save_progress(session: Session) -> None:
    """Write a resumable checkpoint from the main process."""
    engine, progress = session.engine, session.progress
    if engine.is_main_process:
        progress.scaler = engine.scaler.state_dict() if engine.scaler else None
        session.run.save(session.model, session.optimizer, progress)
    engine.wait_for_everyone()


def score(session: Session) -> dict:
    """Score the validation split over all processes, log the scores, and keep the model if it is the best so far.

    Returns:
        The scores, on every process.
    """
    recipe, engine, run = session.recipe, session.engine, session.run
    start = time.perf_counter()
    evaluation = evaluate(
        session.model,
        recipe,
        precision=recipe.train.precision,
        rank=engine.process_index,
        world=engine.num_processes,
        gather=_gather_objects if engine.num_processes > 1 else None,
        examples=EXAMPLES if engine.is_main_process else 0,
    )
    session.journal.pause(time.perf_counter() - start)
    _, value = headline(evaluation.scores)
    better = value > session.progress.best
    session.progress.best = max(session.progress.best, value)
    session.progress.evaluated = session.progress.step
    if engine.is_main_process:
        session.journal.evaluation(session.progress.step, evaluation.scores, better)
        export_model(run.path / "last.safetensors", session, evaluation.scores)
        if better or not (run.path / "best.safetensors").is_file():
            export_model(run.path / "best.safetensors", session, evaluation.scores)
        write_report(session, evaluation)
    save_progress(session)
    return evaluation.scores


def write_report(session: Session, evaluation: Evaluation) -> None:
    """Write curves and report."""
    run = session.run
    write_whole(run.path / "curves.png", lambda file: draw.curves(run.log_file, file))
    write_whole(
        run.path / "report.html",
        lambda file: draw.report(
            run.path,
            file,
            recipe_yaml=dump_recipe(session.recipe),
            evaluation=evaluation.scores,
            pictures=evaluation.examples,
            categories=session.model.categories,
            facts=session.journal.facts(session.progress.step) | {"start": " · ".join(session.start) or "at random"},
        ),
    )


def export_model(path: Path, session: Session, scores: dict | None) -> None:
    """Write the model in our format."""
    provenance = {
        "maskwright": __version__,
        "run": path.parent.name,
        "start": session.start,
        "step": session.progress.step,
        "scores": scores,
    }
    save_checkpoint(path, checkpoint_of(session.model, session.recipe, provenance))


def _gather_objects(item: object) -> list:
    gathered: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, item)
    return gathered
