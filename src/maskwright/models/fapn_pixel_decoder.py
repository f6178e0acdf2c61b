"""Feature-aligned pixel decoders: coarse features are shifted to match the fine ones before the two are added.

FaPN (Huang et al., "FaPN: Feature-aligned Pyramid Network for Dense Image Prediction", section 3, without its feature
selection) as SeMask uses it; original file `SeMask-FAPN/SeMask-Mask2Former/mask2former/modeling/pixel_decoder/fapn.py`.
Unusual: the deformable convolution is not a compiled operator. It is deformable attention with one point per kernel
tap, followed by one matrix product with the kernel. An alignment has no norm of its own, but uses that of the
convolution after it.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.models.layers import ConvNorm, group_norm, initialize_convolution
from maskwright.models.ops.deformable_attention import deformable_attention
from maskwright.models.pixel_decoder import LEVEL_STRIDES

_GROUPS = 8  # groups of channels, each with its own offsets
_KERNEL = 3
_TAPS = _KERNEL**2
_CHUNK = 32768  # output cells whose samples are in memory at once


class AlignedPixelDecoder(nn.Module):
    """FaPN: a feature pyramid of convolutions with an alignment in each step, without attention."""

    def __init__(self, channels: dict[int, int], *, hidden_dim: int, mask_dim: int) -> None:
        super().__init__()
        coarsest, *finer = sorted(channels, reverse=True)
        self.coarsest = ConvNorm(channels[coarsest], hidden_dim, _KERNEL, activate=True)
        self.laterals = nn.ModuleList(ConvNorm(channels[stride], hidden_dim, 1, activate=False) for stride in finer)
        self.alignments = nn.ModuleList(FeatureAlignment(hidden_dim) for _ in finer)
        self.smooths = nn.ModuleList(ConvNorm(hidden_dim, hidden_dim, _KERNEL, activate=True) for _ in finer)
        self.mask_projection = nn.Conv2d(hidden_dim, mask_dim, _KERNEL, padding=_KERNEL // 2)
        initialize_convolution(self.mask_projection)

    def forward(self, features: dict[int, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Decode; see `PixelDecoder`."""
        coarsest, *finer = sorted(features, reverse=True)
        level = self.coarsest(features[coarsest])
        levels = [level]
        steps = zip(finer, self.laterals, self.alignments, self.smooths, strict=True)
        for stride, project, align, smooth in steps:
            lateral = project(features[stride])
            merged = lateral + F.interpolate(level, size=lateral.shape[-2:], mode="nearest")
            level = smooth(align(lateral, merged, smooth.norm))
            levels.append(level)
        return levels[: len(LEVEL_STRIDES)], self.mask_projection(level)


class FeatureAlignment(nn.Module):
    """Deformable convolution of coarse features, with offsets predicted from both inputs, added to the fine ones."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.difference = nn.Conv2d(2 * dim, dim, 1, bias=False)
        self.places = nn.Conv2d(dim, _GROUPS * _TAPS * 3, _KERNEL, padding=_KERNEL // 2)
        self.sampled = nn.Conv2d(dim, dim, _KERNEL)  # holds the kernel of the deformable convolution
        initialize_convolution(self.difference)
        nn.init.zeros_(self.places.weight)
        nn.init.uniform_(self.sampled.weight, -1 / (dim * _TAPS) ** 0.5, 1 / (dim * _TAPS) ** 0.5)
        for layer in (self.places, self.sampled):
            nn.init.constant_(cast(Tensor, layer.bias), 0)

    def forward(self, fine: Tensor, coarse: Tensor, norm: nn.GroupNorm) -> Tensor:
        """Align `coarse` and add `fine`, both (B, C, h, w); offsets and samples are computed in float32."""
        difference = group_norm(self.difference(torch.cat([fine, 2 * coarse], 1)), norm)
        with torch.autocast(fine.device.type, enabled=False):
            places = self.places(difference.float())
            offsets, modulation = places[:, : 2 * _GROUPS * _TAPS], places[:, 2 * _GROUPS * _TAPS :].sigmoid()
            weight, bias = self.sampled.weight.float(), self.sampled.bias
            aligned = deformable_convolution(coarse.float(), offsets, modulation, weight, bias)
        return F.relu(aligned) + fine


def deformable_convolution(
    features: Tensor, offsets: Tensor, modulation: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Modulated deformable convolution (Zhu et al., "Deformable ConvNets v2", section 3), stride 1, same size.

    Args:
        features: (B, C, h, w).
        offsets: (B, groups * taps * 2, h, w), ordered by group, then tap (row by row), then (dy, dx), in cells.
        modulation: (B, groups * taps, h, w), ordered by group, then tap; scales the samples.
        weight: (outputs, C, side, side) with an odd side; taps = side * side.
        bias: (outputs,), or None.

    Returns:
        (B, outputs, h, w). Sampling is bilinear, with zeros outside.
    """
    batch, channels, h, w = features.shape
    side, taps = weight.shape[-1], weight.shape[-1] ** 2
    groups = modulation.shape[1] // taps
    reach = torch.arange(side, device=features.device) - side // 2
    y = torch.arange(h, device=features.device)[:, None, None, None] + reach[:, None]  # (h, 1, side, 1)
    x = torch.arange(w, device=features.device)[:, None, None] + reach  # (w, 1, side)
    regular = torch.stack(torch.broadcast_tensors(x, y), -1).view(h * w, taps, 1, 2)  # (x, y) of each tap
    moved = offsets.view(batch, groups, taps, 2, h * w).permute(0, 4, 2, 1, 3).flip(-1)  # (B, h*w, taps, groups, 2)
    positions = (regular + moved)[:, :, :, :, None, None]
    weights = modulation.view(batch, groups, taps, h * w).permute(0, 3, 2, 1)[..., None, None]
    values = features.view(batch, groups, channels // groups, h * w).permute(0, 3, 1, 2).contiguous()
    kernel = weight.permute(0, 2, 3, 1).flatten(1)  # (outputs, taps * C)
    chunks = []
    for places, scales in zip(positions.split(_CHUNK, 1), weights.split(_CHUNK, 1), strict=True):
        # Every tap of every cell is a query; groups are heads.
        samples = deformable_attention(
            values, [(h, w)], places.flatten(1, 2).contiguous(), scales.flatten(1, 2).contiguous()
        )
        chunks.append(F.linear(samples.view(batch, -1, taps * channels), kernel, bias))
    return torch.cat(chunks, 1).transpose(1, 2).unflatten(2, (h, w))
