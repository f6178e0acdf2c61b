"""Processor time of our metrics and of their references on the same predictions, image by image in alternating order.

Both sides begin with arrays: pycocotools encodes masks, as in the original's evaluator, and gets the annotations as
RLE, while ours begins with id maps; the panoptic protocol gets decoded PNGs, and the formula of mIoU a label map. The
official tool of Cityscapes only reads files, so our side reads the same files, and a note reports the time of reading.
That scores are equal is tested.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.rows import Options, Part, Row
from benchmarks.scenes import DETECTIONS, Scene, cityscapes_detections, coco_scenes, coco_things, write_cityscapes_truth
from benchmarks.score_peers import (
    Histograms,
    PanopticReference,
    Pycocotools,
    Side,
    cityscapes_tool_scores,
    coco_annotations,
)
from benchmarks.timing import Timing, threads
from maskwright.config.categories import load_categories
from maskwright.config.schema import DataConfig
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.images.label_images import read_label_image
from maskwright.evaluation.metrics.average_precision import AveragePrecision
from maskwright.evaluation.metrics.base import Metric
from maskwright.evaluation.metrics.cityscapes_ap import CityscapesAP
from maskwright.evaluation.metrics.mean_iou import MeanIoU
from maskwright.evaluation.metrics.panoptic_quality import PanopticQuality
from maskwright.results.segmentation import Segmentation
from maskwright.results.submission import open_submission
from maskwright.structures.annotations import Target

IMAGES = 500  # of COCO's size, each with 10 to 20 objects and 100 detections
CITYSCAPES_IMAGES = 4  # of 2048x1024; the official tool takes seconds for each

Scores = dict[str, float | None]


def bench_evaluation(options: Options) -> Part:
    """Score synthetic results of COCO's size, and of a few images of Cityscapes' size, on both sides.

    Returns:
        Processor seconds per image of AP of masks and boxes, panoptic quality, mIoU, and the AP of Cityscapes if
        cityscapesscripts is installed.

    Raises:
        MaskwrightError: pycocotools is not installed.
    """
    rounds = options.rounds or 1
    with threads(1):
        part = _compare_coco(rounds, options.seed)
        if _installed("cityscapesscripts"):
            row, notes = _compare_cityscapes(rounds, options.seed)
            part.rows.append(row)
            part.notes.extend(notes)
    return part


def _compare_coco(rounds: int, seed: int) -> Part:
    annotations = coco_annotations(load_categories("coco_instance"), coco_things(IMAGES, seed))
    peers = {
        "AP, masks and boxes": _version("pycocotools"),
        "panoptic quality": "the protocol of panopticapi",
        "mIoU": "the formula of mmsegmentation",
    }
    seconds = np.zeros((rounds, len(peers), 2))
    for round_seconds in seconds:
        score_all(coco_pairs(annotations), round_seconds, seed)
    rows = [_row(name, seconds[:, position].T / IMAGES) for position, name in enumerate(peers)]
    return Part(rows, [f"{name}: compared with {peer}" for name, peer in peers.items()])


def coco_pairs(annotations: dict) -> list[tuple[Side, Side]]:
    """Pair each of our metrics with its reference; `annotations` as of `coco_annotations`."""
    instance, panoptic = load_categories("coco_instance"), load_categories("coco_panoptic")
    return [
        (_Ours(AveragePrecision(instance), _instances), Pycocotools(instance, annotations)),
        (_Ours(PanopticQuality(panoptic), _segments), PanopticReference(panoptic)),
        (_Ours(MeanIoU(panoptic), _classes), Histograms(panoptic)),
    ]


def _row(piece: str, seconds: np.ndarray) -> Row:
    """Make a row of seconds per image, (2, rounds), ours and theirs."""
    ours, theirs = (Timing(side.tolist()) for side in seconds)
    setting = f"per image, {IMAGES} of COCO's size with {DETECTIONS} detections, 1 process, 1 thread"
    return Row("evaluation", piece, setting, "peer", ours, theirs, clock="processor")


class _Ours:
    def __init__(self, metric: Metric, pick: Callable[[Scene], tuple[Segmentation, Target]]) -> None:
        self.metric, self.pick = metric, pick

    def add(self, scene: Scene) -> None:
        self.metric.update(*self.pick(scene))

    def finish(self) -> Scores:
        scores = self.metric.compute()
        return {name: value for name, value in scores.items() if name != "images" and not isinstance(value, dict)}


def _instances(scene: Scene) -> tuple[Segmentation, Target]:
    return scene.found, scene.things


def _segments(scene: Scene) -> tuple[Segmentation, Target]:
    return scene.found_segments, scene.segments


def _classes(scene: Scene) -> tuple[Segmentation, Target]:
    return scene.found_classes, scene.segments


def score_all(pairs: Sequence[tuple[Side, Side]], seconds: np.ndarray, seed: int) -> list[tuple[Scores, Scores]]:
    """Score all scenes once, add the time to `seconds` (pairs, 2), and return the scores of both sides of each pair."""
    for number, scene in enumerate(coco_scenes(IMAGES, seed)):
        for pair, spent in zip(pairs, seconds, strict=True):
            for side in (0, 1) if number % 2 else (1, 0):
                start = time.process_time()
                pair[side].add(scene)
                spent[side] += time.process_time() - start
    scores = []
    for pair, spent in zip(pairs, seconds, strict=True):
        found = []
        for side in (0, 1):
            start = time.process_time()
            found.append(pair[side].finish())
            spent[side] += time.process_time() - start
        scores.append((found[0], found[1]))
    return scores


def _compare_cityscapes(rounds: int, seed: int) -> tuple[Row, list[str]]:
    name = f"AP of Cityscapes, {CITYSCAPES_IMAGES} images, files read"
    seconds, reading = np.zeros((2, rounds)), np.zeros((2, rounds))
    with tempfile.TemporaryDirectory() as folder:
        root, found = Path(folder) / "cityscapes", Path(folder) / "found"
        names = write_cityscapes_truth(root, CITYSCAPES_IMAGES, seed)
        annotated = open_annotations(
            DataConfig(format="cityscapes", root=str(root), task="instance", train=None), "val"
        )
        with open_submission("cityscapes", "instance", found) as submission:
            for number, image in enumerate(names):
                target = annotated.target(number)
                submission.add(cityscapes_detections(target, annotated.categories, seed + number), image)
        truths = [root / "gtFine" / "val" / "town" / f"{image}_gtFine_instanceIds.png" for image in names]
        for number in range(rounds):
            start = time.process_time()
            cityscapes_tool_scores(found, truths)
            middle = time.process_time()
            our_cityscapes_scores(found, names, annotated)
            seconds[:, number] = time.process_time() - middle, middle - start
            reading[:, number] = _reading_seconds([*truths, *sorted(found.rglob("*.png"))])
    share = np.median(reading, axis=1) / CITYSCAPES_IMAGES
    notes = [
        f"{name}: compared with {_version('cityscapesscripts')}",
        f"{name}: decoding takes {share[0]:.3f} s of ours, and {share[1]:.3f} s of theirs, by Pillow",
    ]
    return _row(name, seconds / CITYSCAPES_IMAGES), notes


def _reading_seconds(files: Sequence[Path]) -> tuple[float, float]:
    """Return the processor seconds to decode images by our reader, and by Pillow, which the official tool uses."""
    start = time.process_time()
    for file in files:
        read_label_image(file)
    middle = time.process_time()
    for file in files:
        np.array(Image.open(file))
    return middle - start, time.process_time() - middle


def our_cityscapes_scores(found: Path, names: Sequence[str], annotated: AnnotatedImages) -> Scores:
    """Return our scores of the files that the official tool reads, including annotations."""
    categories = annotated.categories
    metric, labels = CityscapesAP(categories), {category.id: label for label, category in enumerate(categories)}
    space = np.empty((0, 0, 0), dtype=bool)
    for number, name in enumerate(names):
        rows = [line.split() for line in (found / f"{name}_pred.txt").read_text(encoding="utf-8").splitlines()]
        target = annotated.target(number)
        if len(space) < len(rows) or space.shape[1:] != target.original_size:
            space = np.empty(
                (len(rows), *target.original_size), dtype=bool
            )  # reused, because allocating costs as much as decoding
        masks = space[: len(rows)]
        for mask, row in zip(masks, rows, strict=True):
            np.not_equal(read_label_image(found / row[0]), 0, out=mask)
        kinds, scores = np.array([labels[int(row[1])] for row in rows]), np.array([float(row[2]) for row in rows])
        result = Segmentation("instance", masks.shape[1:], categories, kinds, scores, instance_masks=masks)
        metric.update(result, target)
    return metric.compute()


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}" if _installed(package) else package
