"""Swin (Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows"): blocks and stages.

Names and shapes of weights, and the order in which random ones are drawn, are those of timm 1.0. The steps are the
original's: the map is padded to whole windows and then shifted (timm shifts first, which differs wherever the size is
not a multiple of the window), and odd blocks always shift, also where the map fits one window.

Unusual: cells never lie in raster order between the blocks of a stage, but window by window, in the windows of the
block that made them. Padding, the way back, shift and the next partition so are one gathering of rows. The windows are
sorted by their shift mask, see `windows.py`, so no mask is made for every window of a CPU. There, in prediction, a
block does all its steps for some windows at a time: what lies between them then stays in the processor's cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.errors import RecipeError
from maskwright.models.backbones.base import STRIDES, Backbone, BackboneOutput, DropPath, drop_path_rates
from maskwright.models.backbones.swin_windows import Windows, arrange_windows, gather, transition
from maskwright.models.layers import added

# name: C of the first stage, blocks and heads of each stage, and windows
_MODELS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], int | tuple[int, ...]]] = {
    "swin_tiny_patch4_window7_224": (96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_small_patch4_window7_224": (96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "swin_base_patch4_window7_224": (128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
    "swin_base_patch4_window12_384": (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_large_patch4_window7_224": (192, (2, 2, 18, 2), (6, 12, 24, 48), 7),
    "swin_large_patch4_window12_384": (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
    "swin_s3_tiny_224": (96, (2, 2, 6, 2), (3, 6, 12, 24), (7, 7, 14, 7)),
    "swin_s3_small_224": (96, (2, 2, 18, 2), (3, 6, 12, 24), (14, 14, 14, 7)),
    "swin_s3_base_224": (96, (2, 2, 30, 2), (3, 6, 12, 24), (7, 7, 14, 7)),
}


def is_swin(name: str) -> bool:
    """Whether `build_swin` knows the name, whatever weights the part behind a dot names."""
    return name.partition(".")[0].removesuffix("_in22k") in _MODELS


def build_swin(name: str, options: dict[str, Any], *, channels: int) -> SwinBackbone:
    """A Swin with random weights.

    Args:
        name: see `is_swin`.
        options: `embed_dim`, `depths`, `num_heads`, `window_size`, `head_dim`, `mlp_ratio`, `qkv_bias`,
            `drop_path_rate`, `proj_drop_rate` and `attn_drop_rate`, as timm means them; each of the first six that is
            not a list holds for all stages, but widths double from stage to stage.
        channels: of the images.

    Raises:
        RecipeError: an option is unknown or has a value that no Swin has.
    """
    width, depths, heads, window = _MODELS[name.partition(".")[0].removesuffix("_in22k")]
    values: dict[str, Any] = {
        "embed_dim": width,
        "depths": depths,
        "num_heads": heads,
        "window_size": window,
        "head_dim": None,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "drop_path_rate": 0.0,
        "proj_drop_rate": 0.0,
        "attn_drop_rate": 0.0,
    }
    try:
        if unknown := options.keys() - values.keys():
            raise ValueError(f"{', '.join(sorted(unknown))} is unknown; known are {', '.join(values)}")
        return _build(values | options, channels)
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"model.backbone_options {options} do not suit '{name}': {reason}") from None


def _build(values: dict[str, Any], channels: int) -> SwinBackbone:
    first = values["embed_dim"]
    several = isinstance(first, list | tuple)
    widths = _for_each_stage("embed_dim", first) if several else [int(first) * 2**stage for stage in range(4)]
    depths, heads, head_widths, windows, ratios = (
        _for_each_stage(key, values[key]) for key in ("depths", "num_heads", "head_dim", "window_size", "mlp_ratio")
    )
    if min(*widths, *depths, *heads, *windows) < 1:
        raise ValueError("widths, depths, heads and windows must be at least 1")
    rates, stages = drop_path_rates(values["drop_path_rate"], depths), []
    embedding = PatchEmbed(channels, widths[0])
    for number, width in enumerate(widths):
        downsample = PatchMerging(widths[number - 1], width) if number else nn.Identity()
        blocks = [
            SwinBlock(
                width,
                heads=heads[number],
                head_width=head_widths[number],
                window=windows[number],
                hidden=int(width * ratios[number]),
                drop_path=rate,
                dropout=(values["attn_drop_rate"], values["proj_drop_rate"]),
                qkv_bias=values["qkv_bias"],
            )
            for rate in rates[number]
        ]
        stages.append(SwinStage(downsample, blocks, windows[number]))
    for module in nn.ModuleList(stages).modules():
        if isinstance(module, nn.Linear):
            _draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return SwinBackbone(embedding, stages, widths)


@torch.no_grad()
def _draw(weights: Tensor) -> None:
    """Fill with a normal distribution of deviation 0.02, by the numbers that timm draws for it."""
    weights.uniform_(-1, 1).erfinv_().mul_(0.02 * 2**0.5).clamp_(-2, 2)


def _for_each_stage(option: str, value: Any) -> list[Any]:
    """A list of four from a list of four, or from one value."""
    values = list(value) if isinstance(value, list | tuple) else [value] * len(STRIDES)
    if len(values) != len(STRIDES):
        raise ValueError(f"{option} has {len(values)} entries, needed are {len(STRIDES)}")
    return values


class SwinBackbone(Backbone):
    """The four stages, with a layer norm on each output, as the original Mask2Former has. Images may have any size.

    Args:
        embedding: what makes cells of pixels.
        stages: four.
        widths: C of each stage.

    Attributes:
        window: side of the windows of its first stage, in cells.
    """

    size_divisor = 1

    def __init__(self, embedding: PatchEmbed, stages: list[SwinStage], widths: list[int]) -> None:
        super().__init__()
        self.patch_embed = embedding
        self.stages = nn.Sequential(*stages)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.channels = dict(zip(STRIDES, widths, strict=True))
        self.window = stages[0].window

    def forward(self, images: Tensor) -> BackboneOutput:
        """See `BackboneOutput`; sides that are no multiple of a stride are rounded up."""
        x = self.patch_embed(images)
        features = {}
        for stride, stage, norm in zip(STRIDES, self.stages, self.norms, strict=True):
            x = stage(x)
            features[stride] = norm(x).permute(0, 3, 1, 2)
        return BackboneOutput(features)

    def first_stages(self, count: int) -> list[nn.Module]:
        """See `Backbone`; the norm on an output is the decoder's."""
        return [self.patch_embed, *list(self.stages)[:count]]


class PatchEmbed(nn.Module):
    """Each patch of 4x4 pixels becomes a cell."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, STRIDES[0], STRIDES[0])
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, h, w, C), after padding to whole patches with zeros right and bottom."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % STRIDES[0], 0, -height % STRIDES[0]))
        return self.norm(self.proj(padded).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Four neighbouring cells become one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * inputs)
        self.reduction = nn.Linear(4 * inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, inputs) to (B, h/2, w/2, outputs), sides rounded up: odd ones are padded with zeros."""
        _, h, w, _ = x.shape
        if h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)  # (B, h/2, w/2, across, down, C)
        return self.reduction(self.norm(x.flatten(3)))


class SwinStage(nn.Module):
    """Merging of patches, except in the first stage, and blocks of which every second one shifts its windows."""

    def __init__(self, downsample: nn.Module, blocks: list[SwinBlock], window: int) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, inputs) to (B, h', w', C), half as high and wide where the stage merges patches."""
        x = self.downsample(x)
        batch, h, w, _ = x.shape
        rows, before = x.flatten(0, 2), None
        for number, block in enumerate(self.blocks):
            shift = self.window // 2 if number % 2 else 0
            rows = block(rows, arrange_windows(batch, (h, w), self.window, before, shift, x.device))
            before = shift
        if before is not None:
            rows = gather(rows, *transition(batch, (h, w), self.window, before, None, x.device))
        return rows.view(x.shape)


class SwinBlock(nn.Module):
    """Attention in windows and a multi-layer perceptron, each with a norm before it and a residual around it.

    Args:
        width: C.
        heads: of the attention.
        head_width: channels of each head; None divides C among them.
        window: side in cells.
        hidden: channels inside the perceptron.
        drop_path: rate at which images leave the block out in training.
        dropout: rates of what attention adds up, and of the outputs of its and the perceptron's layers.
        qkv_bias: whether queries, keys and values have a bias.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_width: int | None,
        window: int,
        hidden: int,
        drop_path: float,
        dropout: tuple[float, float],
        qkv_bias: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(
            width, heads=heads, head_width=head_width, window=window, dropout=dropout, qkv_bias=qkv_bias
        )
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Perceptron(width, hidden, dropout[1])
        self.drop_path = DropPath(drop_path)

    def forward(self, rows: Tensor, windows: Windows) -> Tensor:
        """Rows (cells, C) in the order of the block before, to (B * windows * T, C) in that of `windows`."""
        biases = self.attn.biases(windows.masks)
        in_parts = rows.device.type == "cpu" and not (self.training or torch.is_grad_enabled())
        if not in_parts or torch.compiler.is_compiling():
            return self._run(gather(rows, *windows.transition), windows.padded, windows.spread(biases), windows)
        out = rows.new_empty(len(windows.transition.index), rows.shape[1])
        for chunk in windows.chunks:
            x = rows.index_select(0, windows.transition.index[chunk.start : chunk.stop])
            bias = [(len(x), biases[chunk.kind])]
            out[chunk.start : chunk.stop] = self._run(x, chunk.padded, bias, windows)
        return out

    def _run(self, x: Tensor, padded: Tensor | None, biases: list[tuple[int, Tensor]], windows: Windows) -> Tensor:
        """Some or all windows, (n * T, C); `padded` are rows outside the map, which attention sees as zeros."""
        normed = self.norm1(x)
        if padded is not None:
            normed = normed.index_fill(0, padded, 0.0)
        x = added(self._dropped(self.attn(normed, biases), windows), x)
        return added(self._dropped(self.mlp(self.norm2(x)), windows), x)

    def _dropped(self, added: Tensor, windows: Windows) -> Tensor:
        """What is added to all windows, without the images that leave it out."""
        if not self.drop_path.is_active:
            return added
        scales = self.drop_path.scales(added, windows.batch).index_select(0, windows.images)  # (B * windows,)
        return (added.unflatten(0, (len(scales), -1)) * scales[:, None, None]).flatten(0, 1)


class WindowAttention(nn.Module):
    """Attention of the cells of a window to each other, with a learned bias for each distance; see `SwinBlock`."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_width: int | None,
        window: int,
        dropout: tuple[float, float],
        qkv_bias: bool,
    ) -> None:
        super().__init__()
        inside = heads * (head_width or width // heads)
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * inside, bias=qkv_bias)
        self.proj = nn.Linear(inside, width)
        self.attention_dropout, self.proj_drop = dropout[0], nn.Dropout(dropout[1])
        _draw(self.relative_position_bias_table)

    def biases(self, masks: Tensor) -> Tensor:
        """(kinds, 1, heads, T, T): the bias of each pair of cells, plus each of the masks (kinds, T, T)."""
        table, cells = self.relative_position_bias_table, self.window**2
        index = _relative_positions(self.window, table.device)
        bias = table.index_select(0, index).t().unflatten(1, (cells, cells))  # (heads, T, T)
        return (bias + masks[:, None]).unsqueeze(1)

    def forward(self, x: Tensor, biases: list[tuple[int, Tensor]]) -> Tensor:
        """Windows (n * T, C), of which the given numbers of rows have the biases (1 or their n, heads, T, T) each."""
        qkv = self.qkv(x).view(-1, self.window**2, 3, self.heads, self.qkv.out_features // (3 * self.heads))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (n, heads, T, C/heads)
        counts = [rows // self.window**2 for rows, _ in biases]
        parts = zip(*(part.split(counts) for part in (query, key, value)), (bias for _, bias in biases), strict=True)
        attended = [self._attend(*part).transpose(1, 2) for part in parts]
        whole = attended[0] if len(attended) == 1 else torch.cat(attended)  # (n, T, heads, C/heads)
        return self.proj_drop(self.proj(whole.reshape(len(x), -1)))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """(n, heads, T, C/heads) each; written out where a CPU trains, which has no fused backward pass with a bias."""
        dropout = self.attention_dropout if self.training else 0.0
        if not query.requires_grad or query.device.type != "cpu":
            return F.scaled_dot_product_attention(query, key, value, bias, dropout)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias
        return F.dropout(scores.softmax(-1), dropout) @ value


class Perceptron(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(cells, C) to the same shape."""
        hidden = self.fc1(x)
        gelu = F.gelu if torch.is_grad_enabled() else torch.ops.aten.gelu_  # in place, where nothing is kept
        return self.dropout(self.fc2(self.dropout(gelu(hidden))))


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _relative_positions(window: int, device: torch.device) -> Tensor:
    """(T * T,) the row of the table of biases for each pair of cells."""
    y, x = np.divmod(np.arange(window * window), window)
    rows = (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)
    return torch.from_numpy(rows.ravel()).to(device)
