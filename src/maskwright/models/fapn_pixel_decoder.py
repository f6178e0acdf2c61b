"""Feature-aligned pixel decoders: coarse features are moved to where the fine ones say they belong before they join.

FaPN (Huang et al., "FaPN: Feature-aligned Pyramid Network for Dense Image Prediction", section 3, without its feature
selection) as SeMask uses it; original file `SeMask-FAPN/SeMask-Mask2Former/mask2former/modeling/pixel_decoder/fapn.py`.
Unusual: the deformable convolution is not compiled. It is deformable attention with one point per kernel tap, whose
samples meet the kernel in one matrix product. And an alignment has no norm of its own: it uses that of the convolution
behind it.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.models.layers import ConvNorm, group_norm, initialise_convolution
from maskwright.models.ops.deformable_attention import deformable_attention
from maskwright.models.pixel_decoder import LEVEL_STRIDES

_GROUPS = 8  # of channels, each with sampling places of its own
_KERNEL = 3
_TAPS = _KERNEL**2
_BLOCK = 32768  # output cells whose samples are held at once


class AlignedPixelDecoder(nn.Module):
    """FaPN: a feature pyramid of convolutions, with an alignment in each step. It has no attention."""

    def __init__(self, channels: dict[int, int], *, width: int, mask_width: int) -> None:
        super().__init__()
        coarsest, *finer = sorted(channels, reverse=True)
        self.coarsest = ConvNorm(channels[coarsest], width, _KERNEL, activate=True)
        self.laterals = nn.ModuleList(ConvNorm(channels[stride], width, 1, activate=False) for stride in finer)
        self.alignments = nn.ModuleList(FeatureAlignment(width) for _ in finer)
        self.smooths = nn.ModuleList(ConvNorm(width, width, _KERNEL, activate=True) for _ in finer)
        self.mask_projection = nn.Conv2d(width, mask_width, _KERNEL, padding=_KERNEL // 2)
        initialise_convolution(self.mask_projection)

    def forward(self, features: dict[int, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Decode; see `PixelDecoder`."""
        coarsest, *finer = sorted(features, reverse=True)
        x = self.coarsest(features[coarsest])
        outputs = [x]
        parts = zip(finer, self.laterals, self.alignments, self.smooths, strict=True)
        for stride, project, align, smooth in parts:
            lateral = project(features[stride])
            joined = lateral + F.interpolate(x, size=lateral.shape[-2:], mode="nearest")
            x = smooth(align(lateral, joined, smooth.norm))
            outputs.append(x)
        return outputs[: len(LEVEL_STRIDES)], self.mask_projection(x)


class FeatureAlignment(nn.Module):
    """Coarse features, sampled where their difference to the fine ones points, added to the fine ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.difference = nn.Conv2d(2 * width, width, 1, bias=False)
        self.places = nn.Conv2d(width, _GROUPS * _TAPS * 3, _KERNEL, padding=_KERNEL // 2)
        self.sampled = nn.Conv2d(width, width, _KERNEL)  # its weights are applied at the sampled places
        initialise_convolution(self.difference)
        nn.init.zeros_(self.places.weight)
        nn.init.uniform_(self.sampled.weight, -1 / (width * _TAPS) ** 0.5, 1 / (width * _TAPS) ** 0.5)
        for layer in (self.places, self.sampled):
            nn.init.constant_(cast(Tensor, layer.bias), 0)

    def forward(self, fine: Tensor, coarse: Tensor, norm: nn.GroupNorm) -> Tensor:
        """Fine and coarse features of one size, both (B, C, h, w), to (B, C, h, w); places and samples in float32."""
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
        offsets: (B, groups * taps * 2, h, w), of group, then tap (row by row), then (dy, dx), in cells.
        modulation: (B, groups * taps, h, w), of group, then tap; multiplies what is sampled.
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
    blocks = []
    for places, shares in zip(positions.split(_BLOCK, 1), weights.split(_BLOCK, 1), strict=True):
        # Every tap of every cell is a query; groups are heads.
        samples = deformable_attention(
            values, [(h, w)], places.flatten(1, 2).contiguous(), shares.flatten(1, 2).contiguous()
        )
        blocks.append(F.linear(samples.view(batch, -1, taps * channels), kernel, bias))
    return torch.cat(blocks, 1).transpose(1, 2).unflatten(2, (h, w))
