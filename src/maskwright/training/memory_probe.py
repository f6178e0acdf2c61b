"""Memory and time of a run, measured before its first step on one micro-batch, without changing anything.

The peak memory of forward and backward is measured, with weights and gradients in it. What only the optimizer and the
moving average will add is computed.
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
from maskwright.training.step import backward_micro_batch, step_normalizers

logger = logging.getLogger(__name__)


@dataclass
class MemoryProbe:
    """Result of a probe, in this process.

    Attributes:
        images: of the micro-batch.
        seconds: for forward, losses and backward of the micro-batch.
        peak_gb: peak memory, with weights and gradients; on a CPU, of the whole process.
        state_gb: memory that optimizer and moving average will add.
    """

    images: int
    seconds: float
    peak_gb: float
    state_gb: float

    def describe(self, recipe: Recipe, steps: int, device: torch.device) -> str:
        """Describe the probe in one line, for a run with `steps` steps left."""
        memory = free_and_total_memory_gb(device)
        available = f" of {memory[1]:.1f} GB" if memory else " GB"
        step_seconds = self.seconds * recipe.train.gradient_accumulation_steps
        return (
            f"memory probe: {self.images} {'image' if self.images == 1 else 'images'}, forward and backward: "
            f"{self.seconds:.2f} s, peak {self.peak_gb:.1f} GB; with {self.state_gb:.1f} GB of optimizer state about "
            f"{self.peak_gb + self.state_gb:.1f}{available}. {steps} steps: about "
            f"{format_duration(steps * step_seconds)}, without data loading, evaluations and checkpoints"
        )


def probe_memory(
    accelerator: Accelerator, model: Segmenter, criterion: Criterion, recipe: Recipe, annotated: AnnotatedImages
) -> MemoryProbe:
    """Run one micro-batch of the first step forward and backward; all processes call it.

    Weights, buffers and gradients are restored.

    Raises:
        MaskwrightError: the images are too small and too few for batch normalization.
    """
    train = recipe.train.model_copy(update={"num_workers": 0, "progressive_resizing": ()})  # the largest samples
    recipe = recipe.model_copy(update={"train": train})
    rank, world = accelerator.process_index, accelerator.num_processes
    micro_batches = next(iter(train_loader(recipe, rank=rank, world_size=world, annotated=annotated)))
    normalizers = step_normalizers(accelerator, micro_batches, model, train)
    device = accelerator.device
    seconds = 0.0
    with _restored_buffers(model):
        for _ in range(1 if device.type == "cpu" else 2):  # an accelerator selects its kernels in the first pass
            reset_peak_memory(device)
            start = time.perf_counter()
            backward_micro_batch(accelerator, model, criterion, micro_batches[0], normalizers, train, 0)
            synchronize(device)
            seconds = time.perf_counter() - start
            model.zero_grad(set_to_none=True)
    optimizer_bytes = sum(
        sum(map(_local_bytes, group["params"])) * (1 if group["orthogonal"] else 2)
        for group in build_optimizer(model, train, fused=False).param_groups
    )
    ema_bytes = sum(map(_local_bytes, model.parameters())) if train.ema_decay else 0
    state_gb = (optimizer_bytes + ema_bytes) / 1e9
    return MemoryProbe(len(micro_batches[0].images), seconds, peak_memory_gb(device), state_gb)


def find_accumulation_steps(
    accelerator: Accelerator,
    model: Segmenter,
    criterion: Criterion,
    recipe: Recipe,
    annotated: AnnotatedImages,
    first: int | None,
) -> int:
    """Find the smallest number of micro-batches per step that fits into the memory of all processes.

    Args:
        accelerator: of this process.
        model: unwrapped and unsharded.
        criterion: of the run.
        recipe: its batch size is kept.
        annotated: the training split.
        first: number to try first: the one found before the run was resumed.

    Raises:
        MaskwrightError: not even one image fits.
    """
    images = recipe.train.batch_size // accelerator.num_processes
    for steps in (number for number in range(first or 1, images + 1) if images % number == 0):
        train = recipe.train.model_copy(update={"gradient_accumulation_steps": steps})
        failed = 0.0
        try:
            probe_memory(accelerator, model, criterion, recipe.model_copy(update={"train": train}), annotated)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not is_out_of_memory(error):
                raise
            failed = 1.0
        model.zero_grad(set_to_none=True)
        reset_peak_memory(accelerator.device)
        if not sum_over_processes(accelerator, (failed,))[0]:
            return steps
        logger.info("%d images at once do not fit into memory", images // steps)
    raise MaskwrightError(
        "a single image does not fit into memory",
        where="train.auto_gradient_accumulation",
        remedy="lower train.augment.crop_size or train.num_points, or set train.gradient_checkpointing=true",
    )


def format_duration(seconds: float) -> str:
    """Format seconds for people."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


@contextmanager
def _restored_buffers(model: nn.Module) -> Generator[None]:
    """Restore the buffers, such as batch norm statistics, after the block."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.copy_(value)


def _local_bytes(parameter: torch.Tensor) -> int:
    """Return the bytes of a parameter, or of this process's shard of it."""
    local = getattr(parameter, "to_local", lambda: parameter)()
    return local.numel() * local.element_size()
