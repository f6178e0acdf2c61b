"""Profile a few training steps into a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import profile, schedule, supported_activities

from maskwright.runtime.atomic_write import write_file_atomically

_SKIPPED, _WARM_UP, _TRACED = 1, 1, 3  # steps


def profile_steps(run: Path, rank: int) -> profile:
    """Trace the third to fifth step after the start into `profile-rank-N.json` in the run's folder."""

    def write(finished: profile) -> None:
        write_file_atomically(run / f"profile-rank-{rank}.json", lambda file: finished.export_chrome_trace(str(file)))

    return profile(
        activities=sorted(supported_activities(), key=str),
        schedule=schedule(wait=_SKIPPED, warmup=_WARM_UP, active=_TRACED, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
        profile_memory=True,
    )
