"""One optimizer step: forward, losses and backward of each micro-batch, then clipping and the update.

Unusual: losses are divided by sums over the whole step, not over a micro-batch, and everything random depends on
(seed, step, sample) only. So neither the number of processes nor of micro-batches changes what is learned, and a
resumed run needs no saved state of a random generator.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import astuple

import torch
from accelerate import Accelerator
from torch import nn

from maskwright.config.schema import TrainConfig
from maskwright.data.transforms import progressive_scale
from maskwright.errors import MaskwrightError, TrainingError
from maskwright.models.segmenter import Segmenter
from maskwright.structures.annotations import Batch, Category, to_device
from maskwright.training.class_balance import weights_of_classes
from maskwright.training.fsdp import full_tensor, gradient_sync
from maskwright.training.losses.criterion import Criterion, Losses, Normalizers, count_normalizers
from maskwright.training.losses.point_sampling import RandomPoints, mix_seeds
from maskwright.training.nan_guard import (
    StepResult,
    can_skip_on_device,
    nonfinite_error,
    propagate_nonfinite,
    skip_updates,
)
from maskwright.training.phase_timer import phase


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: Criterion,
    micro_batches: list[Batch],
    config: TrainConfig,
    step: int,
) -> StepResult:
    """Take one step on this process's share of the batch, in `config.gradient_accumulation_steps` micro-batches.

    Returns:
        The unweighted losses of the whole step, see `Criterion`, and the gradient norm before clipping. They have been
        checked, unless the device skips a non-finite step by itself: then the caller must check them.

    Raises:
        TrainingError: a loss or the gradient is not finite; names the terms, the step and the images. The weights are
            unchanged.
    """
    segmenter: Segmenter = accelerator.unwrap_model(model)
    segmenter.begin_step(step, config)
    normalizers = step_normalizers(accelerator, micro_batches, segmenter, config)
    optimizer.zero_grad(set_to_none=True)
    losses: list[Losses] = []
    for number, batch in enumerate(micro_batches, start=1):
        with gradient_sync(accelerator, model, enabled=number == len(micro_batches)):
            losses.append(backward_micro_batch(accelerator, model, criterion, batch, normalizers, config, step))
    with phase("optimizer"):
        norm = full_tensor(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf))
        total = sum_losses(accelerator, losses)
        result = StepResult(step, micro_batches, losses, total, norm, scaled=bool(accelerator.scaler))
        unwrapped = getattr(optimizer, "optimizer", optimizer)
        if accelerator.scaler or not can_skip_on_device(unwrapped):
            result.check()
        else:
            skip_updates(unwrapped, ~norm.isfinite())
        optimizer.step()
    return result


def backward_micro_batch(
    accelerator: Accelerator,
    model: nn.Module,
    criterion: Criterion,
    batch: Batch,
    normalizers: Normalizers,
    config: TrainConfig,
    step: int,
) -> Losses:
    """Accumulate the gradients of one micro-batch; return its losses, unweighted and detached.

    Raises:
        MaskwrightError: the images are too small and too few for batch normalization.
        TrainingError: a matching cost is not finite.
    """
    batch = batch.to(accelerator.device)
    if (scale := progressive_scale(config, step)) < 1:  # keeps the number of points per area
        criterion = criterion.with_num_points(max(1, round(config.num_points * scale**2)))
    points = RandomPoints(config.seed, step, batch.keys, accelerator.device)
    torch.manual_seed(mix_seeds(config.seed, step, *batch.keys[0]))  # for drop path
    with phase("forward"), accelerator.autocast(), _naming_single_values():
        output = model(batch.images, batch.padding, intermediate=True)
    with phase("criterion"):
        try:
            losses = criterion(output, batch.targets, points, normalizers)
        except TrainingError as error:
            raise nonfinite_error(step, str(error), [target.image_id for target in batch.targets]) from None
    with phase("backward"):
        # Gradients are averaged over processes, but the normalizers already count all processes: undo the mean.
        accelerator.backward(propagate_nonfinite(criterion.total(losses)) * accelerator.num_processes)
    return {term: values.detach() for term, values in losses.items()}


@contextmanager
def _naming_single_values() -> Generator[None]:
    """Explain the error of a batch normalization whose features have one cell in all."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise MaskwrightError(
            "batch normalization needs more than one value per channel, but the last features of a step have one cell",
            where="train.batch_size",
            remedy="train on more or larger images per step, or set model.backbone_norm=frozen",
        ) from None


def sum_losses(accelerator: Accelerator, micro_batch_losses: list[Losses]) -> Losses:
    """Sum the losses over all micro-batches and processes."""
    sizes = {term: len(values) for term, values in micro_batch_losses[0].items()}
    flat = [torch.cat(list(losses.values())) for losses in micro_batch_losses]
    total = accelerator.reduce(torch.stack(flat).sum(0), "sum")
    return dict(zip(sizes, total.split(list(sizes.values())), strict=True))


def step_normalizers(
    accelerator: Accelerator, micro_batches: list[Batch], model: Segmenter, config: TrainConfig
) -> Normalizers:
    """Count the normalizers of the whole step: all micro-batches of all processes."""
    targets = [target for batch in micro_batches for target in batch.targets]
    weights = weights_of_classes(config, model.categories)
    own = count_normalizers(targets, model.config.num_queries, config.no_object_weight, weights)
    if accelerator.num_processes == 1:
        return own
    counts = to_device(torch.tensor(astuple(own), dtype=torch.float32), accelerator.device)
    return Normalizers(*accelerator.reduce(counts, "sum").unbind())


def build_criterion(config: TrainConfig, categories: Sequence[Category] = ()) -> Criterion:
    """Build the criterion that a recipe describes; `categories` are needed for `train.class_weights`."""
    return Criterion(
        class_weight=config.class_loss_weight,
        mask_weight=config.mask_loss_weight,
        dice_weight=config.dice_loss_weight,
        no_object_weight=config.no_object_weight,
        num_points=config.num_points,
        oversample_ratio=config.oversample_ratio,
        importance_sample_ratio=config.importance_sample_ratio,
        semantic_weight=config.semantic_loss_weight,
        ohem_pixels=config.ohem_pixels,
        class_weights=weights_of_classes(config, categories),
    )
