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
    """Figures of one fixture and whether each is within its tolerance."""

    figures: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def check(self, name: str, value: str, good: bool) -> None:
        self.figures.append(f"{name} {value}")
        if not good:
            self.failures.append(f"{name} {value}")

    def most(self, name: str, difference: float, tolerance: float) -> None:
        self.check(name, f"{difference:.1e}", difference <= tolerance)


def difference(ours: np.ndarray, theirs: np.ndarray, rounding: np.ndarray | float = 0.0) -> float:
    """The largest difference beyond the rounding; shapes may differ by a leading 1."""
    assert ours.size == theirs.size, f"{ours.shape} against {theirs.shape}"
    return float(np.maximum(np.abs(ours.reshape(theirs.shape) - theirs) - rounding, 0).max())
