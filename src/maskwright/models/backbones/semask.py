"""SeMask (Jain et al., "SeMask: Semantically Masked Transformers for Semantic Segmentation"): layers between stages.

Section 3; original file `SeMask-FPN/mmseg/models/backbones/semask_swin_transformer.py`. Unusual: the residual sum uses
the normalized cells, so a new semantic layer is a layer norm and not the identity; and one linear layer is both the
query of the attention and the supervised class map. Scores are neither scaled nor masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.models.backbones.base import STRIDES, Backbone, BackboneOutput
from maskwright.models.backbones.swin import SwinBackbone
from maskwright.models.layers import resize

_DROPOUT = 0.1  # of the attention output, in all published models


class SemaskBackbone(Backbone):
    """A Swin with a semantic layer after each stage, whose output goes to the next stage and to the decoder."""

    size_divisor = 1

    def __init__(self, swin: SwinBackbone, semantic_layers: Sequence[SemanticLayer]) -> None:
        super().__init__()
        self.patch_embed = swin.patch_embed
        self.stages = swin.stages
        self.semantic_layers = nn.ModuleList(semantic_layers)
        self.norms = swin.norms
        self.channels = swin.channels

    def forward(self, images: Tensor) -> BackboneOutput:
        """See `BackboneOutput`; sizes that are not a multiple of a stride are rounded up."""
        x = self.patch_embed(images)  # (B, h, w, C)
        features, maps = {}, []
        parts = zip(STRIDES, self.stages, self.semantic_layers, self.norms, strict=True)
        for stride, stage, semantic_layer, norm in parts:
            semantic_map, x = semantic_layer(stage(x))
            features[stride] = norm(x).permute(0, 3, 1, 2)
            maps.append(semantic_map)
        return BackboneOutput(features, tuple(maps))

    def first_stages(self, count: int) -> list[nn.Module]:
        """See `Backbone`; a stage includes its semantic layer."""
        return [self.patch_embed, *list(self.stages)[:count], *list(self.semantic_layers)[:count]]


class SemanticLayer(nn.Module):
    """Attention between cells that are likely of the same class; also predicts the class of each cell.

    Differs from the reference: its Mask2Former variants initialize both `output` and `gamma` with zero, so that neither
    ever gets a gradient and the attention stays off. Here every linear layer starts as in its FPN variant.

    Args:
        dim: C.
        num_classes: K.
        window: side of the windows that attention is limited to; None for attention over the whole image.
    """

    def __init__(self, *, dim: int, num_classes: int, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, num_classes)
        self.key = nn.Linear(dim, num_classes)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(_DROPOUT)
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map cells (B, h, w, C) to class logits (B, K, h, w) and new cells (B, h, w, C)."""
        _, h, w, _ = x.shape
        x = self.norm(x)
        rows, columns = (h, w) if self.window is None else (self.window, self.window)
        padded = F.pad(x, (0, 0, 0, -w % columns, 0, -h % rows))  # padding is attended to like any cell
        parts = padded.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
        cells = parts.flatten(3, 4).flatten(0, 2)  # (B * windows, T, C)
        query = self.query(cells)  # (B * windows, T, K)
        attended = attention(query, self.key(cells), self.value(cells))
        semantic_map, branch = (
            part.view(*parts.shape[:5], -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w]
            for part in (query, self.output(attended))
        )  # (B, h, w, K) and (B, h, w, C)
        return semantic_map.permute(0, 3, 1, 2), self.gamma * self.dropout(branch) + x


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Unscaled attention with one head, of (n, T, K), (n, T, K) and (n, T, C); ONNX's has a dimension for heads."""
    return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=1.0)[:, 0]


def fuse(semantic_maps: Sequence[Tensor], *, align_corners: bool) -> Tensor:
    """Upsample the maps of all stages to stride 4, in steps of 2, and add them.

    Args:
        semantic_maps: (B, K, H/stride, W/stride), fine to coarse.
        align_corners: of the bilinear interpolation; off with the FPN decoder, on with Mask2Former's.

    Returns:
        (B, K, h, w).
    """
    total = semantic_maps[0]
    for doublings, coarse in enumerate(semantic_maps[1:], 1):
        for _ in range(doublings):
            coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=align_corners)
        total = total + resize(coarse, semantic_maps[0], align_corners)
    return total
