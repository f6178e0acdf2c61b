"""Sliding-window inference for semantic segmentation, as OpenMMLab's mmseg (`slide_inference`)."""

from __future__ import annotations

import math
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from maskwright.inference.mask_upsampling import SemanticScores
from maskwright.inference.tiling import Rectangle


def list_windows(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int] | Literal["even"] | None = None
) -> list[Rectangle]:
    """List the windows that cover an image, row by row.

    Args:
        size: (height, width) of the image in pixels.
        window: (height, width); a window larger than the image is cut to the image.
        stride: (down, across); two thirds of the window if None; "even" spaces as few windows as possible evenly.
    """
    if stride == "even":
        starts = (even_starts(length, side) for length, side in zip(size, window, strict=True))
        return [
            Rectangle(top, left, min(top + window[0], size[0]), min(left + window[1], size[1]))
            for top, left in product(*starts)
        ]
    down, across = stride or (round(window[0] * 2 / 3), round(window[1] * 2 / 3))
    return [
        Rectangle(top, left, min(top + window[0], size[0]), min(left + window[1], size[1]))
        for top in window_starts(size[0], window[0], max(1, down))
        for left in window_starts(size[1], window[1], max(1, across))
    ]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows start along one dimension: every `stride` pixels, the last one moved back into the image."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(index * stride, length - window), 0) for index in range(count)]


def even_starts(length: int, window: int) -> list[int]:
    """Return where windows start along one dimension: as few as cover it, evenly spaced, rounded down.

    As EoMT's `window_imgs_semantic`.
    """
    count = math.ceil(length / window)
    overlap = (count * window - length) / max(count - 1, 1)
    return [int(index * (window - overlap)) for index in range(count)]


class WindowMean:
    """Mean over overlapping windows of the class scores at each pixel, logits where the model has them.

    Args:
        size: (height, width) of the image that the window slides over.
        windows: number of windows.
    """

    def __init__(self, size: tuple[int, int], windows: int) -> None:
        self.size, self.missing = size, windows
        self.total = self.count = torch.zeros(())
        self.are_logits = False

    def add(self, window: Rectangle, scores: SemanticScores) -> None:
        """Add the scores of one window."""
        values = scores.at_input()
        if self.total.ndim == 0:
            self.total, self.count = values.new_zeros(len(values), *self.size), values.new_zeros(self.size)
        place = (slice(window.top, window.bottom), slice(window.left, window.right))
        self.total[:, *place] += values
        self.count[place] += 1
        self.are_logits = scores.are_logits
        self.missing -= 1

    def mean(self) -> SemanticScores:
        """Return the mean, once every window is there."""
        values: Tensor = self.total / self.count
        return SemanticScores(values, self.are_logits, self.size, self.size)
