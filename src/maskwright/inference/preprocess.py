"""Resize images for the network, in prediction and evaluation."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from maskwright.config.schema import EvaluateConfig
from maskwright.data.images.resize import resize_image, resize_to, shortest_edge_size
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
    return Prepared(pixels, tuple(resize_for_network(pixels, config, scale) for scale in config.scales))


def resize_for_network(pixels: np.ndarray, config: EvaluateConfig, scale: float = 1) -> np.ndarray:
    """Resize an image (H, W, C) to the size of `config` times `scale`."""
    size = pixels.shape[:2]
    short_side, max_side = config.short_side, config.max_side
    if scale != 1:
        short_side = (short_side or min(size)) * scale
        max_side = max_side and max_side * scale
    if config.size:
        size = (max(1, round(config.size[0] * scale)), max(1, round(config.size[1] * scale)))
    elif config.size_divisor is None:
        return resize_image(pixels, short_side, max_side)
    elif short_side is not None:
        size = _transformers_size(size, short_side, max_side)
    elif max_side is not None and max(size) > max_side:
        size = shortest_edge_size(size, min(size), max_side)
    divisor = config.size_divisor or 1
    return resize_to(pixels, (math.ceil(size[0] / divisor) * divisor, math.ceil(size[1] / divisor) * divisor))


def _transformers_size(size: tuple[int, int], short_side: float, max_side: float | None) -> tuple[int, int]:
    """Return the (height, width) of transformers before it rounds up: the long side is truncated, not rounded."""
    short, long = min(size), max(size)
    exact = short_side
    if max_side is not None and long / short * short_side > max_side:
        exact = max_side * short / long
    new_short, new_long = max(1, round(exact)), max(1, int(exact * long / short))
    return (new_short, new_long) if size[0] <= size[1] else (new_long, new_short)
