"""Key maps of the plain ViTs of transformers, DINOv2 and DINOv3, alone or inside EoMT: their names to timm's.

timm stores query, key and value in one tensor, and the two input layers of DINOv2's SwiGLU as well.
"""

from __future__ import annotations

from maskwright.checkpoints.key_maps.key_map import KeyMap

OURS = "backbone.network"
OUR_BLOCK = f"{OURS}.blocks.{{i}}"
_PARTS = ("q_proj", "k_proj", "v_proj")

Rows = tuple[tuple[str, str], ...]


def dinov2_block(block: str) -> Rows:
    """Return the rows of a DINOv2 block whose names begin with `block`, but for query, key and value."""
    return (
        *((f"{block}.layer_scale{k}.lambda1", f"{OUR_BLOCK}.ls{k}.gamma") for k in (1, 2)),
        *((f"{block}.norm{k}", f"{OUR_BLOCK}.norm{k}") for k in (1, 2)),
        *((f"{block}.mlp.fc{k}", f"{OUR_BLOCK}.mlp.fc{k}") for k in (1, 2)),
        (f"{block}.mlp.weights_in", f"{OUR_BLOCK}.mlp.fc1"),
        (f"{block}.mlp.weights_out", f"{OUR_BLOCK}.mlp.fc2"),
    )


def dinov3_block(block: str, *, gated: bool) -> Rows:
    """Return the rows of a DINOv3 block, but for the matrices of query, key and value; `gated` of one with SwiGLU."""
    layers = {"gate_proj": "fc1_g", "up_proj": "fc1_x", "down_proj": "fc2"}
    if not gated:
        layers = {"up_proj": "fc1", "down_proj": "fc2"}
    return (
        *((f"{block}.layer_scale{k}.lambda1", f"{OUR_BLOCK}.gamma_{k}") for k in (1, 2)),
        *((f"{block}.norm{k}", f"{OUR_BLOCK}.norm{k}") for k in (1, 2)),
        *((f"{block}.attention.{k}_proj.bias", f"{OUR_BLOCK}.attn.{k}_bias") for k in "qv"),
        *((f"{block}.attention.{k}_bias", f"{OUR_BLOCK}.attn.{k}_bias") for k in "qv"),  # after DINOV3_BIASES
        (f"{block}.attention.o_proj", f"{OUR_BLOCK}.attn.proj"),
        *((f"{block}.mlp.{theirs}", f"{OUR_BLOCK}.mlp.{ours}") for theirs, ours in layers.items()),
    )


DINOV3_BIASES = ((r"\.attention\.([qv])_proj\.bias$", r".attention.\1_bias"),)  # timm's are not fused


def dinov3_qkv(block: str) -> tuple[tuple[str, tuple[str, ...], str], ...]:
    """Return the row of query, key and value of a block with DINOv3's names."""
    return ((f"{block}.attention.{{part}}", _PARTS, f"{OUR_BLOCK}.attn.qkv"),)


_TOKENS: Rows = (("embeddings.cls_token", f"{OURS}.cls_token"), ("embeddings.register_tokens", f"{OURS}.reg_token"))
DINOV2_EMBEDDINGS: Rows = (*_TOKENS, ("embeddings.patch_embeddings.projection", f"{OURS}.patch_embed.proj"))
DINOV3_EMBEDDINGS: Rows = (*_TOKENS, ("embeddings.patch_embeddings", f"{OURS}.patch_embed.proj"))

MASK_TOKEN = (r"(.*\.)?mask_token", "used only in pretraining")
DINOV2 = KeyMap(
    name="transformers DINOv2",
    signatures=("encoder.layer.0.layer_scale1.lambda1",),
    prefixes=(
        *DINOV2_EMBEDDINGS,
        ("embeddings.position_embeddings", f"{OURS}.pos_embed"),
        *dinov2_block("encoder.layer.{i}"),
        ("encoder.layer.{i}.attention.output.dense", f"{OUR_BLOCK}.attn.proj"),
        ("layernorm", f"{OURS}.norm"),
    ),
    fused_qkv=(
        ("encoder.layer.{i}.attention.attention.{part}", ("query", "key", "value"), f"{OUR_BLOCK}.attn.qkv"),
        ("encoder.layer.{i}.mlp.{part}", ("gate_proj", "up_proj"), f"{OUR_BLOCK}.mlp.fc1"),
    ),
    renames=(  # of `state_dict()` in 5.x; its `save_pretrained` still writes the names of 4.x
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.down_proj\.", ".mlp.weights_out."),
    ),
    dropped=(MASK_TOKEN,),
)
_LAYER = "layer.{i}"


def _dinov3(signature: str, *, gated: bool) -> KeyMap:
    return KeyMap(
        name="transformers DINOv3",
        signatures=(signature,),
        prefixes=(
            *DINOV3_EMBEDDINGS,
            *dinov3_block(_LAYER, gated=gated),
            ("norm", f"{OURS}.norm"),
        ),
        fused_qkv=dinov3_qkv(_LAYER),
        renames=(*DINOV3_BIASES, (r"^model\.layer\.", "layer.")),
        dropped=(MASK_TOKEN,),
    )


DINOV3 = _dinov3("embeddings.patch_embeddings.weight", gated=False)
DINOV3_GATED = _dinov3("layer.0.mlp.gate_proj.weight", gated=True)
