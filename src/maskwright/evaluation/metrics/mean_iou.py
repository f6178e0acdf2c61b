"""Mean IoU, mean accuracy, pixel accuracy and frequency-weighted IoU, averaged as OpenMMLab's mmseg does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maskwright.evaluation.metrics.base import Metric, Scores, count_overlaps, json_score, json_scores, mean, ratio
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target


class MeanIoU(Metric):
    """IoU and accuracy of classes over all pixels of all images.

    Pixels without an object are not scored; crowd regions are pixels of their class. Panoptic results are scored by the
    classes of their segments. A pixel without a predicted class is a miss of its annotated class.

    Attributes:
        confusion: (K+1, K+1) int64, pixels by annotated (rows) and predicted (columns) class; the last row counts
            ignored pixels, the last column pixels without a predicted class.
    """

    task = target_task = "semantic"

    def __init__(self, categories: Sequence[Category]) -> None:
        super().__init__(categories)
        side = len(self.categories) + 1
        self.confusion = np.zeros((side, side), dtype=np.int64)

    def _add(self, result: Segmentation, target: Target) -> None:
        if len(target.id_maps) > 1:
            target = target.merge_classes()
        add_pixels(self.confusion, target.labels.numpy(), class_pixels(result, target))

    def _merge(self, other: MeanIoU) -> None:
        self.confusion += other.confusion

    def compute(self) -> Scores:
        """Return mIoU and mAcc (means over classes), fwIoU (weighted by annotated pixels) and aAcc (share of pixels).

        A class that is in neither annotations nor results has no data and is excluded from means. A class that is only
        predicted has IoU 0 and counts in mIoU, as in mmseg; detectron2 excludes it, so its mIoU can be higher if
        a class is never annotated.
        """
        return self._scores(*pixel_scores(self.confusion))


def class_pixels(result: Segmentation, target: Target) -> np.ndarray:
    """Count the predicted classes of the pixels of each annotated object.

    Args:
        result: semantic or panoptic.
        target: with one layer of objects.

    Returns:
        (N+1, K+1) int64; row 0 counts pixels without an object, the last column those without a predicted class.

    Raises:
        ValueError: the result is an instance result.
    """
    no_class = len(result.categories)
    if result.label_map is not None:
        classes = np.minimum(result.label_map.astype(np.uint64), no_class).astype(np.int64)
    elif result.segment_map is not None:
        classes = np.concatenate([[no_class], result.labels]).astype(np.int64)[result.segment_map]
    else:
        raise ValueError(
            f"image {target.image_id}: IoU of classes needs a semantic or panoptic result, found an instance result"
        )
    return count_overlaps(target.id_maps[0].numpy(), classes, len(target), no_class)


def add_pixels(confusion: np.ndarray, labels: np.ndarray, pixels: np.ndarray) -> None:
    """Add an image to a confusion matrix (K+1, K+1), given the labels (N,) of its objects and its `class_pixels`."""
    np.add.at(confusion, np.append(len(confusion) - 1, labels), pixels)


def pixel_scores(confusion: np.ndarray) -> tuple[dict[str, float | None], dict[str, list]]:
    """Return the scores over all classes and the columns of the class table for a confusion matrix."""
    counted = confusion[:-1].astype(np.float64)
    hits = counted.diagonal()
    annotated, predicted = counted.sum(1), counted[:, :-1].sum(0)
    iou = ratio(hits, annotated + predicted - hits)
    accuracy = ratio(hits, annotated)
    summary = {
        "mIoU": mean(iou),
        "mAcc": mean(accuracy),
        "aAcc": json_score(ratio(hits.sum(), annotated.sum())),
        "fwIoU": json_score(ratio(np.nansum(annotated * iou), annotated.sum())),
    }
    return summary, {
        "IoU": json_scores(iou),
        "Acc": json_scores(accuracy),
        "pixels": annotated.astype(np.int64).tolist(),
    }
