"""Set up a run in one process: data, model, optimizer, folder and logger, new or resumed from a checkpoint."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from maskwright.checkpoints.checkpoint import Checkpoint
from maskwright.checkpoints.finetune import identify_base, load_initial_weights
from maskwright.checkpoints.load import model_from_checkpoint
from maskwright.config.recipe import Recipe
from maskwright.config.schema import TrainConfig
from maskwright.data.build import open_dataset
from maskwright.data.check.check import check_before_training
from maskwright.data.fingerprint import fingerprint
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.loader import epoch_length
from maskwright.data.pixel_statistics import measure_pixel_statistics
from maskwright.errors import MaskwrightError, RecipeError, printable
from maskwright.evaluation.evaluate import check_classes, check_evaluation, check_not_empty
from maskwright.models import build_model
from maskwright.models.blocks import freeze_all_but_head, freeze_stages, recompute_blocks
from maskwright.models.lora import add_adapters, merge_adapters, split_adapters
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.device import (
    convert_sync_batch_norms,
    create_accelerator,
    gather_objects,
    has_fused_optimizer,
    use_deterministic_algorithms,
)
from maskwright.training.adapter_check import AdapterCheck
from maskwright.training.class_balance import balance_classes
from maskwright.training.ema import ExponentialMovingAverage
from maskwright.training.fsdp import full_tensor, shard
from maskwright.training.hang_watchdog import HangWatchdog
from maskwright.training.logger import RunLogger
from maskwright.training.losses.criterion import Criterion
from maskwright.training.memory_probe import find_accumulation_steps, probe_memory
from maskwright.training.optimizer import build_optimizer, describe_schedule, learning_rate_advice
from maskwright.training.run_folder import RunFolder, stored_recipe
from maskwright.training.run_lock import RunLock
from maskwright.training.step import build_criterion
from maskwright.training.trackers import check_trackers
from maskwright.training.training_checkpoint import Progress

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """Everything that one process of a run works with.

    Attributes:
        recipe: complete and resolved.
        dataset: the training split.
        repeat_factors: of its images, (N,) float64, for `train.repeat_threshold`; else None.
        accelerator: of this process.
        run: the run's folder.
        model: unwrapped; its weights may be sharded.
        wrapped_model: the model as accelerate prepared it.
        optimizer: unwrapped.
        wrapped_optimizer: the optimizer as accelerate prepared it.
        ema: moving average of the weights, if the recipe has one.
        criterion: the losses.
        progress: of the run.
        run_logger: writes the log.
        watchdog: detects hangs.
        start: how the weights were initialized, and what changed when the run was resumed, one line each.
        lock: on the run's folder.
        adapter_check: of a LoRA run.
    """

    recipe: Recipe
    dataset: AnnotatedImages
    repeat_factors: np.ndarray | None
    accelerator: Accelerator
    run: RunFolder
    model: Segmenter
    wrapped_model: nn.Module
    optimizer: torch.optim.Optimizer
    wrapped_optimizer: torch.optim.Optimizer
    ema: ExponentialMovingAverage | None
    criterion: Criterion
    progress: Progress
    run_logger: RunLogger
    watchdog: HangWatchdog
    start: list[str]
    lock: RunLock
    adapter_check: AdapterCheck | None


def open_session(recipe: Recipe, output: Path, lock: RunLock) -> Session | None:
    """Set up a run, new or resumed from its last checkpoint; None if it is finished.

    Args:
        recipe: complete and resolved.
        output: the run's folder.
        lock: on it; acquired here.

    Raises:
        MaskwrightError: the recipe, the data, the device or the folder cannot be used.
    """
    config = recipe.train
    check_trackers(config.trackers)
    if config.deterministic:
        use_deterministic_algorithms()
    accelerator = create_accelerator(config.precision)
    torch.manual_seed(config.seed)
    _acquire(lock, accelerator)
    splits = _open_data(recipe, accelerator)
    dataset = splits["train"]
    stored = stored_recipe(output)
    recipe = with_pixel_statistics(recipe, dataset, stored)
    recipe, repeat_factors = balance_classes(recipe, dataset, stored, accelerator)
    config = recipe.train
    run = RunFolder(output, recipe)
    checkpoint = run.latest_checkpoint()
    progress = checkpoint.progress if checkpoint else Progress()
    check_same_step(accelerator, progress.step, output)
    if run.is_finished(progress):
        logger.info("%s is finished: %d of %d steps; nothing to do", output, progress.step, config.steps)
        return None
    model = build_model(recipe.model, dataset.categories)
    _check_crop(model, config)
    model.check_window(recipe.evaluate.window_size)
    if checkpoint:
        logger.info("resuming from step %d/%d", progress.step, config.steps)
        start = run.start() + _note_changes(run, progress, _fingerprints(splits, accelerator))
    else:
        start = load_initial_weights(model, recipe)
        if config.lora:
            progress.base = identify_base(model, str(config.initial_weights))
            start.append(f"train.lora: the base is {progress.base.path} with SHA-256 {progress.base.sha256}")
        for line in start:
            logger.info("%s", line)
        progress.data = _fingerprints(splits, accelerator)
    prepare_model(model, recipe, accelerator)
    # Weights of 1x1 convolutions have gradients in the layout of their input; the copies cost nothing that matters.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    criterion = build_criterion(config, dataset.categories)
    epoch = len(dataset) if repeat_factors is None else epoch_length(repeat_factors)
    recipe = _plan_steps(recipe, accelerator, model, criterion, dataset, progress, epoch)
    config = recipe.train
    optimizer = build_optimizer(model, config, fused=has_fused_optimizer(accelerator.device))
    ema = ExponentialMovingAverage(model, config.ema_decay) if config.ema_decay else None
    if checkpoint:
        checkpoint.restore(model, optimizer, ema)
    if accelerator.is_main_process:
        run.begin(progress, start)
    if progress.scaler and accelerator.scaler:
        accelerator.scaler.load_state_dict(progress.scaler)
    return Session(
        recipe=recipe,
        dataset=dataset,
        repeat_factors=repeat_factors,
        accelerator=accelerator,
        run=run,
        model=model,
        wrapped_model=model if config.fsdp else accelerator.prepare(model),
        optimizer=optimizer,
        wrapped_optimizer=accelerator.prepare(optimizer),
        ema=ema,
        criterion=criterion,
        progress=progress,
        run_logger=RunLogger(run, recipe, accelerator, progress.step),
        watchdog=HangWatchdog(output, accelerator.process_index, config.hang_timeout_seconds),
        start=start,
        lock=lock,
        adapter_check=AdapterCheck(model) if config.lora else None,
    )


def _acquire(lock: RunLock, accelerator: Accelerator) -> None:
    """Lock the run's folder, or raise an error in all processes."""
    failure = None
    if accelerator.is_main_process:
        try:
            lock.acquire()
        except MaskwrightError as error:
            failure = error
    if failure := gather_objects(accelerator, failure)[0]:
        raise failure


def _open_data(recipe: Recipe, accelerator: Accelerator) -> dict[str, AnnotatedImages]:
    """Open and check the splits, so that errors appear before the first step."""
    splits = {name: open_dataset(recipe, name) for name in ("train", "val") if getattr(recipe.data, name)}
    check_not_empty(splits["train"], "data.train")
    if recipe.data.val:
        check_classes(splits["train"].categories, splits["val"].categories, "data.val")
        check_evaluation(recipe, "val", splits["val"], recipe.train.best_metric)
    if recipe.train.check_data and accelerator.is_main_process:
        check_before_training(recipe, splits)
    return splits


def _check_crop(model: Segmenter, config: TrainConfig) -> None:
    """Check that crops, which are padded to multiples of 32, are whole patches.

    Raises:
        RecipeError: they are not.
    """
    patch = model.window_divisor
    padded = [-(-side // 32) * 32 for side in config.augment.crop_size]
    if any(side % patch for side in padded):
        raise RecipeError(
            f"{list(config.augment.crop_size)} is padded to {padded}, not to multiples of the patch size {patch}",
            where="train.augment.crop_size",
            remedy=f"use multiples of {math.lcm(32, patch)}, or model.backbone_options={{patch_size: 16}}",
        )


def _fingerprints(splits: dict[str, AnnotatedImages], accelerator: Accelerator) -> dict[str, str]:
    """Return the fingerprints of the splits, taken by the main process."""
    own = {name: fingerprint(split) for name, split in splits.items()} if accelerator.is_main_process else {}
    return gather_objects(accelerator, own)[0]


# Keys of the validation that do not change scores; whether data.val does is decided by its fingerprint.
_SAME_SCORES = ("evaluate.batch_size", "evaluate.tile_mask_megabytes")


def _note_changes(run: RunFolder, progress: Progress, data: dict[str, str]) -> list[str]:
    """Log what a resumed run changes; return what concerns data and scores.

    If scores are no longer comparable, the best one so far is forgotten.
    """
    described = {key: f"{key}={printable(now)} (was {printable(was)})" for key, was, now in run.changes}
    if described:
        logger.info("%s: resuming with %s", run.path, ", ".join(described.values()))
    kept = [key for key in described if not key.startswith("train.") or key == "train.best_metric"]
    changes = [described[key] for key in kept]
    before, progress.data = progress.data or {}, data
    # Fingerprints of earlier versions are the beginning of ours.
    changed = {name: found for name, found in data.items() if not found.startswith(before.get(name, ""))}
    for name, found in changed.items():
        logger.warning("%s: data.%s has changed: it had %s, and has %s", run.path, name, before[name], found)
        changes.append(f"data.{name} has {found} (had {before[name]})")
    if "train" in changed:
        logger.warning("%s: the remaining steps use the changed data, in the order of its images", run.path)
    others = [key for key in kept if not key.startswith("data.") and key not in _SAME_SCORES]
    others += ["data.val"] if "data.val" in kept and not before else []
    if ("val" in changed or others) and progress.best_score >= 0:
        logger.warning("%s: earlier scores are not comparable; the best model is chosen among those to come", run.path)
        progress.best_score, progress.evaluations_without_improvement = -1.0, 0
    return [f"changed after step {progress.step}: {change}" for change in changes]


def with_pixel_statistics(recipe: Recipe, train: AnnotatedImages, stored: Recipe | None = None) -> Recipe:
    """Return the recipe with values for an empty `model.pixel_mean` or `pixel_std`: those of `stored`, or measured."""
    config = recipe.model
    if config.pixel_mean and config.pixel_std:
        return recipe
    if stored:
        values = {name: getattr(config, name) or getattr(stored.model, name) for name in ("pixel_mean", "pixel_std")}
        return recipe.model_copy(update={"model": config.model_copy(update=values)})
    measured = measure_pixel_statistics(train)
    values = {"pixel_mean": config.pixel_mean or measured.mean, "pixel_std": config.pixel_std or measured.std}
    for name, value in values.items():
        logger.info("model.%s is %s, measured on %d training images", name, list(value), measured.num_images)
    return recipe.model_copy(update={"model": config.model_copy(update=values)})


def prepare_model(model: Segmenter, recipe: Recipe, accelerator: Accelerator) -> None:
    """Move the model to the device, synchronize its norms, freeze, recompute and shard it, as the recipe says."""
    config = recipe.train
    for name, module in list(model.named_children()):  # norms of decoders are always synchronized, as published
        if name != "backbone" or recipe.model.backbone_norm == "sync":
            setattr(model, name, convert_sync_batch_norms(module, accelerator))
    if isinstance(adapter := getattr(model.backbone, "neck", None), nn.Module):  # and those of a ViT's adapter
        model.backbone.neck = convert_sync_batch_norms(adapter, accelerator)
    _freeze(model, config)
    model.to(accelerator.device).train()
    if config.gradient_checkpointing:
        logger.info("%d blocks are recomputed in the backward pass", recompute_blocks(model))
    if config.fsdp:
        shard(model, accelerator)


def _freeze(model: Segmenter, config: TrainConfig) -> None:
    """Freeze what the recipe does not train, and add its adapters."""
    if config.frozen_stages == "all_but_head":
        freeze_all_but_head(model)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        logger.info("train.frozen_stages: only the head is trained, %.2f million parameters", trained / 1e6)
    else:
        freeze_stages(model, config.frozen_stages)
    if config.lora:
        logger.info("%s", add_adapters(model, config.lora))


def _plan_steps(
    recipe: Recipe,
    accelerator: Accelerator,
    model: Segmenter,
    criterion: Criterion,
    dataset: AnnotatedImages,
    progress: Progress,
    epoch: int,
) -> Recipe:
    """Log the schedule, its expected time and memory, and advice; return the recipe with its accumulation steps.

    `epoch` is the number of samples of one.
    """
    if recipe.train.auto_gradient_accumulation:
        progress.gradient_accumulation_steps = find_accumulation_steps(
            accelerator, model, criterion, recipe, dataset, progress.gradient_accumulation_steps
        )
        changes = {"gradient_accumulation_steps": progress.gradient_accumulation_steps}
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
    config = recipe.train
    logger.info("%s", describe_schedule(config, epoch, accelerator.num_processes))
    if advice := learning_rate_advice(config):
        logger.warning("%s", advice)
    if config.probe_memory:
        probe = probe_memory(accelerator, model, criterion, recipe, dataset)
        logger.info("%s", probe.describe(recipe, config.steps - progress.step, accelerator.device))
    return recipe


def evaluation_state(session: Session) -> dict[str, Tensor]:
    """Return the weights that are scored and exported: averaged if there is an average, and unsharded.

    All processes call it. They share memory with the session, and keep adapters separate from their weights.
    """
    _broadcast_buffers(session)
    state = session.ema.tensors if session.ema else session.model.state_dict()
    return {key: full_tensor(tensor.detach()) for key, tensor in state.items()}


def evaluation_model(session: Session, state: dict[str, Tensor]) -> Segmenter:
    """Return the model with these weights, see `evaluation_state`; adapters are merged as when a file is read.

    It shares memory with the session, and is in evaluation mode unless it is the trained model itself.
    """
    model, recipe = session.model, session.recipe
    if not (session.ema or recipe.train.fsdp or recipe.train.lora):
        return model
    if recipe.train.lora:
        state = merge_adapters(*split_adapters(state), recipe.train.lora.alpha)
    checkpoint = Checkpoint(model.config, model.categories, recipe.evaluate, state, recipe)
    return model_from_checkpoint(checkpoint, session.accelerator.device)


def _broadcast_buffers(session: Session) -> None:
    """Give all processes the running statistics of the first, whose model is the one that is exported."""
    if session.accelerator.num_processes == 1:
        return
    buffers = dict(session.model.named_buffers())
    averaged = session.ema.tensors if session.ema else {}
    for buffer in (*buffers.values(), *(averaged[name] for name in buffers if name in averaged)):
        dist.broadcast(buffer, 0)


def check_same_step(accelerator: Accelerator, step: int, output: Path) -> None:
    """Check that all processes resume from the same step.

    Raises:
        MaskwrightError: they do not see the same checkpoint.
    """
    steps = gather_objects(accelerator, step)
    if other := next((rank for rank, found in enumerate(steps) if found != steps[0]), None):
        raise MaskwrightError(
            f"process 0 would resume from step {steps[0]}, but process {other} from step {steps[other]}",
            where=output,
            remedy="put --output on storage that all machines share",
        )
