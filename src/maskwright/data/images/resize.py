"""Resizing of images for evaluation and prediction, with the sizes and the filter of detectron2."""

from __future__ import annotations

import numpy as np
from PIL import Image


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


def resize_image(image: np.ndarray, short_side: float | None, max_side: float | None) -> np.ndarray:
    """Resize an image (H, W, C) with Pillow's antialiased bilinear filter.

    Args:
        image: (H, W, C) uint8 or float32.
        short_side: in pixels, see `shortest_edge_size`; None keeps the size unless the long side exceeds `max_side`.
        max_side: limit of the long side in pixels; None for no limit.

    Returns:
        (h, w, C) of the same type; the same array if the size does not change.
    """
    size = image.shape[:2]
    if short_side is None and (max_side is None or max(size) <= max_side):
        return image
    return resize_to(image, shortest_edge_size(size, min(size) if short_side is None else short_side, max_side))


def resize_to(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (H, W, C) to (height, width), as `resize_image` does; the same array if it has that size."""
    height, width = size
    if (height, width) == image.shape[:2]:
        return image
    if image.shape[2] == 3 and image.dtype == np.uint8:
        return _resize(image, height, width)
    return np.stack([_resize(image[..., channel], height, width) for channel in range(image.shape[2])], axis=2)


def _resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.array(Image.fromarray(np.ascontiguousarray(array)).resize((width, height), Image.Resampling.BILINEAR))
