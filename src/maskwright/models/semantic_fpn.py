"""Semantic FPN (Kirillov et al., "Panoptic Feature Pyramid Networks", section 3.2): classifies pixels, has no masks.

The decoder of SeMask-FPN; original file `SeMask-FPN/mmseg/models/decode_heads/fpn_head.py`. Unusual: there is no
top-down pyramid before it. Maps are upsampled by 2 in steps and resized to stride 4 at the end, because a level need
not have exactly twice the size of the next.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.models.backbones.base import Backbone
from maskwright.models.backbones.semask import fuse
from maskwright.models.layers import resize
from maskwright.models.segmenter import Segmenter
from maskwright.structures.predictions import ModelOutput, PixelPrediction

_DROPOUT = 0.1  # of whole channels


class SemanticFPN(Segmenter):
    """Backbone and per-pixel decoder."""

    tasks = ("semantic",)

    def __init__(
        self, *, backbone: Backbone, decoder: nn.Module, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        self.backbone = backbone
        self.decoder = decoder
        self.size_divisor = backbone.size_divisor

    def forward(self, images: Tensor, padding: Tensor | None = None, intermediate: bool = False) -> ModelOutput:
        """Predict; see `Segmenter`."""
        features, semantic_maps = self.backbone(self.normalize(images, padding))
        fused = fuse(semantic_maps, align_corners=False) if intermediate and semantic_maps else None
        return ModelOutput(PixelPrediction(self.decoder(features)), [], semantic_maps, fused)


class FPNDecoder(nn.Module):
    """Upsample every level to stride 4 with convolutions, add them and classify each cell."""

    def __init__(self, channels: dict[int, int], *, hidden_dim: int, num_classes: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for level, stride in enumerate(sorted(channels)):
            inputs = [channels[stride], *[hidden_dim] * (level - 1)]
            blocks = [ConvBatchNorm(count, hidden_dim, upsample=level > 0) for count in inputs]
            self.levels.append(nn.Sequential(*blocks))
        self.dropout = nn.Dropout2d(_DROPOUT)
        self.classifier = nn.Conv2d(hidden_dim, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.constant_(cast(Tensor, self.classifier.bias), 0)

    def forward(self, features: dict[int, Tensor]) -> Tensor:
        """Decode.

        Args:
            features: stride to (B, C_stride, H/stride, W/stride), for strides 4, 8, 16 and 32.

        Returns:
            Class logits (B, K, h, w).
        """
        first, *others = (level(features[stride]) for level, stride in zip(self.levels, sorted(features), strict=True))
        total = first  # (B, C, h, w)
        for other in others:
            total = total + resize(other, total)
        return self.classifier(self.dropout(total))


class ConvBatchNorm(nn.Module):
    """3x3 convolution, batch norm, ReLU, and optionally bilinear upsampling by 2."""

    def __init__(self, inputs: int, outputs: int, *, upsample: bool) -> None:
        super().__init__()
        self.upsample = upsample
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h, w), or (B, outputs, 2h, 2w) with `upsample`."""
        features = F.relu(self.norm(self.conv(features)))
        return F.interpolate(features, scale_factor=2, mode="bilinear") if self.upsample else features
