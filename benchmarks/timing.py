"""Timing of two sides in alternating rounds, by component, and their peak memory."""

from __future__ import annotations

import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import nn

from maskwright.runtime.device import peak_memory_gb

WHOLE = "whole"
Seconds = dict[str, float]  # component -> seconds of one call; `WHOLE` is the whole call
Side = Callable[[], Seconds]

_MATRIX = 2048  # side of the matrices whose product measures the machine's rate


@dataclass
class Timing:
    """Seconds per call of one side, in order."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median of all rounds."""
        return statistics.median(self.seconds)

    @property
    def mean(self) -> float:
        """Mean of all rounds, for rounds that differ."""
        return statistics.fmean(self.seconds)

    @property
    def minimum(self) -> float:
        """Minimum of all rounds."""
        return min(self.seconds)


def alternate(sides: Sequence[Side], rounds: int) -> list[dict[str, Timing]]:
    """Time all sides in alternating rounds, so that a busy machine slows down both; the first round is a warm-up."""
    timings: list[dict[str, Timing]] = [{} for _ in sides]
    for number in range(rounds + 1):
        for side, timing in zip(sides, timings, strict=True):
            for part, seconds in side().items():
                rounds_of_part = timing.setdefault(part, Timing()).seconds
                if number:
                    rounds_of_part.append(seconds)
    return timings


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Side:
    """Make a side whose call is timed as a whole."""

    def side() -> Seconds:
        start = clock()
        call()
        return {WHOLE: clock() - start}

    return side


class ModuleTimer:
    """Times the named modules of a network within one call; several runs of a module are summed."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.seconds: Seconds = {}
        for part, module in modules.items():
            module.register_forward_pre_hook(lambda *_, part=part: self.start(part))
            module.register_forward_hook(lambda *_, part=part: self.stop(part))

    def start(self, part: str) -> None:
        """Start timing a component."""
        self.seconds[part] = self.seconds.get(part, 0.0) - time.perf_counter()

    def stop(self, part: str) -> None:
        """Stop timing a component."""
        self.seconds[part] += time.perf_counter()

    def side(self, call: Callable[[], object], rest: str) -> Side:
        """Make a side whose call is timed as a whole and by component; `rest` is the time outside of the modules."""

        def run() -> Seconds:
            self.seconds = {}
            start = time.perf_counter()
            call()
            whole = time.perf_counter() - start
            return self.seconds | {rest: whole - sum(self.seconds.values()), WHOLE: whole}

        return run


def peak_megabytes(call: Callable[..., object], *arguments: object) -> float:
    """Return the peak memory, in 10^6 bytes, of a new process that only makes one call.

    Args:
        call: a module-level function, so that the new process can import it.
        arguments: its arguments.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_after, torch.get_num_threads(), call, arguments).result()


def _peak_after(threads: int, call: Callable[..., object], arguments: tuple) -> float:
    torch.set_num_threads(threads)
    call(*arguments)
    return 1000 * peak_memory_gb(torch.device("cpu"))


def matrix_rate(kind: torch.dtype, repeats: int = 10) -> float:
    """Return the floating-point operations per second of this CPU: the best of several products of large matrices."""
    left, right = torch.randn(2, _MATRIX, _MATRIX).to(kind)
    torch.mm(left, right)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return 2 * _MATRIX**3 / min(seconds)


class TimeLimitError(BaseException):
    """A block took too long. Not an `Exception`, so that the code of the block does not handle it."""


@contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """Run a block in the main thread, and raise TimeLimitError in it after `seconds`. Needs a POSIX system."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeLimitError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def threads(count: int) -> Generator[None]:
    """Run a block with this number of PyTorch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
