"""By what `camvid-lite` or `nuclei-lite` wins: its training without one part at a time, and the model in transformers.

Every configuration may use the same processor time for its steps, data loading included, in one process of one thread:
a few steps of each of its sample sizes, which are not counted, tell how many steps that is, and the schedule is scaled
to them. Processor time and not wall-clock time, because other programs on the machine change it less. We evaluate all
models: CamVid's on val and test, those of nuclei on val. This takes hours, so it only runs on request; results are
saved one by one, and the same command continues with those that are missing.

With `--vit-weights`, the configurations are the ways to use a pretrained DINOv2 ViT-S instead, beside the recipe.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.peer import peer_name
from benchmarks.peer_training import PeerTraining
from benchmarks.rows import Options, Part
from benchmarks.timing import threads
from maskwright.checkpoints.load import load_model
from maskwright.config.recipe import Recipe, load_recipe
from maskwright.errors import MaskwrightError
from maskwright.evaluation.evaluate import evaluate
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.training.run_lock import RunLock
from maskwright.training.setup import open_session
from maskwright.training.train import load_batches, take_step

WHOLE = "the recipe"  # the configuration without changes
ADAMW = ("train.optimizer=adamw",)  # at the recipe's learning rate: better than 3e-4 on a part of the training split
ONE_SIZE = ("train.progressive_resizing=[]",)
PEER = "peer: AdamW, samples of one size"
CONFIGURATIONS = {  # name: recipe overrides; the most important first
    WHOLE: (),
    PEER: (*ADAMW, *ONE_SIZE),
    "AdamW in place of Muon": ADAMW,
    "samples of one size": ONE_SIZE,
    "random backbone, at the whole learning rate": (
        "model.backbone_weights=null",
        "train.backbone_lr_multiplier=1",
    ),
    "AdamW, samples of one size": (*ADAMW, *ONE_SIZE),
    "float32": ("train.precision=fp32",),
}
SCORES = {"camvid-lite": ("mIoU", ("val", "test")), "nuclei-lite": ("AP", ("val",))}  # and the splits they are of
# The ViT has the rate of EoMT's authors, about 1e-4 and less in earlier blocks. With a patch of 16 pixels, as theirs.
VIT = (
    "model.backbone=vit_small_patch14_dinov2",
    "model.backbone_options={patch_size: 16, img_size: 320}",
    "model.pixel_mean=[123.675,116.28,103.53]",
    "model.pixel_std=[58.395,57.12,57.375]",
    "train.backbone_lr_multiplier=0.15",
    "train.layer_decay=0.8",
)
VIT_CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    WHOLE: (),
    "ViT-S, simple feature pyramid": VIT,
    "ViT-S, EoMT": (
        *VIT,
        "model.family=eomt",
        "model.query_blocks=3",
        "train.mask_annealing=[[0.17,0.33],[0.42,0.58],[0.67,0.83]]",
        *ADAMW,
        "train.learning_rate=4.0e-4",
        "train.backbone_lr_multiplier=0.3",
    ),
    "ViT-S frozen, simple feature pyramid": (*VIT, "train.frozen_stages=4"),
    "ViT-S, ViT-Adapter": (*VIT, "model.vit_pyramid=adapter"),
    "ViT-S frozen, ViT-Adapter": (*VIT, "model.vit_pyramid=adapter", "train.frozen_stages=4"),
}
CALIBRATION_STEPS = 5  # of each size; the fastest counts, because other load makes steps slower
OVERRIDES: tuple[str, ...] = ()  # recipe overrides of all configurations


@dataclass(frozen=True)
class Run:
    """A training of one configuration.

    Attributes:
        configuration: its name.
        seed: of weights, samples and points.
        steps: how many.
        images: trained on, repetitions included.
        seconds: processor time of the steps.
        scores: mIoU on each split, in 0..1.
    """

    configuration: str
    seed: int
    steps: int
    images: int
    seconds: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Side:
    """A started training: `step` takes a step, and `trained` returns the model."""

    step: Callable[[], object]
    trained: Callable[[], Segmenter]


def bench_ablation(options: Options) -> Part:
    """Train all configurations with all seeds, except those whose results are in `ablation.json` already.

    Raises:
        MaskwrightError: transformers is not installed, or the file holds results of another budget.
    """
    peer = peer_name()
    assert options.output, "checked by the caller"
    path = options.output / "ablation.json"
    steps, runs = _read(path, options.budget)
    configurations = _configurations(options)
    with threads(1):
        for name in configurations:
            for seed in range(options.seeds):
                if any((run.configuration, run.seed) == (name, seed) for run in runs):
                    continue
                if name not in steps:
                    steps[name] = _count_steps(name, options)
                runs.append(_train(name, _recipe(name, options, steps[name], seed), seed))
                _write(path, options.budget, steps, runs)
    rows = [_row(name, [run for run in runs if run.configuration == name]) for name in configurations]
    budget = f"{options.budget:g} s of processor time for each training, one process, one thread, {options.recipe}"
    return Part(
        [], [f"{budget}; per second of processor time; scores are {SCORES[options.recipe][0]}", f"peer: {peer}"], rows
    )


def _read(path: Path, budget: float) -> tuple[dict[str, int], list[Run]]:
    """Return the steps of each configuration and the finished runs; both are empty if there is no file."""
    if not path.is_file():
        return {}, []
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["budget"] != budget:
        raise MaskwrightError(
            f"holds results of a budget of {values['budget']:g} s, not {budget:g} s",
            where=path,
            remedy="set --budget to that, or another --output",
        )
    return values["steps"], [Run(**run) for run in values["runs"]]


def _write(path: Path, budget: float, steps: dict[str, int], runs: Sequence[Run]) -> None:
    text = json.dumps({"budget": budget, "steps": steps, "runs": [vars(run) for run in runs]}, indent=2)
    write_file_atomically(path, lambda temporary: temporary.write_text(f"{text}\n", encoding="utf-8"))


def _recipe(name: str, options: Options, steps: int, seed: int, more: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a configuration, its schedule scaled to a number of steps."""
    overrides = [f"data.root={options.data}", "train.num_workers=0", *OVERRIDES, *_configurations(options)[name]]
    if options.recipe == "nuclei-lite":
        overrides.append("evaluate.task=instance")
    whole = load_recipe(options.recipe, overrides)
    warmup = round(whole.train.warmup_steps / whole.train.steps * steps)
    scaled = [f"train.steps={steps}", f"train.warmup_steps={warmup}", f"train.seed={seed}"]
    return load_recipe(options.recipe, [*overrides, *scaled, *more])


def _configurations(options: Options) -> dict[str, tuple[str, ...]]:
    """Return the recipe overrides of each configuration by its name."""
    if options.vit_weights is None:
        return CONFIGURATIONS
    weights = f"model.backbone_weights={options.vit_weights.resolve()}"
    return {name: (*more, weights) if more else () for name, more in VIT_CONFIGURATIONS.items()}


def _count_steps(name: str, options: Options) -> int:
    """Return how many steps of a configuration take the processor time of the options."""
    phases = _recipe(name, options, 1, 0).train.progressive_resizing
    sizes = [*(phase.size for phase in phases), 1.0]
    equal = [f"{{until: {number / len(sizes)}, size: {size}}}" for number, size in enumerate(sizes[:-1], 1)]
    resizing = f"train.progressive_resizing=[{', '.join(equal)}]"
    seconds = []
    with _start(name, _recipe(name, options, CALIBRATION_STEPS * len(sizes), 0, [resizing])) as side:
        for _ in range(CALIBRATION_STEPS * len(sizes)):
            start = processor_seconds()
            side.step()
            seconds.append(processor_seconds() - start)
    ends = [*(phase.until for phase in phases), 1.0]
    mean = 0.0
    for number, (start, end) in enumerate(zip([0.0, *ends], ends, strict=False)):
        mean += (end - start) * min(seconds[CALIBRATION_STEPS * number :][:CALIBRATION_STEPS])
    return max(1, round(options.budget / mean))


def _train(name: str, recipe: Recipe, seed: int) -> Run:
    """Train and evaluate a configuration."""
    with _start(name, recipe) as side:
        start = processor_seconds()
        for _ in range(recipe.train.steps):
            side.step()
        seconds = processor_seconds() - start
        model = side.trained()
        score, splits = SCORES[recipe.name]
        scores = {
            split: float(evaluate(model, recipe, split, precision=recipe.train.precision).scores[score])
            for split in splits
        }
    return Run(name, seed, recipe.train.steps, recipe.train.steps * recipe.train.batch_size, seconds, scores)


@contextmanager
def _start(name: str, recipe: Recipe) -> Generator[Side]:
    """Start a training, ours or the peer's, in a temporary folder."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        if name == PEER:
            training = PeerTraining(recipe, folder)
            yield Side(lambda: training.step(training.next_batch()), lambda: load_model(training.save()))
            return
        with RunLock(folder) as lock:
            session = open_session(recipe, folder, lock)
            assert session, "a new folder holds no finished run"
            batches = load_batches(session)
            yield Side(lambda: take_step(session, next(batches)), lambda: session.model)


def processor_seconds() -> float:
    """Return the processor time of this process and its finished children, user and system."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _row(name: str, runs: Sequence[Run]) -> dict[str, str]:
    """Return a row of the table; values of several seeds are in their order."""
    speed = sum(run.images for run in runs) / sum(run.seconds for run in runs)
    row = {"": name, "steps": str(runs[0].steps), "images/s": f"{speed:.2f}"}
    for split in runs[0].scores:
        found = [run.scores[split] for run in runs]
        row |= {split: ", ".join(f"{score:.1%}" for score in found), f"{split} mean": f"{statistics.fmean(found):.1%}"}
    return row | {"processor s": ", ".join(f"{run.seconds:.0f}" for run in runs)}
