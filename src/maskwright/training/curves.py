"""Curves of trainings as pictures: one run, several in one picture, and one against another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from maskwright.training.read_logs import Row, TrainingLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMOOTHED_SHARE = 30  # a moving average covers a thirtieth of a curve
_MOST_SCORES = 4  # panels of scores


def run_figure(rows: Sequence[Row]) -> Figure:
    """Loss and its terms, scores, learning rate and gradient norm of one run; a panel without data says so.

    Raw values are pale, their moving average over a thirtieth of the run is strong.
    """
    figure = _figure(11, 7)
    loss, metrics, rate, norm = figure.subplots(2, 2).flat
    _plot(loss, rows, "Loss", {"loss": "total", **{term: term.removeprefix("loss_") for term in _terms(rows)}})
    _plot_metrics(metrics, [row for row in rows if isinstance(row.get("evaluation"), dict)])
    _plot(rate, rows, "Learning rate", {"learning_rate": None})
    _plot(norm, rows, "Gradient norm", {"gradient_norm": None})
    return figure


def runs_figure(logs: Sequence[TrainingLog], smoothing: int | None = None) -> Figure:
    """Several runs, one colour each, one panel for each quantity that any of them logged.

    Args:
        logs: at least one.
        smoothing: logged values under the moving average, 1 for none; None takes a thirtieth of each curve.
    """
    rows = [row for log in logs for row in log.rows]
    scores = _score_names(rows)[:_MOST_SCORES]
    panels = [
        ("Loss", "loss"),
        *[(f"Loss: {term.removeprefix('loss_')}", term) for term in _terms(rows)],
        ("Learning rate", "learning_rate"),
        ("Gradient norm", "gradient_norm"),
    ]
    panels = [(title, key) for title, key in panels if any(_is_number(row.get(key)) for row in rows)]
    columns = min(3, len(panels) + len(scores))
    lines = -(-(len(panels) + len(scores)) // columns)
    figure = _figure(4.6 * columns, 3.2 * lines + 0.5)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    names = name_runs([log.source for log in logs])
    for ax, (title, key) in zip(axes, panels, strict=False):
        _decorate(ax, title)
        for number, log in enumerate(logs):
            _line(ax, log.series(key), f"C{number}", names[number], smoothing)
    for ax, score in zip(axes[len(panels) :], scores, strict=False):
        _decorate(ax, f"{score} (%)")
        for number, log in enumerate(logs):
            if points := _score_points(log.rows, score):
                ax.plot(*zip(*points, strict=True), color=f"C{number}", marker="o", markersize=3.5, label=names[number])
    for ax in axes[len(panels) + len(scores) :]:
        ax.remove()
    if len(logs) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(logs), 4), frameon=False)
    return figure


def comparison_figure(run: TrainingLog, reference: TrainingLog, errors: Mapping[int, float], limit: float) -> Figure:
    """Both loss curves, and under them the relative errors, step to value, beside the limit of their mean."""
    figure = _figure(10, 6.5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    names = name_runs([run.source, reference.source])
    _decorate(above, "Loss")
    for number, log in enumerate((reference, run)):
        series = log.series()
        above.plot(
            *_points(series),
            color=("0.45", "C0")[number],
            linewidth=(3, 1.2)[number],
            alpha=(0.6, 1)[number],
            marker="o" if len(series) < 2 else "",
            label=f"{names[1 - number]} ({log.layout})",
        )
    above.legend(frameon=False)
    above.tick_params(labelbottom=True)
    _decorate(below, "Relative error")
    below.plot(*_points(errors), color="C0", linewidth=1.2, marker="." if len(errors) < 60 else "")
    below.axhline(limit, color="C3", linestyle="--", linewidth=1)
    below.annotate(
        f"limit of the mean, {limit:g}",
        (1, limit),
        (-4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color="C3",
        fontsize=9,
    )
    below.set_ylim(bottom=0)
    return figure


def save_png(figure: Figure, file: Path | BinaryIO, dots_per_inch: int = 110) -> None:
    """Write a figure as PNG."""
    figure.savefig(file, format="png", dpi=dots_per_inch)


def is_share(value: Any) -> bool:
    """Whether a value is a metric in 0..1, which people read in percent; integers are counts."""
    return isinstance(value, float) and 0 <= value <= 1


def name_runs(sources: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; a run's log is called by its folder."""
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


def _terms(rows: Sequence[Row]) -> list[str]:
    return sorted({key for row in rows for key in row if key.startswith("loss_")})


def _decorate(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _plot(axes: Axes, rows: Sequence[Row], title: str, series: Mapping[str, str | None]) -> None:
    """One line per logged quantity."""
    _decorate(axes, title)
    for number, (key, label) in enumerate(series.items()):
        _line(axes, {row["step"]: row[key] for row in rows if _is_number(row.get(key))}, f"C{number}", label, None)
    _finish(axes)


def _line(axes: Axes, series: Mapping[int, float], color: str, label: str | None, smoothing: int | None) -> None:
    """Raw values pale, their moving average strong; nothing without values. What is not finite is left out."""
    finite = {step: value for step, value in series.items() if math.isfinite(value)}
    if not finite:
        return
    steps, values = _points(finite)
    width = min(len(values), max(1, len(values) // _SMOOTHED_SHARE if smoothing is None else smoothing))
    axes.plot(steps, values, color=color, alpha=0.25 if width > 1 else 1, linewidth=1)
    kernel = np.ones(width)
    smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
    axes.plot(steps, smooth, color=color, linewidth=1.8, label=label, marker="o" if len(values) == 1 else "")


def _points(series: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(list(series), float), np.array(list(series.values()), float)


def _score_names(rows: Sequence[Row]) -> list[str]:
    evaluations = [row["evaluation"] for row in rows if isinstance(row.get("evaluation"), dict)]
    return list(dict.fromkeys(name for scores in evaluations for name, value in scores.items() if is_share(value)))


def _score_points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """(step, percent)."""
    evaluations = [(row["step"], row["evaluation"]) for row in rows if isinstance(row.get("evaluation"), dict)]
    return [(step, 100 * scores[name]) for step, scores in evaluations if is_share(scores.get(name))]


def _plot_metrics(axes: Axes, rows: Sequence[Row]) -> None:
    """The first four metrics in percent, with the best value of the first."""
    _decorate(axes, "Metrics (%)")
    for number, name in enumerate(_score_names(rows)[:_MOST_SCORES]):
        points = _score_points(rows, name)
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
