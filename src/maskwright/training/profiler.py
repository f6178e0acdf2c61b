"""A trace of a few training steps, for viewers of Chrome's trace format, such as Perfetto and chrome://tracing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch.profiler import profile, schedule, supported_activities

from maskwright.runtime.atomic_write import write_file_atomically

_WAIT, _WARM_UP, _ACTIVE = 1, 1, 3  # steps


class Tracer(Protocol):
    """What is told of each step."""

    def step(self) -> None:
        """A step is done."""


class _NoTrace(AbstractContextManager):
    def __exit__(self, *exception: object) -> None:
        return None

    def step(self) -> None:
        """Nothing is traced."""


def no_trace() -> AbstractContextManager[Tracer]:
    """A run that is not traced."""
    return _NoTrace()


def trace_steps(run: Path, rank: int) -> AbstractContextManager[Tracer]:
    """Trace the third to fifth step after the start into `profile-rank-N.json` in the run's folder."""

    def write(finished: profile) -> None:
        write_file_atomically(run / f"profile-rank-{rank}.json", lambda file: finished.export_chrome_trace(str(file)))

    return profile(
        activities=sorted(supported_activities(), key=str),
        schedule=schedule(wait=_WAIT, warmup=_WARM_UP, active=_ACTIVE, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
        profile_memory=True,
    )
