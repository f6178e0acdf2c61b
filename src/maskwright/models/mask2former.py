"""Mask2Former (Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation")."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.models.backbones.semask import fuse
from maskwright.models.segmenter import Segmenter
from maskwright.structures.predictions import ModelOutput


class Mask2Former(Segmenter):
    """Backbone, pixel decoder and masked decoder."""

    tasks = ("semantic", "instance", "panoptic")
    size_divisor = 32

    def __init__(
        self,
        *,
        backbone: nn.Module,
        pixel_decoder: nn.Module,
        masked_decoder: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.masked_decoder = masked_decoder

    def forward(self, images: Tensor, padding: Tensor | None = None, intermediate: bool = False) -> ModelOutput:
        """Predict; see `Segmenter`."""
        features, semantic_maps = self.backbone(self.normalize(images, padding))
        levels, mask_features = self.pixel_decoder(features)
        *earlier, final = self.masked_decoder(levels, mask_features, intermediate)
        semantic_logits = None
        if intermediate and semantic_maps:
            fused = fuse(semantic_maps, align_corners=True)
            semantic_logits = F.interpolate(fused, size=images.shape[-2:], mode="bilinear", align_corners=True)
        return ModelOutput(final, earlier, semantic_maps, semantic_logits)
