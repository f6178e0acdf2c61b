"""Predictions of the models, before post-processing. The dimension key is in `annotations`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class MaskPrediction:
    """One decoder layer's prediction. Masks are products; ask for the ones that are needed.

    Attributes:
        class_logits: (B, Q, K+1); the last class is "no object".
        mask_embeddings: (B, Q, C).
        mask_features: (B, C, h, w), shared by all layers of one forward pass.
    """

    class_logits: Tensor
    mask_embeddings: Tensor
    mask_features: Tensor

    def mask_logits(self) -> Tensor:
        """(B, Q, h, w): the masks of all queries at stride 4."""
        return torch.einsum("bqc,bchw->bqhw", self.mask_embeddings, self.mask_features)

    def image(self, index: int) -> MaskPrediction:
        """The prediction for one image of the batch, with B = 1."""
        part = slice(index, index + 1)
        return MaskPrediction(self.class_logits[part], self.mask_embeddings[part], self.mask_features[part])


@dataclass(slots=True)
class PixelPrediction:
    """What a per-pixel decoder predicts: no masks, a class for every pixel.

    Attributes:
        class_logits: (B, K, h, w), before the softmax over K.
    """

    class_logits: Tensor

    def image(self, index: int) -> PixelPrediction:
        """The prediction for one image of the batch, with B = 1."""
        return PixelPrediction(self.class_logits[index : index + 1])


@dataclass(slots=True)
class ModelOutput:
    """All that a forward pass gives.

    Attributes:
        final: the last decoder layer's prediction, or that of a per-pixel decoder.
        intermediate: the predictions before it, from the learned queries on; empty where they were not asked for, and
            for a per-pixel decoder.
        semantic_maps: class logits of each semantic layer, (B, K, H/stride, W/stride), fine to coarse; empty for a
            model without such layers.
        semantic_logits: those maps as one, (B, K, h, w) at stride 4 or (B, K, H, W), as the model's decoder has it;
            None where `semantic_maps` is empty or intermediate predictions were not asked for.
    """

    final: MaskPrediction | PixelPrediction
    intermediate: list[MaskPrediction] = field(default_factory=list)
    semantic_maps: tuple[Tensor, ...] = ()
    semantic_logits: Tensor | None = None
