"""Figures of a comparison and their tolerances."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

LOGITS = 5e-4
PIXELS = 0.999
SCORES = 1e-4
MASK_IOU = 0.999
LOSSES = 1e-5
GRADIENTS = 1e-6


@dataclass
class Report:
    """Figures of one fixture and whether each is within its tolerance.

    Attributes:
        figures: each with its name.
        failures: those beyond their tolerance.
        differences: the numbers among the figures, the largest of each name.
        refused: the layouts that cannot express the model.
    """

    figures: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def check(self, name: str, value: str, good: bool) -> None:
        self.figures.append(f"{name} {value}")
        if not good:
            self.failures.append(f"{name} {value}")

    def most(self, name: str, difference: float, tolerance: float) -> None:
        self.differences[name] = max(difference, self.differences.get(name, 0.0))
        self.check(name, f"{difference:.1e}", difference <= tolerance)


def table(rows: list[tuple[str, str, Report]]) -> str:
    """Markdown: one row per (layout, model, report), with its largest differences in each direction."""
    columns = ("class logits", "mask logits", "to detectron2", "to transformers", "to mmdetection", "to mmsegmentation")
    lines = ["| layout | model | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for layout, model, report in rows:
        cells = [f"{report.differences[name]:.1e}" if name in report.differences else "" for name in columns[:2]]
        cells += [_written(report, name) for name in columns[2:]]
        lines.append(f"| {layout} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _written(report: Report, target: str) -> str:
    found = [value for name, value in report.differences.items() if name.startswith(target)]
    if target.removeprefix("to ") in report.refused:
        return "refused"
    return " / ".join("0" if value == 0 else f"{value:.1e}" for value in found) or "not run"


def difference(ours: np.ndarray, theirs: np.ndarray, rounding: np.ndarray | float = 0.0) -> float:
    """The largest difference beyond the rounding; shapes may differ by a leading 1."""
    assert ours.size == theirs.size, f"{ours.shape} against {theirs.shape}"
    return float(np.maximum(np.abs(ours.reshape(theirs.shape) - theirs) - rounding, 0).max())
