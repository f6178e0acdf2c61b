"""Boundary AP: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation" (CVPR 2021).

Matched by faster-coco-eval (extra `boundary`): IoU is the minimum of the masks' IoU and the IoU of their boundaries,
whose width is 2 % of the image's diagonal. Unusual: faster-coco-eval expects all images at once, so it is
called for one image at a time, its matches are kept, and its own accumulation runs over them at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from maskwright.errors import MaskwrightError
from maskwright.evaluation.metrics.average_precision import (
    coco_annotations,
    coco_categories,
    coco_columns,
    coco_results,
    coco_summary,
    find_things,
    integer_image_id,
)
from maskwright.evaluation.metrics.base import Metric, Scores
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target

_MAX_DETECTIONS = (1, 10, 100)
_AREAS = 4  # all, small, medium, large


class BoundaryAP(Metric):
    """COCO average precision of instance masks, matched by boundary IoU; otherwise like `AveragePrecision`.

    Attributes:
        matchings: for each label and each image with objects or predictions of it, the integer image id and
            faster-coco-eval's matches for each area range.

    Raises:
        DatasetError: no category is a thing.
        MaskwrightError: faster-coco-eval is not installed.
    """

    task = target_task = "instance"

    def __init__(self, categories: Sequence[Category]) -> None:
        super().__init__(categories)
        self.things = find_things(self.categories)
        self.matchings: dict[int, list[tuple[int, list[Any]]]] = {}
        _evaluator()

    def _add(self, result: Segmentation, target: Target) -> None:
        truth, found = coco_annotations(target, self.things, 1), coco_results(result, target, self.things, 1)
        used = sorted({entry["category_id"] for entry in truth + found})
        if not used:
            return
        images = [{"id": 1, "height": result.size[0], "width": result.size[1]}]
        evaluator = _evaluate(images, truth, found, coco_categories(self.categories), used)
        number = integer_image_id(target.image_id)
        for position, category in enumerate(used):
            entries = evaluator[position * _AREAS : (position + 1) * _AREAS]
            self.matchings.setdefault(category - 1, []).append((number, entries))

    def _merge(self, other: BoundaryAP) -> None:
        for label, entries in other.matchings.items():
            self.matchings.setdefault(label, []).extend(entries)

    def compute(self) -> Scores:
        """Return the scores of `AveragePrecision` by boundary IoU, with prefix `boundary_`."""
        curves = [self._curves(label) for label in np.flatnonzero(self.things)]
        precision, recall = (np.stack(parts, 2 - i) for i, parts in enumerate(zip(*curves, strict=True)))
        summary = coco_summary(precision, recall, _MAX_DETECTIONS, "boundary_")
        return self._scores(summary, coco_columns(precision, self.things, "boundary_"))

    def _curves(self, label: int) -> tuple[np.ndarray, np.ndarray]:
        """Return precision (IoU thresholds, recalls, areas, limits) and recall (without recalls) of one class."""
        module = _evaluator()
        params = module.Params("boundary")
        images = sorted(self.matchings.get(label, []), key=lambda entry: entry[0])
        params.imgIds, params.catIds = list(range(len(images))), [1]
        entries = [areas[i] for i in range(_AREAS) for _, areas in images]
        curves = module._C.COCOevalAccumulate(params, entries)
        precision, recall = (np.asarray(curves[name], dtype=np.float64) for name in ("precision", "recall"))
        return np.where(precision < 0, np.nan, precision)[:, :, 0], np.where(recall < 0, np.nan, recall)[:, 0]


def _evaluator() -> ModuleType:
    try:
        from faster_coco_eval.core import cocoeval
    except ImportError:
        raise MaskwrightError(
            "boundary AP needs faster-coco-eval, which is not installed", remedy='pip install "maskwright[boundary]"'
        ) from None
    return cocoeval


def _evaluate(images: list, truth: list, found: list, categories: list, used: list[int]) -> list[Any]:
    """Return one result per category in `used` and area range, in this order."""
    from faster_coco_eval import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    annotations = COCO({"images": images, "annotations": truth, "categories": categories})
    results = annotations.loadRes(found) if found else COCO(annotations.dataset | {"annotations": []})
    evaluator = COCOeval_faster(annotations, results, "boundary", separate_eval=True, rle_iou_max_workers=1)
    evaluator.params.catIds = used
    evaluator.evaluate()
    return evaluator._evalImgs_cpp
