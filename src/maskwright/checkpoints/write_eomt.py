"""Write EoMT checkpoints for the original (`tue-mps/eomt`) and for transformers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from maskwright.checkpoints.checkpoint import Checkpoint
from maskwright.checkpoints.key_maps.eomt import (
    ORIGINAL_DINOV2,
    ORIGINAL_DINOV3,
    ORIGINAL_DINOV3_GATED,
    TRANSFORMERS_DINOV2,
    TRANSFORMERS_DINOV3,
    plain_mlp,
)
from maskwright.checkpoints.key_maps.key_map import KeyMap
from maskwright.checkpoints.transformers_config import CONFIG, PROCESSOR, image_processor, loss_values
from maskwright.checkpoints.write_foreign import foreign_state, save_torch, write_transformers_folder
from maskwright.errors import CheckpointError
from maskwright.models import build_model
from maskwright.runtime.atomic_write import write_file_atomically

if TYPE_CHECKING:
    from maskwright.models.backbones.vit import VitBackbone

_DEFAULT_SIDE = 640


def write_eomt(path: Path, checkpoint: Checkpoint) -> None:
    """Write a file that `main.py --model.ckpt_path` of the original reads, with complete weights.

    Args:
        path: a `.bin` or `.pth` file.
        checkpoint: an EoMT with a DINOv2, or with a DINOv3 with biases.

    Raises:
        CheckpointError: the original cannot express the model.
    """
    _check_family(checkpoint, "the original EoMT")
    if _is_dinov2(checkpoint):
        key_map = ORIGINAL_DINOV2
    else:
        _check_biases(checkpoint, "the original EoMT")
        gated = "backbone.network.blocks.0.mlp.fc1_g.weight" in checkpoint.state
        key_map = ORIGINAL_DINOV3_GATED if gated else ORIGINAL_DINOV3
    weights = foreign_state(checkpoint, key_map)
    for name in ("mean", "std"):
        values = torch.tensor(getattr(checkpoint.config, f"pixel_{name}")) / 255
        weights[f"network.encoder.pixel_{name}"] = values.reshape(1, -1, 1, 1)
    content = {"state_dict": weights}
    write_file_atomically(path, lambda temporary: save_torch(content, temporary))


def write_eomt_transformers(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a folder for `EomtForUniversalSegmentation` or `EomtDinov3ForUniversalSegmentation` of transformers.

    Args:
        folder: absent or empty.
        checkpoint: an EoMT with a DINOv2 with registers, or with a DINOv3 with biases and plain MLPs.

    Raises:
        CheckpointError: transformers cannot express the model.
    """
    _check_family(checkpoint, "transformers")
    with torch.device("meta"):
        backbone = cast("VitBackbone", build_model(checkpoint.config, checkpoint.categories).backbone)
    key_map, values = _dinov2(checkpoint, backbone) if _is_dinov2(checkpoint) else _dinov3(checkpoint, backbone)
    config = _common(checkpoint, backbone) | values
    processor = _processor(checkpoint)
    weights = {key: tensor.contiguous() for key, tensor in foreign_state(checkpoint, key_map).items()}
    write_transformers_folder(folder, weights, {CONFIG: config, PROCESSOR: processor})


def _check_family(checkpoint: Checkpoint, target: str) -> None:
    if checkpoint.config.family != "eomt" or not ({"gamma_1", "ls1.gamma"} & _block_names(checkpoint)):
        raise CheckpointError(
            f"{target} cannot express family {checkpoint.config.family} with {checkpoint.config.backbone}: it has only "
            "EoMT with a DINOv2 or DINOv3"
        )


def _block_names(checkpoint: Checkpoint) -> set[str]:
    start = "backbone.network.blocks.0."
    return {key.removeprefix(start) for key in checkpoint.state if key.startswith(start)}


def _is_dinov2(checkpoint: Checkpoint) -> bool:
    return "ls1.gamma" in _block_names(checkpoint)


def _check_biases(checkpoint: Checkpoint, target: str) -> None:
    if "attn.q_bias" not in _block_names(checkpoint):
        raise CheckpointError(
            f"{target} cannot express {checkpoint.config.backbone}: its DINOv3 has biases of queries and values",
            remedy="train with a backbone whose name ends in _qkvb",
        )


def _dinov2(checkpoint: Checkpoint, backbone: VitBackbone) -> tuple[KeyMap, dict[str, Any]]:
    if backbone.network.reg_token is None:
        raise CheckpointError(f"transformers cannot express {checkpoint.config.backbone}: its EoMT has register tokens")
    width, mlp = backbone.width, cast(Any, backbone.blocks[0]).mlp
    gated = mlp.fc1.out_features == 2 * mlp.fc2.in_features
    usual = (4 * width * 2 // 3 + 7) // 8 * 8 if gated else 4 * width
    ratio, rest = (4, 0) if mlp.fc2.in_features == usual else divmod(mlp.fc2.in_features, width)
    if rest or (gated and mlp.fc2.in_features != usual):
        raise CheckpointError(f"transformers cannot express MLPs with {mlp.fc2.in_features} hidden channels")
    key_map = TRANSFORMERS_DINOV2 if gated else plain_mlp(TRANSFORMERS_DINOV2)
    rows, columns = backbone.network.patch_embed.grid_size
    if rows != columns:
        raise CheckpointError(f"transformers cannot express a position table of {rows}x{columns} patches: it is square")
    return key_map, {
        "architectures": ["EomtForUniversalSegmentation"],
        "model_type": "eomt",
        "image_size": rows * backbone.patch_size,
        "mlp_ratio": ratio,
        "use_swiglu_ffn": gated,
    }


def _dinov3(checkpoint: Checkpoint, backbone: VitBackbone) -> tuple[KeyMap, dict[str, Any]]:
    _check_biases(checkpoint, "transformers")
    mlp = cast(Any, backbone.blocks[0]).mlp
    if hasattr(mlp, "fc1_g"):
        raise CheckpointError(
            f"transformers cannot express {checkpoint.config.backbone}: with gated MLPs its heads would also have "
            "another activation"
        )
    evaluate = checkpoint.evaluate
    size = evaluate.pad_size or evaluate.window_size or evaluate.size or (_DEFAULT_SIDE, _DEFAULT_SIDE)
    return TRANSFORMERS_DINOV3, {
        "architectures": ["EomtDinov3ForUniversalSegmentation"],
        "model_type": "eomt_dinov3",
        "image_size": size[0],
        "intermediate_size": mlp.fc1.out_features,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "pos_embed_rescale": checkpoint.config.backbone_options.get("rope_rescale_coords"),
    }


def _common(checkpoint: Checkpoint, backbone: VitBackbone) -> dict[str, Any]:
    config, network = checkpoint.config, backbone.network
    names = [category.name for category in checkpoint.categories]
    values: dict[str, Any] = {
        "hidden_size": backbone.width,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": cast(Any, backbone.blocks[0]).attn.num_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": cast(Any, network.norm).eps,
        "patch_size": backbone.patch_size,
        "num_channels": len(config.pixel_mean),
        "num_register_tokens": 0 if network.reg_token is None else network.reg_token.shape[1],
        "drop_path_rate": 0.0,
        "num_upscale_blocks": sum(key.endswith("depthwise.weight") for key in checkpoint.state),
        "num_blocks": config.query_blocks,
        "num_queries": config.num_queries,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        "maskwright": {
            "categories": [asdict(category) for category in checkpoint.categories],
            "evaluate": checkpoint.evaluate.model_dump(),
        },
    }
    return values | (loss_values(checkpoint.recipe.train) if checkpoint.recipe else {})


def _processor(checkpoint: Checkpoint) -> dict[str, Any]:
    evaluate = checkpoint.evaluate
    values = image_processor(checkpoint.config, checkpoint.categories, evaluate)
    side = (evaluate.pad_size or evaluate.window_size or (_DEFAULT_SIDE,))[0]
    size = {"shortest_edge": side, "longest_edge": None if evaluate.window_size else side}
    kept = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample")
    return {
        "image_processor_type": "EomtImageProcessor",
        "do_resize": True,
        "size": size,
        "do_split_image": evaluate.window_size is not None,
        "do_pad": evaluate.window_size is None,
        **{key: values[key] for key in kept},
    }
