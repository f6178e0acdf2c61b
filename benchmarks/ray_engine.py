"""Prediction of many small images: the plain loop of `predict`, and one and two workers on Ray, with the same cores.

The sides take turns over parts of the images, so that a busy machine slows down all of them; `--rounds` sets the number
of parts. Times begin with the first image; starting Ray and its workers, once per turn, is a column of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from benchmarks.rows import Options, Part
from benchmarks.timing import threads
from maskwright.cluster.ray_options import RayOptions
from maskwright.cluster.ray_predict import predict_on_ray
from maskwright.data.images.find import find_images
from maskwright.data.images.load import load_image
from maskwright.inference.predict_files import predict_files
from maskwright.inference.predictor import Predictor

IMAGES, SIDE, TURNS, MODEL = 2000, 96, 4, "nuclei"
SAMPLE = Path(__file__).parents[1] / "src/maskwright/data/sample"

Seconds = tuple[float, float]  # from the first image to the last result; and before and after


def bench_ray(options: Options) -> Part:
    """Time the three sides.

    Raises:
        MaskwrightError: Ray is not installed.
    """
    turns = options.rounds or TURNS
    sides: dict[str, Callable[[Path, Path], Seconds]] = {
        "loop": _loop(options.threads),
        "1 worker": _workers(1, options.threads),
        f"{options.threads} workers": _workers(options.threads, options.threads),
    }
    found: dict[str, list[Seconds]] = {name: [] for name in sides}
    count = -(-IMAGES // turns)
    with TemporaryDirectory() as folder, threads(options.threads):
        for turn in range(turns):
            images = _write_crops(Path(folder) / f"images-{turn}", count, options.seed + turn)
            for name, side in sides.items():
                found[name].append(side(images, Path(folder) / f"{name}-{turn}"))
    loop = sum(seconds for seconds, _ in found["loop"])
    scores = [_cells(name, seconds, count, loop) for name, seconds in found.items()]
    setting = f"{turns * count:,} crops of {SIDE}x{SIDE} in {turns} turns, {MODEL}, {options.threads} cores"
    return Part([], [setting], scores)


def _cells(name: str, turns: list[Seconds], count: int, loop: float) -> dict[str, str]:
    """Return a row of the table; `count` images per turn, `loop` seconds of the loop in all turns."""
    seconds = [working for working, _ in turns]
    return {
        "": name,
        "images/s": f"{count * len(turns) / sum(seconds):.1f}",
        "slowest turn": f"{count / max(seconds):.1f}",
        "fastest turn": f"{count / min(seconds):.1f}",
        "of the loop": f"{loop / sum(seconds):.2f}",
        "start and stop, s": f"{sum(rest for _, rest in turns) / len(turns):.1f}",
    }


def _loop(count: int) -> Callable[[Path, Path], Seconds]:
    predictor = Predictor(MODEL, device="cpu")

    def run(images: Path, output: Path) -> Seconds:
        with threads(count):
            start = time.perf_counter()
            predict_files(predictor, [str(images)], output, short_side=SIDE)
            return time.perf_counter() - start, 0.0

    return run


def _workers(workers: int, cores: int) -> Callable[[Path, Path], Seconds]:
    each = RayOptions(workers=workers, resources={"CPU": cores // workers})

    def run(images: Path, output: Path) -> Seconds:
        start = time.perf_counter()
        summary = predict_on_ray(MODEL, [str(images)], output, each, device="cpu", short_side=SIDE)
        return summary.seconds, time.perf_counter() - start - summary.seconds

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
