"""Plain vision transformers of timm as backbones: DINOv2, DINOv3, AugReg, CLIP, SigLIP, EVA and their like.

All features of a plain ViT have the stride of its patches. The simple feature pyramid (Li et al. 2022, "Exploring Plain
Vision Transformer Backbones for Object Detection", section 3) makes strides 4, 8, 16 and 32 of the last one;
`vit_adapter` is the other way.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, cast

import timm
import torch
from timm.layers import LayerNorm, LayerNorm2d, resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from maskwright.errors import RecipeError, one_line
from maskwright.models.backbones.base import STRIDES, Backbone, BackboneOutput, scale_maps
from maskwright.models.backbones.vit_adapter import STAGES, VitAdapter
from maskwright.models.ops.cpu_path import uses_cpu_path

PYRAMID_CHANNELS = 256
_MAX_SCORES = 2**23  # of one block; they are kept for the backward pass
_MODULES = ("timm.models.vision_transformer", "timm.models.eva")


def is_plain_vit(name: str) -> bool:
    """Return whether a timm model of that name is a plain vision transformer."""
    return timm.is_model(name) and timm.model_entrypoint(name).__module__ in _MODULES


def build_vit(name: str, arguments: dict[str, Any], *, pyramid: Literal["simple", "adapter"] | None) -> VitBackbone:
    """Build a plain ViT with random weights.

    Args:
        name: of the timm model; a part after a dot names weights and is ignored.
        arguments: of the timm model; also `norm_eps`, the epsilon of its layer norms.
        pyramid: add a simple feature pyramid or a ViT-Adapter; with neither only the tokens can be had.

    Raises:
        RecipeError: timm does not know an argument, or the network has no tokens to take.
    """
    arguments = dict(arguments)
    if eps := arguments.pop("norm_eps", None):
        arguments["norm_layer"] = partial(LayerNorm, eps=eps)
    try:
        network = timm.create_model(name, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True, **arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"'{name}' cannot be built: {one_line(error)}", where="model.backbone_options") from None
    if not isinstance(network, VisionTransformer | Eva):
        raise RecipeError(f"'{name}' is a {type(network).__name__}, not a plain ViT", where="model.backbone")
    # This removes what only classifies; the adapter takes the tokens without the final norm, as published.
    network.prune_intermediate_layers([len(network.blocks) - 1], prune_norm=pyramid == "adapter")
    # DINOv2's authors resize its position table without antialiasing, except with registers; timm always uses it.
    antialias = not name.partition(".")[0].endswith("patch14_dinov2")
    width, patch_size = int(network.embed_dim), int(network.patch_embed.patch_size[0])
    match pyramid:
        case None:
            return VitBackbone(network, antialias=antialias)
        case "simple":
            return PyramidVit(network, SimpleFeaturePyramid(width, patch_size), antialias=antialias)
        case "adapter":
            adapter = VitAdapter(
                width,
                patch_size=patch_size,
                num_heads=int(cast(Any, network.blocks[0]).attn.num_heads),
                channels=arguments.get("in_chans", 3),
                drop_path=arguments.get("drop_path_rate", 0.0),
            )
            return AdaptedVit(network, adapter, antialias=antialias)


class VitBackbone(Backbone):
    """A plain ViT that returns its tokens, not a feature pyramid.

    Attributes:
        network: of timm.
        width: C of the tokens.
        patch_size: side of a patch in pixels.
        query_blocks: the number of last blocks that also process queries (EoMT), which cannot be frozen.
    """

    def __init__(self, network: VisionTransformer | Eva, *, antialias: bool) -> None:
        super().__init__()
        self.network, self.antialias = network, antialias
        self.width, self.patch_size = int(network.embed_dim), int(network.patch_embed.patch_size[0])
        self.query_blocks = 0
        self._resized: dict[tuple[int, int], Tensor] = {}  # the last resized position table, by rows and columns

    @property
    def num_prefix_tokens(self) -> int:
        """The number of class and register tokens, which come before those of the patches."""
        return int(self.network.num_prefix_tokens)

    @property
    def blocks(self) -> nn.Sequential | nn.ModuleList:
        """The transformer blocks."""
        return cast(nn.Sequential, self.network.blocks)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """Embed the patches of images (B, 3, H, W).

        Returns:
            The tokens before the first block, (B, T, C), class and register tokens first; rotary positions of the
            patches, if the network has any; and the rows and columns of patches.
        """
        network = self.network
        patches = network.patch_embed(images)  # (B, rows, columns, C)
        grid = (patches.shape[1], patches.shape[2])
        tokens, table = patches.flatten(1, 2), network.pos_embed
        prefix = [
            token.expand(tokens.shape[0], -1, -1)
            for token in (network.cls_token, network.reg_token)
            if token is not None
        ]
        if table is not None:
            table = self._resized_positions(table, grid)
            if network.no_embed_class:
                tokens = tokens + table
        tokens = torch.cat([*prefix, tokens], 1)
        if table is not None and not network.no_embed_class:
            tokens = tokens + table
        rope = getattr(network, "rope", None)
        return network.norm_pre(network.pos_drop(tokens)), None if rope is None else rope.get_embed(shape=grid), grid

    def _resized_positions(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the position table for rows and columns of patches.

        An exported graph has the table of the call before, since OpenVINO resizes bicubically in another way.
        """
        if torch.compiler.is_exporting() and grid in self._resized:
            return self._resized[grid]
        stored = (int(self.network.patch_embed.grid_size[0]), int(self.network.patch_embed.grid_size[1]))
        rows = 0 if self.network.no_embed_class else self.num_prefix_tokens
        resized = resize_position_table(table, stored, grid, num_prefix_tokens=rows, antialias=self.antialias)
        if grid != stored and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._resized = {grid: resized}
        return resized

    def run_block(self, index: int, tokens: Tensor, rope: Tensor | None, visible: Tensor | None = None) -> Tensor:
        """Run a block on tokens (B, T, C).

        Args:
            index: of the block.
            tokens: before the block.
            rope: rotary positions from `embed`.
            visible: bool, broadcast to (B, heads, T, T), True where a token may attend to another; None allows all.
        """
        block = self.blocks[index]
        attention: Any = getattr(block, "attn", None)  # a block of parallel branches has several
        if attention is not None and uses_cpu_path(tokens):
            attention.fused_attn = not _suits_explicit_attention(tokens, int(attention.num_heads))
        if rope is None:
            return block(tokens, attn_mask=visible)
        if getattr(self.network, "rope_mixed", False):  # learned frequencies, different in each block
            rope = rope[index]
        return block(tokens, rope=rope, attn_mask=visible)

    def _stage_ends(self) -> list[int]:
        """Return the number of blocks before each stage, a quarter of them, and after the last one."""
        return [round(len(self.blocks) * stage / STAGES) for stage in range(STAGES + 1)]

    def admit_queries(self, count: int, blocks: int) -> None:
        """Let the last blocks process queries, which come before all other tokens and have no position.

        Raises:
            RecipeError: there are fewer blocks.
        """
        if not 0 < blocks <= len(self.blocks):
            raise RecipeError(
                f"{blocks}, but the network has {len(self.blocks)} blocks",
                where="model.query_blocks",
                remedy="published models use 3 to 5",
            )
        self.query_blocks = blocks
        for block in list(self.blocks)[-blocks:]:
            attention = cast(Any, block.attn)
            if hasattr(attention, "num_prefix_tokens"):  # rotary positions skip them
                attention.num_prefix_tokens += count

    def first_stages(self, count: int) -> list[nn.Module] | None:
        """See `Backbone`; a stage is a quarter of the blocks, the last one includes the final norm.

        Raises:
            RecipeError: the stages hold blocks that process queries.
        """
        blocks, ends = list(self.blocks), self._stage_ends()
        end, most = ends[count], len(blocks) - self.query_blocks
        if end > most:
            raise RecipeError(
                f"{count} freezes the first {end} of {len(blocks)} blocks, but the last {self.query_blocks} process "
                "the queries and have to be trained",
                where="train.frozen_stages",
                remedy=f"set it to {max(stage for stage in range(count) if ends[stage] <= most)} or less",
            )
        network = self.network
        own = nn.ParameterList([p for p in network.parameters(recurse=False)])  # class token, position table, ...
        parts = [own, network.patch_embed, network.norm_pre, *blocks[:end]]
        return parts + [network.norm] * (count == STAGES)


class PyramidVit(VitBackbone):
    """A plain ViT with a simple feature pyramid, `neck`."""

    def __init__(self, network: VisionTransformer | Eva, neck: SimpleFeaturePyramid, *, antialias: bool) -> None:
        super().__init__(network, antialias=antialias)
        self.neck, self.channels = neck, dict.fromkeys(STRIDES, PYRAMID_CHANNELS)

    def forward(self, images: Tensor) -> BackboneOutput:
        """See `BackboneOutput`; images are padded to whole patches with zeros at the right and bottom."""
        features = self.neck(self.last_feature_map(images))
        height, width = images.shape[-2:]
        return BackboneOutput(
            {stride: level[..., : height // stride, : width // stride] for stride, level in features.items()}
        )

    def last_feature_map(self, images: Tensor) -> Tensor:
        """Return the normed tokens of the patches after the last block, (B, C, rows, columns)."""
        tokens, rope, grid = self.embed(images)
        for index in range(len(self.blocks)):
            tokens = self.run_block(index, tokens, rope)
        patches = self.network.norm(tokens)[:, self.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, grid)


class AdaptedVit(VitBackbone):
    """A plain ViT with a ViT-Adapter, `neck`."""

    def __init__(self, network: VisionTransformer | Eva, neck: VitAdapter, *, antialias: bool) -> None:
        super().__init__(network, antialias=antialias)
        self.neck, self.channels = neck, dict.fromkeys(STRIDES, self.width)

    def forward(self, images: Tensor) -> BackboneOutput:
        """See `BackboneOutput`; the ViT sees images padded to whole patches with zeros at the right and bottom."""
        tokens, rope, grid = self.embed(images)
        ends = self._stage_ends()

        def run_stage(stage: int, tokens: Tensor) -> Tensor:
            for index in range(ends[stage], ends[stage + 1]):
                tokens = self.run_block(index, tokens, rope)
            return tokens

        return BackboneOutput(self.neck(images, tokens, grid, run_stage))


def _suits_explicit_attention(tokens: Tensor, num_heads: int) -> bool:
    """Return whether attention among tokens (B, T, C) is faster as products and a softmax; see `explicit_attention`.

    A training step of a block of ViT-S takes 0.215 instead of 0.260 s (8 images of 320 patches, one thread of an AMD
    EPYC, Zen 4).
    """
    return (
        tokens.requires_grad
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and len(tokens) * num_heads * tokens.shape[1] ** 2 <= _MAX_SCORES
    )


def resize_position_table(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], *, num_prefix_tokens: int, antialias: bool
) -> Tensor:
    """Resize the positions of patches in a table (1, T, C) bicubically, from `old` to `new` rows and columns."""
    if old == new:
        return table
    return resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=num_prefix_tokens, antialias=antialias)


class SimpleFeaturePyramid(nn.Module):
    """Feature maps at strides 4, 8, 16 and 32 from one map at the stride of the patches.

    Each level is made on its own: by transposed convolutions to finer strides, by max-pooling to coarser ones, then a
    1x1 and a 3x3 convolution to 256 channels, with layer norms over channels. If the patch size is not a power of two,
    levels come out at a neighboring stride, such as 3.5, and are resized bilinearly.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.doublings = {stride: round(math.log2(patch_size / stride)) for stride in STRIDES}
        self.levels = nn.ModuleList(_pyramid_level(width, doublings) for doublings in self.doublings.values())

    def forward(self, features: Tensor) -> dict[int, Tensor]:
        """Map (B, C, rows, columns) to {stride: (B, 256, h, w)}, where maps cover at least the patches' area."""
        maps = {}
        for (stride, doublings), level in zip(self.doublings.items(), self.levels, strict=True):
            result = level(features)
            if (scale := self.patch_size / 2**doublings / stride) != 1:
                rows, columns = (math.ceil(side * self.patch_size / stride) for side in features.shape[-2:])
                result = scale_maps(result, scale, (rows, columns))
            maps[stride] = result
        return maps


def _pyramid_level(width: int, doublings: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(doublings):
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width //= 2
        if index + 1 < doublings:
            layers += [LayerNorm2d(width), nn.GELU()]
    if doublings < 0:
        layers.append(nn.MaxPool2d(2**-doublings, ceil_mode=True))
    return nn.Sequential(
        *layers,
        nn.Conv2d(width, PYRAMID_CHANNELS, 1, bias=False),
        LayerNorm2d(PYRAMID_CHANNELS),
        nn.Conv2d(PYRAMID_CHANNELS, PYRAMID_CHANNELS, 3, padding=1, bias=False),
        LayerNorm2d(PYRAMID_CHANNELS),
    )
