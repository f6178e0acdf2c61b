"""Average precision of instances by the rules of Cityscapes.

Original: cityscapesscripts/evaluation/evalInstanceLevelSemanticLabeling.py.

Differences from COCO's: an object matches above a threshold, not at it; a prediction is ignored if the share of its
pixels on void, groups and objects of less than 100 pixels is above the threshold; of several predictions of one object,
the one with the highest score is true; equal scores are one point of the curve; and the area under the curve is not
interpolated. Unusual: of each prediction, only the outcome at each threshold is kept, ten bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maskwright.evaluation.metrics.average_precision import find_things
from maskwright.evaluation.metrics.base import Metric, Scores, check_no_overlap, json_scores, mean
from maskwright.evaluation.metrics.cityscapes_iou import check_cityscapes_classes
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target
from maskwright.structures.id_maps import count_values, id_dtype

THRESHOLDS = np.arange(0.5, 1.0, 0.05)
MIN_PIXELS = 100  # of an object that counts; smaller ones are ignored

_IGNORED, _FALSE, _TRUE = -1, 0, 1


class CityscapesAP(Metric):
    """AP over ten thresholds and AP50 of instance masks, by the rules of Cityscapes' own tool.

    Crowd regions are its groups: objects that cannot be separated; those of one class and image are one group. If
    a target has no `void`, all pixels without an object are void.

    Attributes:
        objects: (K,) int64, annotated objects that count.
        labels: per image (P,) int64, labels of the predictions that have a pixel.
        scores: per image (P,) float64.
        outcomes: per image (P, 10) int8, at each threshold: 1 true, 0 false, -1 ignored.

    Raises:
        DatasetError: no category is a thing, or one is not of the classes that Cityscapes evaluates.
    """

    task = target_task = "instance"

    def __init__(self, categories: Sequence[Category]) -> None:
        super().__init__(categories)
        check_cityscapes_classes(self.categories)
        self.things = find_things(self.categories)
        self.objects = np.zeros(len(self.categories), dtype=np.int64)
        self.labels: list[np.ndarray] = []
        self.scores: list[np.ndarray] = []
        self.outcomes: list[np.ndarray] = []

    def _add(self, result: Segmentation, target: Target) -> None:
        if result.task != "instance" or result.scores is None:
            found = f"found {result.task}"
            raise ValueError(f"image {target.image_id}: Cityscapes AP needs an instance result with scores, {found}")
        check_no_overlap(target, "Cityscapes AP")
        labels, crowd = target.labels.numpy(), target.is_crowd.numpy()
        sizes, inside, void = _count(result.masks, target)
        used = np.flatnonzero(self.things[result.labels] & (inside.sum(1) > 0))
        kinds, inside, void = result.labels[used], inside[used], void[used]
        pixels = inside.sum(1)
        inside = inside[:, 1:] * (kinds[:, None] == labels)  # (P, N), of the own class

        counted = ~crowd & (sizes >= MIN_PIXELS) & self.things[labels]
        iou = inside / (pixels[:, None] + sizes - inside).clip(1)
        group, group_size = inside[:, crowd].sum(1), ((kinds[:, None] == labels) * (sizes * crowd)).sum(1)
        group_iou = group / (pixels + group_size - group)
        small = inside[:, ~crowd & ~counted].sum(1) + np.where(group_size < MIN_PIXELS, group, 0)

        scores = result.scores[used].astype(np.float64)
        absorbed = np.maximum(group_iou, iou[:, ~crowd & ~counted].max(1, initial=0))
        ignored_share = (void + group + small) / pixels
        self.objects += np.bincount(labels[counted], minlength=len(self.categories))
        self.labels.append(kinds)
        self.scores.append(scores)
        self.outcomes.append(_outcomes(iou[:, counted], scores, absorbed, ignored_share))

    def _merge(self, other: CityscapesAP) -> None:
        self.objects += other.objects
        self.labels += other.labels
        self.scores += other.scores
        self.outcomes += other.outcomes

    def compute(self) -> Scores:
        """Return AP and AP50 over all classes with an annotated object, and per class."""
        labels = np.concatenate([np.zeros(0, np.int64), *self.labels])
        scores = np.concatenate([np.zeros(0), *self.scores])
        outcomes = np.concatenate([np.zeros((0, len(THRESHOLDS)), np.int8), *self.outcomes])
        precision = np.full((len(self.categories), len(THRESHOLDS)), np.nan)
        for label in np.flatnonzero(self.objects):
            own = labels == label
            for i in range(len(THRESHOLDS)):
                precision[label, i] = _area_under_curve(scores[own], outcomes[own, i], self.objects[label])
        summary = {"AP": mean(precision), "AP50": mean(precision[:, 0])}
        return self._scores(summary, {"AP": json_scores(precision.mean(1)), "AP50": json_scores(precision[:, 0])})


def _count(masks: np.ndarray, target: Target) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count pixels of each object (N,), of each mask by object (P, N+1; 0 is none), and of each mask on void (P,)."""
    ids, count = target.id_maps[0].numpy(), len(target)
    codes = ids.astype(id_dtype(count + 2)) + 1  # 0 is for pixels outside of a mask
    if target.void is not None:
        codes[target.void] = count + 2
    overlap = np.zeros((len(masks), count + 2), dtype=np.int64)
    for row, mask in zip(overlap, masks, strict=True):
        part = _bounds(mask)
        row[:] = count_values(codes[part] * mask[part], count + 3)[1:]
    void = overlap[:, 0] if target.void is None else overlap[:, -1]
    inside = overlap[:, :-1].copy()
    inside[:, 0] += overlap[:, -1]
    return count_values(ids, count + 1)[1:], inside, void


def _bounds(mask: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns of the bounding box of a mask (H, W) bool."""
    rows = np.flatnonzero(mask.any(1))
    if not len(rows):
        return slice(0), slice(0)
    tall = slice(rows[0], rows[-1] + 1)
    columns = np.flatnonzero(mask[tall].any(0))
    return tall, slice(columns[0], columns[-1] + 1)


def _outcomes(iou: np.ndarray, scores: np.ndarray, absorbed: np.ndarray, ignored_share: np.ndarray) -> np.ndarray:
    """Decide whether each prediction of an image is true, false or ignored at each threshold.

    Args:
        iou: (P, N) with the objects of its class that count. Objects do not overlap, so at most one is above the
            lowest threshold.
        scores: (P,).
        absorbed: (P,) largest IoU with a group or a small object of its class.
        ignored_share: (P,) share of its pixels on void, group or small objects; may exceed 1.

    Returns:
        (P, thresholds) int8.
    """
    best, partner = iou.max(1, initial=0), iou.argmax(1) if iou.shape[1] else np.zeros(len(iou), np.int64)
    matched = best[:, None] > THRESHOLDS
    ignored = (absorbed[:, None] > THRESHOLDS) | (ignored_share[:, None] > THRESHOLDS)
    outcomes = np.where(ignored & ~matched, _IGNORED, _FALSE).astype(np.int8)
    order = np.argsort(-scores, kind="stable")
    for i in range(len(THRESHOLDS)):
        candidates = order[matched[order, i]]
        _, first = np.unique(partner[candidates], return_index=True)
        outcomes[candidates[first], i] = _TRUE
    return outcomes


def _area_under_curve(scores: np.ndarray, outcomes: np.ndarray, objects: int) -> float:
    """Return the area under the precision-recall curve of one class and threshold."""
    counted = outcomes != _IGNORED
    order = np.argsort(scores[counted])
    hits = (outcomes[counted] == _TRUE)[order]
    _, first = np.unique(scores[counted][order], return_index=True)
    found = hits[::-1].cumsum()[::-1][first]  # true positives at each score
    precision = np.append(found / (len(hits) - first), 1.0)
    recall = np.append(found / objects, 0.0)
    steps = np.append(recall[:1], recall[:-1]) - np.append(recall[1:], 0.0)
    return float(precision @ steps) / 2
