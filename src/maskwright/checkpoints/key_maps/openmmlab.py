"""Key map of OpenMMLab: mmdetection (`panoptic_head.`) and mmsegmentation (`decode_head.`), releases 2.x and 3.x.

Their Swin gathers the four neighbors of a patch with `unfold`, so the merged channels are in another order.
"""

from __future__ import annotations

from torch import Tensor

from maskwright.checkpoints.key_maps.key_map import (
    NOT_PARAMETERS,
    NUM_BATCHES_TRACKED,
    RELATIVE_POSITION_INDEX,
    Conversion,
    KeyMap,
    torchvision_resnet,
)

_HEAD = "panoptic_head"
_PIXELS, _ENCODER = f"{_HEAD}.pixel_decoder", f"{_HEAD}.pixel_decoder.encoder.layers.{{i}}"
_DECODER = f"{_HEAD}.transformer_decoder.layers.{{i}}"
_OUR_ENCODER, _OUR_DECODER = "pixel_decoder.layers.{i}", "masked_decoder.layers.{i}"
_BLOCK, _OUR_BLOCK = "backbone.stages.{i}.blocks.{j}", "backbone.stages.{i}.blocks.{j}"

_SWIN = (
    ("backbone.patch_embed.projection", "backbone.patch_embed.proj"),
    ("backbone.patch_embed.norm", "backbone.patch_embed.norm"),
    # timm merges patches at the start of a stage, OpenMMLab at the end of the previous one.
    *((f"backbone.stages.{i}.downsample", f"backbone.stages.{i + 1}.downsample") for i in range(3)),
    (f"{_BLOCK}.norm1", f"{_OUR_BLOCK}.norm1"),
    (f"{_BLOCK}.norm2", f"{_OUR_BLOCK}.norm2"),
    (f"{_BLOCK}.attn.w_msa", f"{_OUR_BLOCK}.attn"),
    (f"{_BLOCK}.ffn.layers.0.0", f"{_OUR_BLOCK}.mlp.fc1"),
    (f"{_BLOCK}.ffn.layers.1", f"{_OUR_BLOCK}.mlp.fc2"),
    ("backbone.norm{i}", "backbone.norms.{i}"),
)
_DECODERS = (
    (f"{_PIXELS}.input_convs.{{i}}.conv", "pixel_decoder.input_projections.{i}.conv"),
    (f"{_PIXELS}.input_convs.{{i}}.gn", "pixel_decoder.input_projections.{i}.norm"),
    (f"{_PIXELS}.level_encoding.weight", "pixel_decoder.level_embedding"),
    (f"{_ENCODER}.self_attn.sampling_offsets", f"{_OUR_ENCODER}.attention.offsets"),
    (f"{_ENCODER}.self_attn.attention_weights", f"{_OUR_ENCODER}.attention.weights"),
    (f"{_ENCODER}.self_attn.value_proj", f"{_OUR_ENCODER}.attention.value"),
    (f"{_ENCODER}.self_attn.output_proj", f"{_OUR_ENCODER}.attention.output"),
    (f"{_ENCODER}.norms.0", f"{_OUR_ENCODER}.attention_norm"),
    (f"{_ENCODER}.ffn.layers.0.0", f"{_OUR_ENCODER}.feedforward.expand"),
    (f"{_ENCODER}.ffn.layers.1", f"{_OUR_ENCODER}.feedforward.reduce"),
    (f"{_ENCODER}.norms.1", f"{_OUR_ENCODER}.feedforward_norm"),
    (f"{_PIXELS}.lateral_convs.0.conv", "pixel_decoder.lateral.conv"),
    (f"{_PIXELS}.lateral_convs.0.gn", "pixel_decoder.lateral.norm"),
    (f"{_PIXELS}.output_convs.0.conv", "pixel_decoder.smooth.conv"),
    (f"{_PIXELS}.output_convs.0.gn", "pixel_decoder.smooth.norm"),
    (f"{_PIXELS}.mask_feature", "pixel_decoder.mask_projection"),
    (f"{_HEAD}.query_feat", "masked_decoder.query_features"),
    (f"{_HEAD}.query_embed", "masked_decoder.query_positions"),
    (f"{_HEAD}.level_embed", "masked_decoder.level_embedding"),
    (f"{_DECODER}.cross_attn.attn.out_proj", f"{_OUR_DECODER}.cross_attention.output"),
    (f"{_DECODER}.norms.0", f"{_OUR_DECODER}.cross_norm"),
    (f"{_DECODER}.self_attn.attn.out_proj", f"{_OUR_DECODER}.self_attention.output"),
    (f"{_DECODER}.norms.1", f"{_OUR_DECODER}.self_norm"),
    (f"{_DECODER}.ffn.layers.0.0", f"{_OUR_DECODER}.feedforward.expand"),
    (f"{_DECODER}.ffn.layers.1", f"{_OUR_DECODER}.feedforward.reduce"),
    (f"{_DECODER}.norms.2", f"{_OUR_DECODER}.feedforward_norm"),
    (f"{_HEAD}.transformer_decoder.post_norm", "masked_decoder.norm"),
    (f"{_HEAD}.cls_embed", "masked_decoder.class_head"),
    (f"{_HEAD}.mask_embed", "masked_decoder.mask_head"),
)


def unfolded_to_concatenated(merged: Tensor) -> Tensor:
    """Reorder (..., 4C) from channel-major, neighbors in reading order, to neighbor-major, column by column."""
    channels = merged.shape[-1] // 4
    return merged.unflatten(-1, (channels, 2, 2)).movedim(-3, -1).transpose(-3, -2).flatten(-3).contiguous()


def concatenated_to_unfolded(merged: Tensor) -> Tensor:
    """The inverse of `unfolded_to_concatenated`."""
    channels = merged.shape[-1] // 4
    return merged.unflatten(-1, (2, 2, channels)).transpose(-3, -2).movedim(-1, -3).flatten(-3).contiguous()


OPENMMLAB = KeyMap(
    name="openmmlab",
    signatures=("panoptic_head.query_feat.weight", "decode_head.query_feat.weight"),
    prefixes=(*torchvision_resnet("backbone"), *_SWIN, *_DECODERS),
    split_qkv=(
        (f"{_DECODER}.cross_attn.attn.in_proj_", f"{_OUR_DECODER}.cross_attention"),
        (f"{_DECODER}.self_attn.attn.in_proj_", f"{_OUR_DECODER}.self_attention"),
    ),
    renames=(
        (r"^decode_head\.", "panoptic_head."),
        # Releases before mmdetection 3.0 number the attention modules of a layer.
        (r"(pixel_decoder\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
        (r"(transformer_decoder\.layers\.\d+)\.attentions\.0\.", r"\1.cross_attn."),
        (r"(transformer_decoder\.layers\.\d+)\.attentions\.1\.", r"\1.self_attn."),
        (r"\.ffns\.0\.", ".ffn."),
    ),
    conversions=(
        Conversion(
            r"backbone\.stages\.\d+\.downsample\.(norm\.(weight|bias)|reduction\.weight)",
            unfolded_to_concatenated,
            concatenated_to_unfolded,
        ),
    ),
    dropped=(
        *NOT_PARAMETERS,
        (r"backbone\..*\.num_batches_tracked", "a step counter of norms that are frozen there"),
        (r"data_preprocessor\..*", "normalization constants, set by the recipe"),
        (r"ema_.*", "a second, averaged copy of the weights"),
    ),
    buffers=(RELATIVE_POSITION_INDEX, NUM_BATCHES_TRACKED),
)
