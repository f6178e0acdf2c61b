"""The command line: parse, call one verb, print. No logic, and nothing heavy is imported before a verb is chosen."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter, validators

from maskwright import __version__
from maskwright.bench import PartName
from maskwright.errors import MaskwrightError, RunInterrupted

app = App(
    name="maskwright",
    help="Universal image segmentation with Mask2Former: train, evaluate, predict and convert, on any device.",
    version=__version__,
    version_flags=["--version"],
    help_format="plaintext",  # markdown would cost a third of the time of --help
    suppress_keyboard_interrupt=False,  # `main` says so in a word
)

Task = Literal["semantic", "instance", "panoptic"]
Precision = Literal["fp32", "bf16", "fp16"]
Layout = Literal["maskwright", "transformers", "detectron2", "mmdetection", "mmsegmentation"]
Benchmark = Literal["coco", "cityscapes", "ade20k"]
_OUTPUT = Parameter(name=["--output", "-o"])
_NOT_NEGATIVE = validators.Number(gte=0)
_AT_LEAST_ONE = validators.Number(gte=1)


@app.command
def train(
    recipe: str,
    *overrides: str,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    profile: Annotated[bool, Parameter(negative=())] = False,
    benchmark: int | None = None,
) -> None:
    """Train a recipe, or go on with an unfinished run.

    Started again with the same output folder, a run goes on where its last checkpoint was written. On SIGTERM it saves
    where it stands, and leaves with exit status 75.

    Parameters
    ----------
    recipe
        Name of a recipe (see `maskwright recipes`) or a YAML file.
    overrides
        Values to change, as key.path=value: data.root=/data/coco train.steps=1000 model.backbone=resnet50 ...
    output
        Folder of the run; default: runs/NAME.
    profile
        Also trace the third to fifth step into profile-rank-0.json, for Perfetto or chrome://tracing.
    benchmark
        Only measure so many steps: images per second, time by part, memory. Nothing is scored or written.
    """
    from maskwright.recipe import load_recipe
    from maskwright.train import train as run

    loaded = load_recipe(recipe, overrides)
    if benchmark is not None:
        from maskwright.benchmark import benchmark as measure

        found = measure(loaded, benchmark)
        if _speaks():
            print(found.table())
        return
    folder = output or Path("runs") / loaded.name
    run(loaded, folder, profile=profile)
    if _speaks():
        print(f"\nReport: {folder / 'report.html'}\nModel:  {folder / 'best.safetensors'}")


@app.command
def evaluate(
    checkpoint: Path,
    recipe: str,
    *overrides: str,
    split: Literal["train", "val", "test"] = "val",
    task: Task | None = None,
    submission: Benchmark | None = None,
    output: Annotated[Path, _OUTPUT] = Path("submission"),
    device: str | None = None,
    precision: Precision = "fp32",
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Score a checkpoint on a split, by the rules of COCO, Cityscapes or mmseg: the recipe's evaluate.metrics.

    Parameters
    ----------
    checkpoint
        Weight file of any known layout, or the name of a published model (see `maskwright zoo`).
    recipe
        Recipe that says which data and how images are prepared.
    overrides
        Values to change, as key.path=value.
    split
        Which images.
    task
        Kind of results to score; default: the recipe's evaluate.task, where panoptic includes the others' metrics.
    submission
        Also write the results as this benchmark takes them.
    output
        Folder of the submission.
    device
        cpu, cuda, mps, ...; default: the machine's accelerator.
    precision
        Number format of the network.
    json_
        Print JSON instead of tables.
    """
    from maskwright.checkpoint import load_model
    from maskwright.device import pick_device
    from maskwright.evaluate import evaluate as run
    from maskwright.recipe import load_recipe
    from maskwright.submission import open_submission

    task_override = [f"evaluate.task={task}"] if task else []
    loaded = load_recipe(recipe, [*overrides, *task_override])
    model = load_model(checkpoint, pick_device(device))
    files = open_submission(submission, loaded.evaluate.task, output) if submission else None
    with _progress("evaluating") as advance, files or nullcontext():
        on_result = files.add if files else None
        scores = run(model, loaded, split, precision=precision, on_image=advance, on_result=on_result).scores
    if json_:
        print(json.dumps(scores))
    else:
        _print_scores(scores)


@app.command
def check(
    source: str,
    *overrides: str,
    output: Annotated[Path, _OUTPUT] = Path("check.html"),
    sample: int | None = None,
    workers: int | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Look for what is wrong with a data set: open every file, count objects, find duplicates, draw a contact sheet.

    The exit status is 1 if there are errors, and 0 if there are only warnings.

    Parameters
    ----------
    source
        Name of a recipe or a YAML file; or a folder, an archive or a COCO json, whose format is then recognised.
    overrides
        Values of the recipe to change, as key.path=value.
    output
        The page with all problems and the contact sheet.
    sample
        Images of each split to look at, evenly spread; default: all.
    workers
        Processes; default: one per core.
    json_
        Print JSON instead of tables.
    """
    from maskwright.check import check as run
    from maskwright.check.page import write_page

    with _progress("checking") as advance:
        report = run(source, overrides, sample=sample, workers=workers, on_image=advance)
    write_page(report, output)
    if json_:
        print(json.dumps(report.to_json()))
    else:
        _print_check(report)
        print(f"Page: {output}")
    if report.errors:
        sys.exit(1)


@app.command
def predict(
    checkpoint: Path,
    *inputs: str,
    output: Annotated[Path, _OUTPUT] = Path("predictions"),
    task: Task | None = None,
    submission: Benchmark | None = None,
    object_threshold: float | None = None,
    overlap_threshold: float | None = None,
    top_k: int | None = None,
    score_threshold: float | None = None,
    scales: str | None = None,
    flip: Annotated[bool | None, Parameter(negative="--no-flip")] = None,
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    tile: int | None = None,
    tile_overlap: int | None = None,
    tile_mask_megabytes: int | None = None,
    device: str | None = None,
    precision: Precision = "fp32",
    compile: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Segment pictures and write overlays and masks, or the files that a benchmark takes.

    Pictures that cannot be read are listed at the end, and the exit status is then 1.

    Parameters
    ----------
    checkpoint
        Weight file of any known layout, or the name of a published model (see `maskwright zoo`).
    inputs
        Files, folders and globs.
    output
        Folder of the results.
    task
        Kind of result; default: what the checkpoint was made for.
    submission
        Write the results as this benchmark takes them, and no overlays.
    object_threshold
        Least class score of a panoptic segment; default 0.8.
    overlap_threshold
        Least visible share of a panoptic segment; default 0.8.
    top_k
        Most instances per image; default 100.
    score_threshold
        Least score of an instance; default 0.
    scales
        Sizes, relative, whose class scores are averaged, as 0.5,1,1.5 (semantic).
    flip
        See each picture with left and right exchanged, too, and average.
    window
        Height and width in pixels of a window that slides over the picture (semantic).
    stride
        Steps of the window down and across; default: two thirds of it.
    tile
        Side in pixels of the parts in which larger pictures are segmented; objects across seams are put together.
    tile_overlap
        Least overlap of neighbouring tiles in pixels; default: an eighth of a tile.
    tile_mask_megabytes
        Memory for the masks of all instances of a picture in tiles, default 256; of more, the least sure are left out.
    device
        cpu, cuda, mps, ...; default: the machine's accelerator.
    precision
        Number format of the network.
    compile
        Compile the network for each size of picture first, which takes minutes: for many pictures of one size.
    """
    from maskwright.predict import Predictor
    from maskwright.predict import predict as run

    if not inputs:
        raise MaskwrightError("nothing to predict: name files, folders or globs behind the checkpoint")
    predictor = Predictor(checkpoint, device=device, precision=precision, compile=compile)
    with _progress("predicting") as advance:
        summary = run(
            predictor,
            inputs,
            output,
            submission=submission,
            on_image=lambda path, total: advance(1, total),
            task=task,
            object_threshold=object_threshold,
            overlap_threshold=overlap_threshold,
            top_k=top_k,
            score_threshold=score_threshold,
            scales=_numbers(scales),
            flip=flip,
            window=window,
            stride=stride,
            tile=tile,
            tile_overlap=tile_overlap,
            tile_mask_megabytes=tile_mask_megabytes,
        )
    print(f"{summary.done} of {summary.done + len(summary.failures)} pictures -> {output}")
    for path, reason in summary.failures:
        print(f"failed: {reason}" if str(path) in reason else f"failed: {path}: {reason}", file=sys.stderr)
    if summary.failures:
        sys.exit(1)


@app.command
def convert(source: Path, destination: Path, *, to: Layout = "maskwright", categories: str | None = None) -> None:
    """Convert a checkpoint of another implementation to ours, or any checkpoint to another implementation.

    The source's layout and architecture are recognised from the weights alone.

    Parameters
    ----------
    source
        Our weight file, or one of detectron2, transformers, OpenMMLab or EasyCV; a folder of transformers; a Hub id; or
        the name of a published model (see `maskwright zoo`).
    destination
        A .safetensors file; for transformers a new folder; for detectron2 a .pkl or .pth file; for mmdetection and
        mmsegmentation a .pth file.
    to
        Whose layout is written.
    categories
        Class list: a built-in name or a YAML file; default: as the checkpoint says, else by the number of classes.
    """
    from maskwright.convert import convert as run

    checkpoint = run(source, destination, to=to, categories=categories)
    by_reason: dict[str, list[str]] = {}
    for key, reason in checkpoint.dropped:
        by_reason.setdefault(reason, []).append(key)
    for reason, keys in by_reason.items():
        print(f"left out {keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}: {reason}")
    model = checkpoint.config
    print(
        f"{checkpoint.provenance.get('layout', 'maskwright')} -> {destination}: {model.backbone}, "
        f"{model.queries} queries, "
        f"{len(checkpoint.categories)} classes ({checkpoint.categories[0].name}, ...), {checkpoint.evaluate.task}"
    )


@app.command
def compare(
    run: Path,
    reference: Path,
    *,
    pattern: Annotated[list[str] | None, Parameter(negative=())] = None,
    relative: Annotated[float, Parameter(validator=_NOT_NEGATIVE)] = 0.05,
    absolute: Annotated[float, Parameter(validator=_NOT_NEGATIVE)] = 0.0002,
    plot: Path | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    r"""Hold the loss curve of a training against another's: of maskwright, MMEngine, mmcv, detectron2, or any text.

    The exit status is 0 if one of the two errors is within its limit, 1 if neither is, 2 if nothing can be compared.

    Parameters
    ----------
    run
        Folder of a run, or a log.
    reference
        Folder of a run, or a log; relative errors are relative to its losses.
    pattern
        How the lines of a text are read: a regular expression with groups named loss and step, as
        'step (?P<step>\d+) .* loss (?P<loss>[\d.]+)'; once for each kind of text.
    relative
        Largest mean relative error of the loss.
    absolute
        Largest mean absolute error of the loss.
    plot
        PNG that shows both curves, and the relative error at each step.
    json_
        Print JSON instead of a table.
    """
    from maskwright.compare import compare as run_comparison
    from maskwright.compare import draw_comparison
    from maskwright.logs import read_log

    try:
        logs = [read_log(source, pattern or ()) for source in (run, reference)]
        comparison = run_comparison(*logs, relative_limit=relative, absolute_limit=absolute)
        if plot:
            draw_comparison(*logs, comparison, plot)
    except MaskwrightError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if json_:
        print(json.dumps(comparison.to_json()))
    else:
        print(f"{'':10}  {'mean relative error':>20}  {'mean absolute error':>20}")
        for name, errors in {"loss": comparison.loss, **comparison.terms}.items():
            print(f"{name:10}  {errors.relative:20.3g}  {errors.absolute:20.3g}")
        print(comparison.verdict())
    sys.exit(0 if comparison.passes else 1)


@app.command
def plot(
    *runs: Path,
    output: Annotated[Path, _OUTPUT] = Path("curves.png"),
    pattern: Annotated[list[str] | None, Parameter(negative=())] = None,
    smoothing: Annotated[int | None, Parameter(validator=_AT_LEAST_ONE)] = None,
) -> None:
    """Draw the curves of several trainings in one picture: losses, scores, learning rates and gradient norms.

    Parameters
    ----------
    runs
        Folders of runs, or logs: of maskwright, MMEngine, mmcv, detectron2, or any text.
    output
        The PNG.
    pattern
        How the lines of a text are read, see `maskwright compare`.
    smoothing
        Logged values under the moving average, 1 for none; default: a thirtieth of each curve.
    """
    from maskwright.plot import plot as run

    if not runs:
        raise MaskwrightError("nothing to plot: name folders of runs, or logs, behind the command")
    run(runs, output, pattern or (), smoothing)
    print(f"Curves: {output}")


@app.command
def doctor(*, device: str | None = None, json_: Annotated[bool, Parameter(name="--json", negative=())] = False) -> None:
    """Tell what this machine has, whether it computes rightly, and what to do where it does not.

    The exit status is 1 if something is broken.

    Parameters
    ----------
    device
        cpu, cuda, mps, ...; default: the machine's accelerator.
    json_
        Print JSON instead of lines.
    """
    from dataclasses import asdict

    from maskwright.doctor import examine

    findings = []
    for finding in examine(device):
        findings.append(finding)
        if not json_:
            remedy = f"\n{'':8}-> {finding.remedy}" if finding.remedy else ""
            state = "BROKEN" if finding.state == "broken" else finding.state
            print(f"{state:8}{finding.text}{remedy}", flush=True)
    if json_:
        print(json.dumps([asdict(finding) for finding in findings]))
    if any(finding.state == "broken" for finding in findings):
        sys.exit(1)


@app.command
def recipes(
    name: str | None = None,
    *,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
    markdown: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """List what can be trained by name, with expected scores and costs; or print one recipe, to change and train it.

    Parameters
    ----------
    name
        A recipe of the package, or a published model.
    json_
        Print the list as JSON.
    markdown
        Write the table that stands in docs/recipes.md.
    """
    from maskwright import catalog
    from maskwright.recipe import recipe_text

    if name:
        print(recipe_text(name), end="")
    elif json_:
        print(json.dumps([dataclasses.asdict(row) for row in catalog.all_rows()]))
    else:
        print((catalog.markdown if markdown else catalog.table)(catalog.all_rows()))


@app.command
def bench(
    *parts: PartName,
    rounds: int | None = None,
    threads: int = 2,
    precision: Literal["fp32", "bf16"] = "fp32",
    backbone: Literal["r50", "r50-timm", "swin-t"] = "r50",
    output: Path | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Time ours against its peers on the same input, in turns, on the CPU.

    Parameters
    ----------
    parts
        What to time; all without.
    rounds
        Timed calls of each side; each part has its own number.
    threads
        Of PyTorch.
    precision
        Number format of both networks.
    backbone
        Of both models.
    output
        Folder for bench.json, bench.md and bench.png.
    json_
        Print JSON instead of tables.
    """
    from maskwright.bench import suite
    from maskwright.bench.rows import Options, table

    options = Options(rounds=rounds, threads=threads, precision=precision, backbone=backbone)
    found = suite.run_benchmarks(parts, options)
    text = f"{suite.machine()}\n\n{table(list(found.values()))}"
    values = json.dumps(suite.to_json(found, options))
    print(values if json_ else text)
    if output:
        suite.save(found, text, values, output)


@app.command
def zoo(name: str | None = None, *, markdown: Annotated[bool, Parameter(negative=())] = False) -> None:
    """List the published models, or tell all about one: scores, licence, what to download and where to put it.

    Parameters
    ----------
    name
        One model; every command that takes a checkpoint takes such a name too.
    markdown
        Write the whole list as it stands in docs/zoo.md.
    """
    from maskwright import zoo as models

    if markdown:
        print(models.markdown())
    elif name:
        print(models.describe(models.get_entry(name)))
    else:
        print(models.list_models(models.published_models().values()))


def main() -> None:
    """Entry point: a user's mistake is one line and exit status 1."""
    configure_logging()
    try:
        app()
    except RunInterrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(75)  # EX_TEMPFAIL of sysexits.h: try again
    except MaskwrightError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough; without this, Python complains when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def configure_logging() -> None:
    """Let the main process say what it does, and the others only what goes wrong."""
    level = logging.INFO if _speaks() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for noisy in ("timm", "matplotlib", "PIL", "torch", "accelerate"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))


def _numbers(text: str | None) -> list[float] | None:
    """Numbers between commas."""
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise MaskwrightError(f"'{text}' is not numbers between commas, like 0.5,1,1.5") from None


def _speaks() -> bool:
    """Whether this is the main process; of several that torchrun starts, the others are silent."""
    return os.environ.get("RANK", "0") == "0"


class _progress:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self.bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task(title, total=None)

    def __enter__(self):
        self.bar.start()
        return self.advance

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def advance(self, images: int, total: int | None = None) -> None:
        """Count images."""
        self.bar.update(self.task, advance=images, total=total)


def _print_check(report) -> None:
    """Statistics, then problems, so that the latter stand where the reader looks."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from maskwright.check.report import problem_lines, terminal_tables

    console = Console()
    for head, rows in terminal_tables(report):
        table = Table(box=None, pad_edge=False)
        for number, name in enumerate(head):
            is_number = all(row[number][:1].isdigit() for row in rows)
            table.add_column(name, justify="right" if is_number else "left", no_wrap=name in ("class", "split"))
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table, "")
    print("\n\n".join(filter(None, (report.recipe_lines(), problem_lines(report.sorts), report.verdict()))))


def _print_scores(scores: dict) -> None:
    from rich.console import Console

    from maskwright.metrics import format_table, format_tables

    console = Console()
    for table in (*format_tables(scores), format_table(scores)):
        console.print(table)


if __name__ == "__main__":
    main()
