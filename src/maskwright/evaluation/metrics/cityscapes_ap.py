"""The average precision of Cityscapes; original: cityscapesscripts/evaluation/evalInstanceLevelSemanticLabeling.py.

How it differs from COCO's: an object matches above a threshold, not at it; a prediction that covers void, a group or an
object of less than 100 pixels to a larger share than the threshold is ignored; of several predictions of one object the
surest is right; equal scores are one point of the curve; and the area under the curve is taken without interpolation.
What is unusual: only the outcome at each threshold is kept of a prediction, ten bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maskwright.evaluation.metrics.average_precision import find_things
from maskwright.evaluation.metrics.base import Metric, Scores, check_flat, column, mean
from maskwright.evaluation.metrics.cityscapes_iou import check_classes
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target
from maskwright.structures.id_maps import count_values, id_dtype

THRESHOLDS = np.arange(0.5, 1.0, 0.05)
LEAST_PIXELS = 100  # of an object that can be missed

_IGNORED, _FALSE, _TRUE = -1, 0, 1


class CityscapesAP(Metric):
    """AP over ten thresholds and AP50 of instance masks, as Cityscapes' own tool counts them.

    Crowd regions are its groups: objects that could not be told apart; all of one class and image are one group. Where
    a target has no `void`, all of its pixels without an object are void.

    Attributes:
        objects: (K,) int64, annotated objects that can be missed.
        labels: per image (P,) int64, of the predictions that have a pixel.
        scores: per image (P,) float64.
        outcomes: per image (P, 10) int8, at each threshold: 1 true, 0 false, -1 ignored.

    Raises:
        DatasetError: no category is a thing, or one is none of the classes that Cityscapes evaluates.
    """

    task = truth = "instance"

    def __init__(self, categories: Sequence[Category]) -> None:
        super().__init__(categories)
        check_classes(self.categories)
        self.things = find_things(self.categories)
        self.objects = np.zeros(len(self.categories), dtype=np.int64)
        self.labels: list[np.ndarray] = []
        self.scores: list[np.ndarray] = []
        self.outcomes: list[np.ndarray] = []

    def _add(self, result: Segmentation, target: Target) -> None:
        if result.task != "instance" or result.scores is None:
            found = f"found {result.task}"
            raise ValueError(f"image {target.image_id}: Cityscapes AP needs an instance result with scores, {found}")
        check_flat(target, "Cityscapes AP")
        labels, crowd = target.labels.numpy(), target.is_crowd.numpy()
        sizes, inside, void = _count(result.masks, target)
        used = np.flatnonzero(self.things[result.labels] & (inside.sum(1) > 0))
        kinds, inside, void = result.labels[used], inside[used], void[used]
        pixels = inside.sum(1)
        inside = inside[:, 1:] * (kinds[:, None] == labels)  # (P, N), of the own class

        counted = ~crowd & (sizes >= LEAST_PIXELS) & self.things[labels]
        iou = inside / (pixels[:, None] + sizes - inside).clip(1)
        group, group_size = inside[:, crowd].sum(1), ((kinds[:, None] == labels) * (sizes * crowd)).sum(1)
        group_iou = group / (pixels + group_size - group)
        small = inside[:, ~crowd & ~counted].sum(1) + np.where(group_size < LEAST_PIXELS, group, 0)

        scores = result.scores[used].astype(np.float64)
        absorbed = np.maximum(group_iou, iou[:, ~crowd & ~counted].max(1, initial=0))
        ignored_share = (void + group + small) / pixels
        self.objects += np.bincount(labels[counted], minlength=len(self.categories))
        self.labels.append(kinds)
        self.scores.append(scores)
        self.outcomes.append(_outcomes(iou[:, counted], scores, absorbed, ignored_share))

    def _join(self, other: CityscapesAP) -> None:
        self.objects += other.objects
        self.labels += other.labels
        self.scores += other.scores
        self.outcomes += other.outcomes

    def compute(self) -> Scores:
        """AP and AP50, over all classes that have an object and per class; a class of which none is found has 0."""
        labels = np.concatenate([np.zeros(0, np.int64), *self.labels])
        scores = np.concatenate([np.zeros(0), *self.scores])
        outcomes = np.concatenate([np.zeros((0, len(THRESHOLDS)), np.int8), *self.outcomes])
        precision = np.full((len(self.categories), len(THRESHOLDS)), np.nan)
        for label in np.flatnonzero(self.objects):
            own = labels == label
            for i in range(len(THRESHOLDS)):
                precision[label, i] = _area(scores[own], outcomes[own, i], self.objects[label])
        summary = {"AP": mean(precision), "AP50": mean(precision[:, 0])}
        return self._scores(summary, {"AP": column(precision.mean(1)), "AP50": column(precision[:, 0])})


def _count(masks: np.ndarray, target: Target) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of each object (N,); of each mask on no object and on each object (P, N+1); of each mask on void (P,)."""
    ids, count = target.id_maps[0].numpy(), len(target)
    codes = ids.astype(id_dtype(count + 2)) + 1  # 0 is left for what is outside of a mask
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
    """The rows and columns of a (H, W) bool mask that have a pixel: mostly a small part of the image."""
    rows = np.flatnonzero(mask.any(1))
    if not len(rows):
        return slice(0), slice(0)
    tall = slice(rows[0], rows[-1] + 1)
    columns = np.flatnonzero(mask[tall].any(0))
    return tall, slice(columns[0], columns[-1] + 1)


def _outcomes(iou: np.ndarray, scores: np.ndarray, absorbed: np.ndarray, ignored_share: np.ndarray) -> np.ndarray:
    """Whether each prediction of an image is true, false or ignored at each threshold.

    Args:
        iou: (P, N) with the objects of its class that can be missed. Objects do not overlap, so at most one is above
            the lowest threshold.
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
        sure = order[matched[order, i]]
        _, first = np.unique(partner[sure], return_index=True)
        outcomes[sure[first], i] = _TRUE
    return outcomes


def _area(scores: np.ndarray, outcomes: np.ndarray, objects: int) -> float:
    """The area under the curve of precision over recall of one class and threshold."""
    counted = outcomes != _IGNORED
    order = np.argsort(scores[counted])
    hits = (outcomes[counted] == _TRUE)[order]
    _, first = np.unique(scores[counted][order], return_index=True)
    found = hits[::-1].cumsum()[::-1][first]  # true ones from each score on
    precision = np.append(found / (len(hits) - first), 1.0)
    recall = np.append(found / objects, 0.0)
    steps = np.append(recall[:1], recall[:-1]) - np.append(recall[1:], 0.0)
    return float(precision @ steps) / 2
