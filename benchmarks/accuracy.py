"""Accuracy of a small model on CamVid from random weights, against the same model in transformers.

Two comparisons, and all four models are evaluated by us on val and test:

- equal settings: AdamW, samples of one size, one process, the same batches and steps; only the time may differ.
- each side's best: ours by the recipe, which uses Muon, smaller samples in most steps and one process per thread;
  theirs by the equal settings, for 2.5 times as long.

The peer is eager. Preparing its batches and masks is not timed, because we do that for it. All of this
takes more than an hour, so it only runs on request.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import peer
from benchmarks.peer_training import PeerTraining
from benchmarks.rows import Options, Part, Row
from benchmarks.timing import Timing, threads
from maskwright.checkpoints.load import load_model
from maskwright.config.recipe import Recipe, load_recipe
from maskwright.errors import MaskwrightError
from maskwright.evaluation.evaluate import evaluate

FACTOR = 2.5  # training time of theirs at its best, relative to ours
RECIPE = "camvid-quick"
EQUAL = ("train.optimizer=adamw", "train.learning_rate=3e-4", "train.progressive_resizing=[]", "train.steps=250")
OVERRIDES: tuple[str, ...] = ()  # recipe overrides


@dataclass(frozen=True)
class Training:
    """A finished training.

    Attributes:
        weights: file or folder of the last model.
        seconds: wall-clock time.
        processes: their number.
        recipe: what was trained.
    """

    weights: Path
    seconds: float
    processes: int
    recipe: Recipe

    def setting(self) -> str:
        """Return precision, optimizer, steps, samples, split and processes in words."""
        train = self.recipe.train
        rate = f"{train.optimizer} at {train.learning_rate:g}"
        samples = (
            f"samples of {len(train.progressive_resizing) + 1} sizes" if train.progressive_resizing else "one size"
        )
        processes = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return f"{train.precision}, {rate}, {train.steps} steps on train, {samples}, {processes}"

    def line(self, side: str) -> str:
        """Return setting, time, and the scores on each split."""
        scores = []
        for split in ("val", "test"):
            found = evaluate(load_model(self.weights), self.recipe, split).scores
            scores.append(f"{split} mIoU {found['mIoU']:.1%}, pixel accuracy {found['aAcc']:.1%}")
        return f"{side}: {self.setting()}, {self.seconds / 60:.1f} min: {'; '.join(scores)}"


def bench_accuracy(options: Options) -> Part:
    """Train both on the data of the options, with equal settings and at their best, and evaluate them.

    Raises:
        MaskwrightError: transformers is not installed, or our training failed.
    """
    name = peer.peer_name()
    overrides = [f"data.root={options.data}", f"train.precision={options.precision}", *OVERRIDES]
    with threads(options.threads), TemporaryDirectory() as place:
        folder = Path(place)
        ours = _train_ours([*overrides, *EQUAL], folder / "ours", 1, options.threads)
        theirs = _train_theirs(load_recipe(RECIPE, [*overrides, *EQUAL]), folder / "theirs")
        our_best = _train_ours(overrides, folder / "our-best", options.threads, options.threads)
        steps = max(1, round(FACTOR * our_best.seconds / theirs.seconds * theirs.recipe.train.steps))
        longer = load_recipe(RECIPE, [*overrides, *EQUAL, f"train.steps={steps}"])
        their_best = _train_theirs(longer, folder / "their-best")
        rows = [
            _row("equal settings", ours, name, options, theirs),
            _row("ours at its best", our_best, name, options, None),
        ]
        notes = [ours.line("ours, equal settings"), theirs.line(f"{name}, equal settings")]
        notes += [our_best.line("ours at its best"), their_best.line(f"{name} at its best")]
    return Part(rows, notes)


def _row(piece: str, ours: Training, name: str, options: Options, theirs: Training | None) -> Row:
    """Make a row of training times; there is a peer only where it takes the same steps."""
    setting = f"{ours.recipe.name}, {ours.setting()}, {options.threads} threads in all"
    return Row("accuracy", piece, setting, name, Timing([ours.seconds]), Timing([theirs.seconds]) if theirs else None)


def _train_ours(overrides: list[str], output: Path, processes: int, threads: int) -> Training:
    """Train by the command line, which shares the threads among the processes.

    Raises:
        MaskwrightError: it failed; with its error message.
    """
    start = time.perf_counter()
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *launch, "maskwright", "train", RECIPE, *overrides, "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads // processes)}
    told = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(command, env=environment, stdout=told[0], stderr=told[1], text=True, check=False)
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["nothing"]  # torchrun prints more after our error
        line = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise MaskwrightError(f"training {RECIPE} exited with status {done.returncode}: {line}")
    seconds = time.perf_counter() - start
    return Training(output / "last.safetensors", seconds, processes, load_recipe(RECIPE, overrides))


def _train_theirs(recipe: Recipe, output: Path) -> Training:
    """Train theirs with the batches, optimizer and schedule of the recipe; preparing a batch is not timed."""
    training, seconds = PeerTraining(recipe, output), 0.0
    for _ in range(recipe.train.steps):
        batch = training.next_batch()
        begin = time.perf_counter()
        training.step(batch)
        seconds += time.perf_counter() - begin
    return Training(training.save(), seconds, 1, recipe)
