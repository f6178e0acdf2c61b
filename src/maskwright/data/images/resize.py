"""Resizing of images for evaluation and prediction, with the sizes and the filter of detectron2."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from PIL import Image


class SizingRule(Protocol):
    """The keys of a recipe's `evaluate` section that decide the size at which the network sees an image."""

    @property
    def size(self) -> tuple[int, int] | None: ...  # noqa: D102
    @property
    def short_side(self) -> int | None: ...  # noqa: D102
    @property
    def max_side(self) -> int | None: ...  # noqa: D102
    @property
    def size_divisor(self) -> int | None: ...  # noqa: D102


def network_size(size: tuple[int, int], rule: SizingRule, scale: float = 1) -> tuple[int, int]:
    """Return the (height, width) to which an image of `size` is resized, `scale` times the one of the rule."""
    short_side: float | None = rule.short_side
    max_side: float | None = rule.max_side
    if scale != 1:
        short_side = (short_side or min(size)) * scale
        max_side = max_side and max_side * scale
    if rule.size:
        size = (max(1, round(rule.size[0] * scale)), max(1, round(rule.size[1] * scale)))
    elif short_side is not None and rule.size_divisor is not None:
        size = _transformers_size(size, short_side, max_side)
    elif short_side is not None or (max_side is not None and max(size) > max_side):
        size = shortest_edge_size(size, min(size) if short_side is None else short_side, max_side)
    divisor = rule.size_divisor or 1
    return math.ceil(size[0] / divisor) * divisor, math.ceil(size[1] / divisor) * divisor


def shrink_to_fit(size: tuple[int, int], largest: tuple[int, int]) -> tuple[int, int]:
    """Return a (height, width) of the same shape that is nowhere larger than `largest`; `size` if it fits already."""
    factor = min(largest[0] / size[0], largest[1] / size[1], 1.0)
    return max(1, min(largest[0], round(size[0] * factor))), max(1, min(largest[1], round(size[1] * factor)))


def _transformers_size(size: tuple[int, int], short_side: float, max_side: float | None) -> tuple[int, int]:
    """Return the (height, width) of transformers before it rounds up: the long side is truncated, not rounded."""
    short, long = min(size), max(size)
    exact = short_side
    if max_side is not None and long / short * short_side > max_side:
        exact = max_side * short / long
    new_short, new_long = max(1, round(exact)), max(1, int(exact * long / short))
    return (new_short, new_long) if size[0] <= size[1] else (new_long, new_short)


def shortest_edge_size(size: tuple[int, int], short_side: float, max_side: float | None) -> tuple[int, int]:
    """Return the (height, width) at which the short side has `short_side` pixels and the long one at most `max_side`.

    Rounded as in detectron2's ResizeShortestEdge; no side is below 1.
    """
    height, width = size
    factor = short_side / min(height, width)
    new_height, new_width = (short_side, factor * width) if height < width else (factor * height, short_side)
    if max_side is not None and max(new_height, new_width) > max_side:
        factor = max_side / max(new_height, new_width)
        new_height, new_width = new_height * factor, new_width * factor
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def resize_to(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (H, W, C) with Pillow's antialiased bilinear filter.

    Args:
        image: (H, W, C) uint8 or float32.
        size: (height, width).

    Returns:
        (height, width, C) of the same type; the same array if the size does not change.
    """
    height, width = size
    if (height, width) == image.shape[:2]:
        return image
    if image.shape[2] == 3 and image.dtype == np.uint8:
        return _resize(image, height, width)
    return np.stack([_resize(image[..., channel], height, width) for channel in range(image.shape[2])], axis=2)


def _resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.array(Image.fromarray(np.ascontiguousarray(array)).resize((width, height), Image.Resampling.BILINEAR))
