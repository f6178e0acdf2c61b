"""`maskwright train --benchmark`: the speed of a training, by its own loop and steps; nothing is scored or kept."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from maskwright.config.recipe import Recipe
from maskwright.data.build import train_loader
from maskwright.errors import MaskwrightError
from maskwright.runtime.device import (
    describe_device,
    gather_objects,
    is_asynchronous,
    peak_memory_gb,
    synchronize,
    usable_precision,
)
from maskwright.training.nan_guard import Unchecked
from maskwright.training.setup import open_session
from maskwright.training.stopwatch import Stopwatch
from maskwright.training.train import run_steps

PARTS = ("data", "forward", "criterion", "backward", "optimizer")


@dataclass(frozen=True)
class Benchmark:
    """What was measured.

    Attributes:
        device: in words, of the first process.
        precision: number format that was used.
        processes: how many, one per device.
        batch_size: images per step over all processes.
        steps: measured ones; the first tenth is left out.
        step_seconds: mean of a step, of the slowest process.
        part_seconds: mean over processes, by part, and the rest as "other".
        memory_gb: peak of each process, in GB (10^9 bytes): of its accelerator, or of the process on a CPU.
    """

    device: str
    precision: str
    processes: int
    batch_size: int
    steps: int
    step_seconds: float
    part_seconds: dict[str, float]
    memory_gb: list[float]

    @property
    def images_per_second(self) -> float:
        """Over all devices."""
        return self.batch_size / self.step_seconds

    def table(self) -> str:
        """For people."""
        total = sum(self.part_seconds.values())
        whole, memory = self.images_per_second, ", ".join(f"{peak:.2f}" for peak in self.memory_gb)
        lines = [
            f"{self.device}, {self.precision}, {self.processes} process(es), {self.batch_size} images per step, "
            f"{self.steps} steps measured",
            f"images/s   {whole:.3f}, per device {whole / self.processes:.3f}",
            f"step       {self.step_seconds:.4f} s",
            *(f"{name:10} {part:.4f} s  {part / total:6.1%}" for name, part in self.part_seconds.items()),
            f"memory     {memory} GB at most",
        ]
        return "\n".join(lines)


def benchmark(recipe: Recipe, steps: int) -> Benchmark:
    """Train for so many steps with the recipe's data, model and settings, in a folder that is removed again.

    On devices that the host runs ahead of, the first half of the measured steps gives the speed, undisturbed, and the
    second half, which waits for the device between its parts, gives the shares.

    Args:
        recipe: complete and resolved; what is not training (scores, checks, trackers) is left out.
        steps: at least 4.

    Raises:
        MaskwrightError: there are too few steps; the recipe, the data or the device cannot be used.
        TrainingError: a loss is not finite.
    """
    if steps < 4:
        raise MaskwrightError(f"--benchmark {steps}: a first step warms up and others are measured; ask for at least 4")
    changes = {"steps": steps, "trackers": (), "check_data": False, "probe_memory": False, "hang_timeout_seconds": None}
    train = recipe.train.model_copy(update=changes)
    data = recipe.data.model_copy(update={"val": None})
    with tempfile.TemporaryDirectory(prefix="maskwright-benchmark-") as folder:
        session = open_session(recipe.model_copy(update={"train": train, "data": data}), Path(folder))
        assert session, "a new folder holds no finished run"
        engine, device, journal = session.engine, session.engine.device, session.journal
        rank, world = engine.process_index, engine.num_processes
        loader = train_loader(session.recipe, rank=rank, world_size=world, start_step=0, annotated=session.dataset)
        warm_up = max(1, steps // 10)
        split_from = (warm_up + steps) // 2 if is_asynchronous(device) else warm_up
        watch, marks = Stopwatch(device), {}

        def mark(step: int) -> None:
            synchronize(device)
            marks[step] = (time.perf_counter(), journal.waited)

        running = run_steps(session, loader)
        with Unchecked() as unchecked:
            for step in range(steps):
                if step in (warm_up, split_from):
                    mark(step)
                if step < split_from:
                    numbers, _ = next(running)
                else:
                    with watch.running():
                        numbers, _ = next(running)
                unchecked.add(numbers, at_once=False)
            mark(steps)
        end = split_from if split_from > warm_up else steps
        step_seconds = (marks[end][0] - marks[warm_up][0]) / (end - warm_up)
        split = steps - split_from
        watch.seconds["data"] = marks[steps][1] - marks[split_from][1]
        parts = {name: watch.seconds.get(name, 0.0) / split for name in PARTS}
        parts["other"] = max(0.0, (marks[steps][0] - marks[split_from][0]) / split - sum(parts.values()))
        found = gather_objects(engine, (step_seconds, parts, peak_memory_gb(device)))
        engine.wait_for_everyone()
    return Benchmark(
        device=describe_device(device),
        precision=usable_precision(device, train.precision),
        processes=world,
        batch_size=train.batch_size,
        steps=steps - warm_up,
        step_seconds=max(seconds for seconds, _, _ in found),
        part_seconds={name: sum(part[name] for _, part, _ in found) / world for name in parts},
        memory_gb=[memory for _, _, memory in found],
    )
