"""Key map of Hugging Face transformers (`Mask2FormerForUniversalSegmentation`), releases 4.x and 5.x.

The backbone is its own Swin, its own ResNet, or any timm network. Its Swin stores query, key and value separately, but
its cross-attention stores them in one tensor.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from maskwright.checkpoints.key_maps.key_map import CLASS_WEIGHTS, NOT_PARAMETERS, NUM_BATCHES_TRACKED, Buffer, KeyMap

_BACKBONE = "model.pixel_level_module.encoder"
_PIXELS = "model.pixel_level_module.decoder"
_QUERIES = "model.transformer_module"
_ENCODER, _OUR_ENCODER = f"{_PIXELS}.encoder.layers.{{i}}", "pixel_decoder.layers.{i}"
_DECODER, _OUR_DECODER = f"{_QUERIES}.decoder.layers.{{i}}", "masked_decoder.layers.{i}"
_BLOCK, _OUR_BLOCK = f"{_BACKBONE}.encoder.layers.{{i}}.blocks.{{j}}", "backbone.stages.{i}.blocks.{j}"

_SWIN = (
    (f"{_BACKBONE}.embeddings.patch_embeddings.projection", "backbone.patch_embed.proj"),
    (f"{_BACKBONE}.embeddings.norm", "backbone.patch_embed.norm"),
    # timm merges patches at the start of a stage, transformers at the end of the previous one.
    *((f"{_BACKBONE}.encoder.layers.{i}.downsample", f"backbone.stages.{i + 1}.downsample") for i in range(3)),
    (f"{_BLOCK}.layernorm_before", f"{_OUR_BLOCK}.norm1"),
    (f"{_BLOCK}.layernorm_after", f"{_OUR_BLOCK}.norm2"),
    (f"{_BLOCK}.attention.self.relative_position_bias_table", f"{_OUR_BLOCK}.attn.relative_position_bias_table"),
    (f"{_BLOCK}.attention.output.dense", f"{_OUR_BLOCK}.attn.proj"),
    (f"{_BLOCK}.intermediate.dense", f"{_OUR_BLOCK}.mlp.fc1"),
    (f"{_BLOCK}.output.dense", f"{_OUR_BLOCK}.mlp.fc2"),
    *((f"{_BACKBONE}.hidden_states_norms.stage{i + 1}", f"backbone.norms.{i}") for i in range(4)),
    (f"{_BACKBONE}.swin.layernorm", "backbone.unused_norm"),
)
_RESNET = (
    (f"{_BACKBONE}.embedder.embedder.convolution", "backbone.network.conv1"),
    (f"{_BACKBONE}.embedder.embedder.normalization", "backbone.network.bn1"),
    *(
        (
            f"{_BACKBONE}.encoder.stages.{stage}.layers.{{i}}.{foreign}",
            f"backbone.network.layer{stage + 1}.{{i}}.{ours}",
        )
        for stage in range(4)
        for foreign, ours in (
            ("shortcut.convolution", "downsample.0"),
            ("shortcut.normalization", "downsample.1"),
            *((f"layer.{k}.convolution", f"conv{k + 1}") for k in range(3)),
            *((f"layer.{k}.normalization", f"bn{k + 1}") for k in range(3)),
        )
    ),
)
_TIMM = (f"{_BACKBONE}._backbone", "backbone.network")
_DECODERS = (
    (f"{_PIXELS}.input_projections.{{i}}.0", "pixel_decoder.input_projections.{i}.conv"),
    (f"{_PIXELS}.input_projections.{{i}}.1", "pixel_decoder.input_projections.{i}.norm"),
    (f"{_PIXELS}.level_embed", "pixel_decoder.level_embedding"),
    (f"{_ENCODER}.self_attn.sampling_offsets", f"{_OUR_ENCODER}.attention.offsets"),
    (f"{_ENCODER}.self_attn.attention_weights", f"{_OUR_ENCODER}.attention.weights"),
    (f"{_ENCODER}.self_attn.value_proj", f"{_OUR_ENCODER}.attention.value"),
    (f"{_ENCODER}.self_attn.output_proj", f"{_OUR_ENCODER}.attention.output"),
    (f"{_ENCODER}.self_attn_layer_norm", f"{_OUR_ENCODER}.attention_norm"),
    (f"{_ENCODER}.fc1", f"{_OUR_ENCODER}.feedforward.expand"),
    (f"{_ENCODER}.fc2", f"{_OUR_ENCODER}.feedforward.reduce"),
    (f"{_ENCODER}.final_layer_norm", f"{_OUR_ENCODER}.feedforward_norm"),
    (f"{_PIXELS}.mask_projection", "pixel_decoder.mask_projection"),
    (f"{_PIXELS}.adapter_1.0", "pixel_decoder.lateral.conv"),
    (f"{_PIXELS}.adapter_1.1", "pixel_decoder.lateral.norm"),
    (f"{_PIXELS}.layer_1.0", "pixel_decoder.smooth.conv"),
    (f"{_PIXELS}.layer_1.1", "pixel_decoder.smooth.norm"),
    (f"{_QUERIES}.queries_features", "masked_decoder.query_features"),
    (f"{_QUERIES}.queries_embedder", "masked_decoder.query_positions"),
    (f"{_QUERIES}.level_embed", "masked_decoder.level_embedding"),
    (f"{_DECODER}.cross_attn.out_proj", f"{_OUR_DECODER}.cross_attention.output"),
    (f"{_DECODER}.cross_attn_layer_norm", f"{_OUR_DECODER}.cross_norm"),
    (f"{_DECODER}.self_attn.q_proj", f"{_OUR_DECODER}.self_attention.query"),
    (f"{_DECODER}.self_attn.k_proj", f"{_OUR_DECODER}.self_attention.key"),
    (f"{_DECODER}.self_attn.v_proj", f"{_OUR_DECODER}.self_attention.value"),
    (f"{_DECODER}.self_attn.out_proj", f"{_OUR_DECODER}.self_attention.output"),
    (f"{_DECODER}.self_attn_layer_norm", f"{_OUR_DECODER}.self_norm"),
    (f"{_DECODER}.fc1", f"{_OUR_DECODER}.feedforward.expand"),
    (f"{_DECODER}.fc2", f"{_OUR_DECODER}.feedforward.reduce"),
    (f"{_DECODER}.final_layer_norm", f"{_OUR_DECODER}.feedforward_norm"),
    (f"{_QUERIES}.decoder.layernorm", "masked_decoder.norm"),
    ("class_predictor", "masked_decoder.class_head"),
    *(
        (f"{_QUERIES}.decoder.mask_predictor.mask_embedder.{i}.0", f"masked_decoder.mask_head.{2 * i}")
        for i in range(3)
    ),
)
_IN_BLOCK = r"(\.encoder\.layers\.\d+\.blocks\.\d+)"

TRANSFORMERS = KeyMap(
    name="transformers",
    signatures=("model.transformer_module.queries_embedder.weight",),
    prefixes=(*_SWIN, *_RESNET, _TIMM, *_DECODERS, CLASS_WEIGHTS),
    split_qkv=((f"{_DECODER}.cross_attn.in_proj_", f"{_OUR_DECODER}.cross_attention"),),
    fused_qkv=((f"{_BLOCK}.attention.self.{{part}}", ("query", "key", "value"), f"{_OUR_BLOCK}.attn.qkv"),),
    # Keys of `state_dict()` in 5.x; its `save_pretrained` still writes those of 4.x.
    renames=(
        (r"^(model\.pixel_level_module\.encoder)\.swin\.", r"\1."),
        (_IN_BLOCK + r"\.attention\.q_proj\.", r"\1.attention.self.query."),
        (_IN_BLOCK + r"\.attention\.k_proj\.", r"\1.attention.self.key."),
        (_IN_BLOCK + r"\.attention\.v_proj\.", r"\1.attention.self.value."),
        (_IN_BLOCK + r"\.attention\.o_proj\.", r"\1.attention.output.dense."),
        (_IN_BLOCK + r"\.attention\.relative_position_bias\.", r"\1.attention.self."),
        (_IN_BLOCK + r"\.mlp\.fc1\.", r"\1.intermediate.dense."),
        (_IN_BLOCK + r"\.mlp\.fc2\.", r"\1.output.dense."),
    ),
    dropped=(
        *NOT_PARAMETERS,
        (r"model\.pixel_level_module\.encoder\.layernorm\..*", "a norm that 5.x writes but never uses"),
    ),
    # 5.x warns if its unused norm is missing; 4.x computes the relative positions itself.
    buffers=(
        NUM_BATCHES_TRACKED,
        Buffer(r"backbone\.norms\.3\.weight", "backbone.unused_norm.weight", torch.ones_like),
        Buffer(r"backbone\.norms\.3\.bias", "backbone.unused_norm.bias", torch.zeros_like),
    ),
)
# For a timm backbone: transformers keeps timm's own names after one prefix.
TRANSFORMERS_TIMM = replace(TRANSFORMERS, prefixes=(_TIMM, *_DECODERS, CLASS_WEIGHTS))
