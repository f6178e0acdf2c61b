"""Prediction of many small images: the plain loop of `predict`, and one and two workers on Ray, with the same cores.

The sides take turns over parts of the images, so that a busy machine slows down all of them; `--rounds` sets how many
turns. Times begin with the first image; what starting Ray and its workers takes once per run is in a note.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from benchmarks.rows import Options, Part, Row
from benchmarks.timing import Timing, threads
from maskwright.cluster.ray_options import RayOptions
from maskwright.cluster.ray_predict import predict_on_ray
from maskwright.data.images.find import find_images
from maskwright.data.images.load import load_image
from maskwright.inference.predict_files import predict_files
from maskwright.inference.predictor import Predictor

IMAGES, SIDE, TURNS, MODEL = 500, 96, 4, "nuclei"  # images of one turn
SAMPLE = Path(__file__).parents[1] / "src/maskwright/data/sample"


def bench_ray(options: Options) -> Part:
    """Time the three sides.

    Raises:
        MaskwrightError: Ray is not installed.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 would be unfair on a busy machine
    turns = options.rounds or TURNS
    sides: dict[str, Callable[[Path, Path], tuple[float, float]]] = {
        "loop": _loop(options.threads),
        "1 worker": _workers(1, options.threads),
        f"{options.threads} workers": _workers(options.threads, options.threads),
    }
    found = {name: (Timing(), Timing()) for name in sides}
    with TemporaryDirectory() as folder, threads(options.threads):
        for turn in range(turns):
            images = _write_crops(Path(folder) / f"images-{turn}", IMAGES, options.seed + turn)
            for name, side in sides.items():
                seconds, whole = side(images, Path(folder) / f"{name}-{turn}")
                found[name][0].seconds.append(seconds)
                found[name][1].seconds.append(whole - seconds)
    timings = {name: timing for name, (timing, _) in found.items()}
    loop = timings.pop("loop")
    setting = f"{turns} turns of {IMAGES} crops of {SIDE}x{SIDE}, {MODEL}, {options.threads} cores"
    rate = {name: IMAGES / timing.median for name, timing in {"loop": loop, **timings}.items()}
    notes = [
        ", ".join(f"{name} {images:.1f} images/s ({images / rate['loop']:.2f})" for name, images in rate.items()),
        "starting and stopping: " + ", ".join(f"{name} {found[name][1].median:.1f} s" for name in timings),
    ]
    return Part([Row("ray", "whole", setting, "", loop, None, timings)], notes)


def _loop(count: int) -> Callable[[Path, Path], tuple[float, float]]:
    predictor = Predictor(MODEL, device="cpu")

    def run(images: Path, output: Path) -> tuple[float, float]:
        with threads(count):
            start = time.perf_counter()
            predict_files(predictor, [str(images)], output, short_side=SIDE)
            seconds = time.perf_counter() - start
        return seconds, seconds

    return run


def _workers(workers: int, cores: int) -> Callable[[Path, Path], tuple[float, float]]:
    each = RayOptions(workers=workers, resources={"CPU": cores // workers})

    def run(images: Path, output: Path) -> tuple[float, float]:
        start = time.perf_counter()
        summary = predict_on_ray(MODEL, [str(images)], output, each, device="cpu", short_side=SIDE)
        return summary.seconds, time.perf_counter() - start

    return run


def _write_crops(folder: Path, count: int, seed: int) -> Path:
    """Write crops of the sample images in the package."""
    folder.mkdir()
    images = [load_image(path) for path in find_images([SAMPLE / "train", SAMPLE / "val"])]
    generator = np.random.default_rng(seed)
    for number in range(count):
        image = images[number % len(images)]
        top, left = (int(generator.integers(0, size - SIDE)) for size in image.shape[:2])
        Image.fromarray(image[top : top + SIDE, left : left + SIDE]).save(folder / f"{number:04d}.png")
    return folder
