"""SeMask (Jain et al., "SeMask: Semantically Masked Transformers for Semantic Segmentation"): layers between stages.

Section 3; original file `SeMask-FPN/mmseg/models/backbones/semask_swin_transformer.py`. Unusual: the residual is added
to the normalised cells, so a semantic layer is a layer norm at its start and not the identity; and one linear layer is
both the query of the attention and the class map that is supervised. Scores are neither scaled nor masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.models.backbones.base import STRIDES, Backbone, BackboneOutput
from maskwright.models.backbones.swin import SwinBackbone
from maskwright.models.layers import resize

_DROPOUT = 0.1  # of what the attention adds, whatever the model


class SemaskBackbone(Backbone):
    """A Swin with a semantic layer behind each stage: what it gives goes to the next stage and to the decoder."""

    size_divisor = 1

    def __init__(self, swin: SwinBackbone, semantic_layers: Sequence[SemanticLayer]) -> None:
        super().__init__()
        self.patch_embed = swin.patch_embed
        self.stages = swin.stages
        self.semantic_layers = nn.ModuleList(semantic_layers)
        self.norms = swin.norms
        self.channels = swin.channels

    def forward(self, images: Tensor) -> BackboneOutput:
        """See `BackboneOutput`; sides that are no multiple of a stride are rounded up."""
        x = self.patch_embed(images)  # (B, h, w, C)
        features, maps = {}, []
        parts = zip(STRIDES, self.stages, self.semantic_layers, self.norms, strict=True)
        for stride, stage, semantic_layer, norm in parts:
            semantic_map, x = semantic_layer(stage(x))
            features[stride] = norm(x).permute(0, 3, 1, 2)
            maps.append(semantic_map)
        return BackboneOutput(features, tuple(maps))

    def first_stages(self, count: int) -> list[nn.Module]:
        """See `Backbone`; a stage's semantic layer belongs to it."""
        return [self.patch_embed, *list(self.stages)[:count], *list(self.semantic_layers)[:count]]


class SemanticLayer(nn.Module):
    """Cells gather from others of like class, and tell their own class on the way.

    Differs from the reference: its Mask2Former variants start with `output` at zero as well as `gamma`, so that neither
    ever gets a gradient and the attention stays off. Here every linear layer starts as in its FPN variant.

    Args:
        width: C.
        num_classes: K.
        window: side of the windows inside which cells see each other; None lets every cell see the whole image.
    """

    def __init__(self, *, width: int, num_classes: int, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, num_classes)
        self.key = nn.Linear(width, num_classes)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(_DROPOUT)
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, w, C) to the semantic map (B, K, h, w), raw logits, and the cells (B, h, w, C)."""
        _, h, w, _ = x.shape
        x = self.norm(x)
        rows, columns = (h, w) if self.window is None else (self.window, self.window)
        padded = F.pad(x, (0, 0, 0, -w % columns, 0, -h % rows))  # these cells are seen like any other
        parts = padded.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
        cells = parts.flatten(3, 4).flatten(0, 2)  # (B * windows, T, C)
        query = self.query(cells)  # (B * windows, T, K)
        gathered = F.scaled_dot_product_attention(query, self.key(cells), self.value(cells), scale=1.0)
        semantic_map, added = (
            part.view(*parts.shape[:5], -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w]
            for part in (query, self.output(gathered))
        )
        return semantic_map.permute(0, 3, 1, 2), self.gamma * self.dropout(added) + x


def fuse(semantic_maps: Sequence[Tensor], *, align_corners: bool) -> Tensor:
    """(B, K, h, w): the maps of all stages at stride 4, each doubled step by step, and added.

    Args:
        semantic_maps: (B, K, H/stride, W/stride), fine to coarse.
        align_corners: of the bilinear interpolation; the FPN decoder has it off, those of Mask2Former on.
    """
    total = semantic_maps[0]
    for doublings, coarse in enumerate(semantic_maps[1:], 1):
        for _ in range(doublings):
            coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=align_corners)
        total = total + resize(coarse, semantic_maps[0], align_corners)
    return total
