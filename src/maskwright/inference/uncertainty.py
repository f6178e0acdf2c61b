"""The uncertainty of a model about an image, and the image's features: what `rank` chooses images by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.config.schema import EvaluateConfig
from maskwright.inference.mask_upsampling import CropPrediction, SemanticScores
from maskwright.inference.segment import segment
from maskwright.models.segmenter import Segmenter
from maskwright.structures.annotations import Category
from maskwright.structures.predictions import MaskPrediction, PixelPrediction

_STRIDE = 4  # pixels of a cell of the network's masks, at whose size uncertainty is measured


def class_uncertainty(
    predictions: Sequence[CropPrediction | SemanticScores],
    input_size: tuple[int, int],
    categories: tuple[Category, ...],
    config: EvaluateConfig,
) -> np.ndarray:
    """Return the share of each class in the uncertainty of an image, (K,) float64; the sum is in 0..1.

    Semantic: the mean over pixels of 1 - confidence, see `confidence.semantic`. Instance and panoptic: the expected
    share of wrong segments. A segment with score s is right with probability s, so among all pairs of a query and
    a class, sum s (1 - s) / sum s; the denominator is at least 1, so an image in which the model is sure that there is
    nothing is certain. Panoptic also counts stuff.

    Args:
        predictions: see `segment`.
        input_size: (height, width) of the image as the network saw it.
        categories: in label order.
        config: `task`, and `top_k` for the number of pairs; no threshold is applied.
    """
    height, width = (-(-side // _STRIDE) for side in input_size)
    if config.task == "semantic":
        result = segment(
            predictions,
            "semantic",
            output_size=(height, width),
            categories=categories,
            config=config,
            confidence_map=True,
        )
        assert result.label_map is not None
        assert result.confidence is not None
        unsure = 1 - result.confidence.astype(np.float64)
        return np.bincount(result.label_map.ravel(), unsure.ravel(), len(categories)) / unsure.size
    if config.task == "panoptic":
        categories = tuple(replace(category, is_thing=True) for category in categories)
    settings = config.model_copy(update={"task": "instance", "score_threshold": 0.0})
    result = segment(predictions, "instance", output_size=(height, width), categories=categories, config=settings)
    assert result.scores is not None
    scores = result.scores.astype(np.float64)
    return np.bincount(result.labels, scores * (1 - scores), len(categories)) / max(1.0, scores.sum())


class FeatureRecorder:
    """The forward pass of a model that also keeps the mean of the backbone's coarsest features of every crop.

    Args:
        model: in evaluation mode, on its device.
    """

    def __init__(self, model: Segmenter) -> None:
        self.model = model
        self._features = torch.zeros(0)
        self._vectors: list[Tensor] = []

    def __call__(self, images: Tensor, padding: Tensor) -> MaskPrediction | PixelPrediction:
        """Return the final prediction; see `Segmenter`."""
        hook = self.model.backbone.register_forward_hook(self._keep)
        try:
            prediction = self.model(images, padding).final
        finally:
            hook.remove()
        features = self._features.float()
        inside = F.interpolate((~padding)[:, None].float(), features.shape[-2:], mode="area")
        self._vectors += ((features * inside).sum((2, 3)) / inside.sum((2, 3))).unbind()
        return prediction

    def take(self) -> np.ndarray:
        """Return the mean (C,) float32 over the crops since the last call, scaled to length 1."""
        mean = torch.stack(self._vectors).mean(0)
        self._vectors.clear()
        return F.normalize(mean, dim=0).cpu().numpy()

    def _keep(self, _module: object, _inputs: object, output: tuple[dict[int, Tensor], object]) -> None:
        features = output[0]
        self._features = features[max(features)]
