"""Commands for training: recipes, check, train, compare and plot."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from maskwright.cli.terminal import OUTPUT, ProgressBar, is_main_process, path_option
from maskwright.errors import MaskwrightError

_NOT_NEGATIVE = validators.Number(gte=0)
_AT_LEAST_ONE = validators.Number(gte=1)


def train(
    recipe: str,
    *overrides: str,
    output: Annotated[Path | None, OUTPUT] = None,
    profile: bool = False,
    benchmark: int | None = None,
) -> None:
    """Train a recipe, or resume an unfinished run.

    To resume a run, start it again with the same output folder.

    On SIGTERM, it writes a checkpoint and exits with status 75.

    Parameters
    ----------
    recipe
        Name of a recipe (see `maskwright recipes`) or YAML file.
    overrides
        Recipe values to change, as section.key=value, e.g. train.steps=1000 (see `maskwright recipes --keys`).
    output
        Folder of the run; default: runs/NAME.
    profile
        Also write a trace of steps 3 to 5 to profile-rank-0.json, for Perfetto or chrome://tracing.
    benchmark
        Measure images per second, time and memory over this many steps, without evaluating or writing anything.
    """
    from maskwright.config.recipe import load_recipe
    from maskwright.training.train import train as run

    loaded = load_recipe(recipe, overrides)
    if benchmark is not None:
        from maskwright.training.throughput import measure_throughput

        throughput = measure_throughput(loaded, benchmark)
        if is_main_process():
            print(throughput.table())
        return
    folder = output or Path("runs") / loaded.name
    run(loaded, folder, profile=profile)
    if is_main_process():
        print(f"\nReport: {folder / 'report.html'}\nModel:  {folder / 'best.safetensors'}")


def check(
    source: str,
    *overrides: str,
    output: Annotated[Path, OUTPUT] = Path("check.html"),
    recipe: Annotated[Path | None, path_option("--recipe")] = None,
    task: Literal["semantic", "instance", "panoptic"] | None = None,
    sample: int | None = None,
    workers: int | None = None,
    json_: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Check a dataset: open every file, count objects, find duplicates, and write an HTML report with previews.

    The exit status is 1 if there are errors, and 0 if there are only warnings.

    Parameters
    ----------
    source
        Name of a recipe or YAML file; or a folder, archive or COCO JSON file, whose format is detected.
    overrides
        Recipe values to change, as section.key=value; for a folder, archive or JSON, values of data only.
    output
        HTML report to write.
    recipe
        Recipe to write: one to start from, with sizes and steps that suit the folder, archive or JSON.
    task
        Task to check the folder, archive or JSON for; default: all that it is annotated for, with a recipe for the most
        detailed one.
    sample
        Number of images to check in each split, evenly spread; default: all.
    workers
        Number of processes; default: one per core.
    json_
        Print JSON instead of tables.
    """
    from maskwright.data.check.check import check as run
    from maskwright.data.check.check import is_data_set
    from maskwright.data.check.html_report import write_html
    from maskwright.data.check.starting_recipe import require_new_recipe, write_starting_recipe

    if not source:
        raise MaskwrightError(
            "an empty text, expected a recipe or dataset", remedy="check the shell variable that it comes from"
        )
    if output.is_dir():
        raise MaskwrightError("is a folder, expected an HTML file to write", where=output, remedy="name a file in it")
    if recipe is not None:
        if not is_data_set(source, overrides):
            found = "--recipe is for a folder, archive or JSON, expected no recipe"
            raise MaskwrightError(found, where=source, remedy="name the dataset itself")
        require_new_recipe(recipe)
    with ProgressBar("checking") as advance:
        report = run(source, overrides, task=task, sample=sample, workers=workers, on_image=advance)
    write_html(report, output)
    if json_:
        print(json.dumps(report.to_json()))
    else:
        _print_check(report)
        print(f"Page: {output}")
    if report.errors:
        if recipe is not None:
            print(f"{recipe} is not written until the errors are fixed", file=sys.stderr)
        sys.exit(1)
    if recipe is not None:
        write_starting_recipe(report, recipe)
        if not json_:
            print(f"Recipe: {recipe}")


def recipes(
    name: str | None = None,
    *,
    keys: bool = False,
    models: bool = False,
    measure: bool = False,
    json_: Annotated[bool, Parameter(name="--json")] = False,
    markdown: bool = False,
) -> None:
    """List the recipes and published models with expected scores and costs; or print one recipe to copy and edit.

    Parameters
    ----------
    name
        Recipe or published model to print as YAML; with --models, part of the names of the models to list.
    keys
        Print all recipe keys with types, defaults and descriptions (docs/recipe-keys.md).
    models
        List models by size, from 3 to 1,200 million parameters, with their operations and the keys that choose them.
    measure
        With --models, also measure time and memory on this machine's CPU.
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
    elif models:
        _print_models(name, measure, json_)
    elif measure:
        raise MaskwrightError("--measure is for --models", remedy="use both")
    elif name:
        print(recipe_text(name), end="")
    elif json_:
        print(json.dumps([dataclasses.asdict(entry) for entry in catalog.catalog_entries()]))
    else:
        print((catalog.markdown_table if markdown else catalog.terminal_table)(catalog.catalog_entries()))


def _print_models(part: str | None, measure: bool, json_: bool) -> None:
    from maskwright.checkpoints import model_sizes

    names = model_sizes.model_names(part)
    if not names:
        raise MaskwrightError(
            f"no model has '{part}' in its name", remedy=f"use one of: {'; '.join(model_sizes.model_names())}"
        )
    with ProgressBar("models") as advance:
        sizes = []
        for name in names:
            sizes.append(model_sizes.model_size(name, measured=measure))
            advance(1, len(names))
    print(json.dumps([dataclasses.asdict(size) for size in sizes]) if json_ else model_sizes.table(sizes))


def compare(
    run: Path,
    reference: Path,
    *,
    pattern: list[str] | None = None,
    relative: Annotated[float, Parameter(validator=_NOT_NEGATIVE)] = 0.05,
    absolute: Annotated[float, Parameter(validator=_NOT_NEGATIVE)] = 0.0002,
    plot: Path | None = None,
    json_: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    r"""Compare the loss curves of two training runs of maskwright, MMEngine, mmcv, detectron2, or any text log.

    The exit status is 0 if one of the errors is within its limit, 1 if neither is, 2 if the logs cannot be compared.

    Parameters
    ----------
    run
        Run folder or log file.
    reference
        Run folder or log file to compare with; errors are relative to its losses.
    pattern
        Regular expression for the lines of a text log, with groups named loss and step, such as
        'step (?P<step>\d+) .* loss (?P<loss>[\d.]+)'; repeat it for several log formats.
    relative
        Max mean relative error of the loss.
    absolute
        Max mean absolute error of the loss.
    plot
        PNG to write, with both curves and the relative error at each step.
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
        _print_comparison(comparison)
    sys.exit(0 if comparison.passes else 1)


def plot(
    *runs: Path,
    output: Annotated[Path, OUTPUT] = Path("curves.png"),
    pattern: list[str] | None = None,
    smoothing: Annotated[int | None, Parameter(validator=_AT_LEAST_ONE)] = None,
) -> None:
    """Plot the curves of several training runs: losses, scores, learning rates and gradient norms.

    Parameters
    ----------
    runs
        Run folders, or log files of maskwright, MMEngine, mmcv, detectron2, or any text log.
    output
        PNG to write.
    pattern
        Regular expression for the lines of a text log, see `maskwright compare`.
    smoothing
        Number of logged values in the moving average, 1 for none; default: a thirtieth of each curve.
    """
    from maskwright.diagnostics.plot_runs import plot as run

    if not runs:
        raise MaskwrightError("nothing to plot", remedy="give run folders or log files after the command")
    run(runs, output, pattern or (), smoothing)
    print(f"Curves: {output}")


def _print_comparison(comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", box=None, pad_edge=False)
    for name in ("mean relative error", "mean absolute error"):
        table.add_column(name, justify="right")
    for name, errors in {"loss": comparison.loss, **comparison.terms}.items():
        table.add_row(name, f"{errors.relative:.3g}", f"{errors.absolute:.3g}")
    Console().print(table)
    print(comparison.verdict())


def _print_check(report) -> None:
    """Print the problems last, where the reader looks first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from maskwright.data.check.report import problem_lines, terminal_tables

    console = Console()
    if lines := report.layout_lines():
        print(lines, end="\n\n")
    for head, rows in terminal_tables(report):
        table = Table(box=None, pad_edge=False)
        for number, name in enumerate(head):
            is_number = all(row[number][:1].isdigit() for row in rows)
            table.add_column(name, justify="right" if is_number else "left", no_wrap=name in ("class", "split"))
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table, "")
    print("\n\n".join(filter(None, (report.recipe_lines(), problem_lines(report.problem_groups), report.summary()))))
