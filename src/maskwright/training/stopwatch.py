"""How long the parts of a training step take. A step names its parts; where nobody measures, that costs nothing."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.profiler import record_function

from maskwright.runtime.device import synchronize

_RUNNING: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


class Stopwatch:
    """Seconds of each part, added up while `running`.

    Each part waits for the device at both ends, so that its work is counted where it was asked for. A host that would
    run ahead of its device is held up by that.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def running(self) -> Generator[None]:
        """Count what happens inside."""
        token = _RUNNING.set(self)
        try:
            yield
        finally:
            _RUNNING.reset(token)

    @contextmanager
    def count(self, name: str) -> Generator[None]:
        """Add the time inside to a part."""
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


@contextmanager
def part_of_step(name: str) -> Generator[None]:
    """A part of a step: named in traces, and counted where a stopwatch runs."""
    watch = _RUNNING.get()
    with record_function(name):
        if watch is None:
            yield
        else:
            with watch.count(name):
                yield
