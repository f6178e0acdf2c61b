"""Key map of the original implementation (facebookresearch/Mask2Former on detectron2)."""

from __future__ import annotations

from maskwright.checkpoints.key_maps.key_map import CLASS_WEIGHTS, NOT_PARAMETERS, RELATIVE_POSITION_INDEX, KeyMap

_RESNET = (
    ("backbone.stem.conv1.norm", "backbone.network.bn1"),
    ("backbone.stem.conv1", "backbone.network.conv1"),
    *(
        (f"backbone.res{stage + 1}.{{i}}.{foreign}", f"backbone.network.layer{stage}.{{i}}.{ours}")
        for stage in (1, 2, 3, 4)
        for foreign, ours in (
            ("shortcut.norm", "downsample.1"),
            ("shortcut", "downsample.0"),
            ("conv{j}.norm", "bn{j}"),
            ("conv{j}", "conv{j}"),
        )
    ),
)
SWIN = (
    ("backbone.patch_embed", "backbone.patch_embed"),
    # timm merges patches at the start of a stage, the original at the end of the previous one.
    *((f"backbone.layers.{i}.downsample", f"backbone.stages.{i + 1}.downsample") for i in range(3)),
    ("backbone.layers.{i}.blocks.{j}", "backbone.stages.{i}.blocks.{j}"),
    ("backbone.norm{i}", "backbone.norms.{i}"),
)


def head_prefixes(head: str) -> tuple[tuple[str, str], ...]:
    """Return the rows of both decoders inside the module `head`."""
    pixels, queries = f"{head}.pixel_decoder", f"{head}.predictor"
    encoder, ours = f"{pixels}.transformer.encoder.layers.{{i}}", "pixel_decoder.layers.{i}"
    cross, alone, feedforward = (
        f"{queries}.transformer_{kind}_layers.{{i}}" for kind in ("cross_attention", "self_attention", "ffn")
    )
    layer = "masked_decoder.layers.{i}"
    return (
        (f"{pixels}.input_proj.{{i}}.0", "pixel_decoder.input_projections.{i}.conv"),
        (f"{pixels}.input_proj.{{i}}.1", "pixel_decoder.input_projections.{i}.norm"),
        (f"{pixels}.transformer.level_embed", "pixel_decoder.level_embedding"),
        (f"{encoder}.self_attn.sampling_offsets", f"{ours}.attention.offsets"),
        (f"{encoder}.self_attn.attention_weights", f"{ours}.attention.weights"),
        (f"{encoder}.self_attn.value_proj", f"{ours}.attention.value"),
        (f"{encoder}.self_attn.output_proj", f"{ours}.attention.output"),
        (f"{encoder}.norm1", f"{ours}.attention_norm"),
        (f"{encoder}.linear1", f"{ours}.feedforward.expand"),
        (f"{encoder}.linear2", f"{ours}.feedforward.reduce"),
        (f"{encoder}.norm2", f"{ours}.feedforward_norm"),
        (f"{pixels}.mask_features", "pixel_decoder.mask_projection"),
        (f"{pixels}.adapter_1.norm", "pixel_decoder.lateral.norm"),
        (f"{pixels}.adapter_1", "pixel_decoder.lateral.conv"),
        (f"{pixels}.layer_1.norm", "pixel_decoder.smooth.norm"),
        (f"{pixels}.layer_1", "pixel_decoder.smooth.conv"),
        (f"{queries}.query_feat", "masked_decoder.query_features"),
        (f"{queries}.query_embed", "masked_decoder.query_positions"),
        (f"{queries}.level_embed", "masked_decoder.level_embedding"),
        (f"{cross}.multihead_attn.out_proj", f"{layer}.cross_attention.output"),
        (f"{cross}.norm", f"{layer}.cross_norm"),
        (f"{alone}.self_attn.out_proj", f"{layer}.self_attention.output"),
        (f"{alone}.norm", f"{layer}.self_norm"),
        (f"{feedforward}.linear1", f"{layer}.feedforward.expand"),
        (f"{feedforward}.linear2", f"{layer}.feedforward.reduce"),
        (f"{feedforward}.norm", f"{layer}.feedforward_norm"),
        (f"{queries}.decoder_norm", "masked_decoder.norm"),
        (f"{queries}.class_embed", "masked_decoder.class_head"),
        *((f"{queries}.mask_embed.layers.{i}", f"masked_decoder.mask_head.{2 * i}") for i in range(3)),
    )


def head_qkv(head: str) -> tuple[tuple[str, str], ...]:
    """Return the rows of the masked decoder's query, key and value weights inside the module `head`."""
    layers, ours = f"{head}.predictor.transformer", "masked_decoder.layers.{i}"
    return (
        (f"{layers}_cross_attention_layers.{{i}}.multihead_attn.in_proj_", f"{ours}.cross_attention"),
        (f"{layers}_self_attention_layers.{{i}}.self_attn.in_proj_", f"{ours}.self_attention"),
    )


DETECTRON2 = KeyMap(
    name="detectron2",
    signatures=("sem_seg_head.predictor.query_embed.weight",),
    prefixes=(*_RESNET, *SWIN, *head_prefixes("sem_seg_head"), CLASS_WEIGHTS),
    split_qkv=head_qkv("sem_seg_head"),
    # Keys of the first releases, which the original's own `_load_from_state_dict` hooks rename as well.
    renames=(
        (r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", "sem_seg_head.pixel_decoder."),
        (r"static_query", "query_feat"),
    ),
    dropped=NOT_PARAMETERS,
    buffers=(RELATIVE_POSITION_INDEX,),
)
