"""Expected calibration error: the mean difference between how sure a model is and how often it is right.

Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017): predictions are sorted by their confidence into 15
bins of equal width, and the differences between accuracy and mean confidence of the bins are averaged with the sizes of
the bins as weights. Lower is better, but 0 is not accurate: a model that always answers the most frequent class with
the frequency of that class is calibrated.

What is counted depends on the task:

- semantic: every annotated pixel, by `Segmentation.confidence`.
- instance, panoptic: every predicted segment, by its score; it is right if it matches an annotated segment of its
  class. This is the detection ECE (D-ECE) of Küppers et al., "Multivariate Confidence Calibration for Object Detection"
  (CVPR workshops 2020), with confidence as the only dimension. Segments that were missed do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from hotcoco import mask as coco_mask

from maskwright.evaluation.metrics.average_precision import coco_annotations, coco_results, find_things
from maskwright.evaluation.metrics.base import Metric, Scores, as_table, json_score, json_scores, ratio
from maskwright.evaluation.metrics.panoptic_quality import match_segments
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target

BINS = 15
SAME_OBJECT = 0.5  # min IoU of an instance that is right

_UNIT = 2**24  # confidences are summed in units of 1 / 2**24, exactly and so in any order
_BAND_PIXELS = 2**22  # pixels counted at once


class CalibrationError(Metric):
    """ECE and the reliability of each bin; see the subclasses for what is counted.

    Attributes:
        counted: what the bins count, for the table.
        counts: (BINS,) int64, predictions in each bin.
        right: (BINS,) int64, how many of them are right.
        confidence: (BINS,) int64, the sum of their confidences, in units of 2^-24.
    """

    higher_is_better = False
    counted = "segments"

    def __init__(self, categories: Sequence[Category]) -> None:
        super().__init__(categories)
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.right = np.zeros(BINS, dtype=np.int64)
        self.confidence = np.zeros(BINS, dtype=np.int64)

    def count(self, confidence: np.ndarray, right: np.ndarray) -> None:
        """Add predictions, given the confidence of each (n,) in 0..1, and whether it is right (n,) bool."""
        bins = np.clip(np.ceil(confidence.astype(np.float64) * BINS).astype(np.int64) - 1, 0, BINS - 1)
        self.counts += np.bincount(bins, minlength=BINS)
        self.right += np.bincount(bins[right], minlength=BINS)
        units = np.rint(confidence.astype(np.float64) * _UNIT)
        self.confidence += np.bincount(bins, units, BINS).astype(np.int64)

    def _merge(self, other: CalibrationError) -> None:
        self.counts += other.counts
        self.right += other.right
        self.confidence += other.confidence

    def compute(self) -> Scores:
        """Return ECE, and for each bin the mean confidence, the accuracy and the number of predictions."""
        confidence = self.confidence / _UNIT
        ece = ratio(np.abs(self.right - confidence).sum(), self.counts.sum())
        edges = np.rint(100 * np.arange(BINS + 1) / BINS).astype(int).tolist()
        names = [f"{low}-{high} %" for low, high in pairwise(edges)]
        columns = {
            "confidence": json_scores(ratio(confidence, self.counts)),
            "accuracy": json_scores(ratio(self.right, self.counts)),
            self.counted: self.counts.tolist(),
        }
        return {"ECE": json_score(ece), "images": len(self.image_ids), "per_confidence": as_table(names, columns)}


class PixelCalibration(CalibrationError):
    """ECE of the pixels of semantic results; pixels without an object are not counted, crowds are their class."""

    task = target_task = "semantic"
    counted = "pixels"
    needs_confidence = True

    def _add(self, result: Segmentation, target: Target) -> None:
        if result.label_map is None or result.confidence is None:
            found = f"found {result.task}"
            raise ValueError(f"image {target.image_id}: ECE needs a semantic result with a confidence map, {found}")
        if len(target.id_maps) > 1:
            target = target.merge_classes()
        ids, labels = target.id_maps[0].numpy(), np.append(-1, target.labels.numpy())
        height = max(1, _BAND_PIXELS // max(1, ids.shape[1]))
        for start in range(0, len(ids), height):
            rows = slice(start, start + height)
            truth = labels[ids[rows]]
            annotated = truth >= 0
            self.count(result.confidence[rows][annotated], (result.label_map[rows] == truth)[annotated])


class PanopticCalibration(CalibrationError):
    """D-ECE of panoptic segments: right is a true positive of panoptic quality, and what PQ ignores is not counted."""

    task = target_task = "panoptic"

    def _add(self, result: Segmentation, target: Target) -> None:
        match = match_segments(result, target, "ECE")
        right = np.zeros(len(result), dtype=bool)
        right[match.predicted] = True
        counted = right | match.false_positive
        assert result.scores is not None
        self.count(result.scores[counted], right[counted])


class InstanceCalibration(CalibrationError):
    """D-ECE of instances, matched as by COCO at an IoU of 0.5; an instance on a crowd region is not counted.

    Raises:
        DatasetError: no category is a thing.
    """

    task = target_task = "instance"

    def __init__(self, categories: Sequence[Category]) -> None:
        super().__init__(categories)
        self.things = find_things(self.categories)

    def _add(self, result: Segmentation, target: Target) -> None:
        truth, found = coco_annotations(target, self.things, 1), coco_results(result, target, self.things, 1)
        for label in sorted({entry["category_id"] for entry in found}):
            own = [entry for entry in found if entry["category_id"] == label]
            own.sort(key=lambda entry: -entry["score"])
            objects = [entry for entry in truth if entry["category_id"] == label]
            crowd = np.array([entry["iscrowd"] for entry in objects], dtype=bool)
            masks = [[entry["segmentation"] for entry in entries] for entries in (own, objects)]
            iou = np.asarray(coco_mask.iou(*masks, crowd.tolist())).reshape(len(own), len(objects))
            right, ignored = _match(iou, crowd)
            scores = np.array([entry["score"] for entry in own])
            self.count(scores[~ignored], right[~ignored])


def _match(iou: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match predictions, best first, each to the free object of the highest IoU; return (P,) right and (P,) ignored.

    Args:
        iou: (P, N); with crowd regions, the share of the prediction inside.
        crowd: (N,) bool.
    """
    right, ignored = np.zeros(len(iou), dtype=bool), np.zeros(len(iou), dtype=bool)
    free = iou * ~crowd
    for prediction in range(len(iou)):
        if free.shape[1] and free[prediction].max() >= SAME_OBJECT:
            right[prediction] = True
            free[:, free[prediction].argmax()] = 0
        else:
            ignored[prediction] = bool((iou[prediction, crowd] >= SAME_OBJECT).any())
    return right, ignored
