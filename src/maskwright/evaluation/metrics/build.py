"""How good results are, on annotations of the original size: by the rules of COCO, Cityscapes and mmseg.

One file per score. What is unusual: every metric streams. It keeps counts or the outcome of matching, never a mask of
an earlier image; it can be pickled, and metrics of several processes merge into exactly the one that a single process
would have had.
"""

from __future__ import annotations

from collections.abc import Sequence

from maskwright.config.schema import EvaluateConfig, MetricName
from maskwright.evaluation.metrics.average_precision import AveragePrecision
from maskwright.evaluation.metrics.base import Metric, Scores, join_scores
from maskwright.evaluation.metrics.boundary import BoundaryAP
from maskwright.evaluation.metrics.cityscapes_ap import CityscapesAP
from maskwright.evaluation.metrics.cityscapes_iou import CityscapesIoU
from maskwright.evaluation.metrics.mean_iou import MeanIoU
from maskwright.evaluation.metrics.panoptic_quality import PanopticQuality
from maskwright.evaluation.metrics.tables import format_table, format_tables
from maskwright.structures.annotations import Category, Task

__all__ = [
    "AveragePrecision",
    "BoundaryAP",
    "CityscapesAP",
    "CityscapesIoU",
    "MeanIoU",
    "Metric",
    "PanopticQuality",
    "Scores",
    "build_metric",
    "build_metrics",
    "format_table",
    "format_tables",
    "join_scores",
]

CUSTOMARY: dict[Task, MetricName] = {"semantic": "mean_iou", "instance": "ap", "panoptic": "pq"}


def build_metrics(config: EvaluateConfig, categories: Sequence[Category]) -> list[Metric]:
    """What a recipe says is scored; the headline is the first score of the first metric.

    With `config.task` panoptic these are all of `config.metrics`, as a panoptic model gives results of every kind;
    otherwise those that score results of the task. Where there is none, it is the customary one of the task.

    Raises:
        DatasetError, MaskwrightError: see `build_metric`.
    """
    chosen = [name for name in config.metrics or () if config.task in ("panoptic", _KINDS[name].task)]
    return [build_metric(name, categories) for name in chosen or [CUSTOMARY[config.task]]]


def build_metric(name: MetricName, categories: Sequence[Category]) -> Metric:
    """One metric, without an image so far.

    Raises:
        DatasetError: it cannot score these categories: none is a thing, or one is none of Cityscapes.
        MaskwrightError: it needs a package that is not installed.
    """
    return _KINDS[name](categories)


_KINDS: dict[MetricName, type[Metric]] = {
    "mean_iou": MeanIoU,
    "pq": PanopticQuality,
    "ap": AveragePrecision,
    "boundary_ap": BoundaryAP,
    "cityscapes_iou": CityscapesIoU,
    "cityscapes_ap": CityscapesAP,
}
