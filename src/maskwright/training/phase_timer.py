"""Time spent in each phase of a training step. A step marks its phases; the marks cost nothing unless a timer runs."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.profiler import record_function

from maskwright.runtime.device import synchronize

_RUNNING: ContextVar[PhaseTimer | None] = ContextVar("phase_timer", default=None)


class PhaseTimer:
    """Accumulate the seconds of each phase inside `running`.

    The device is synchronized at both ends of a phase, so that its work is attributed to the phase that queued it. This
    slows down a host that would otherwise run ahead of its device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def running(self) -> Generator[None]:
        """Time the phases inside the block."""
        token = _RUNNING.set(self)
        try:
            yield
        finally:
            _RUNNING.reset(token)

    @contextmanager
    def measure(self, name: str) -> Generator[None]:
        """Add the time inside the block to a phase."""
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


@contextmanager
def phase(name: str) -> Generator[None]:
    """Mark a phase of a step: named in profiler traces, and timed if a timer is running."""
    timer = _RUNNING.get()
    with record_function(name):
        if timer is None:
            yield
        else:
            with timer.measure(name):
                yield
