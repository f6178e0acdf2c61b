"""The pixel decoder: backbone features to three levels for the masked decoder and one map of mask features.

Mask2Former, section 3.2 and appendix; original file `modeling/pixel_decoder/msdeformattn.py`. Unusual: levels run
from coarse to fine everywhere (strides 32, 16, 8), and only the finest one is joined with the stride-4 features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.models.layers import ConvNorm, FeedForward, added, initialise_convolution, sine_positions
from maskwright.models.ops.deformable_attention import DeformableAttention, choose_backend

LEVEL_STRIDES = (32, 16, 8)


class PixelDecoder(nn.Module):
    """Multi-scale deformable attention encoder with one FPN step to stride 4.

    With an `alignment` (see `aligned_pixel_decoder`) in that step it is the MSFaPN decoder of SeMask.
    """

    def __init__(
        self,
        channels: dict[int, int],
        *,
        width: int,
        mask_width: int,
        heads: int,
        points: int,
        layers: int,
        feedforward: int,
        alignment: nn.Module | None = None,
    ) -> None:
        super().__init__()
        projections = [ConvNorm(channels[stride], width, 1, activate=False, bias=True) for stride in LEVEL_STRIDES]
        self.input_projections = nn.ModuleList(projections)
        for projection in projections:
            nn.init.xavier_uniform_(projection.conv.weight)
        self.level_embedding = nn.Parameter(torch.empty(len(LEVEL_STRIDES), width))
        nn.init.normal_(self.level_embedding)
        self.layers = nn.ModuleList(
            EncoderLayer(width=width, heads=heads, points=points, feedforward=feedforward) for _ in range(layers)
        )
        self.lateral = ConvNorm(channels[4], width, 1, activate=False)
        self.alignment = alignment
        self.smooth = ConvNorm(width, width, 3, activate=True)
        self.mask_projection = nn.Conv2d(width, mask_width, 1)
        initialise_convolution(self.mask_projection)

    def forward(self, features: dict[int, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Decode.

        Args:
            features: stride to (B, C_stride, H/stride, W/stride), for strides 4, 8, 16 and 32.

        Returns:
            The levels at strides 32, 16 and 8, each (B, C, H/stride, W/stride), and mask features (B, C, h, w).
        """
        levels = [
            project(features[stride]) for project, stride in zip(self.input_projections, LEVEL_STRIDES, strict=True)
        ]
        shapes = [(level.shape[-2], level.shape[-1]) for level in levels]
        positions = torch.cat(
            [
                sine_positions(h, w, level.shape[1], level.device) + embedding
                for (h, w), level, embedding in zip(shapes, levels, self.level_embedding, strict=True)
            ]
        )  # (T, C)
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)  # (B, T, C)
        for layer in self.layers:
            tokens = layer(tokens, positions, shapes)
        parts = tokens.split([h * w for h, w in shapes], 1)
        levels = [part.unflatten(1, shape).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes, strict=True)]
        lateral = self.lateral(features[4])
        coarse = levels[-1]
        if torch.is_grad_enabled():  # with the channels last, the backward pass of `smooth` takes three times as long
            coarse = coarse.contiguous()
        fine = F.interpolate(coarse, size=lateral.shape[-2:], mode="bilinear", align_corners=False).add_(lateral)
        if self.alignment is not None:
            fine = self.alignment(lateral, fine, self.smooth.norm)
        return levels, self.mask_projection(self.smooth(fine))


class EncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward block, each with a residual and a norm behind it."""

    def __init__(self, *, width: int, heads: int, points: int, feedforward: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(width=width, heads=heads, levels=len(LEVEL_STRIDES), points=points)
        self.attention_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, feedforward)
        self.feedforward_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, positions: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """(B, T, C) to (B, T, C); positions (T, C)."""
        if torch.is_grad_enabled() or choose_backend(tokens) != "bag":
            return self._finish(tokens, self.attention(tokens, positions, shapes))
        done = [self._finish(*part) for part in self.attention.in_parts(tokens, positions, shapes)]
        return torch.cat(done).view(tokens.shape)

    def _finish(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """All that follows attention, (..., C) to (..., C)."""
        tokens = self.attention_norm(added(attended, tokens))
        return self.feedforward_norm(added(self.feedforward(tokens), tokens))
