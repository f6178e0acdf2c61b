"""Compare an exported file with the model it was made from: numbers, bits of the masks, and final results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike

import numpy as np
import torch

from maskwright.errors import MaskwrightError
from maskwright.export.graph import ExportGraph
from maskwright.inference.exported.decisions import read_decision
from maskwright.inference.exported.metadata import ExportMetadata
from maskwright.inference.exported.runtimes import ExportedFile, Outputs
from maskwright.inference.exported_model import as_prediction
from maskwright.inference.mask_upsampling import CropPrediction
from maskwright.inference.segment import segment
from maskwright.models.segmenter import Segmenter
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Task
from maskwright.structures.predictions import MaskPrediction, PixelPrediction


class ExportError(MaskwrightError):
    """An exported file failed its check and was removed.

    Attributes:
        table: the numbers, as lines of text.
    """

    def __init__(self, found: str, *, where: str | PathLike[str] = "", remedy: str = "", table: str = "") -> None:
        super().__init__(found, where=where, remedy=remedy)
        self.table = table


Prediction = MaskPrediction | PixelPrediction

QUANTILE = 0.999  # of the differences of an output
SAME_OBJECT = 0.9  # mask IoU


@dataclass(frozen=True)
class Tolerance:
    """Limits of the check. Differences are relative to the largest value of an output, for 99.9 % of its values.

    Attributes:
        maps: for outputs that do not depend on attention masks: mask features, and the logits of a model without masks.
        queries: for all others. Rounding flips a few bits of the attention masks, and each changes a query: with random
            weights, those of a ResNet-50 at 512x512 differ by 1 % although its mask features agree to 0.001 %.
        agreement: minimum share of the pixels or instances of the final results.
    """

    maps: float
    queries: float
    agreement: float

    def of(self, output: str) -> float:
        """Return the limit of an output."""
        return self.maps if output in ("mask_features", "pixel_logits") else self.queries


TOLERANCES = {"fp32": Tolerance(1e-3, 0.03, 0.99), "fp16": Tolerance(0.03, 0.1, 0.95)}


@dataclass
class Comparison:
    """The differences between a file and the model, over all images of the check.

    Attributes:
        tolerance: the limits.
        largest: for each output of numbers: its largest value, its largest difference, and the difference that 99.9 %
            of its values do not exceed.
        flipped: mask logits at stride 4 with another sign, and their number; None if the file has no masks.
        agreement: for each task, the share of the model's result that the file reproduces.
    """

    tolerance: Tolerance
    largest: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    flipped: tuple[int, int] | None = None
    agreement: dict[Task, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether everything is within the limits; NaN is not."""
        close = (usual <= self.tolerance.of(name) * value for name, (value, _, usual) in self.largest.items())
        return all(close) and all(share >= self.tolerance.agreement for share in self.agreement.values())

    def table(self) -> str:
        """Format as lines of text."""
        lines = []
        if self.largest:
            lines.append(
                f"{'output':<18}{'largest value':>14}{'largest diff.':>15}{'99.9 % within':>15}{'allowed':>10}"
            )
        for name, (value, difference, usual) in self.largest.items():
            allowed = self.tolerance.of(name) * value
            mark = "" if usual <= allowed else "  too large"
            lines.append(f"{name:<18}{value:>14.4g}{difference:>15.2g}{usual:>15.2g}{allowed:>10.2g}{mark}")
        if self.flipped is not None:
            lines.append(f"mask bits that differ: {self.flipped[0]:,} of {self.flipped[1]:,}")
        for task, share in self.agreement.items():
            mark = "" if share >= self.tolerance.agreement else f"  less than {self.tolerance.agreement:.0%}"
            lines.append(f"{task} results agree: {share:.3%}{mark}")
        return "\n".join(lines)


def compare(graph: ExportGraph, file: ExportedFile, images: Sequence[tuple[np.ndarray, tuple[int, int]]]) -> Comparison:
    """Run the model and the file on images.

    Args:
        graph: of the model, on a CPU.
        file: opened.
        images: (C, H, W) float32 of the file's size, padded with the mean pixel; each with the (height, width) of the
            image in it.
    """
    metadata = file.metadata
    comparison = Comparison(TOLERANCES[metadata.precision])
    differences: dict[str, list[np.ndarray]] = {}
    agreements: dict[Task, list[float]] = {}
    for pixels, image_size in images:
        found = file.run(pixels[None])
        with torch.no_grad():
            final = graph.model(torch.from_numpy(pixels)[None]).final
            if metadata.contents != "result":
                expected = zip(graph.output_names, graph.head(final, metadata.size), strict=True)
                _add_differences(comparison, differences, {name: values.numpy() for name, values in expected}, found)
                _add_flipped_bits(comparison, final, as_prediction(found))
        for task in metadata.tasks:
            share = agreement(*_results(graph.model, final, found, task, metadata, image_size))
            agreements.setdefault(task, []).append(share)
    for name, parts in differences.items():
        value, largest, _ = comparison.largest[name]
        usual = float(np.quantile(np.concatenate(parts), QUANTILE, method="higher"))
        comparison.largest[name] = value, largest, usual
    comparison.agreement = {task: float(np.mean(shares)) for task, shares in agreements.items()}
    return comparison


def _add_differences(
    comparison: Comparison,
    differences: dict[str, list[np.ndarray]],
    expected: Outputs,
    found: Outputs,
) -> None:
    for name, values in expected.items():
        difference = np.abs(values - found[name].astype(np.float32)).ravel()
        value, largest, _ = comparison.largest.get(name, (0.0, 0.0, 0.0))
        comparison.largest[name] = max(value, float(np.abs(values).max())), max(largest, float(difference.max())), 0.0
        differences.setdefault(name, []).append(difference)


def _add_flipped_bits(comparison: Comparison, expected: Prediction, found: Prediction) -> None:
    if isinstance(expected, MaskPrediction) and isinstance(found, MaskPrediction):
        first, second = expected.mask_logits() > 0, found.mask_logits() > 0
        flipped, total = comparison.flipped or (0, 0)
        comparison.flipped = flipped + int((first != second).sum()), total + first.numel()


def _results(
    model: Segmenter,
    expected: Prediction,
    found: Outputs,
    task: Task,
    metadata: ExportMetadata,
    image_size: tuple[int, int],
) -> tuple[Segmentation, Segmentation]:
    """Return the results of the model and of the file.

    A file with results inside decides at the size of its input, so these are compared at that size.
    """

    def decide(prediction: Prediction, size: tuple[int, int]) -> Segmentation:
        crop = CropPrediction(prediction, metadata.size, size)
        config = model.evaluate_config
        return segment([crop], task, output_size=size, categories=model.categories, config=config)

    if metadata.contents != "result":
        return decide(expected, image_size), decide(as_prediction(found), image_size)
    outputs = {name: array[0] for name, array in found.items()}
    return decide(expected, metadata.size), read_decision(outputs, metadata, metadata.size, metadata.size)


def agreement(expected: Segmentation, found: Segmentation) -> float:
    """Return the share of the expected result that is found.

    Semantic: pixels with the same class. Panoptic: pixels in matching segments of the same class, or in none. Instance:
    instances with a counterpart of the same class and a mask IoU of at least 0.9.
    """
    if expected.task == "instance":
        return _instance_agreement(expected, found)
    if expected.label_map is not None and found.label_map is not None:
        return float(np.mean(expected.label_map == found.label_map))
    pairs, counts = np.unique(
        expected.id_map().astype(np.int64) * (len(found) + 1) + found.id_map(), return_counts=True
    )
    first, second = np.divmod(pairs, len(found) + 1)
    labels = [np.concatenate([[-1], result.labels]) for result in (expected, found)]
    areas = [np.bincount(result.id_map().ravel(), minlength=len(result) + 1) for result in (expected, found)]
    union = areas[0][first] + areas[1][second] - counts
    same = (labels[0][first] == labels[1][second]) & ((first == 0) | (counts > 0.5 * union))
    return float(counts[same].sum() / counts.sum())


def _instance_agreement(expected: Segmentation, found: Segmentation) -> float:
    if not len(expected):
        return 1.0 if not len(found) else 0.0
    first, second = (result.masks.reshape(len(result), -1).astype(np.float32) for result in (expected, found))
    common = first @ second.T
    union = first.sum(1)[:, None] + second.sum(1) - common
    same = (common >= SAME_OBJECT * union) & (expected.labels[:, None] == found.labels)  # two empty masks are equal
    return float(same.any(1).mean())
