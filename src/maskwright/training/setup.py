"""One process's part of a run: everything that the loop works with, put together from a recipe and a folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from maskwright.checkpoints.checkpoint import Checkpoint, model_from_checkpoint
from maskwright.checkpoints.finetune import load_initial_weights
from maskwright.config.recipe import Recipe
from maskwright.data.build import open_dataset
from maskwright.data.check.check import check_before_training
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.pixel_statistics import measure_pixel_statistics
from maskwright.errors import MaskwrightError
from maskwright.evaluation.evaluate import check_classes, check_evaluation
from maskwright.models import build_model
from maskwright.models.blocks import freeze_stages, recompute_blocks
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.device import (
    convert_sync_batch_norms,
    create_accelerator,
    gather_objects,
    has_fused_optimizer,
    use_deterministic_algorithms,
)
from maskwright.training.ema import MovingAverage
from maskwright.training.fsdp import is_sharded, shard, whole_tensor
from maskwright.training.hang_watchdog import StallWatch
from maskwright.training.logger import Journal
from maskwright.training.losses.criterion import Criterion
from maskwright.training.memory_probe import find_parts, try_part
from maskwright.training.optimizer import advise_on_rate, build_optimizer, describe_steps
from maskwright.training.run_folder import RunFolder
from maskwright.training.step import build_criterion
from maskwright.training.trackers import check_trackers
from maskwright.training.training_checkpoint import Progress

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """One process's part of a run.

    Attributes:
        recipe: complete and resolved.
        dataset: the training split.
        engine: of this process.
        run: the folder.
        model: bare; its weights lie in slices where it is sharded.
        network: the model as a step runs it.
        optimizer: bare.
        stepper: the optimizer as a step runs it.
        average: of the weights, where the recipe wants one.
        criterion: the losses.
        progress: where the run stands.
        journal: what is told and logged.
        watch: what notices a hang.
        start: what became of the weights that it began with, one line for each decision.
    """

    recipe: Recipe
    dataset: AnnotatedImages
    engine: Accelerator
    run: RunFolder
    model: Segmenter
    network: nn.Module
    optimizer: torch.optim.Optimizer
    stepper: torch.optim.Optimizer
    average: MovingAverage | None
    criterion: Criterion
    progress: Progress
    journal: Journal
    watch: StallWatch
    start: list[str]


def open_session(recipe: Recipe, output: Path) -> Session | None:
    """Everything of a run, new or where its last checkpoint stands; None where it is finished.

    Raises:
        MaskwrightError: the recipe, the data, the device or the folder cannot be used.
    """
    config = recipe.train
    check_trackers(config.trackers)
    if config.deterministic:
        use_deterministic_algorithms()
    engine = create_accelerator(config.precision)
    torch.manual_seed(config.seed)
    opened = {name: open_dataset(recipe, name) for name in ("train", "val") if getattr(recipe.data, name)}
    dataset = opened["train"]
    if recipe.data.val:
        check_classes(dataset.categories, opened["val"].categories, "data.val")
        check_evaluation(recipe, "val", opened["val"], config.best_metric)
    if config.check_data and engine.is_main_process:
        check_before_training(recipe, opened)
    recipe = with_pixel_statistics(recipe, dataset)
    run = RunFolder(output, recipe)
    saved = run.newest()
    progress = saved.progress if saved else Progress()
    check_same_step(engine, progress.step, output)
    if run.is_finished(progress):
        logger.info("%s is finished: %d of %d steps; nothing to do", output, progress.step, config.steps)
        return None
    model = build_model(recipe.model, dataset.categories)
    if saved:
        logger.info("going on after step %d of %d", progress.step, config.steps)
        start = run.start()
    else:
        start = load_initial_weights(model, recipe)
        for line in start:
            logger.info("%s", line)
    prepare_model(model, recipe, engine)
    criterion = build_criterion(config)
    if config.auto_gradient_accumulation:
        progress.accumulate = find_parts(engine, model, criterion, recipe, dataset, progress.accumulate)
        recipe = recipe.model_copy(
            update={"train": config.model_copy(update={"gradient_accumulation_steps": progress.accumulate})}
        )
        config = recipe.train
    logger.info("%s", describe_steps(config, len(dataset), engine.num_processes))
    if advice := advise_on_rate(config):
        logger.warning("%s", advice)
    if config.probe_memory:
        estimate = try_part(engine, model, criterion, recipe, dataset)
        logger.info("%s", estimate.describe(recipe, config.steps - progress.step, engine.device))
    optimizer = build_optimizer(model, config, fused=has_fused_optimizer(engine.device))
    average = MovingAverage(model, config.ema_decay) if config.ema_decay else None
    if saved:
        saved.restore(model, optimizer, average)
    if engine.is_main_process:
        run.begin(progress, start)
    if progress.scaler and engine.scaler:
        engine.scaler.load_state_dict(progress.scaler)
    return Session(
        recipe=recipe,
        dataset=dataset,
        engine=engine,
        run=run,
        model=model,
        network=model if config.fsdp else engine.prepare(model),
        optimizer=optimizer,
        stepper=engine.prepare(optimizer),
        average=average,
        criterion=criterion,
        progress=progress,
        journal=Journal(run, recipe, engine, progress.step),
        watch=StallWatch(output, engine.process_index, config.hang_timeout_seconds),
        start=start,
    )


def prepare_model(model: Segmenter, recipe: Recipe, engine: Accelerator) -> None:
    """Make a model what the recipe trains: on its device, with its norms, frozen, recomputed and sharded parts."""
    config = recipe.train
    for name, part in list(model.named_children()):  # decoders always, as published
        if name != "backbone" or recipe.model.backbone_norm == "sync":
            setattr(model, name, convert_sync_batch_norms(part, engine))
    model.to(engine.device).train()
    freeze_stages(model, config.frozen_stages)
    if config.gradient_checkpointing:
        logger.info("%d blocks are computed again in the backward pass", recompute_blocks(model))
    if config.fsdp:
        shard(model, engine)


def whole_model(session: Session) -> Segmenter:
    """The model that is scored and kept: of averaged weights where there are some, and put together where sharded.

    All processes call it. It shares memory with the session, and is in evaluation mode unless it is the trained model
    itself.
    """
    _share_statistics(session)
    state = session.average.tensors if session.average else session.model.state_dict()
    if not session.average and not is_sharded(state):
        return session.model
    whole = {key: whole_tensor(tensor.detach()) for key, tensor in state.items()}
    recipe, model = session.recipe, session.model
    checkpoint = Checkpoint(model.config, model.categories, recipe.evaluate, whole, recipe)
    return model_from_checkpoint(checkpoint, session.engine.device)


def _share_statistics(session: Session) -> None:
    """Give all processes the batch norms' running statistics of the first, whose model is the one that is kept."""
    if session.engine.num_processes == 1:
        return
    buffers = dict(session.model.named_buffers())
    averages = session.average.tensors if session.average else {}
    for buffer in (*buffers.values(), *(averages[name] for name in buffers if name in averages)):
        dist.broadcast(buffer, 0)


def check_same_step(engine: Accelerator, step: int, output: Path) -> None:
    """Refuse to go on from different steps in different processes.

    Raises:
        MaskwrightError: they do not see the same checkpoint.
    """
    steps = gather_objects(engine, step)
    if other := next((rank for rank, found in enumerate(steps) if found != steps[0]), None):
        raise MaskwrightError(
            f"{output}: process 0 would go on after step {steps[0]}, but process {other} after step {steps[other]}; "
            "put --output where all machines see the same files"
        )


def with_pixel_statistics(recipe: Recipe, train: AnnotatedImages) -> Recipe:
    """The recipe with numbers where `model.pixel_mean` or `pixel_std` is to be measured."""
    config = recipe.model
    if config.pixel_mean and config.pixel_std:
        return recipe
    measured = measure_pixel_statistics(train)
    values = {"pixel_mean": config.pixel_mean or measured.mean, "pixel_std": config.pixel_std or measured.std}
    for name, numbers in values.items():
        logger.info("model.%s is %s, of %d training pictures", name, list(numbers), measured.pictures)
    return recipe.model_copy(update={"model": config.model_copy(update=values)})
