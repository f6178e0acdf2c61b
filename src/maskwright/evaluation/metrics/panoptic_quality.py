"""Panoptic quality: Kirillov et al., "Panoptic Segmentation" (CVPR 2019), with the rules of the COCO panoptic API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maskwright.evaluation.metrics.base import (
    Metric,
    Scores,
    check_no_overlap,
    count_overlaps,
    json_scores,
    mean,
    ratio,
)
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target


class PanopticQuality(Metric):
    """PQ, SQ and RQ with the rules of the COCO panoptic API.

    A predicted and an annotated segment of the same class match if their IoU is above 0.5; void pixels inside the
    predicted segment do not count in the union. Crowd regions never match and are never false negatives. An unmatched
    predicted segment is no false positive if more than half of it is on void or on the crowd region of its class; of
    several crowd regions of a class, the last one counts, as in the API. Predicted segments without a pixel are
    ignored. Areas are counted from the maps, not read from the annotation file.

    hotcoco's `PanopticEval` is not used because it needs all images at once and cannot be merged; a test compares both.

    Attributes:
        counts: (K, 3) int64, true positives, false positives, false negatives.
        iou_sums: sum of the IoU of each class's true positives in units of 2^-53. An IoU above 0.5 is a multiple of
            this unit, so the sums are exact and independent of the order of images and of how processes share them.
    """

    task = target_task = "panoptic"

    def __init__(self, categories: Sequence[Category]) -> None:
        super().__init__(categories)
        self.counts = np.zeros((len(self.categories), 3), dtype=np.int64)
        self.iou_sums = [0] * len(self.categories)

    def _add(self, result: Segmentation, target: Target) -> None:
        match = match_segments(result, target, "panoptic quality")
        labels = target.labels.numpy()
        true, false, missed = labels[match.annotated], result.labels[match.false_positive], labels[match.missed]
        for label, value in zip(true.tolist(), match.iou.tolist(), strict=True):
            self.iou_sums[label] += int(value * 2**53)
        for kind, group in enumerate((true, false, missed)):
            self.counts[:, kind] += np.bincount(group, minlength=len(self.categories))

    def _merge(self, other: PanopticQuality) -> None:
        self.counts += other.counts
        self.iou_sums = [a + b for a, b in zip(self.iou_sums, other.iou_sums, strict=True)]

    def compute(self) -> Scores:
        """Return PQ, SQ and RQ over all classes, things (`_th`) and stuff (`_st`).

        Means are over classes with a segment in annotations or results. SQ of a class without a match is 0.
        """
        tp, fp, fn = self.counts.T
        iou_sums = np.array([total / 2**53 for total in self.iou_sums])
        seen = self.counts.sum(1) > 0
        rq = ratio(tp, tp + fp / 2 + fn / 2)
        sq = np.where(seen, np.nan_to_num(ratio(iou_sums, tp)), np.nan)
        quality = {"PQ": ratio(iou_sums, tp + fp / 2 + fn / 2), "SQ": sq, "RQ": rq}

        thing = np.array([category.is_thing for category in self.categories], dtype=bool)
        groups = {"": np.ones_like(thing), "_th": thing, "_st": ~thing}
        summary = {
            name + suffix: mean(values[group]) for suffix, group in groups.items() for name, values in quality.items()
        }
        per_class = {name: json_scores(values) for name, values in quality.items()}
        per_class |= {"TP": tp.tolist(), "FP": fp.tolist(), "FN": fn.tolist()}
        return self._scores(summary, per_class)


class SegmentMatch(NamedTuple):
    """The outcome of matching N annotated and M predicted segments.

    Attributes:
        annotated: (T,) index of the annotated segment of each true positive.
        predicted: (T,) index of its predicted segment.
        iou: (T,) above 0.5.
        false_positive: (M,) bool; segments that are ignored are neither true nor false.
        missed: (N,) bool.
    """

    annotated: np.ndarray
    predicted: np.ndarray
    iou: np.ndarray
    false_positive: np.ndarray
    missed: np.ndarray


def match_segments(result: Segmentation, target: Target, metric: str) -> SegmentMatch:
    """Match the segments of an image by the rules of `PanopticQuality`.

    Args:
        result: panoptic.
        target: without overlap.
        metric: name for errors.

    Raises:
        ValueError: the result is not panoptic.
        DatasetError: annotated objects overlap.
    """
    if result.segment_map is None:
        raise ValueError(f"image {target.image_id}: {metric} needs a panoptic result, found {result.task}")
    check_no_overlap(target, metric)
    labels, crowd = target.labels.numpy(), target.is_crowd.numpy()
    ids = target.id_maps[0].numpy()
    overlap = count_overlaps(ids, result.segment_map, len(labels), len(result.labels))  # (N+1, M+1)
    pixels, void, inside = overlap.sum(0)[1:], overlap[0, 1:], overlap[1:, 1:]

    union = overlap.sum(1)[1:, None] + pixels - inside - void  # (N, M)
    match = (2 * inside > union) & (labels[:, None] == result.labels) & ~crowd[:, None]
    rows, columns = match.nonzero()
    iou = inside[rows, columns] / union[rows, columns]

    missed, false = ~crowd, pixels > 0  # false negatives and false positives
    missed[rows] = false[columns] = False
    false &= 2 * (void + _crowd_pixels(inside, labels, crowd, result.labels)) <= pixels
    return SegmentMatch(rows, columns, iou, false, missed)


def _crowd_pixels(inside: np.ndarray, labels: np.ndarray, crowd: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return for each predicted segment its pixels on the crowd region of its class, (M,)."""
    last = dict(zip(labels[crowd].tolist(), crowd.nonzero()[0].tolist(), strict=True))  # crowd region of each class
    pixels = np.zeros(len(predicted), dtype=np.int64)
    for label, i in last.items():
        np.copyto(pixels, inside[i], where=predicted == label)
    return pixels
