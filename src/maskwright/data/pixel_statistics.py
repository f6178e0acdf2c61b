"""Mean and deviation of each channel over a data set's pictures, for the normalisation of their pixels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from maskwright.data.formats.base import AnnotatedImages
from maskwright.errors import DatasetError

MEASURED_PICTURES = 1000  # evenly spread; more do not change the first three digits
_DIGITS = 6  # significant ones that are kept


class PixelStatistics(NamedTuple):
    """Of each channel, over all pixels, in the pictures' units.

    Attributes:
        mean: (C,).
        std: (C,), above 0; of a channel that is the same everywhere it is 1.
        pictures: how many were measured.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pictures: int


def channel_sums(image: np.ndarray) -> np.ndarray:
    """(3, C) float64: pixels, sum, and sum of squares of each channel of a picture (H, W, C)."""
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return rgb_sums(Image.fromarray(image))
    values = image.reshape(-1, image.shape[2]).astype(np.float64)
    return np.stack([np.full(image.shape[2], float(len(values))), values.sum(0), np.square(values).sum(0)])


def rgb_sums(picture: Image.Image) -> np.ndarray:
    """The `channel_sums` of an RGB picture of 8 bits."""
    levels, counts = np.arange(256.0), np.array(picture.histogram(), dtype=np.float64).reshape(3, 256)
    return np.stack([counts.sum(1), counts @ levels, counts @ levels**2])


def summarize_sums(sums: np.ndarray, pictures: int) -> PixelStatistics:
    """From the added `channel_sums` of so many pictures."""
    count, total, squares = sums
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    std[std <= 1e-9 * np.maximum(np.abs(mean), 1e-9)] = 1.0
    return PixelStatistics(_rounded(mean), _rounded(std), pictures)


def measure_pixel_statistics(annotated: AnnotatedImages, pictures: int = MEASURED_PICTURES) -> PixelStatistics:
    """The statistics of a split, from at most so many of its pictures, evenly spread.

    Raises:
        DatasetError: the split has no pictures.
        ImageError: a picture cannot be read.
    """
    count = min(len(annotated), pictures)
    if not count:
        raise DatasetError("data.train has no picture to measure; name some to train on")
    indices = np.linspace(0, len(annotated) - 1, count).round().astype(int)
    return summarize_sums(np.sum([channel_sums(annotated.image(int(index))) for index in indices], axis=0), count)


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values)
