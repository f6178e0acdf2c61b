"""Resize images for the network, in prediction and evaluation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskwright.config.schema import EvaluateConfig
from maskwright.data.images.resize import resize_image
from maskwright.data.images.tiled_tiff import ImageReader


class Prepared(NamedTuple):
    """An image, and its copies resized for the network.

    Attributes:
        pixels: (H, W, C) uint8 or float32, the image itself; results have its size.
        scales: (h, w, C), one for each of `evaluate.scales`.
    """

    pixels: np.ndarray
    scales: tuple[np.ndarray, ...]


def prepare(image: ImageReader, config: EvaluateConfig) -> Prepared | ImageReader:
    """Resize an image as the recipe's `evaluate` section says; return an image to be tiled unchanged."""
    if config.tile_size is not None and max(image.size) > config.tile_size:
        return image
    return prepare_whole(image.read(0, 0, *image.size), config)


def prepare_whole(pixels: np.ndarray, config: EvaluateConfig) -> Prepared:
    """Resize an image of any size.

    Each scale is resized from the image itself, with `short_side` and `max_side` times the scale, as in mmseg.
        Differs from the reference: `DatasetMapperTTA` resizes what was resized for testing before, and limits the long
        side of all scales alike (for ADE20K to 3584 pixels, which is that of the largest scale here).

    Args:
        pixels: (H, W, C) uint8 or float32.
        config: the sizes.
    """
    scales = []
    for scale in config.scales:
        short_side, max_side = config.short_side, config.max_side
        if scale != 1:
            short_side = (short_side or min(pixels.shape[:2])) * scale
            max_side = max_side and max_side * scale
        scales.append(resize_image(pixels, short_side, max_side))
    return Prepared(pixels, tuple(scales))
