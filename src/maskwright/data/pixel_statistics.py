"""Mean and standard deviation of each channel over a dataset, for the normalization of its pixels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from maskwright.data.formats.base import AnnotatedImages
from maskwright.errors import DatasetError

_MAX_IMAGES = 1000  # evenly spaced; more do not change the first three digits
_SIGNIFICANT_DIGITS = 6


class PixelStatistics(NamedTuple):
    """Statistics of each channel over all pixels, in the units of the images.

    Attributes:
        mean: (C,).
        std: (C,), > 0; 1 for a constant channel.
        num_images: number of measured images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_images: int


def channel_sums(image: np.ndarray) -> np.ndarray:
    """Return (3, C) float64: number of pixels, sum, and sum of squares of each channel of an image (H, W, C)."""
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return rgb_sums(Image.fromarray(image))
    values = image.reshape(-1, image.shape[2]).astype(np.float64)
    return np.stack([np.full(image.shape[2], float(len(values))), values.sum(0), np.square(values).sum(0)])


def rgb_sums(image: Image.Image) -> np.ndarray:
    """Return the `channel_sums` of an 8-bit RGB image."""
    levels, counts = np.arange(256.0), np.array(image.histogram(), dtype=np.float64).reshape(3, 256)
    return np.stack([counts.sum(1), counts @ levels, counts @ levels**2])


def summarize_sums(sums: np.ndarray, num_images: int) -> PixelStatistics:
    """Return the statistics for the added `channel_sums` of `num_images` images."""
    count, total, squares = sums
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    std[std <= 1e-9 * np.maximum(np.abs(mean), 1e-9)] = 1.0
    return PixelStatistics(_round(mean), _round(std), num_images)


def measure_pixel_statistics(annotated: AnnotatedImages, max_images: int = _MAX_IMAGES) -> PixelStatistics:
    """Measure the statistics of a split on at most `max_images` evenly spaced images.

    Raises:
        DatasetError: the split has no images.
        ImageError: an image cannot be read.
    """
    count = min(len(annotated), max_images)
    if not count:
        raise DatasetError("has no images to measure", where="data.train", remedy="name images to train on")
    indices = np.linspace(0, len(annotated) - 1, count).round().astype(int)
    return summarize_sums(np.sum([channel_sums(annotated.image(int(index))) for index in indices], axis=0), count)


def _round(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{value:.{_SIGNIFICANT_DIGITS}g}") for value in values)
