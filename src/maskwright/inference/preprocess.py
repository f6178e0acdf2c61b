"""From a picture to what a network sees of it, for prediction and evaluation alike."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskwright.config.schema import EvaluateConfig
from maskwright.data.images.resize import resize_image
from maskwright.data.images.tiled_tiff import ImageReader


class Prepared(NamedTuple):
    """An image, and the sizes at which the network sees it.

    Attributes:
        pixels: (H, W, C) uint8 or float32, the image itself; the result has its size.
        scales: (h, w, C), one for each of `evaluate.scales`.
    """

    pixels: np.ndarray
    scales: tuple[np.ndarray, ...]


def prepare(picture: ImageReader, config: EvaluateConfig) -> Prepared | ImageReader:
    """The picture resized as the recipe's `evaluate` section says; the picture itself, where it is cut into tiles."""
    if config.tile_size is not None and max(picture.size) > config.tile_size:
        return picture
    return prepare_whole(picture.read(0, 0, *picture.size), config)


def prepare_whole(pixels: np.ndarray, config: EvaluateConfig) -> Prepared:
    """The picture resized, however large it is.

    Each scale is made of the picture itself, with `short_side` and `max_side` times the scale, as mmseg does.
        Differs from the reference: `DatasetMapperTTA` resizes a second time what was resized for testing before, and
        limits the long side of all scales alike (for ADE20K to 3584 pixels, which is that of the largest scale here).

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
