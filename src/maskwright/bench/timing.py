"""Sides of a comparison, timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Timing:
    """Seconds per call of one side.

    Attributes:
        seconds: of each round, in order.
        segments: found by the first call.
    """

    seconds: list[float] = field(default_factory=list)
    segments: int = 0

    @property
    def median(self) -> float:
        """The middle of all rounds."""
        return statistics.median(self.seconds)

    @property
    def mean(self) -> float:
        """Of all rounds; for rounds that differ."""
        return statistics.fmean(self.seconds)

    @property
    def minimum(self) -> float:
        """The fastest round."""
        return min(self.seconds)


def alternate(sides: tuple[Callable[[], int], ...], rounds: int) -> tuple[Timing, ...]:
    """Time all sides in turns, after a warm-up each."""
    timings = tuple(Timing(segments=side()) for side in sides)
    for _ in range(rounds):
        for side, timing in zip(sides, timings, strict=True):
            start = time.perf_counter()
            side()
            timing.seconds.append(time.perf_counter() - start)
    return timings
