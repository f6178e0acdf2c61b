"""Upsample the coarse maps of a network to the size of the image.

As in the original, maps are resized bilinearly (`align_corners=False`) twice: to the padded input of the network, and,
after the padding is cropped, to the size of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from maskwright.structures.predictions import MaskPrediction, PixelPrediction

SCORE_VALUES = 16_000_000  # class scores that are resized at a time


class CropPrediction(NamedTuple):
    """The prediction for one crop of an image, and where the crop is in the network's input.

    Attributes:
        prediction: with B = 1.
        padded_size: (height, width) of the network's input.
        input_size: (height, width) of the crop, at the top left of the input.
        flipped: whether the crop was flipped horizontally.
    """

    prediction: MaskPrediction | PixelPrediction
    padded_size: tuple[int, int]
    input_size: tuple[int, int]
    flipped: bool = False


class SemanticScores(NamedTuple):
    """The score of each class at each cell of a crop.

    Attributes:
        values: (K, h, w).
        are_logits: whether a softmax over K follows after resizing; otherwise scores can be averaged as they are.
        padded_size: (height, width) to resize the values to,
        input_size: and to crop them to. Both are the size of the values if these are already at the input's or output's
            size.
        flipped: as in `CropPrediction`.
    """

    values: Tensor
    are_logits: bool
    padded_size: tuple[int, int]
    input_size: tuple[int, int]
    flipped: bool = False

    def at_input(self) -> Tensor:
        """Return the values (K, H, W) at the size of the crop; those of a flipped crop stay flipped."""
        return _without_padding(self.values, self)

    def at_output(self, output_size: tuple[int, int]) -> Iterator[Tensor]:
        """Yield (k, H, W), a few classes at a time; the values of a flipped crop stay flipped."""
        few = max(1, SCORE_VALUES // (output_size[0] * output_size[1]))
        return (resize(_without_padding(part, self), output_size) for part in self.values.split(few))


def pixel_scores(prediction: CropPrediction | SemanticScores) -> SemanticScores:
    """Return the class scores of a prediction without masks."""
    if isinstance(prediction, SemanticScores):
        return prediction
    assert isinstance(prediction.prediction, PixelPrediction)
    return SemanticScores(prediction.prediction.class_logits[0].float(), True, *prediction[1:])


def upsample(maps: Tensor, crop: CropPrediction, output_size: tuple[int, int]) -> Tensor:
    """Resize the maps (N, h, w) of a crop to (N, H, W) and undo its padding and its flip."""
    maps = _without_padding(maps, crop)
    return resize(maps.flip(-1) if crop.flipped else maps, output_size)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (N, H, W) to (N, *size), bilinear, align_corners=False."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def _without_padding(maps: Tensor, crop: CropPrediction | SemanticScores) -> Tensor:
    height, width = crop.input_size
    return resize(maps, crop.padded_size)[:, :height, :width]
