"""A result as `Detections` of the supervision library (https://supervision.roboflow.com)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from maskwright.errors import MaskwrightError
from maskwright.results.segmentation import Segmentation

if TYPE_CHECKING:
    import supervision


def to_supervision(segmentation: Segmentation) -> supervision.Detections:
    """Return the segments as `supervision.Detections`.

    Returns:
        xyxy: (N, 4) boxes in pixels; mask: (N, H, W) bool; class_id: (N,) labels; confidence: (N,) scores, None for
        semantic; data: "class_name", and "segment_id" from 1 on, which distinguishes segments of one class.

    Raises:
        MaskwrightError: supervision is not installed.
    """
    try:
        import supervision
    except ImportError:
        raise MaskwrightError("supervision is not installed", remedy="pip install supervision") from None
    return supervision.Detections(
        xyxy=segmentation.boxes,
        mask=segmentation.masks,
        class_id=segmentation.labels.astype(int),
        confidence=segmentation.scores,
        data={"class_name": np.array(segmentation.names), "segment_id": np.arange(1, len(segmentation) + 1)},
    )
