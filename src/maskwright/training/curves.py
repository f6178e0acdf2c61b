"""Training curves as figures: one run, several runs in one figure, and one run against a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from maskwright.training.log_files import LogRow
from maskwright.training.read_logs import TrainingLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WINDOWS_PER_CURVE = 30  # the moving average covers a thirtieth of a curve
_MAX_METRICS = 4


def run_figure(rows: Sequence[LogRow]) -> Figure:
    """Plot loss and its terms, metrics, learning rate and gradient norm of one run.

    Raw values are pale, their moving average over a thirtieth of the run is strong. A panel without data says so.
    """
    figure = _figure(11, 7)
    loss, metrics, rate, norm = figure.subplots(2, 2).flat
    _plot(loss, rows, "Loss", {"loss": "total", **{term: term.removeprefix("loss_") for term in _terms(rows)}})
    _plot_metrics(metrics, [row for row in rows if isinstance(row.get("evaluation"), dict)])
    _plot(rate, rows, "Learning rate", {"learning_rate": None})
    _plot(norm, rows, "Gradient norm", {"gradient_norm": None})
    return figure


def runs_figure(logs: Sequence[TrainingLog], smoothing: int | None = None) -> Figure:
    """Plot several runs, one color each, with a panel for each quantity that any of them logged.

    Args:
        logs: at least one.
        smoothing: window of the moving average in logged values, 1 for none; None is a thirtieth of each curve.
    """
    rows = [row for log in logs for row in log.rows]
    metrics = _metric_names(rows)[:_MAX_METRICS]
    panels = [
        ("Loss", "loss"),
        *[(f"Loss: {term.removeprefix('loss_')}", term) for term in _terms(rows)],
        ("Learning rate", "learning_rate"),
        ("Gradient norm", "gradient_norm"),
    ]
    panels = [(title, key) for title, key in panels if any(_is_number(row.get(key)) for row in rows)]
    count = len(panels) + len(metrics)
    columns = min(3, count)
    panel_rows = -(-count // columns)
    figure = _figure(4.6 * columns, 3.2 * panel_rows + 0.5)
    axes = list(figure.subplots(panel_rows, columns, squeeze=False).flat)
    names = name_runs([log.source for log in logs])
    for ax, (title, key) in zip(axes, panels, strict=False):
        _style(ax, title)
        for number, log in enumerate(logs):
            _line(ax, log.series(key), f"C{number}", names[number], smoothing)
    for ax, metric in zip(axes[len(panels) :], metrics, strict=False):
        _style(ax, f"{metric} (%)")
        for number, log in enumerate(logs):
            if points := _metric_points(log.rows, metric):
                ax.plot(*zip(*points, strict=True), color=f"C{number}", marker="o", markersize=3.5, label=names[number])
    for ax in axes[count:]:
        ax.remove()
    if len(logs) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(logs), 4), frameon=False)
    return figure


def comparison_figure(run: TrainingLog, reference: TrainingLog, errors: Mapping[int, float], limit: float) -> Figure:
    """Plot both loss curves, and below them the relative errors (step to value) and the limit of their mean."""
    figure = _figure(10, 6.5)
    losses, relative = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    names = name_runs([run.source, reference.source])
    _style(losses, "Loss")
    for number, log in enumerate((reference, run)):
        series = log.series()
        losses.plot(
            *_points(series),
            color=("0.45", "C0")[number],
            linewidth=(3, 1.2)[number],
            alpha=(0.6, 1)[number],
            marker="o" if len(series) < 2 else "",
            label=f"{names[1 - number]} ({log.layout})",
        )
    losses.legend(frameon=False)
    losses.tick_params(labelbottom=True)
    _style(relative, "Relative error")
    relative.plot(*_points(errors), color="C0", linewidth=1.2, marker="." if len(errors) < 60 else "")
    relative.axhline(limit, color="C3", linestyle="--", linewidth=1)
    relative.annotate(
        f"limit of the mean, {limit:g}",
        (1, limit),
        (-4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color="C3",
        fontsize=9,
    )
    relative.set_ylim(bottom=0)
    return figure


def save_png(figure: Figure, file: Path | BinaryIO, dots_per_inch: int = 110) -> None:
    """Write a figure as PNG."""
    figure.savefig(file, format="png", dpi=dots_per_inch)


def is_share(value: Any) -> bool:
    """Return whether a value is a metric in 0..1, which is shown in percent; integers are counts."""
    return isinstance(value, float) and 0 <= value <= 1


def name_runs(sources: Sequence[Path]) -> list[str]:
    """Name runs by the shortest distinct ends of their paths; the log of a run is named by its folder."""
    paths = [
        source.resolve().parent if source.name in ("log.jsonl", "metrics.json") else source.resolve()
        for source in sources
    ]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _terms(rows: Sequence[LogRow]) -> list[str]:
    return sorted({key for row in rows for key in row if key.startswith("loss_")})


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _plot(axes: Axes, rows: Sequence[LogRow], title: str, series: Mapping[str, str | None]) -> None:
    """Plot one line per logged quantity."""
    _style(axes, title)
    for number, (key, label) in enumerate(series.items()):
        _line(axes, {row["step"]: row[key] for row in rows if _is_number(row.get(key))}, f"C{number}", label, None)
    _finish(axes)


def _line(axes: Axes, series: Mapping[int, float], color: str, label: str | None, smoothing: int | None) -> None:
    """Plot raw values pale and their moving average strong; values that are not finite are skipped."""
    finite = {step: value for step, value in series.items() if math.isfinite(value)}
    if not finite:
        return
    steps, values = _points(finite)
    width = min(len(values), max(1, len(values) // _WINDOWS_PER_CURVE if smoothing is None else smoothing))
    axes.plot(steps, values, color=color, alpha=0.25 if width > 1 else 1, linewidth=1)
    kernel = np.ones(width)
    smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
    axes.plot(steps, smooth, color=color, linewidth=1.8, label=label, marker="o" if len(values) == 1 else "")


def _points(series: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(list(series), float), np.array(list(series.values()), float)


def _metric_names(rows: Sequence[LogRow]) -> list[str]:
    evaluations = [row["evaluation"] for row in rows if isinstance(row.get("evaluation"), dict)]
    return list(dict.fromkeys(name for scores in evaluations for name, value in scores.items() if is_share(value)))


def _metric_points(rows: Sequence[LogRow], name: str) -> list[tuple[int, float]]:
    """Return (step, percent) of each evaluation that has the metric."""
    evaluations = [(row["step"], row["evaluation"]) for row in rows if isinstance(row.get("evaluation"), dict)]
    return [(step, 100 * scores[name]) for step, scores in evaluations if is_share(scores.get(name))]


def _plot_metrics(axes: Axes, rows: Sequence[LogRow]) -> None:
    """Plot the first four metrics in percent, and mark the best value of the first."""
    _style(axes, "Metrics (%)")
    for number, name in enumerate(_metric_names(rows)[:_MAX_METRICS]):
        points = _metric_points(rows, name)
        axes.plot(*zip(*points, strict=True), color=f"C{number}", marker="o", markersize=3.5, linewidth=1.6, label=name)
        if number == 0:
            best = max(points, key=lambda point: point[1])
            axes.annotate(f"best {best[1]:.1f}", best, (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axes.margins(y=0.12)
    _finish(axes)


def _finish(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    elif not axes.lines:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color="gray")
        axes.set(xticks=[], yticks=[])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
