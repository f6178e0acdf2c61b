"""The masked decoder: queries look at the image where their own masks are, one feature level after the other.

Mask2Former, section 3.2.1; original file `modeling/transformer_decoder/mask2former_transformer_decoder.py`. Unusual:
masks at full size are never made here. Bilinear downsampling is linear, so the mask features are downsampled once per
level and multiplied there: the same attention masks at a fraction of the products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.models.layers import MLP, Attention, FeedForward, sine_positions
from maskwright.structures.predictions import MaskPrediction


class MaskedDecoder(nn.Module):
    """Learned queries through layers of masked cross-attention; a prediction before each layer and one at the end."""

    def __init__(
        self,
        *,
        queries: int,
        num_classes: int,
        width: int,
        mask_width: int,
        heads: int,
        layers: int,
        feedforward: int,
        levels: int = 3,
    ) -> None:
        super().__init__()
        self.query_features = nn.Embedding(queries, width)
        self.query_positions = nn.Embedding(queries, width)
        self.level_embedding = nn.Embedding(levels, width)
        self.layers = nn.ModuleList(
            DecoderLayer(width=width, heads=heads, feedforward=feedforward) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.class_head = nn.Linear(width, num_classes + 1)
        self.mask_head = MLP(width, mask_width)

    def forward(self, levels: list[Tensor], mask_features: Tensor, intermediate: bool) -> list[MaskPrediction]:
        """Decode.

        Args:
            levels: (B, C, H/stride, W/stride) each, coarse to fine; layer i looks at level i % len(levels).
            mask_features: (B, C, h, w).
            intermediate: whether the predictions before the last are wanted.

        Returns:
            The predictions, the last layer's at the end; only that one if not `intermediate`.
        """
        batch, channels = levels[0].shape[:2]
        positions = [sine_positions(*level.shape[-2:], channels, level.device) for level in levels]
        values = [
            level.flatten(2).transpose(1, 2) + embedding
            for level, embedding in zip(levels, self.level_embedding.weight, strict=True)
        ]  # (B, T, C) each
        keys = [value + position for value, position in zip(values, positions, strict=True)]
        small_features = [_downsample(mask_features, level) for level in levels]
        queries = self.query_features.weight.expand(batch, -1, -1)
        predictions = []
        for index, layer in enumerate(self.layers):
            now = index % len(levels)
            normed = self.norm(queries)
            embeddings = self.mask_head(normed)
            if intermediate:
                predictions.append(MaskPrediction(self.class_head(normed), embeddings, mask_features))
            inside = _inside_mask(embeddings, small_features[now])
            visible = inside | ~inside.any(-1, keepdim=True)  # a query without a mask looks everywhere
            queries = layer(queries, self.query_positions.weight, keys[now], values[now], visible)
        normed = self.norm(queries)
        predictions.append(MaskPrediction(self.class_head(normed), self.mask_head(normed), mask_features))
        return predictions


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention and feed-forward block, each with a residual and a norm behind it."""

    def __init__(self, *, width: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.cross_attention = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.self_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, feedforward)
        self.feedforward_norm = nn.LayerNorm(width)

    def forward(
        self, queries: Tensor, query_positions: Tensor, keys: Tensor, values: Tensor, visible: Tensor
    ) -> Tensor:
        """Queries (B, Q, C) look at values (B, T, C) by their keys, where `visible` (B, Q, T); positions (Q, C)."""
        attended = self.cross_attention(queries + query_positions, keys, values, visible)
        queries = self.cross_norm(queries + attended)
        placed = queries + query_positions
        queries = self.self_norm(queries + self.self_attention(placed, placed, queries))
        return self.feedforward_norm(queries + self.feedforward(queries))


@torch.no_grad()
def _downsample(mask_features: Tensor, level: Tensor) -> Tensor:
    """(B, C, T) at the level's size, in float32 because a mask bit hangs on the sign of a sum over it."""
    return F.interpolate(mask_features.float(), size=level.shape[-2:], mode="bilinear", align_corners=False).flatten(2)


@torch.no_grad()
def _inside_mask(embeddings: Tensor, small_features: Tensor) -> Tensor:
    """(B, Q, T) bool: where the query's mask is at least one half."""
    with torch.autocast(embeddings.device.type, enabled=False):
        return embeddings.float() @ small_features >= 0
