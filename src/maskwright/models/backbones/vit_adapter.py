"""ViT-Adapter (Chen et al. 2023, "Vision Transformer Adapter for Dense Predictions"): strides 4 to 32 of a plain ViT.

Original: `czczup/ViT-Adapter`, files `adapter_modules.py` and `vit_adapter.py`. A small convolutional network makes
spatial features at strides 8, 16 and 32. Before each quarter of the ViT's blocks, its tokens attend to them, and
afterwards they attend to its tokens. Unusual: sampling positions are computed in pixels of the image, so that patches
may have any size, and padding at the right or bottom does not move them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from maskwright.models.backbones.base import STRIDES, DropPath, scale_maps
from maskwright.models.ops.deformable_attention import DeformableCrossAttention

STAGES = 4
_PRIOR_CHANNELS = 64  # of the first convolutions
_POINTS = 4
_EXTRA_EXTRACTORS = 2  # after the last stage
_FEEDFORWARD_RATIO = 0.25
_NARROW = 384  # ViTs up to this width attend with all channels as values, wider ones with half
_EPS = 1e-6


class Grid(NamedTuple):
    """A map of tokens: its rows, its columns and the pixels from one to the next."""

    rows: int
    columns: int
    stride: int


class VitAdapter(nn.Module):
    """The parts of the adapter, which run between those of the ViT.

    Batch norms are always trained: unlike the ViT, nothing here is pretrained.

    Differs from the reference: its plain ViT loses the class token, its BEiT keeps it; here all ViTs keep class and
    register tokens, which do not meet the adapter.

    Args:
        width: C of the tokens.
        patch_size: in pixels.
        num_heads: attention heads of the ViT; the adapter has as many, but at least 6, as published.
        channels: of the images.
        drop_path: stochastic depth rate of all extractors.
    """

    def __init__(self, width: int, *, patch_size: int, num_heads: int, channels: int, drop_path: float) -> None:
        super().__init__()
        self.patch_size = patch_size
        heads = num_heads if width % 6 else max(num_heads, 6)
        self.spatial_prior = SpatialPrior(channels, width)
        self.level_embedding = nn.Parameter(torch.empty(len(STRIDES) - 1, width))
        self.injectors = nn.ModuleList(Injector(width, heads) for _ in range(STAGES))
        counts = [1] * (STAGES - 1) + [1 + _EXTRA_EXTRACTORS]
        self.extractors = nn.ModuleList(
            nn.ModuleList(Extractor(width, heads, drop_path) for _ in range(count)) for count in counts
        )
        self.upscale = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in STRIDES)
        self.apply(_initialize)
        nn.init.normal_(self.level_embedding)

    def forward(
        self, images: Tensor, tokens: Tensor, grid: tuple[int, int], run_stage: Callable[[int, Tensor], Tensor]
    ) -> dict[int, Tensor]:
        """Run the ViT and the adapter.

        Args:
            images: normalized, (B, channels, H, W); H and W are multiples of 32.
            tokens: (B, T, C) before the first block, those of the patches last.
            grid: rows and columns of patches.
            run_stage: runs one quarter of the blocks, given its index, on tokens (B, T, C).

        Returns:
            {stride: (B, C, H/stride, W/stride)}.
        """
        finest, levels = self.spatial_prior(images)
        grids = tuple(Grid(level.shape[2], level.shape[3], s) for s, level in zip(STRIDES[1:], levels, strict=True))
        patch_grid = (Grid(*grid, self.patch_size),)
        spatial = torch.cat(
            [level.flatten(2).mT + embedding for level, embedding in zip(levels, self.level_embedding, strict=True)], 1
        )
        first_patch = tokens.shape[1] - grid[0] * grid[1]
        stages = []
        for stage, (injector, extractors) in enumerate(zip(self.injectors, self.extractors, strict=True)):
            patches = injector(tokens[:, first_patch:], spatial, patch_grid, grids)
            tokens = run_stage(stage, torch.cat([tokens[:, :first_patch], patches], 1))
            patches = tokens[:, first_patch:]
            for extractor in cast(nn.ModuleList, extractors):
                spatial = extractor(spatial, patches, grids, patch_grid)
            stages.append(_to_maps(patches, patch_grid)[0])
        maps = _to_maps(spatial, grids)
        maps = [finest + self.upscale(maps[0]), *maps]
        return {
            stride: norm(own + self._at_stride(stride, of_stage, own))
            for stride, norm, own, of_stage in zip(STRIDES, self.norms, maps, stages, strict=True)
        }

    def _at_stride(self, stride: int, of_patches: Tensor, like: Tensor) -> Tensor:
        """Resize a map of patches bilinearly to another stride, and crop it to the size of `like`."""
        height, width = like.shape[-2:]
        return scale_maps(of_patches, self.patch_size / stride, (height, width))[..., :height, :width]


class SpatialPrior(nn.Module):
    """Convolutions that make a map of C channels at each of strides 4, 8, 16 and 32."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        base = _PRIOR_CHANNELS
        self.stem = nn.Sequential(
            *_convolution(channels, base, 2),
            *_convolution(base, base, 1),
            *_convolution(base, base, 1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        widths = (base, 2 * base, 4 * base, 4 * base)
        self.stages = nn.ModuleList(
            nn.Sequential(*_convolution(before, after, 2)) for before, after in pairwise(widths)
        )
        self.projections = nn.ModuleList(nn.Conv2d(each, width, 1) for each in widths)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map (B, channels, H, W) to the map at stride 4, and those at 8, 16 and 32."""
        features = [self.stem(images)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        finest, *levels = (project(each) for project, each in zip(self.projections, features, strict=True))
        return finest, levels


class Injector(nn.Module):
    """Adds what the patches find in the spatial features to their tokens, scaled by a factor that starts at zero."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.query_norm, self.value_norm = nn.LayerNorm(width, _EPS), nn.LayerNorm(width, _EPS)
        self.attention = _attention(width, num_heads, levels=len(STRIDES) - 1)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(
        self, patches: Tensor, spatial: Tensor, grids: tuple[Grid, ...], value_grids: tuple[Grid, ...]
    ) -> Tensor:
        """Map patches (B, P, C) to the same shape, given spatial features (B, S, C)."""
        return patches + self.gamma * _attend(self, patches, spatial, grids, value_grids)


class Extractor(nn.Module):
    """Adds what the spatial features find in the tokens of the patches, then a convolutional feed-forward block."""

    def __init__(self, width: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.query_norm, self.value_norm = nn.LayerNorm(width, _EPS), nn.LayerNorm(width, _EPS)
        self.attention = _attention(width, num_heads, levels=1)
        self.feedforward_norm = nn.LayerNorm(width, _EPS)
        self.feedforward = ConvFeedForward(width, int(width * _FEEDFORWARD_RATIO))
        self.drop_path = DropPath(drop_path)

    def forward(
        self, spatial: Tensor, patches: Tensor, grids: tuple[Grid, ...], value_grids: tuple[Grid, ...]
    ) -> Tensor:
        """Map spatial features (B, S, C) to the same shape, given patches (B, P, C)."""
        spatial = spatial + _attend(self, spatial, patches, grids, value_grids)
        return spatial + self.drop_path(self.feedforward(self.feedforward_norm(spatial), grids))


class ConvFeedForward(nn.Module):
    """Two linear layers, with a depthwise convolution of each level and a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.reduce = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        """Map (B, S, C) to the same shape."""
        maps = _to_maps(self.expand(tokens), grids)
        hidden = torch.cat([self.depthwise(each).flatten(2).mT for each in maps], 1)
        return self.reduce(nn.functional.gelu(hidden))


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def _attention(width: int, num_heads: int, levels: int) -> DeformableCrossAttention:
    value_dim = width if width <= _NARROW else width // 2
    return DeformableCrossAttention(
        dim=width, value_dim=value_dim, num_heads=num_heads, num_levels=levels, num_points=_POINTS
    )


def _attend(
    part: Injector | Extractor, queries: Tensor, values: Tensor, grids: tuple[Grid, ...], value_grids: tuple[Grid, ...]
) -> Tensor:
    """Run the attention of an injector or extractor."""
    centers = sampling_centers(grids, value_grids, _POINTS, queries.device)
    shapes = [(grid.rows, grid.columns) for grid in value_grids]
    return part.attention(part.query_norm(queries), part.value_norm(values), centers, shapes)


def _to_maps(tokens: Tensor, grids: tuple[Grid, ...]) -> list[Tensor]:
    """Split tokens (B, T, C) into the maps of their grids, (B, C, rows, columns)."""
    parts = tokens.split([grid.rows * grid.columns for grid in grids], 1)
    return [part.mT.unflatten(2, (grid.rows, grid.columns)) for part, grid in zip(parts, grids, strict=True)]


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def sampling_centers(
    grids: tuple[Grid, ...], value_grids: tuple[Grid, ...], num_points: int, device: torch.device
) -> Tensor:
    """Return (T, 2, L * P): the center of each token of `grids`, x and y in cells of each value grid, for each point.

    Cached: do not write to it.
    """
    centers = []
    for grid in grids:
        y, x = (
            (torch.arange(count, dtype=torch.float32, device=device) + 0.5) * grid.stride
            for count in (grid.rows, grid.columns)
        )
        centers.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
    pixels = torch.cat(centers)  # (T, 2)
    cells = torch.stack([pixels / grid.stride - 0.5 for grid in value_grids], -1)  # (T, 2, L)
    return cells.repeat_interleave(num_points, -1)


def _initialize(module: nn.Module) -> None:
    """Initialize linear layers and convolutions as the original; the attention has done so itself."""
    for child in module.children():
        if isinstance(child, nn.Linear) and not isinstance(module, DeformableCrossAttention):
            nn.init.trunc_normal_(child.weight, std=0.02)
            nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Conv2d | nn.ConvTranspose2d):
            outputs = math.prod(child.kernel_size) * child.out_channels // child.groups
            nn.init.normal_(child.weight, std=math.sqrt(2 / outputs))
            if child.bias is not None:
                nn.init.zeros_(child.bias)
