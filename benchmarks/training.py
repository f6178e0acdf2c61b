"""One training step against transformers, from forward to optimizer, with the same weights and objects.

Both sides use fused AdamW, gradient clipping, 12,544 points per mask, and frozen batch norms, whose scale and shift are
not trained, as in the published recipes. Masks and normalized pixels of the peer are prepared before the step. A third
side is the peer with its networks compiled by `torch.compile`; its criterion, which matches on the CPU, is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from benchmarks import peer
from benchmarks.prediction import number_format
from benchmarks.rows import Options, Part, Precision, compared
from benchmarks.timing import WHOLE, ModuleTimer, alternate, matrix_rate, peak_megabytes, threads, timed
from maskwright.checkpoints.checkpoint import Checkpoint
from maskwright.checkpoints.load import model_from_checkpoint, read_checkpoint
from maskwright.config.recipe import load_recipe
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.device import autocast, create_accelerator
from maskwright.structures.annotations import Batch, Target
from maskwright.training.losses.criterion import Criterion, Losses
from maskwright.training.optimizer import build_optimizer
from maskwright.training.step import build_criterion, train_step

if TYPE_CHECKING:
    from transformers import Mask2FormerForUniversalSegmentation

SIDE = 512  # pixels of the crop
OBJECTS = 12
PIECES = ("forward", "criterion", "optimizer")
REST = "backward and clipping"
CLIP = 0.01


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
        ours = our_step(folder, options.seed, options.precision)
        steps = [ours, their_step(load_for_training(folder), options.seed, options.precision)]
        with FlopCounterMode(display=False) as counter:
            ours.call()
        rate = matrix_rate(kind)
        others, other_notes = _other_calls(folder, options)
        sides = [step.timer.side(step.call, REST) for step in steps]
        timings = alternate([*sides, *(timed(call) for call in others.values())], options.rounds or 3)
        names = tuple(others)
        del ours, steps, others
        arguments = (folder, options.seed, options.precision)
        memory = (peak_megabytes(_take_ours, *arguments), peak_megabytes(_take_theirs, *arguments))
        imports = peer.imports_note(__name__)
    sizes = f"batch 1, {SIDE}x{SIDE}, 1 process, {options.threads} threads"
    setting = f"{options.backbone}, {options.precision}, AdamW, frozen batch norms, {sizes}"
    flops = counter.get_total_flops()
    whole, *pieces = (
        compared("training step", piece, setting, name, timings, piece, names) for piece in (WHOLE, *PIECES, REST)
    )
    rows = [replace(whole, memory=memory, roofline=flops / rate), *pieces]
    return Part(rows, [f"{flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s", imports, *other_notes])


def _other_calls(folder: Path, options: Options) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """Return calls of further sides by their names, and notes on them."""
    if not options.compile_minutes:
        return {}, []
    theirs = load_for_training(folder)
    peer.compile_networks(theirs)
    call = their_step(theirs, options.seed, options.precision).call
    compiled, note = peer.first_call(call, options.compile_minutes)
    return {peer.COMPILED: call} if compiled else {}, [note]


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


def our_step(folder: Path, seed: int, precision: Precision, side: int | None = None, crops: int = 1) -> Step:
    """Make our training step, as in `maskwright train`, on the machine's accelerator."""
    recipe = load_recipe("coco-panoptic-r50", [f"train.batch_size={crops}", f"train.precision={precision}"])
    engine = create_accelerator(precision)
    model = _with_fixed_norms(read_checkpoint(folder)).train().to(engine.device)
    optimizer = build_optimizer(model, recipe.train, fused=True)
    step = Step(model, optimizer)
    criterion: Any = _TimedCriterion(build_criterion(recipe.train), step.timer)
    batch, numbers = make_batch(seed, side or SIDE, crops), count()
    step.call = lambda: train_step(engine, model, optimizer, criterion, [batch], recipe.train, next(numbers))
    return step


def _with_fixed_norms(checkpoint: Checkpoint) -> Segmenter:
    """Build the model with frozen batch norms, as in the recipe; transformers' files do not say they are frozen."""
    config = checkpoint.config.model_copy(update={"backbone_norm": "frozen"})
    state = {name: tensor for name, tensor in checkpoint.state.items() if not name.endswith("num_batches_tracked")}
    return model_from_checkpoint(replace(checkpoint, config=config, state=state))


def load_for_training(folder: Path) -> Mask2FormerForUniversalSegmentation:
    """Load their model with frozen batch norms."""
    model = peer.load_theirs(folder).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


def their_step(
    model: Mask2FormerForUniversalSegmentation, seed: int, precision: Precision, side: int | None = None, crops: int = 1
) -> Step:
    """Make their training step; their model computes the losses if it is given objects."""
    device = model.device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, fused=True)
    step = Step(model.model, optimizer)
    model.criterion.register_forward_pre_hook(lambda *_: step.timer.start("criterion"))
    model.criterion.register_forward_hook(lambda *_: step.timer.stop("criterion"))
    batch = make_batch(seed, side or SIDE, crops)
    pixels = peer.normalized(batch.images).to(device)
    labels = [target.labels.to(device) for target in batch.targets]
    masks = [target.masks.float().to(device) for target in batch.targets]

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            output = model(pixel_values=pixels, mask_labels=masks, class_labels=labels)
        output.loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()

    step.call = call
    return step


def make_batch(seed: int, side: int, crops: int) -> Batch:
    """Make a batch of crops with rectangles as objects."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (crops, 3, side, side), dtype=torch.uint8, generator=generator)
    targets = [_target(side, generator) for _ in range(crops)]
    keys = [(0, index) for index in range(crops)]
    return Batch(images, torch.zeros(crops, side, side, dtype=torch.bool), targets, keys, [""] * crops)


def _target(side: int, generator: torch.Generator) -> Target:
    ids = torch.zeros(1, side, side, dtype=torch.int32)
    for number in range(OBJECTS):
        top, left = torch.randint(0, side * 3 // 4, (2,), generator=generator).tolist()
        ids[0, top : top + side // 4, left : left + side // 3] = number + 1
    labels = torch.randint(0, peer.CLASSES, (OBJECTS,), generator=generator)
    return Target(ids, labels, torch.zeros(OBJECTS, dtype=torch.bool), "crop", (side, side))


def _take_ours(folder: Path, seed: int, precision: Precision) -> None:
    our_step(folder, seed, precision).call()


def _take_theirs(folder: Path, seed: int, precision: Precision) -> None:
    their_step(load_for_training(folder), seed, precision).call()
