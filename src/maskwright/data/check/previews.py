"""Pictures with their annotations painted over them, small enough for a page of many."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.transforms import Window, crop_ids, shortest_edge_size
from maskwright.errors import MaskwrightError
from maskwright.results.draw import overlay_target, to_display_rgb
from maskwright.structures.annotations import Target

LONG_SIDE = 560  # pixels
QUALITY = 82


class Example(NamedTuple):
    """One image for the contact sheet.

    Attributes:
        split: that it is of.
        path: the picture's file.
        jpeg: the picture, with what is annotated where that can be read; None where there is no picture.
        labels: the classes that occur.
    """

    split: str
    path: str
    jpeg: bytes | None
    labels: tuple[int, ...]


def illustrate(split: str, annotated: AnnotatedImages, index: int) -> Example:
    """Paint one image. Where something cannot be read it is left out."""
    path = str(annotated.file(index))
    try:
        image = to_display_rgb(annotated.image(index))
    except MaskwrightError:
        return Example(split, path, None, ())
    small = _shrunk(image)
    try:
        target = annotated.target(index)
        annotated.compare_sizes(index, image, target)
    except MaskwrightError:
        return Example(split, path, _jpeg(Image.fromarray(small)), ())
    painted = overlay_target(_target_like(target, small), small, annotated.categories, annotated.task)
    return Example(split, path, _jpeg(painted), tuple(target.labels.unique().tolist()))


def _shrunk(image: np.ndarray) -> np.ndarray:
    """The picture with its long side at most `LONG_SIDE`."""
    size = image.shape[:2]
    if max(size) <= LONG_SIDE:
        return image
    height, width = shortest_edge_size(size, min(size), LONG_SIDE)
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0))


def _target_like(target: Target, image: np.ndarray) -> Target:
    height, width = image.shape[:2]
    ids = crop_ids(target.id_maps.numpy(), Window(height, width, 0, 0, height, width, False))
    return replace(target, id_maps=torch.from_numpy(ids))


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
