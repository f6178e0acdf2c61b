"""Small images with their annotations painted over them, for the contact sheet."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.images.resize import shortest_edge_size
from maskwright.data.transforms import CropBox, crop_id_maps
from maskwright.results.draw import overlay_target, to_display_rgb
from maskwright.structures.annotations import Target

AUGMENTED = "train, augmented"  # split of previews that show training samples
LONG_SIDE = 560  # pixels
JPEG_QUALITY = 82


class Preview(NamedTuple):
    """One image of the contact sheet.

    Attributes:
        split: name of its split, or `AUGMENTED`.
        path: the image file.
        jpeg: the image, with its annotations if they can be read; None if the image cannot be read.
        labels: labels of the classes that occur.
    """

    split: str
    path: str
    jpeg: bytes | None = None
    labels: tuple[int, ...] = ()


def render_preview(split: str, annotated: AnnotatedImages, index: int) -> Preview:
    """Render one image; parts that cannot be read are omitted."""
    path = str(annotated.file(index))
    try:
        image = to_display_rgb(annotated.image(index))
    except Exception:  # examine_image reports it
        return Preview(split, path)
    small = _shrink(image)
    try:
        target = annotated.target(index)
        annotated.compare_sizes(index, image, target)
    except Exception:  # examine_image reports it
        return Preview(split, path, _encode_jpeg(Image.fromarray(small)))
    overlay = overlay_target(_resize_target(target, *small.shape[:2]), small, annotated.categories, annotated.task)
    return Preview(split, path, _encode_jpeg(overlay), tuple(target.labels.unique().tolist()))


def render_sample(image: Tensor, target: Target, path: str, annotated: AnnotatedImages) -> Preview:
    """Render a training sample, (C, H, W) with its objects, as the network sees it."""
    pixels = to_display_rgb(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    small = _shrink(pixels)
    overlay = overlay_target(_resize_target(target, *small.shape[:2]), small, annotated.categories, annotated.task)
    return Preview(AUGMENTED, path, _encode_jpeg(overlay), tuple(target.labels.unique().tolist()))


def _shrink(image: np.ndarray) -> np.ndarray:
    """Return the image with its long side at most `LONG_SIDE`."""
    size = image.shape[:2]
    if max(size) <= LONG_SIDE:
        return image
    height, width = shortest_edge_size(size, min(size), LONG_SIDE)
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0))


def _resize_target(target: Target, height: int, width: int) -> Target:
    ids = crop_id_maps(target.id_maps.numpy(), CropBox(height, width, 0, 0, height, width, False))
    return replace(target, id_maps=torch.from_numpy(ids))


def _encode_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
