"""The entries of COCO's result files for one image, and a result as plain JSON values.

Formats: https://cocodataset.org/#format-results.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import PIL.Image

from maskwright.results.rle import encode_segmentation
from maskwright.results.segmentation import Segmentation
from maskwright.structures.category import Category


def to_json(segmentation: Segmentation) -> dict[str, Any]:
    """Return a result as plain values for `json.dumps`.

    Returns:
        size: [height, width] in pixels.
        task: "semantic", "instance" or "panoptic".
        segments: for each segment `category_id` (`Category.id`), `name`, `score` (null for semantic), `box` (x0, y0,
            x1, y1 in pixels, x1 and y1 exclusive), `area` in pixels, and `mask`, an RLE of the COCO API; with a
            confidence map also `confidence`, its mean over the segment (null for a segment without a pixel).
    """
    columns = (
        _categories(segmentation),
        _scores(segmentation),
        segmentation.boxes.astype(float).tolist(),
        segmentation.areas.tolist(),
        encode_segmentation(segmentation),
    )
    segments = [
        {"category_id": category.id, "name": category.name, "score": score, "box": box, "area": area, "mask": rle}
        for category, score, box, area, rle in zip(*columns, strict=True)
    ]
    _add_confidence(segments, segmentation)
    return {"size": list(map(int, segmentation.size)), "task": segmentation.task, "segments": segments}


def instance_results(segmentation: Segmentation, image_id: int | str) -> list[dict[str, Any]]:
    """Return the instances as a COCO results list; `bbox` is x, y, width, height in pixels."""
    columns = (
        _categories(segmentation),
        _scores(segmentation),
        _corner_and_size(segmentation).tolist(),
        encode_segmentation(segmentation),
    )
    return [
        {"image_id": image_id, "category_id": category.id, "score": score, "bbox": box, "segmentation": rle}
        for category, score, box, rle in zip(*columns, strict=True)
    ]


def panoptic_annotation(segmentation: Segmentation, image_id: int | str, file_name: str) -> dict[str, Any]:
    """Return an entry of "annotations" in the COCO panoptic format, for the PNG of `panoptic_image`.

    Segments without a pixel are omitted, because evaluators refuse them. `bbox` is x, y, width, height in pixels. With
    a confidence map, `confidence` is its mean over the segment.
    """
    columns = (
        _categories(segmentation),
        _scores(segmentation),
        _corner_and_size(segmentation).astype(int).tolist(),
        segmentation.areas.tolist(),
    )
    segments = [
        {
            "id": segment_id,
            "category_id": category.id,
            "isthing": int(category.is_thing),
            "iscrowd": 0,
            "area": area,
            "bbox": box,
            "score": score,
        }
        for segment_id, (category, score, box, area) in enumerate(zip(*columns, strict=True), 1)
    ]
    _add_confidence(segments, segmentation)
    segments = [segment for segment in segments if segment["area"]]
    return {"image_id": image_id, "file_name": file_name, "segments_info": segments}


def panoptic_image(segmentation: Segmentation) -> PIL.Image.Image:
    """Return a panoptic result as an RGB image: R + 256 G + 65536 B is the segment's id from 1 on, 0 is none.

    Raises:
        ValueError: the result is not panoptic.
    """
    if segmentation.segment_map is None:
        raise ValueError(f"a panoptic PNG needs a panoptic result, found {segmentation.task}")
    ids = segmentation.segment_map.astype("<u4", order="C")
    return PIL.Image.fromarray(ids.view(np.uint8).reshape(*segmentation.size, 4)[..., :3].copy())


def _add_confidence(segments: list[dict[str, Any]], segmentation: Segmentation) -> None:
    """Add the mean confidence to every segment if the result has a confidence map."""
    if segmentation.mean_confidence is not None:
        for segment, value in zip(segments, segmentation.mean_confidence.tolist(), strict=True):
            segment["confidence"] = None if math.isnan(value) else value


def _categories(segmentation: Segmentation) -> list[Category]:
    return [segmentation.categories[label] for label in segmentation.labels.tolist()]


def _scores(segmentation: Segmentation) -> list[float | None]:
    return [None] * len(segmentation) if segmentation.scores is None else segmentation.scores.tolist()


def _corner_and_size(segmentation: Segmentation) -> np.ndarray:
    """Return COCO boxes, (N, 4) float64 x, y, width, height in pixels."""
    boxes = segmentation.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes
