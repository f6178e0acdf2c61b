"""`maskwright compare`: compare the loss curves of two training runs, from any framework."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskwright.errors import MaskwrightError
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.training.curves import comparison_figure, save_png
from maskwright.training.read_logs import TrainingLog

RELATIVE_LIMIT = 0.05
ABSOLUTE_LIMIT = 0.0002


@dataclass(frozen=True)
class CurveErrors:
    """Errors of one curve against a reference, over their common steps.

    Attributes:
        relative: mean of |a - b| / |b|, where b is the reference.
        absolute: mean of |a - b|.
    """

    relative: float
    absolute: float


@dataclass(frozen=True)
class Comparison:
    """The comparison of two loss curves.

    Attributes:
        steps: steps that are in both logs, ascending.
        relative_by_step: relative error of the loss at each step.
        loss: errors of the total loss, which decide.
        terms: errors of each loss term that is in both logs.
        relative_limit: max mean relative error that passes.
        absolute_limit: max mean absolute error that passes.
    """

    steps: list[int]
    relative_by_step: dict[int, float]
    loss: CurveErrors
    terms: dict[str, CurveErrors]
    relative_limit: float
    absolute_limit: float

    @property
    def passes(self) -> bool:
        """Whether the relative or the absolute error is within its limit."""
        return self.loss.relative <= self.relative_limit or self.loss.absolute <= self.absolute_limit

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "relative_by_step": list(self.relative_by_step.values()), "passes": self.passes}

    def verdict(self) -> str:
        """Return one line with the errors and their limits."""
        worst = max(self.relative_by_step, key=lambda step: self.relative_by_step[step])
        return (
            f"{'passes' if self.passes else 'FAILS'}: over {len(self.steps)} common steps, {self.steps[0]} to "
            f"{self.steps[-1]}, mean relative error {self.loss.relative:.3g} (limit {self.relative_limit:g}) and mean "
            f"absolute error {self.loss.absolute:.3g} (limit {self.absolute_limit:g}); one of the two is enough; "
            f"largest relative error {self.relative_by_step[worst]:.3g} at step {worst}"
        )


def compare(
    run: TrainingLog,
    reference: TrainingLog,
    relative_limit: float = RELATIVE_LIMIT,
    absolute_limit: float = ABSOLUTE_LIMIT,
) -> Comparison:
    """Compare two loss curves at the steps that both have logged.

    Raises:
        MaskwrightError: they have no step in common, or a loss is not finite.
    """
    ours, theirs = run.series(), reference.series()
    steps = sorted(ours.keys() & theirs.keys())
    if not steps:
        spans = " and ".join(
            f"{min(series)} to {max(series)} of {name.source}" for series, name in ((ours, run), (theirs, reference))
        )
        raise MaskwrightError(f"no step is in both logs: {spans}", remedy="log at the same interval in both runs")
    relative = _relative(ours, theirs, steps)
    for log, series in ((run, ours), (reference, theirs)):
        bad = next((step for step in steps if not math.isfinite(series[step])), None)
        if bad is not None:
            raise MaskwrightError(f"the loss of step {bad} is {series[bad]}, expected a finite value", where=log.source)
    terms = {}
    for key in sorted({key for log in (run, reference) for row in log.rows for key in row if key.startswith("loss_")}):
        a, b = run.series(key), reference.series(key)
        if common := [step for step in steps if step in a and step in b]:
            terms[key.removeprefix("loss_")] = _errors(a, b, common)
    errors = _errors(ours, theirs, steps)
    return Comparison(steps, relative, errors, terms, relative_limit, absolute_limit)


def draw_comparison(run: TrainingLog, reference: TrainingLog, comparison: Comparison, file: Path) -> None:
    """Plot both curves and their relative error as a PNG.

    Raises:
        MaskwrightError: it cannot be written.
    """
    figure = comparison_figure(run, reference, comparison.relative_by_step, comparison.relative_limit)
    write_file_atomically(file, lambda temporary: save_png(figure, temporary))


def _errors(ours: Mapping[int, float], theirs: Mapping[int, float], steps: list[int]) -> CurveErrors:
    absolute = sum(abs(ours[step] - theirs[step]) for step in steps) / len(steps)
    return CurveErrors(sum(_relative(ours, theirs, steps).values()) / len(steps), absolute)


def _relative(ours: Mapping[int, float], theirs: Mapping[int, float], steps: list[int]) -> dict[int, float]:
    """Return |a - b| / |b| by step: infinite if only b is 0, and 0 if both are."""
    relative = {}
    for step in steps:
        difference = abs(ours[step] - theirs[step])
        relative[step] = difference / abs(theirs[step]) if theirs[step] else math.inf if difference else 0.0
    return relative
