"""Look up and download timm's pretrained weights. A separate file, because importing timm takes seconds and 200 MB."""

from __future__ import annotations

import difflib
import logging
import math
from functools import cache
from pathlib import PurePosixPath

import timm
import torch
from timm.layers import resample_patch_embed
from timm.models import PretrainedCfg, get_pretrained_cfg

from maskwright.checkpoints.key_maps.key_map import State
from maskwright.errors import CheckpointError
from maskwright.models.backbones.vit import VitBackbone, resize_position_table

logger = logging.getLogger(__name__)
_DINOV3 = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"


@cache
def timm_files() -> dict[str, str]:
    """Return the names of timm's weights by the names of their files."""
    addresses = {name: timm_config(name).url for name in timm.list_pretrained()}
    return {PurePosixPath(address).name: name for name, address in addresses.items() if isinstance(address, str)}


def timm_name(source: str) -> str | None:
    """Return timm's name for the weights that a name or file name refers to; None if it has none."""
    if source in timm.list_pretrained():
        return source
    return timm_files().get(source) or (source if timm.is_model(source) else None)


def timm_names() -> list[str]:
    """Return all names of weights and of their files."""
    return [*timm_files(), *timm.list_pretrained()]


def timm_config(name: str) -> PretrainedCfg:
    """Return the address and normalization of timm's weights.

    Raises:
        CheckpointError: timm has no weights of that name.
    """
    try:
        known = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        known = None
    if known is None or not known.has_weights:
        near = difflib.get_close_matches(name, timm.list_pretrained(), 3, 0.4)
        raise CheckpointError(f"timm has no weights of '{name}'", remedy=f"nearest: {', '.join(near)}")
    return known


def download(name: str) -> State:
    """Return the weights of a whole network, downloaded unless cached; raises whatever the Hub's client raises."""
    if "dinov3" in name:
        logger.warning("the weights of '%s' have Meta's own license, which you accept by using them: %s", name, _DINOV3)
    return timm.create_model(name, pretrained=True).state_dict()


def expected_names(name: str, options: dict) -> set[str]:
    """Return the names of the weights of a whole network, including its classifier."""
    known = {key: value for key, value in options.items() if key != "norm_eps"}  # which is ours, see `build_vit`
    with torch.device("meta"):
        return set(timm.create_model(name, **known).state_dict())


def fit_vit(state: State, backbone: VitBackbone) -> list[str]:
    """Fit the weights of a plain ViT to another image size, patch size or kind of biases, in place.

    Position tables and patch embeddings are resized as timm does (bicubically with antialiasing; Beyer et al. 2023,
    "FlexiViT"), which is what EoMT is trained from.

    Returns:
        One line for each change.
    """
    prefix, ours = "backbone.network.", backbone.network.state_dict()
    lines = _fit_biases(state, ours, prefix)
    if "norm.weight" not in ours:  # a ViT-Adapter takes the tokens without it
        for name in ("norm.weight", "norm.bias"):
            state.pop(prefix + name, None)
    table, wanted = state.get(f"{prefix}pos_embed"), ours.get("pos_embed")
    if table is not None and wanted is not None and table.ndim == 3 and table.shape[2] == wanted.shape[2]:
        rows = 0 if backbone.network.no_embed_class else backbone.num_prefix_tokens
        side = math.isqrt(table.shape[1] - rows)
        class_token = state.get(f"{prefix}cls_token")
        if rows == 0 and class_token is not None and math.isqrt(table.shape[1] - 1) ** 2 == table.shape[1] - 1:
            # Transformers has a position for the class token, but for no register: timm adds it beforehand.
            state[f"{prefix}cls_token"], table = class_token + table[:, :1], table[:, 1:]
            side = math.isqrt(table.shape[1])
        grid = (int(backbone.network.patch_embed.grid_size[0]), int(backbone.network.patch_embed.grid_size[1]))
        if side * side == table.shape[1] - rows and (side, side) != grid:
            table = resize_position_table(table, (side, side), grid, num_prefix_tokens=rows, antialias=True)
            lines.append(f"position table: resized from {side}x{side} patches to {grid[0]}x{grid[1]}")
        state[f"{prefix}pos_embed"] = table
    patches, wanted = state.get(f"{prefix}patch_embed.proj.weight"), ours["patch_embed.proj.weight"]
    if patches is not None and patches.ndim == 4 and patches.shape[2:] != wanted.shape[2:]:
        resized = resample_patch_embed(patches, list(wanted.shape[2:]))
        state[f"{prefix}patch_embed.proj.weight"] = resized
        lines.append(f"patch embedding: resized from {patches.shape[-1]} to {wanted.shape[-1]} pixels")
    return lines


def _fit_biases(state: State, ours: State, prefix: str) -> list[str]:
    """Drop or add biases of queries and values that are zero, as all of DINOv3's are."""
    names = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    biases = [name for name in names | ours.keys() if name.endswith((".attn.q_bias", ".attn.v_bias"))]
    for name in biases:
        if name not in ours and not state[prefix + name].any():
            del state[prefix + name]
        elif name not in names and name.rpartition(".")[0] + ".qkv.weight" in names:
            state[prefix + name] = torch.zeros_like(ours[name])
    if biases and not any(name in names for name in biases):
        return ["biases of queries and values: not in the weights, so they start at zero"]
    return []
