"""The masked decoder: queries attend to the image where their own masks are, one feature level after the other.

Mask2Former, section 3.2.1; original file `modeling/transformer_decoder/mask2former_transformer_decoder.py`. Unusual:
masks at stride 4 are never computed here. Bilinear downsampling is linear, so the mask features are downsampled once
per level and multiplied there: the same attention masks for a fraction of the products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.models.layers import MLP, Attention, FeedForward, sine_positions
from maskwright.runtime.device import full_precision
from maskwright.structures.predictions import MaskPrediction


class MaskedDecoder(nn.Module):
    """Learned queries, refined by layers of masked cross-attention; predicts before each layer and at the end."""

    def __init__(
        self,
        *,
        num_queries: int,
        num_classes: int,
        hidden_dim: int,
        mask_dim: int,
        num_heads: int,
        num_layers: int,
        feedforward_dim: int,
        num_levels: int = 3,
    ) -> None:
        super().__init__()
        self.query_features = nn.Embedding(num_queries, hidden_dim)
        self.query_positions = nn.Embedding(num_queries, hidden_dim)
        self.level_embedding = nn.Embedding(num_levels, hidden_dim)
        self.layers = nn.ModuleList(
            DecoderLayer(hidden_dim=hidden_dim, num_heads=num_heads, feedforward_dim=feedforward_dim)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.class_head = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_head = MLP(hidden_dim, mask_dim)

    def forward(self, levels: list[Tensor], mask_features: Tensor, intermediate: bool) -> list[MaskPrediction]:
        """Decode.

        Args:
            levels: (B, C, H/stride, W/stride) each, coarse to fine; layer i attends to level i % len(levels).
            mask_features: (B, C, h, w).
            intermediate: also return the predictions before the last.

        Returns:
            The predictions in order; only the last one without `intermediate`.
        """
        batch, channels = levels[0].shape[:2]
        positions = [sine_positions(*level.shape[-2:], channels, level.device) for level in levels]
        values = [
            level.flatten(2).transpose(1, 2) + embedding
            for level, embedding in zip(levels, self.level_embedding.weight, strict=True)
        ]  # (B, T, C) each
        keys = [value + position for value, position in zip(values, positions, strict=True)]
        small_features = [_downsample(mask_features, level) for level in levels]
        queries = self.query_features.weight.expand(batch, -1, -1)  # (B, Q, C)
        predictions = []
        for index, layer in enumerate(self.layers):
            current = index % len(levels)
            normed = self.norm(queries)
            embeddings = self.mask_head(normed)
            if intermediate:
                predictions.append(MaskPrediction(self.class_head(normed), embeddings, mask_features))
            inside = _inside_mask(embeddings, small_features[current])  # (B, Q, T)
            visible = inside | ~inside.any(-1, keepdim=True)  # a query with an empty mask attends everywhere
            queries = layer(queries, self.query_positions.weight, keys[current], values[current], visible)
        normed = self.norm(queries)
        predictions.append(MaskPrediction(self.class_head(normed), self.mask_head(normed), mask_features))
        return predictions


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention and feed-forward block, each with a residual sum and a layer norm."""

    def __init__(self, *, hidden_dim: int, num_heads: int, feedforward_dim: int) -> None:
        super().__init__()
        self.cross_attention = Attention(hidden_dim, num_heads)
        self.cross_norm = nn.LayerNorm(hidden_dim)
        self.self_attention = Attention(hidden_dim, num_heads)
        self.self_norm = nn.LayerNorm(hidden_dim)
        self.feedforward = FeedForward(hidden_dim, feedforward_dim)
        self.feedforward_norm = nn.LayerNorm(hidden_dim)

    def forward(
        self, queries: Tensor, query_positions: Tensor, keys: Tensor, values: Tensor, visible: Tensor
    ) -> Tensor:
        """Update queries (B, Q, C) with positions (Q, C) from keys and values (B, T, C) where `visible` (B, Q, T)."""
        attended = self.cross_attention(queries + query_positions, keys, values, visible)
        queries = self.cross_norm(queries + attended)
        positioned = queries + query_positions
        queries = self.self_norm(queries + self.self_attention(positioned, positioned, queries))
        return self.feedforward_norm(queries + self.feedforward(queries))


@torch.no_grad()
def _downsample(mask_features: Tensor, level: Tensor) -> Tensor:
    """Return (B, C, T) at the level's size, in float32 because attention masks are signs of products with it."""
    small = F.interpolate(mask_features.float(), size=level.shape[-2:], mode="bilinear", align_corners=False)
    return small.flatten(2).contiguous()  # products with channels-last features are slow


@torch.no_grad()
def _inside_mask(embeddings: Tensor, small_features: Tensor) -> Tensor:
    """Return (B, Q, T) bool: where the query's mask probability is at least one half."""
    with full_precision(embeddings):
        return embeddings.float() @ small_features >= 0
