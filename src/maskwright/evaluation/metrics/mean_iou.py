"""Mean IoU, mean accuracy, pixel accuracy and frequency-weighted IoU, averaged as OpenMMLab's mmseg does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maskwright.evaluation.metrics.base import Metric, Scores, column, mean, number, overlaps, ratio
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target


class MeanIoU(Metric):
    """Overlap of the classes over all pixels of all images.

    Pixels without an object are not scored; crowd regions are pixels of their class. Panoptic results are scored by the
    classes of their segments. A pixel that the result leaves without a class is a miss of the class that is there.

    Attributes:
        confusion: (K+1, K+1) int64, pixels by annotated (rows) and predicted (columns) class; the last row is ignored
            pixels, the last column pixels without a predicted class.
    """

    task = truth = "semantic"

    def __init__(self, categories: Sequence[Category]) -> None:
        super().__init__(categories)
        side = len(self.categories) + 1
        self.confusion = np.zeros((side, side), dtype=np.int64)

    def _add(self, result: Segmentation, target: Target) -> None:
        if len(target.id_maps) > 1:
            target = target.merge_classes()
        add_pixels(self.confusion, target.labels.numpy(), class_pixels(result, target))

    def _join(self, other: MeanIoU) -> None:
        self.confusion += other.confusion

    def compute(self) -> Scores:
        """Give mIoU and mAcc (means over classes), fwIoU (IoU weighted by annotated pixels) and aAcc (share of pixels).

        A class that occurs neither in annotations nor in results has no data and counts in no mean. A class that is
        only predicted has IoU 0 and counts in mIoU, as in mmseg; detectron2 leaves it out, so its mIoU can be higher
        on data where a class of the list is never annotated.
        """
        return self._scores(*pixel_scores(self.confusion))


def class_pixels(result: Segmentation, target: Target) -> np.ndarray:
    """How the pixels of each annotated object are classified.

    Args:
        result: semantic or panoptic.
        target: with one layer of objects.

    Returns:
        (N+1, K+1) int64; row 0 is the pixels without an object, the last column those without a predicted class.

    Raises:
        ValueError: the result is one of instances.
    """
    nothing = len(result.categories)
    if result.label_map is not None:
        classes = np.minimum(result.label_map.astype(np.uint64), nothing).astype(np.int64)
    elif result.segment_map is not None:
        classes = np.concatenate([[nothing], result.labels]).astype(np.int64)[result.segment_map]
    else:
        raise ValueError(
            f"image {target.image_id}: IoU of classes needs a semantic or panoptic result, found instances"
        )
    return overlaps(target.id_maps[0].numpy(), classes, len(target), nothing)


def add_pixels(confusion: np.ndarray, labels: np.ndarray, pixels: np.ndarray) -> None:
    """Add an image to a confusion: (K+1, K+1), the labels (N,) of its objects, and its `class_pixels` (N+1, K+1)."""
    np.add.at(confusion, np.append(len(confusion) - 1, labels), pixels)


def pixel_scores(confusion: np.ndarray) -> tuple[dict[str, float | None], dict[str, list]]:
    """The scores over all classes and the columns of the class table, of a `MeanIoU.confusion`."""
    counted = confusion[:-1].astype(np.float64)
    hits = counted.diagonal()
    annotated, predicted = counted.sum(1), counted[:, :-1].sum(0)
    iou = ratio(hits, annotated + predicted - hits)
    accuracy = ratio(hits, annotated)
    summary = {
        "mIoU": mean(iou),
        "mAcc": mean(accuracy),
        "aAcc": number(ratio(hits.sum(), annotated.sum())),
        "fwIoU": number(ratio(np.nansum(annotated * iou), annotated.sum())),
    }
    return summary, {"IoU": column(iou), "Acc": column(accuracy), "pixels": annotated.astype(np.int64).tolist()}
