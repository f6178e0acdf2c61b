"""One training step against transformers, from forward to optimizer, with the same weights and objects.

Both sides use fused AdamW, gradient clipping, 12,544 points per mask, and batch norms with frozen statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from benchmarks import peer
from benchmarks.prediction import number_format
from benchmarks.rows import Options, Part, Precision, compared
from benchmarks.timing import WHOLE, ModuleTimer, alternate, matrix_rate, peak_megabytes, threads
from maskwright.checkpoints.checkpoint import Checkpoint, model_from_checkpoint, read_checkpoint
from maskwright.config.recipe import load_recipe
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.device import autocast, create_accelerator
from maskwright.structures.annotations import Batch, Target
from maskwright.training.losses.criterion import Criterion, Losses
from maskwright.training.optimizer import build_optimizer
from maskwright.training.step import build_criterion, train_step

SIDE = 512  # pixels of the crop
OBJECTS = 12
PIECES = ("forward", "criterion", "optimizer")
REST = "backward and clipping"
_CLIP = 0.01


def bench_training(options: Options) -> Part:
    """Time training steps of one crop on the CPU, and their components.

    Raises:
        MaskwrightError: transformers is not installed, or this CPU only emulates the precision.
    """
    from torch.utils.flop_counter import (
        FlopCounterMode,
    )  # imported here because it imports Triton, which would count as memory of the measured processes

    name, kind = peer.peer_name(), number_format(options.precision)
    with threads(options.threads), peer.saved_model(options.backbone, options.seed) as folder:
        steps = [make(folder, options.seed, options.precision) for make in (our_step, their_step)]
        with FlopCounterMode(display=False) as counter:
            steps[0].call()
        rate = matrix_rate(kind)
        timings = alternate([step.timer.side(step.call, REST) for step in steps], options.rounds or 3)
        del steps
        arguments = (folder, options.seed, options.precision)
        memory = (peak_megabytes(_take_ours, *arguments), peak_megabytes(_take_theirs, *arguments))
    setting = f"{options.backbone}, {options.precision}, batch 1, {SIDE}x{SIDE}, {options.threads} threads"
    flops = counter.get_total_flops()
    whole = compared("training step", WHOLE, setting, name, timings)
    pieces = [compared("training step", piece, setting, name, timings, piece) for piece in (*PIECES, REST)]
    rows = [replace(whole, memory=memory, roofline=flops / rate), *pieces]
    return Part(rows, [f"{flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s"])


class Step:
    """A repeatable training step, timed by component."""

    def __init__(self, forward: nn.Module, optimizer: Optimizer) -> None:
        self.timer = ModuleTimer({"forward": forward})
        self.call: Callable[[], object] = lambda: None
        optimizer.register_step_pre_hook(lambda *_: self.timer.start("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self.timer.stop("optimizer"))


class _TimedCriterion:
    """A criterion that is timed as a component."""

    def __init__(self, criterion: Criterion, timer: ModuleTimer) -> None:
        self.criterion, self.timer, self.total = criterion, timer, criterion.total

    def __call__(self, *arguments: object) -> Losses:
        self.timer.start("criterion")
        losses = self.criterion(*arguments)  # ty: ignore[invalid-argument-type]
        self.timer.stop("criterion")
        return losses


def our_step(folder: Path, seed: int, precision: Precision) -> Step:
    """Make our training step, as in `maskwright train`."""
    recipe = load_recipe("coco-panoptic-r50", ["train.batch_size=1", f"train.precision={precision}"])
    model = _with_fixed_norms(read_checkpoint(folder)).train()
    engine = create_accelerator(precision)
    optimizer = build_optimizer(model, recipe.train, fused=True)
    step = Step(model, optimizer)
    criterion: Any = _TimedCriterion(build_criterion(recipe.train), step.timer)
    batch, numbers = _batch(seed), count()
    step.call = lambda: train_step(engine, model, optimizer, criterion, [batch], recipe.train, next(numbers))
    return step


def _with_fixed_norms(checkpoint: Checkpoint) -> Segmenter:
    """Build the model with frozen batch norms, as in the recipe; transformers' files do not say they are frozen."""
    config = checkpoint.config.model_copy(update={"backbone_norm": "frozen"})
    state = {name: tensor for name, tensor in checkpoint.state.items() if not name.endswith("num_batches_tracked")}
    return model_from_checkpoint(replace(checkpoint, config=config, state=state))


def their_step(folder: Path, seed: int, precision: Precision) -> Step:
    """Make their training step; their model computes the losses if it is given objects."""
    model = peer.load_theirs(folder).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    step = Step(model.model, optimizer)
    model.criterion.register_forward_pre_hook(lambda *_: step.timer.start("criterion"))
    model.criterion.register_forward_hook(lambda *_: step.timer.stop("criterion"))
    batch = _batch(seed)
    pixels = peer.normalized(batch.images)
    labels = [target.labels for target in batch.targets]

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        masks = [target.masks.float() for target in batch.targets]  # done by their loader for each sample
        with autocast(torch.device("cpu"), precision):
            output = model(pixel_values=pixels, mask_labels=masks, class_labels=labels)
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()

    step.call = call
    return step


def _batch(seed: int) -> Batch:
    """Make a batch of one crop with rectangles as objects."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    ids = torch.zeros(1, SIDE, SIDE, dtype=torch.int32)
    for number in range(OBJECTS):
        top, left = torch.randint(0, SIDE * 3 // 4, (2,), generator=generator).tolist()
        ids[0, top : top + SIDE // 4, left : left + SIDE // 3] = number + 1
    labels = torch.randint(0, peer.CLASSES, (OBJECTS,), generator=generator)
    target = Target(ids, labels, torch.zeros(OBJECTS, dtype=torch.bool), "crop", (SIDE, SIDE))
    return Batch(images, torch.zeros(1, SIDE, SIDE, dtype=torch.bool), [target], [(0, 0)], [""])


def _take_ours(folder: Path, seed: int, precision: Precision) -> None:
    our_step(folder, seed, precision).call()


def _take_theirs(folder: Path, seed: int, precision: Precision) -> None:
    their_step(folder, seed, precision).call()
