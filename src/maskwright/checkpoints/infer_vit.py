"""Infer the configuration of an EoMT and its plain ViT from their weights."""

from __future__ import annotations

import math
import re
from typing import Any

from maskwright.checkpoints.key_maps.key_map import State
from maskwright.errors import CheckpointError

_NETWORK = "backbone.network"
# (width, whether the MLPs are gated) -> (name, depth, hidden channels of the MLPs as stored)
_DINOV2 = {
    (384, False): ("small", 12, 1536),
    (768, False): ("base", 12, 3072),
    (1024, False): ("large", 24, 4096),
    (1536, True): ("giant", 40, 8192),
}
_DINOV3 = {
    (192, False): ("tiny", 12, 768),
    (384, False): ("small", 12, 1536),
    (384, True): ("small_plus", 12, 1536),
    (768, False): ("base", 12, 3072),
    (1024, False): ("large", 24, 4096),
    (1280, True): ("huge_plus", 32, 5120),
}
_HEAD_WIDTH = 64  # of all published ViTs
_REGISTERS = 4
_PATCHES = {"dinov2": 14, "dinov3": 16}
_EPS = {"dinov2": 1e-6, "dinov3": 1e-5}
_IMAGE = 518  # for which DINOv2's table is made


def infer_eomt(state: State, heads: int | None, norm_eps: float | None) -> dict[str, Any]:
    """Return values of a `ModelConfig`.

    Args:
        state: our names to tensors.
        heads: attention heads; None takes one for each 64 channels.
        norm_eps: of the layer norms; None is that of the published networks.

    Raises:
        CheckpointError: the ViT is neither a DINOv2 nor a DINOv3.
        KeyError: a weight is missing.
    """
    queries = len(state["head.query_features.weight"])
    blocks = len(state["mask_probabilities"])
    return {"family": "eomt", "num_queries": queries, "query_blocks": blocks, **_infer_vit(state, heads, norm_eps)}


def _infer_vit(state: State, heads: int | None, norm_eps: float | None) -> dict[str, Any]:
    kind = "dinov2" if f"{_NETWORK}.pos_embed" in state else "dinov3"
    if f"{_NETWORK}.blocks.0.{'ls1.gamma' if kind == 'dinov2' else 'gamma_1'}" not in state:
        raise CheckpointError("its ViT is neither a DINOv2 nor a DINOv3, so its weights do not show which one it is")
    width, patch = (state[f"{_NETWORK}.patch_embed.proj.weight"].shape[axis] for axis in (0, -1))
    depth = 1 + max(int(match[1]) for key in state if (match := re.match(rf"{_NETWORK}\.blocks\.(\d+)\.", key)))
    options: dict[str, Any] = {}
    if kind == "dinov2":
        hidden = state[f"{_NETWORK}.blocks.0.mlp.fc1.weight"].shape[0]
        gated = hidden == 2 * state[f"{_NETWORK}.blocks.0.mlp.fc2.weight"].shape[1]
        published, other = _DINOV2, "giant" if gated else "small"
    else:
        hidden = state[f"{_NETWORK}.blocks.0.mlp.fc2.weight"].shape[1]
        gated = f"{_NETWORK}.blocks.0.mlp.fc1_g.weight" in state
        published, other = _DINOV3, "small_plus" if gated else "small"
    size, expected_depth, expected_hidden = published.get((width, gated), (other, 0, 0))
    usual_heads = width // _HEAD_WIDTH if expected_depth else 0
    if expected_depth == 0:
        options["embed_dim"] = width
    if depth != expected_depth:
        options["depth"] = depth
    if (heads or max(1, width // _HEAD_WIDTH)) != usual_heads:
        options["num_heads"] = heads or max(1, width // _HEAD_WIDTH)
    if hidden != expected_hidden:
        options["mlp_ratio"] = (hidden + 0.5) / width  # which timm rounds down
    registers = state[f"{_NETWORK}.reg_token"].shape[1] if f"{_NETWORK}.reg_token" in state else 0
    if registers not in (0, _REGISTERS):
        options["reg_tokens" if kind == "dinov2" else "num_reg_tokens"] = registers
    if patch != _PATCHES[kind]:
        options["patch_size"] = patch
    if kind == "dinov2":
        name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
        image = patch * math.isqrt(state[f"{_NETWORK}.pos_embed"].shape[1])
        options |= {} if image == _IMAGE else {"img_size": image}
    else:
        name = f"vit_{size}_patch16_dinov3{'_qkvb' if f'{_NETWORK}.blocks.0.attn.q_bias' in state else ''}"
    if norm_eps is not None and norm_eps != _EPS[kind]:
        options["norm_eps"] = norm_eps
    return {"backbone": name, "backbone_options": options}


def published_base(backbone: str) -> str:
    """Return the Hub id of the DINOv3 that a model with this timm backbone was fine-tuned from."""
    match = re.match(r"vit_(\w+)_patch16_dinov3", backbone)
    sizes = {"small": "s", "small_plus": "splus", "base": "b", "large": "l", "huge_plus": "hplus"}
    return f"facebook/dinov3-vit{sizes.get(match[1] if match else '', '*')}16-pretrain-lvd1689m"
