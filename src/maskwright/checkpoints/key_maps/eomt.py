"""Key maps of EoMT: `tue-mps/eomt` (Lightning), and transformers' `EomtForUniversalSegmentation` and DINOv3 variant.

The original keeps timm's names for DINOv2, and transformers' for DINOv3.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from maskwright.checkpoints.key_maps.key_map import CLASS_WEIGHTS, NOT_PARAMETERS, Conversion, KeyMap, State
from maskwright.checkpoints.key_maps.vit import (
    DINOV2_EMBEDDINGS,
    DINOV3_BIASES,
    DINOV3_EMBEDDINGS,
    MASK_TOKEN,
    OUR_BLOCK,
    OURS,
    dinov2_block,
    dinov3_block,
    dinov3_qkv,
)

_ENCODER = "network.encoder.backbone"
_NETWORK = f"{_ENCODER}.blocks.{{i}}"
_ORIGINAL_HEAD = (
    ("network.q", "head.query_features"),
    ("network.class_head", "head.class_head"),
    ("network.mask_head", "head.mask_head"),
    ("network.upscale.{i}.conv1", "head.upscale.{i}.conv"),
    ("network.upscale.{i}.conv2", "head.upscale.{i}.depthwise"),
    ("network.upscale.{i}.norm", "head.upscale.{i}.norm"),
    ("network.attn_mask_probs", "mask_probabilities"),
    CLASS_WEIGHTS,
)
_DROPPED = (*NOT_PARAMETERS, MASK_TOKEN, (r"network\.encoder\.pixel_(mean|std)", "normalization, set by the recipe"))

ORIGINAL_DINOV2 = KeyMap(
    name="EoMT",
    signatures=(f"{_ENCODER}.blocks.0.attn.qkv.weight",),
    prefixes=(*_ORIGINAL_HEAD, (_ENCODER, OURS)),
    dropped=_DROPPED,
)


def _original_dinov3(signature: str, *, gated: bool) -> KeyMap:
    return KeyMap(
        name="EoMT with DINOv3",
        signatures=(signature,),
        prefixes=(
            (f"{_ENCODER}.patch_embed.cls_token", f"{OURS}.cls_token"),
            (f"{_ENCODER}.patch_embed.register_tokens", f"{OURS}.reg_token"),
            (f"{_ENCODER}.patch_embed.patch_embeddings", f"{OURS}.patch_embed.proj"),
            *dinov3_block(_NETWORK, gated=gated),
            (f"{_ENCODER}.norm", f"{OURS}.norm"),
            *_ORIGINAL_HEAD,
        ),
        fused_qkv=dinov3_qkv(_NETWORK),
        renames=DINOV3_BIASES,
        dropped=_DROPPED,
    )


ORIGINAL_DINOV3 = _original_dinov3(f"{_ENCODER}.blocks.0.attention.q_proj.weight", gated=False)
ORIGINAL_DINOV3_GATED = _original_dinov3(f"{_ENCODER}.blocks.0.mlp.gate_proj.weight", gated=True)

_LAYER = "layers.{i}"
_HEAD = (
    ("query", "head.query_features"),
    ("class_predictor", "head.class_head"),
    *((f"mask_head.fc{k + 1}", f"head.mask_head.{2 * k}") for k in range(3)),
    ("upscale_block.block.{i}.conv1", "head.upscale.{i}.conv"),
    ("upscale_block.block.{i}.conv2", "head.upscale.{i}.depthwise"),
    ("upscale_block.block.{i}.layernorm2d", "head.upscale.{i}.norm"),
    ("attn_mask_probs", "mask_probabilities"),
    CLASS_WEIGHTS,
)


def _add_batch(table: Tensor) -> Tensor:
    return table[None]


def _drop_batch(table: Tensor) -> Tensor:
    return table[0]


TRANSFORMERS_DINOV2 = KeyMap(
    name="transformers EoMT",
    signatures=("layers.0.attention.out_proj.weight",),
    prefixes=(
        *DINOV2_EMBEDDINGS,
        ("embeddings.position_embeddings.weight", f"{OURS}.pos_embed"),
        *dinov2_block(_LAYER),
        (f"{_LAYER}.mlp.down_proj", f"{OUR_BLOCK}.mlp.fc2"),
        (f"{_LAYER}.attention.out_proj", f"{OUR_BLOCK}.attn.proj"),
        ("layernorm", f"{OURS}.norm"),
        *_HEAD,
    ),
    fused_qkv=(
        *dinov3_qkv(_LAYER),
        (f"{_LAYER}.mlp.{{part}}", ("gate_proj", "up_proj"), f"{OUR_BLOCK}.mlp.fc1"),
    ),
    conversions=(Conversion(r"backbone\.network\.pos_embed", _add_batch, _drop_batch),),
    dropped=NOT_PARAMETERS,
)


TRANSFORMERS_DINOV3 = KeyMap(
    name="transformers EoMT with DINOv3",
    signatures=("layers.0.attention.o_proj.weight",),
    prefixes=(
        *DINOV3_EMBEDDINGS,
        *dinov3_block(_LAYER, gated=False),
        ("layernorm", f"{OURS}.norm"),
        *_HEAD,
    ),
    fused_qkv=dinov3_qkv(_LAYER),
    renames=DINOV3_BIASES,
    dropped=(*NOT_PARAMETERS, MASK_TOKEN),
)

# The first with a matching signature counts.
EOMT_KEY_MAPS = (
    ORIGINAL_DINOV2,
    ORIGINAL_DINOV3_GATED,
    ORIGINAL_DINOV3,
    TRANSFORMERS_DINOV2,
    TRANSFORMERS_DINOV3,
)


def is_delta(state: State) -> bool:
    """Return whether a file of the original has deltas from the weights that it was trained from.

    Then its constants are deltas as well, and therefore zero.
    """
    mean = state.get("network.encoder.pixel_mean")
    return mean is not None and not mean.any()


def plain_mlp(key_map: KeyMap) -> KeyMap:
    """Return the key map for writing a model whose MLPs have no gate: `fc1` is then not two layers in one."""
    return replace(key_map, fused_qkv=tuple(row for row in key_map.fused_qkv if "gate_proj" not in row[1]))
