"""One training step: forward, losses, backward and the optimizer, over all processes and accumulated parts.

Unusual here: losses are divided by the sums of the whole step and not of a part, and whatever is random in a part
depends on (seed, step, sample) alone. So neither the number of processes nor that of parts changes what is learned,
and a run that goes on needs no saved state of any random generator.
"""

from __future__ import annotations

import math
from dataclasses import astuple

import torch
from accelerate import Accelerator
from torch import nn

from maskwright.config.schema import TrainConfig
from maskwright.data.transforms import progressive_scale
from maskwright.errors import TrainingError
from maskwright.models.segmenter import Segmenter
from maskwright.structures.annotations import Batch, to_device
from maskwright.training.fsdp import reduce_gradients, whole_tensor
from maskwright.training.losses.criterion import Criterion, Losses, Normalisers, count_normalisers
from maskwright.training.losses.point_sampling import RandomPoints, mix_seeds
from maskwright.training.nan_guard import StepNumbers, not_finite, poisoned, skip_from_now_on, skips_on_device
from maskwright.training.stopwatch import part_of_step


def train_step(
    engine: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: Criterion,
    parts: list[Batch],
    config: TrainConfig,
    step: int,
) -> StepNumbers:
    """One step over this process's share of the batch, in `config.gradient_accumulation_steps` parts.

    Returns:
        Losses of the whole step, unweighted, see `Criterion`; and the gradient's norm before clipping. They have
        been checked, unless the device left out a damaged step by itself: then it is for the caller to do so.

    Raises:
        TrainingError: a loss or the gradient is not finite; names the terms, the step and the samples. Weights are
            unchanged.
    """
    normalisers = step_normalisers(engine, parts, engine.unwrap_model(model), config)
    optimizer.zero_grad(set_to_none=True)
    losses: list[Losses] = []
    for number, batch in enumerate(parts):
        with reduce_gradients(engine, model, now=number == len(parts) - 1):
            losses.append(backward_part(engine, model, criterion, batch, normalisers, config, step))
    with part_of_step("optimizer"):
        norm = whole_tensor(engine.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf))
        numbers = StepNumbers(step, parts, losses, whole_step(engine, losses), norm, scaled=bool(engine.scaler))
        bare = getattr(optimizer, "optimizer", optimizer)
        if engine.scaler or not skips_on_device(bare):
            numbers.check()
        else:
            skip_from_now_on(bare, ~norm.isfinite())
        optimizer.step()
    return numbers


def backward_part(
    engine: Accelerator,
    model: nn.Module,
    criterion: Criterion,
    batch: Batch,
    normalisers: Normalisers,
    config: TrainConfig,
    step: int,
) -> Losses:
    """Add one part's gradients; returns its losses, unweighted and detached.

    Raises:
        TrainingError: there is no matching, since a cost is not finite.
    """
    batch = batch.to(engine.device)
    if (scale := progressive_scale(config, step)) < 1:  # as many points per area
        criterion = criterion.with_num_points(max(1, round(config.num_points * scale**2)))
    points = RandomPoints(config.seed, step, batch.keys, engine.device)
    torch.manual_seed(mix_seeds(config.seed, step, *batch.keys[0]))  # of what is dropped
    with part_of_step("forward"), engine.autocast():
        output = model(batch.images, batch.padding, intermediate=True)
    with part_of_step("criterion"):
        try:
            losses = criterion(output, batch.targets, points, normalisers)
        except TrainingError as error:
            raise not_finite(step, str(error), [target.image_id for target in batch.targets]) from None
    with part_of_step("backward"):
        # Each process divides by the whole step's sums; gradients are averaged, so the mean is undone here.
        engine.backward(poisoned(criterion.total(losses)) * engine.num_processes)
    return {term: values.detach() for term, values in losses.items()}


def whole_step(engine: Accelerator, parts: list[Losses]) -> Losses:
    """The sums of the losses over all parts and processes."""
    sizes = {term: len(values) for term, values in parts[0].items()}
    rows = [torch.cat(list(losses.values())) for losses in parts]
    total = engine.reduce(torch.stack(rows).sum(0), "sum")
    return dict(zip(sizes, total.split(list(sizes.values())), strict=True))


def step_normalisers(engine: Accelerator, parts: list[Batch], model: Segmenter, config: TrainConfig) -> Normalisers:
    """Normalisers of the whole step: over all parts and processes."""
    targets = [target for batch in parts for target in batch.targets]
    own = count_normalisers(targets, model.config.num_queries, config.no_object_weight)
    if engine.num_processes == 1:
        return own
    counts = to_device(torch.tensor(astuple(own), dtype=torch.float32), engine.device)
    return Normalisers(*engine.reduce(counts, "sum").unbind())


def build_criterion(config: TrainConfig) -> Criterion:
    """The criterion that a recipe describes."""
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
    )
