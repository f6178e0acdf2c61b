"""Resize images for the network, in prediction and evaluation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maskwright.config.schema import EvaluateConfig
from maskwright.data.images.resize import network_size, resize_to, shrink_to_fit
from maskwright.data.images.tiled_tiff import ImageReader


class Prepared(NamedTuple):
    """An image, and its copies resized for the network.

    Attributes:
        pixels: (H, W, C) uint8 or float32, the image itself; results have its size.
        scales: (h, w, C), one for each of `evaluate.scales`.
    """

    pixels: np.ndarray
    scales: tuple[np.ndarray, ...]


def prepare(
    image: ImageReader, config: EvaluateConfig, largest: tuple[int, int] | None = None
) -> Prepared | ImageReader:
    """Resize an image as the recipe's `evaluate` section says; return an image to be tiled unchanged.

    Args:
        image: opened.
        config: the sizes.
        largest: (height, width) of the input of an exported file, which cannot be larger.
    """
    if config.tile_size is not None and max(image.size) > config.tile_size:
        return image
    return prepare_whole(image.read(0, 0, *image.size), config, largest)


def prepare_whole(pixels: np.ndarray, config: EvaluateConfig, largest: tuple[int, int] | None = None) -> Prepared:
    """Resize an image of any size.

    Each scale is resized from the image itself, with `short_side` and `max_side` times the scale, as in mmseg.
        Differs from the reference: `DatasetMapperTTA` resizes what was resized for testing before, and limits the long
        side of all scales alike (for ADE20K to 3584 pixels, which is that of the largest scale here).

    Args:
        pixels: (H, W, C) uint8 or float32.
        config: the sizes.
        largest: see `prepare`; windows of an image are smaller than the image, which is then not shrunk.
    """
    largest = None if config.window_size else largest
    return Prepared(pixels, tuple(resize_for_network(pixels, config, scale, largest) for scale in config.scales))


def resize_for_network(
    pixels: np.ndarray, config: EvaluateConfig, scale: float = 1, largest: tuple[int, int] | None = None
) -> np.ndarray:
    """Resize an image (H, W, C) to the size of `config` times `scale`, and so that it fits into `largest`."""
    size = network_size(pixels.shape[:2], config, scale)
    return resize_to(pixels, size if largest is None else shrink_to_fit(size, largest))
