"""`maskwright train --benchmark`: measure the speed of a training run by its own steps; nothing is kept."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from maskwright.config.recipe import Recipe
from maskwright.errors import MaskwrightError
from maskwright.runtime.device import (
    describe_device,
    gather_objects,
    is_asynchronous,
    peak_memory_gb,
    synchronize,
    usable_precision,
)
from maskwright.training.nan_guard import DelayedChecks
from maskwright.training.phase_timer import PhaseTimer
from maskwright.training.run_lock import RunLock
from maskwright.training.setup import Session, open_session
from maskwright.training.train import load_batches, take_step

PHASES = ("data", "forward", "criterion", "backward", "optimizer")


@dataclass(frozen=True)
class Throughput:
    """Speed and memory of a training run.

    Attributes:
        device: description of the first process's device.
        precision: the precision that was used.
        processes: number of processes, one per device.
        batch_size: images per step over all processes.
        steps: measured steps; the first tenth only warms up.
        step_seconds: mean time of a step, in the slowest process.
        phase_seconds: mean time of each phase over all processes; the rest is "other".
        memory_gb: peak memory of each process in GB (10^9 bytes): of its accelerator, or of the process on a CPU.
    """

    device: str
    precision: str
    processes: int
    batch_size: int
    steps: int
    step_seconds: float
    phase_seconds: dict[str, float]
    memory_gb: list[float]

    @property
    def images_per_second(self) -> float:
        """Images per second over all devices."""
        return self.batch_size / self.step_seconds

    def table(self) -> str:
        """Format the result for people."""
        total = sum(self.phase_seconds.values())
        speed, memory = self.images_per_second, ", ".join(f"{peak:.2f}" for peak in self.memory_gb)
        lines = [
            f"{self.device}, {self.precision}, {self.processes} process(es), {self.batch_size} images per step, "
            f"{self.steps} steps measured",
            f"images/s   {speed:.3f}, per device {speed / self.processes:.3f}",
            f"step       {self.step_seconds:.4f} s",
            *(f"{name:10} {seconds:.4f} s  {seconds / total:6.1%}" for name, seconds in self.phase_seconds.items()),
            f"memory     {memory} GB peak",
        ]
        return "\n".join(lines)


def measure_throughput(recipe: Recipe, steps: int) -> Throughput:
    """Train for a few steps with the recipe's data, model and settings, in a temporary folder.

    On asynchronous devices, the first half of the measured steps gives the undisturbed speed, and the
    second half, which synchronizes the device after each phase, gives the shares of the phases.

    Args:
        recipe: complete and resolved; evaluation, checks and trackers are switched off.
        steps: at least 4.

    Raises:
        MaskwrightError: there are too few steps; the recipe, the data or the device cannot be used.
        TrainingError: a loss is not finite.
    """
    if steps < 4:
        raise MaskwrightError(
            "the first step warms up, and others are measured", where=f"--benchmark {steps}", remedy="use at least 4"
        )
    changes = {"steps": steps, "trackers": (), "check_data": False, "probe_memory": False, "hang_timeout_seconds": None}
    train = recipe.train.model_copy(update=changes)
    data = recipe.data.model_copy(update={"val": None})
    with tempfile.TemporaryDirectory(prefix="maskwright-benchmark-") as folder, RunLock(Path(folder)) as lock:
        session = open_session(recipe.model_copy(update={"train": train, "data": data}), Path(folder), lock)
        assert session, "a new folder holds no finished run"
        accelerator = session.accelerator
        warm_up = max(1, steps // 10)
        step_seconds, phase_seconds = _measure(session, warm_up, steps)
        own = (step_seconds, phase_seconds, peak_memory_gb(accelerator.device))
        measured = gather_objects(accelerator, own)
        accelerator.wait_for_everyone()
    return Throughput(
        device=describe_device(accelerator.device),
        precision=usable_precision(accelerator.device, train.precision),
        processes=len(measured),
        batch_size=train.batch_size,
        steps=steps - warm_up,
        step_seconds=max(seconds for seconds, _, _ in measured),
        phase_seconds={name: sum(phases[name] for _, phases, _ in measured) / len(measured) for name in phase_seconds},
        memory_gb=[memory for _, _, memory in measured],
    )


def _measure(session: Session, warm_up: int, steps: int) -> tuple[float, dict[str, float]]:
    """Take the steps; return the seconds of a step, and of each of its phases."""
    device, run_logger, batches = session.accelerator.device, session.run_logger, load_batches(session)
    timed_from = (warm_up + steps) // 2 if is_asynchronous(device) else warm_up
    timer, clock, data_wait = PhaseTimer(device), {}, {}

    def mark(step: int) -> None:
        synchronize(device)
        clock[step], data_wait[step] = time.perf_counter(), run_logger.data_wait_seconds

    with DelayedChecks() as checks:
        for step in range(steps):
            if step in (warm_up, timed_from):
                mark(step)
            with timer.running() if step >= timed_from else contextlib.nullcontext():
                result, _ = take_step(session, next(batches))
            checks.add(result, now=False)
        mark(steps)
    end = timed_from if timed_from > warm_up else steps
    step_seconds = (clock[end] - clock[warm_up]) / (end - warm_up)
    timed_steps = steps - timed_from
    timer.seconds["data"] = data_wait[steps] - data_wait[timed_from]
    phases = {name: timer.seconds.get(name, 0.0) / timed_steps for name in PHASES}
    phases["other"] = max(0.0, (clock[steps] - clock[timed_from]) / timed_steps - sum(phases.values()))
    return step_seconds, phases
