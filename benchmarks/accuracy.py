"""Accuracy of a small model on CamVid, from random weights, against transformers trained for 2.5 times as long.

Both see the batches of our loader and are evaluated by us on all validation images. Ours is trained by the command
line; theirs by AdamW with learning rate 3e-4, warm-up, poly decay over the remaining time, and samples of one size.
This takes most of an hour, so it only runs on request.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from benchmarks import peer
from benchmarks.rows import Options, Part, Row
from benchmarks.timing import WHOLE, Timing, threads
from maskwright.checkpoints.checkpoint import load_model, make_checkpoint, save_checkpoint
from maskwright.checkpoints.convert import convert
from maskwright.config.recipe import Recipe, load_recipe
from maskwright.data.build import open_dataset, train_loader
from maskwright.errors import MaskwrightError
from maskwright.evaluation.evaluate import evaluate
from maskwright.models import build_model
from maskwright.runtime.device import autocast

FACTOR = 2.5  # training time of theirs, relative to ours
RECIPE = "camvid-quick"
OVERRIDES: tuple[str, ...] = ()  # recipe overrides
_RATE, _DECAY, _CLIP, _WARM_UP = 3e-4, 0.05, 1.0, 50


def bench_accuracy(options: Options) -> Part:
    """Train both on the data of the options, and evaluate them.

    Raises:
        MaskwrightError: transformers is not installed, or our training failed.
    """
    name = peer.peer_name()
    overrides = [f"data.root={options.data}", f"train.precision={options.precision}", *OVERRIDES]
    recipe = load_recipe(RECIPE, overrides)
    with threads(options.threads), TemporaryDirectory() as folder:
        own, other = Path(folder) / "ours", Path(folder) / "theirs"
        seconds = _train_ours(overrides, own, options.threads)
        steps = _train_theirs(recipe, other, seconds * FACTOR, options)
        found = [evaluate(load_model(path), recipe).scores for path in (own / "last.safetensors", other)]
    row = Row(
        "time to accuracy",
        WHOLE,
        f"{RECIPE}, {options.precision}, {options.threads} threads",
        name,
        Timing([seconds]),
        None,
    )
    sides = ("ours", recipe.train.steps, seconds), (f"{name}, samples of one size", steps, seconds * FACTOR)
    lines = []
    for (side, count, time_of_side), scores in zip(sides, found, strict=True):
        accuracies = f"mIoU {scores['mIoU']:.1%}, pixel accuracy {scores['aAcc']:.1%}"
        lines.append(f"{side}: {count} steps in {time_of_side / 60:.1f} min, {accuracies}")
    return Part([row], lines)


def _train_ours(overrides: list[str], output: Path, threads: int) -> float:
    """Return the wall-clock time of the command, run as one process per thread.

    Raises:
        MaskwrightError: it failed; with its error message.
    """
    start = time.perf_counter()
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={threads}", "-m"] if threads > 1 else []
    command = [sys.executable, "-m", *launch, "maskwright", "train", RECIPE, *overrides, "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    told = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(command, env=environment, stdout=told[0], stderr=told[1], text=True, check=False)
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["nothing"]  # torchrun prints more after our error
        line = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise MaskwrightError(f"training {RECIPE} exited with status {done.returncode}: {line}")
    return time.perf_counter() - start


def _train_theirs(recipe: Recipe, output: Path, budget: float, options: Options) -> int:
    """Train theirs for `budget` seconds, save it, and return the number of steps."""
    import transformers

    torch.manual_seed(options.seed)
    whole_samples = recipe.model_copy(update={"train": recipe.train.model_copy(update={"progressive_resizing": ()})})
    start = output.with_name("start")  # so it has the settings and the size of ours
    fresh = build_model(recipe.model, open_dataset(recipe, "train").categories)
    save_checkpoint(start.with_suffix(".safetensors"), make_checkpoint(fresh, recipe, {}))
    convert(start.with_suffix(".safetensors"), start, to="transformers")
    config = transformers.Mask2FormerConfig.from_pretrained(start, train_num_points=recipe.train.num_points)
    model = transformers.Mask2FormerForUniversalSegmentation(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=_DECAY, fused=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.model.pixel_mean, recipe.model.pixel_std))
    batches, begin, steps = iter(train_loader(whole_samples)), time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < budget:
        (batch,) = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - spent / budget) ** 0.9 * min(1, 0.1 + 0.9 * steps / _WARM_UP)
        pixels = ((batch.images.float() - mean) / std).masked_fill(batch.padding[:, None], 0)
        masks = [target.masks.float() for target in batch.targets]
        with autocast(torch.device("cpu"), options.precision):
            loss = model(pixels, mask_labels=masks, class_labels=[target.labels for target in batch.targets]).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        steps += 1
    model.save_pretrained(output)
    shutil.copyfile(start / "preprocessor_config.json", output / "preprocessor_config.json")
    return steps
