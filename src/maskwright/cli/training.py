"""Commands about trainings: recipes and data before one, the training itself, and the curves it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from maskwright.cli.terminal import OUTPUT, ProgressBar, speaks
from maskwright.errors import MaskwrightError

_NOT_NEGATIVE = validators.Number(gte=0)
_AT_LEAST_ONE = validators.Number(gte=1)


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
    from maskwright.config.recipe import load_recipe
    from maskwright.training.train import train as run

    loaded = load_recipe(recipe, overrides)
    if benchmark is not None:
        from maskwright.training.throughput import benchmark as measure

        found = measure(loaded, benchmark)
        if speaks():
            print(found.table())
        return
    folder = output or Path("runs") / loaded.name
    run(loaded, folder, profile=profile)
    if speaks():
        print(f"\nReport: {folder / 'report.html'}\nModel:  {folder / 'best.safetensors'}")


def check(
    source: str,
    *overrides: str,
    output: Annotated[Path, OUTPUT] = Path("check.html"),
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
    from maskwright.data.check.check import check as run
    from maskwright.data.check.html_report import write_html

    with ProgressBar("checking") as advance:
        report = run(source, overrides, sample=sample, workers=workers, on_image=advance)
    write_html(report, output)
    if json_:
        print(json.dumps(report.to_json()))
    else:
        _print_check(report)
        print(f"Page: {output}")
    if report.errors:
        sys.exit(1)


def recipes(
    name: str | None = None,
    *,
    keys: Annotated[bool, Parameter(negative=())] = False,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
    markdown: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """List the recipes and published models with expected scores and costs; or print one recipe to copy and change.

    Parameters
    ----------
    name
        Recipe or published model to print as YAML.
    keys
        Print all recipe keys with types, defaults and descriptions (docs/recipe-keys.md).
    json_
        Print the list as JSON.
    markdown
        Print the table of docs/recipes.md.
    """
    from maskwright.checkpoints import catalog
    from maskwright.config.recipe import recipe_text

    if keys:
        from maskwright.config.recipe_keys import markdown as keys_markdown

        print(keys_markdown(), end="")
    elif name:
        print(recipe_text(name), end="")
    elif json_:
        print(json.dumps([dataclasses.asdict(row) for row in catalog.all_rows()]))
    else:
        print((catalog.markdown if markdown else catalog.table)(catalog.all_rows()))


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
    from maskwright.diagnostics.compare_runs import compare as run_comparison
    from maskwright.diagnostics.compare_runs import draw_comparison
    from maskwright.training.read_logs import read_log

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


def plot(
    *runs: Path,
    output: Annotated[Path, OUTPUT] = Path("curves.png"),
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
    from maskwright.diagnostics.plot_runs import plot as run

    if not runs:
        raise MaskwrightError("nothing to plot: name folders of runs, or logs, behind the command")
    run(runs, output, pattern or (), smoothing)
    print(f"Curves: {output}")


def _print_check(report) -> None:
    """Statistics, then problems, so that the latter stand where the reader looks."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from maskwright.data.check.report import problem_lines, terminal_tables

    console = Console()
    for head, rows in terminal_tables(report):
        table = Table(box=None, pad_edge=False)
        for number, name in enumerate(head):
            is_number = all(row[number][:1].isdigit() for row in rows)
            table.add_column(name, justify="right" if is_number else "left", no_wrap=name in ("class", "split"))
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table, "")
    print("\n\n".join(filter(None, (report.recipe_lines(), problem_lines(report.problem_groups), report.summary()))))
