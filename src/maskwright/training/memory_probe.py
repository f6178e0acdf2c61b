"""What a run will need, before its first step: measured by one trial of a part of that step, which changes nothing.

Time is that of the trial. Memory is the trial's peak on the device, with the weights and gradients in it, and on top,
computed, what only the optimizer and the moving average will add.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from maskwright.config.recipe import Recipe
from maskwright.data.build import train_loader
from maskwright.data.formats.base import AnnotatedImages
from maskwright.errors import MaskwrightError
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.device import (
    free_and_total_memory_gb,
    is_out_of_memory,
    peak_memory_gb,
    reset_peak_memory,
    sum_over_processes,
    synchronize,
)
from maskwright.training.losses.criterion import Criterion
from maskwright.training.optimizer import build_optimizer
from maskwright.training.step import backward_part, step_normalisers

logger = logging.getLogger(__name__)


@dataclass
class Estimate:
    """What was measured.

    Attributes:
        images: of the part, in this process.
        part_seconds: forward, losses and backward of one part.
        part_gb: peak memory of the trial, with weights and gradients; on a CPU of the whole process.
        state_gb: what optimizer and moving average will add, in this process.
    """

    images: int
    part_seconds: float
    part_gb: float
    state_gb: float

    def describe(self, recipe: Recipe, steps: int, device: torch.device) -> str:
        """In one line, for `steps` steps to go."""
        memory = free_and_total_memory_gb(device)
        total = memory[1] if memory else None
        there = f" of {total:.1f} GB" if total else ""
        whole = self.part_seconds * recipe.train.gradient_accumulation_steps
        return (
            f"a trial of {self.images} {'image' if self.images == 1 else 'images'}, forward and backward: "
            f"{self.part_seconds:.2f} s and {self.part_gb:.1f} GB, measured; with {self.state_gb:.1f} GB of optimizer "
            f"state, computed, about {self.part_gb + self.state_gb:.1f}{there}. {steps} steps: about "
            f"{duration(steps * whole)}, without waiting for data, evaluations and checkpoints"
        )


def try_part(
    engine: Accelerator, model: Segmenter, criterion: Criterion, recipe: Recipe, annotated: AnnotatedImages
) -> Estimate:
    """Run one part of the first step forward and backward; all processes call it.

    Weights, statistics and gradients are afterwards as they were.
    """
    train = recipe.train.model_copy(update={"num_workers": 0, "progressive_resizing": ()})  # the largest samples
    alone = recipe.model_copy(update={"train": train})
    rank, world = engine.process_index, engine.num_processes
    batch, *_ = parts = next(iter(train_loader(alone, rank=rank, world_size=world, annotated=annotated)))
    normalisers = step_normalisers(engine, parts, model, train)
    seconds = 0.0
    with _unchanged(model):
        for _ in range(1 if engine.device.type == "cpu" else 2):  # an accelerator chooses its kernels in the first
            reset_peak_memory(engine.device)
            start = time.perf_counter()
            backward_part(engine, model, criterion, batch, normalisers, train, 0)
            synchronize(engine.device)
            seconds = time.perf_counter() - start
            model.zero_grad(set_to_none=True)
    state = sum(
        sum(map(_local_bytes, group["params"])) * (1 if group["orthogonal"] else 2)
        for group in build_optimizer(model, train, fused=False).param_groups
    )
    average = sum(map(_local_bytes, model.parameters())) if recipe.train.ema_decay else 0
    return Estimate(len(batch.images), seconds, peak_memory_gb(engine.device), (state + average) / 1e9)


def find_parts(
    engine: Accelerator,
    model: Segmenter,
    criterion: Criterion,
    recipe: Recipe,
    annotated: AnnotatedImages,
    known: int | None,
) -> int:
    """The least number of parts of a step for which there is memory in all processes.

    Args:
        engine: of this process.
        model: bare and whole.
        criterion: of the run.
        recipe: whose batch keeps its size.
        annotated: the training split.
        known: where a run goes on, what was found at its start; tried first.

    Raises:
        MaskwrightError: one image at a time is too much.
    """
    share = recipe.train.batch_size // engine.num_processes
    for parts in (number for number in range(known or 1, share + 1) if share % number == 0):
        train = recipe.train.model_copy(update={"gradient_accumulation_steps": parts})
        failed = 0.0
        try:
            try_part(engine, model, criterion, recipe.model_copy(update={"train": train}), annotated)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not is_out_of_memory(error):
                raise
            failed = 1.0
        model.zero_grad(set_to_none=True)
        reset_peak_memory(engine.device)
        if not sum_over_processes(engine, (failed,))[0]:
            return parts
        logger.info("no memory for %d images at once", share // parts)
    raise MaskwrightError(
        "there is no memory for a single image; lower train.augment.crop_size or train.num_points, or set "
        "train.gradient_checkpointing=true"
    )


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


@contextmanager
def _unchanged(model: nn.Module) -> Generator[None]:
    """Buffers, such as statistics of batch norms, get their values back."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _local_bytes(parameter: torch.Tensor) -> int:
    """Bytes of a parameter, or of this process's slice of it."""
    local = getattr(parameter, "to_local", lambda: parameter)()
    return local.numel() * local.element_size()
