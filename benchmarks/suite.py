"""Run benchmarks and save their results."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import torch

from benchmarks import ON_CAMVID, ON_REQUEST, PartName
from benchmarks.rows import Options, Part, chart
from maskwright.errors import MaskwrightError
from maskwright.runtime.atomic_write import write_file_atomically


def run_benchmarks(names: Iterable[PartName], options: Options) -> Iterator[tuple[PartName, Part]]:
    """Run the named benchmarks, or all but those of `ON_REQUEST`, and yield each when it is finished.

    Raises:
        MaskwrightError: rounds or threads are below 1, data is missing, the peer is not installed, or this CPU only
            emulates the precision.
    """
    if (options.rounds is not None and options.rounds < 1) or options.threads < 1:
        raise MaskwrightError(f"rounds {options.rounds} and threads {options.threads} must both be at least 1")
    names = tuple(names)
    if (trained := [name for name in names if name in ON_CAMVID]) and options.data is None:
        raise MaskwrightError(
            f"{trained[0]} trains on CamVid, but --data is not set", remedy="set --data to its folder"
        )
    if "ablation" in names and (options.output is None or options.seeds < 1 or options.budget <= 0):
        raise MaskwrightError(
            f"ablation saves its results one by one, but --output is {options.output}, --seeds {options.seeds} and "
            f"--budget {options.budget:g}",
            remedy="set --output to a folder, and the others above 0",
        )
    for name in names or [name for name in get_args(PartName) if name not in ON_REQUEST]:
        yield name, run_benchmark(name, options)


def run_benchmark(name: PartName, options: Options) -> Part:
    """Run one benchmark."""
    match name:
        case "prediction":
            from benchmarks.prediction import bench_prediction as run
        case "training":
            from benchmarks.training import bench_training as run
        case "eomt":
            from benchmarks.eomt import bench_eomt as run
        case "postprocessing":
            from benchmarks.postprocessing import bench_postprocessing as run
        case "data":
            from benchmarks.data import bench_data as run
        case "evaluation":
            from benchmarks.evaluation import bench_evaluation as run
        case "loading":
            from benchmarks.loading import bench_loading as run
        case "startup":
            from benchmarks.startup import bench_startup as run
        case "serving":
            from benchmarks.serving import bench_serving as run
        case "export":
            from benchmarks.exported import bench_export as run
        case "accuracy":
            from benchmarks.accuracy import bench_accuracy as run
        case "ablation":
            from benchmarks.ablation import bench_ablation as run
        case "load":
            from benchmarks.serving import bench_load as run
        case "ray":
            from benchmarks.ray_engine import bench_ray as run
    return run(options)


def machine() -> str:
    """Return what the timings depend on: processor, PyTorch version and date."""
    return f"{processor()}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}"


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def to_json(parts: dict[str, Part], options: Options) -> dict:
    """Return all results for `json.dumps`."""
    found = {
        name: {"rows": [row.to_json() for row in part.rows], "scores": part.scores, "notes": part.notes}
        for name, part in parts.items()
    }
    return {"machine": machine(), "threads": options.threads, "parts": found}


def save(parts: dict[str, Part], text: str, values: str, folder: Path) -> None:
    """Write bench.md and bench.json, and bench.png if there is a ratio."""
    write_file_atomically(folder / "bench.md", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    write_file_atomically(folder / "bench.json", lambda path: path.write_text(values + "\n", encoding="utf-8"))
    if any(row.ratio for part in parts.values() for row in part.rows):
        write_file_atomically(folder / "bench.png", lambda path: chart(list(parts.values()), path, machine()))
