"""Encode results as response bodies."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import PIL.Image

from maskwright.errors import MaskwrightError
from maskwright.results.draw import segment_colors
from maskwright.results.formats.label_studio import make_prediction
from maskwright.results.outlines import crop_segments, trace_polygons
from maskwright.results.segmentation import Segmentation
from maskwright.serving.messages import JSON, PNG, Control, Job


def encode(result: Segmentation, job: Job) -> bytes:
    """Return the body of the answer to a job for one image.

    Raises:
        MaskwrightError: the format cannot hold the result.
    """
    if isinstance(job.answer, Control):
        return json.dumps(make_prediction(result, job.answer, job.model)).encode()
    if job.answer == PNG:
        return _encode_png(result, job)
    assert job.answer == JSON
    document = result.to_json()
    for segment, color in zip(document["segments"], segment_colors(result).tolist(), strict=True):
        segment["color"] = color
    if job.options.masks == "polygons":
        _replace_masks(document["segments"], result)
    return json.dumps({"model": job.model, **document}).encode()


def _encode_png(result: Segmentation, job: Job) -> bytes:
    buffer = io.BytesIO()
    image = result.overlay() if job.options.png == "overlay" else id_image(result)
    image.save(buffer, "png", compress_level=3)
    return buffer.getvalue()


def _replace_masks(segments: list[dict[str, Any]], result: Segmentation) -> None:
    """Replace the masks of the JSON segments by polygons."""
    for segment in segments:
        del segment["mask"]
        segment["polygons"], segment["has_holes"] = [], False
    for index, crop in crop_segments(result):
        outlines = trace_polygons(crop)
        segments[index]["polygons"] = [outline.points.ravel().tolist() for outline in outlines]
        segments[index]["has_holes"] = any(outline.has_hole for outline in outlines)


def id_image(result: Segmentation) -> PIL.Image.Image:
    """Return a gray image in which 0 is no segment and n is segment n-1; the best score wins in overlaps.

    Raises:
        MaskwrightError: there are more than 65535 segments.
    """
    if len(result) > 65535:
        raise MaskwrightError(f"{len(result)} segments, but a PNG of ids holds 65535", remedy="ask for JSON")
    if result.task != "instance":
        ids = result.id_map()
    else:
        assert result.scores is not None
        ids = np.zeros(result.size, dtype=np.int32)
        for index in np.argsort(result.scores, kind="stable"):
            ids[result.masks[index]] = index + 1
    return PIL.Image.fromarray(ids.astype(np.uint8 if len(result) < 256 else np.uint16))
