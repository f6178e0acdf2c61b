"""Predictions of the models, before post-processing. `annotations` has the dimension key."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class MaskPrediction:
    """The prediction of one decoder layer.

    Masks are not stored: a mask is the product of an embedding and the shared features, computed where it is needed.

    Attributes:
        class_logits: (B, Q, K+1); the last class is "no object".
        mask_embeddings: (B, Q, C).
        mask_features: (B, C, h, w), shared by all layers of one forward pass.
    """

    class_logits: Tensor
    mask_embeddings: Tensor
    mask_features: Tensor

    def mask_logits(self) -> Tensor:
        """Return the masks of all queries at stride 4, (B, Q, h, w)."""
        return torch.einsum("bqc,bchw->bqhw", self.mask_embeddings, self.mask_features)

    def image(self, index: int) -> MaskPrediction:
        """Return the prediction for one image of the batch, with B = 1."""
        part = slice(index, index + 1)
        return MaskPrediction(self.class_logits[part], self.mask_embeddings[part], self.mask_features[part])


@dataclass(slots=True)
class PixelPrediction:
    """The prediction of a per-pixel decoder: a class for every pixel, no masks.

    Attributes:
        class_logits: (B, K, h, w), before the softmax over K.
    """

    class_logits: Tensor

    def image(self, index: int) -> PixelPrediction:
        """Return the prediction for one image of the batch, with B = 1."""
        return PixelPrediction(self.class_logits[index : index + 1])


@dataclass(slots=True)
class ModelOutput:
    """The result of a forward pass.

    Attributes:
        final: the prediction of the last decoder layer, or of a per-pixel decoder.
        intermediate: the predictions of the layers before it, starting with the learned queries; empty if they were
            not requested, and for a per-pixel decoder.
        semantic_maps: class logits of each semantic layer (SeMask), (B, K, H/stride, W/stride), fine to coarse; empty
            for other models.
        semantic_logits: the semantic maps fused, (B, K, h, w) at stride 4 or (B, K, H, W), depending on the decoder;
            None if `semantic_maps` is empty or intermediate predictions were not requested.
    """

    final: MaskPrediction | PixelPrediction
    intermediate: list[MaskPrediction] = field(default_factory=list)
    semantic_maps: tuple[Tensor, ...] = ()
    semantic_logits: Tensor | None = None
