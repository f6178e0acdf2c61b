"""Build the metrics of a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from maskwright.config.schema import EvaluateConfig, MetricName
from maskwright.evaluation.metrics.average_precision import AveragePrecision
from maskwright.evaluation.metrics.base import Metric
from maskwright.evaluation.metrics.boundary import BoundaryAP
from maskwright.evaluation.metrics.calibration import InstanceCalibration, PanopticCalibration, PixelCalibration
from maskwright.evaluation.metrics.cityscapes_ap import CityscapesAP
from maskwright.evaluation.metrics.cityscapes_iou import CityscapesIoU
from maskwright.evaluation.metrics.mean_iou import MeanIoU
from maskwright.evaluation.metrics.panoptic_quality import PanopticQuality
from maskwright.structures.annotations import Category, Task

_METRICS: dict[MetricName, type[Metric]] = {
    "mean_iou": MeanIoU,
    "pq": PanopticQuality,
    "ap": AveragePrecision,
    "boundary_ap": BoundaryAP,
    "cityscapes_iou": CityscapesIoU,
    "cityscapes_ap": CityscapesAP,
}
_CALIBRATION: dict[Task, type[Metric]] = {
    "semantic": PixelCalibration,
    "instance": InstanceCalibration,
    "panoptic": PanopticCalibration,
}
_DEFAULTS: dict[Task, MetricName] = {"semantic": "mean_iou", "instance": "ap", "panoptic": "pq"}


def build_metrics(config: EvaluateConfig, categories: Sequence[Category]) -> list[Metric]:
    """Build the metrics of a recipe; the main score is the first score of the first metric.

    If `config.task` is panoptic, these are all of `config.metrics`, because a panoptic model gives results of every
    task; otherwise those of the task. Without any, it is the default metric of the task. Calibration is that of the
    task and never comes first, because a lower error is better.

    Raises:
        DatasetError: a metric cannot score these categories, because none is a thing, or one is not a Cityscapes class.
        MaskwrightError: a metric needs a package that is not installed.
    """
    chosen = config.metrics or ()
    names = [name for name in chosen if name != "ece" and config.task in ("panoptic", _METRICS[name].task)]
    kinds = [_METRICS[name] for name in names or [_DEFAULTS[config.task]]]
    if "ece" in chosen:
        kinds.append(_CALIBRATION[config.task])
    return [kind(categories) for kind in kinds]
