"""Read and write the `config.json` and `preprocessor_config.json` of transformers.

Only what cannot be inferred from the weights is read (attention heads, the name of a timm backbone, class names,
preprocessing), and models that compute something else than ours are refused. What transformers has no key for (things
and stuff, colors, thresholds) is written under "maskwright", which transformers keeps and ignores.
"""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from maskwright.checkpoints.infer_config import padded_setting, resnet_shape, swin_shape, windows_setting
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.config.schema import CategoryConfig, EvaluateConfig, ModelConfig, TrainConfig
from maskwright.config.text import decode_text
from maskwright.errors import CheckpointError, printable
from maskwright.structures.annotations import Category

logger = logging.getLogger(__name__)

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
_OUTER_PROCESSOR = "processor_config.json"
MAX_SIDE = 16_384  # of `evaluate.short_side`
POINTS = 4  # of the deformable attention, per level and head; no key changes it there
_SECTION = "maskwright"
_BILINEAR = 2
_RESAMPLING = {0: "0 (nearest)", 1: "1 (Lanczos)", 3: "3 (bicubic)", 4: "4 (box)", 5: "5 (Hamming)"}
_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "out_indices": [1, 2, 3, 4]}


@dataclass
class SourceSettings:
    """Settings of a model that are stored beside its weights; None where they are not.

    Attributes:
        heads: attention heads of both decoders, or of an EoMT's ViT.
        backbone: name of a timm network.
        norm_eps: of the layer norms of an EoMT's ViT.
        class_names: by the numbers that the source gives them, which may have gaps or start at 1.
        categories: the complete classes, if maskwright wrote the files.
        model: values of a `ModelConfig`.
        evaluate: values of an `EvaluateConfig`.
    """

    heads: int | None = None
    backbone: str | None = None
    norm_eps: float | None = None
    class_names: dict[int, str] | None = None
    categories: tuple[CategoryConfig, ...] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)


# Keys that change the computation but not the weights: (key, the only supported value).
_FIXED = (("activation_function", "relu"), ("pre_norm", False), ("common_stride", 4))
_FIXED_EOMT = {
    "eomt": (("hidden_act", "gelu"),),
    "eomt_dinov3": (
        ("hidden_act", "gelu"),
        ("use_gated_mlp", False),
        ("pos_embed_shift", None),
        ("pos_embed_jitter", None),
    ),
}
MODELS = ("mask2former", *_FIXED_EOMT)
_FIXED_BACKBONE = {
    "swin": (("hidden_act", "gelu"), ("layer_norm_eps", 1e-5), ("patch_size", 4)),
    "resnet": (("hidden_act", "relu"), ("downsample_in_bottleneck", False), ("downsample_in_first_stage", False)),
    "dinov2": (("hidden_act", "gelu"),),
    "dinov2_with_registers": (("hidden_act", "gelu"),),
    "dinov3_vit": (("rope_theta", 100.0),),
}
BACKBONES = tuple(_FIXED_BACKBONE)


def read_settings(folder: Path) -> SourceSettings:
    """Read the two files in the folder of a whole model.

    Raises:
        CheckpointError: a file is damaged, or describes an unsupported model.
    """
    path = folder / CONFIG
    config = read_json(path)
    if config.get("model_type") in _FIXED_EOMT:
        return _read_eomt_settings(folder, config)
    if config.get("model_type") != "mask2former":
        raise CheckpointError(
            f"has model_type '{printable(config.get('model_type'))}', expected one of {', '.join(MODELS)}", where=path
        )
    backbone = config.get("backbone_config")
    backbone = backbone if isinstance(backbone, dict) else {}
    kind = backbone.get("model_type")
    _check(path, config, (*_FIXED, ("feature_size", config.get("hidden_dim"))))
    _check(path, backbone, _FIXED_BACKBONE.get(kind, ()))
    heads = _read_heads(path, config)
    timm = backbone if kind == "timm_backbone" else config if config.get("use_timm_backbone") else {}
    names = _label_names(config)
    categories, evaluate = _maskwright_settings(path, config, names)
    processor = _read_processor(folder)
    if not processor:
        logger.warning(
            "%s: no %s; images are resized and normalized as those of published models", printable(folder), PROCESSOR
        )
    _warn_of_unsupported_steps(processor, folder / PROCESSOR)
    return SourceSettings(
        heads=heads,
        backbone=timm.get("backbone"),
        class_names=names,
        categories=categories,
        model=_normalization(processor, folder / PROCESSOR),
        evaluate=evaluate | _resizing(processor, folder / PROCESSOR, ours=bool(evaluate)),
    )


def _read_heads(path: Path, config: dict) -> int | None:
    heads = config.get("num_attention_heads")
    if heads is not None and not (isinstance(heads, int) and heads > 0):
        raise CheckpointError(f"num_attention_heads is {printable(heads)}, expected a positive integer", where=path)
    return heads


def _read_eomt_settings(folder: Path, config: dict) -> SourceSettings:
    """Read the settings of an EoMT; its evaluation settings follow from its image size and its processor."""
    path = folder / CONFIG
    _check(path, config, _FIXED_EOMT[config["model_type"]])
    rope = config.get("rope_parameters") or {}
    _check(path, rope if isinstance(rope, dict) else {}, (("rope_theta", 100.0), ("rope_type", "default")))
    eps = config.get("layer_norm_eps")
    if eps is not None and not (_is_number(eps) and 0 < eps < 1):
        raise CheckpointError(f"layer_norm_eps is {printable(eps)}, expected a number from 0 to 1", where=path)
    names = _label_names(config)
    categories, evaluate = _maskwright_settings(path, config, names)
    processor = _read_processor(folder)
    return SourceSettings(
        heads=_read_heads(path, config),
        norm_eps=eps,
        class_names=names,
        categories=categories,
        model=_normalization(processor, folder / PROCESSOR),
        evaluate=evaluate or _eomt_evaluate(config, processor, folder / PROCESSOR),
    )


def _eomt_evaluate(config: dict, processor: dict, path: Path) -> dict[str, Any]:
    """Return the sizes of an EoMT: windows if its processor splits images, else images padded to a square."""
    size = processor.get("size") or config.get("image_size")
    side = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
    if side is None:
        return {}
    if type(side) is not int or not 1 <= side <= MAX_SIDE:
        raise _bad_processor(path, "size", size, f"whole numbers from 1 to {MAX_SIDE}")
    windows = bool(processor.get("do_split_image"))
    setting = windows_setting(side) if windows else padded_setting("panoptic", side)
    keys = ["short_side", "max_side", "pad_size", "window_size", "window_stride", "semantic_resolution"]
    return {key: getattr(setting, key) for key in keys + ["task"] * windows}


def read_backbone_settings(folder: Path) -> SourceSettings:
    """Read the two files in the folder of a backbone that was trained on its own.

    Raises:
        CheckpointError: a file is damaged, or describes an unsupported network.
    """
    config = read_json(folder / CONFIG)
    _check(folder / CONFIG, config, _FIXED_BACKBONE.get(config.get("model_type"), ()))
    return SourceSettings(model=_normalization(_read_processor(folder), folder / PROCESSOR))


def read_json(path: Path) -> dict:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(decode_text(path.read_bytes(), str(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read as JSON: {error}", where=path) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}, expected an object", where=path)
    return content


def _read_processor(folder: Path) -> dict:
    """Return the settings of the image processor, which some models have inside those of a processor."""
    if (folder / PROCESSOR).is_file():
        return read_json(folder / PROCESSOR)
    if (folder / _OUTER_PROCESSOR).is_file():
        inner = read_json(folder / _OUTER_PROCESSOR).get("image_processor")
        if isinstance(inner, dict):
            return inner
    return {}


def _check(path: Path, values: dict, fixed: tuple[tuple[str, Any], ...]) -> None:
    """Refuse an unsupported value; a missing key counts as supported."""
    for key, expected in fixed:
        if (found := values.get(key, expected)) != expected:
            raise CheckpointError(f"{key} is {found!r}, but only {expected!r} is supported", where=path)


def _label_names(config: dict) -> dict[int, str] | None:
    """Return names by number, sorted; None if they are missing, only numbered, or not readable."""
    names = config.get("id2label") or {}
    try:
        numbered = {int(label): str(name) for label, name in names.items()}
    except (AttributeError, ValueError):
        return None
    if not numbered or all(re.fullmatch(r"LABEL_\d+", name) for name in numbered.values()):
        return None
    return dict(sorted(numbered.items()))


def _maskwright_settings(
    path: Path, config: dict, names: dict[int, str] | None
) -> tuple[tuple[CategoryConfig, ...] | None, dict[str, Any]]:
    """Return the classes and evaluation settings that maskwright wrote; no classes if the labels have changed since."""
    ours = config.get(_SECTION)
    if not isinstance(ours, dict):
        return None, {}
    try:
        categories = tuple(CategoryConfig.model_validate(category) for category in ours["categories"])
        evaluate = EvaluateConfig.model_validate(ours["evaluate"]).model_dump()
    except (KeyError, TypeError, ValidationError):
        raise CheckpointError(
            f"its section '{_SECTION}' is damaged", where=path, remedy="remove that section"
        ) from None
    same = names == dict(enumerate(category.name for category in categories))
    return categories if same else None, evaluate


def _normalization(processor: dict, path: Path) -> dict[str, Any]:
    """Return `pixel_mean` and `pixel_std` for pixels in 0..255."""
    unit = 1.0
    if processor.get("do_rescale", True):
        factor = processor.get("rescale_factor", 1 / 255)
        if not _is_number(factor) or not 1e-9 < factor < 1e9:
            raise _bad_processor(path, "rescale_factor", factor, "a number above 0, such as 1/255")
        unit = 1 / factor
    if not processor.get("do_normalize", True):
        return {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (unit, unit, unit)}
    values = {}
    for key, name in (("image_mean", "pixel_mean"), ("image_std", "pixel_std")):
        found = processor.get(key)
        if found is None:
            continue
        numbers = [found] * 3 if _is_number(found) else found
        if not isinstance(numbers, list) or len(numbers) != 3 or not all(map(_is_number, numbers)):
            raise _bad_processor(path, key, found, "3 finite numbers")
        scaled = tuple(round(value * unit, 4) for value in numbers)
        if not all(map(math.isfinite, scaled)) or (key == "image_std" and min(scaled) <= 0):
            raise _bad_processor(path, key, found, "3 finite numbers" + " above 0" * (key == "image_std"))
        values[name] = scaled
    return values


def _resizing(processor: dict, path: Path, *, ours: bool) -> dict[str, Any]:
    """Return the size of images; in files of ours (`ours`), `size_divisor` is only a hint for transformers."""
    if not processor:
        return {}
    sizes: dict[str, Any] = {"size": None, "short_side": None, "max_side": None}
    if not processor.get("do_resize", True):
        return sizes
    size = processor.get("size") or {"shortest_edge": 800, "longest_edge": 1333}  # the default of transformers
    if isinstance(size, int):  # releases before 4.26
        size = {"shortest_edge": size, "longest_edge": processor.get("max_size")}
    if not isinstance(size, dict):
        raise _bad_processor(path, "size", size, "height and width, or shortest_edge and longest_edge")
    known = {key: value for key, value in size.items() if value is not None}
    for key, value in known.items():
        limit = 10**9 if key == "longest_edge" else MAX_SIDE
        if type(value) is not int or not 1 <= value <= limit:
            raise _bad_processor(path, f"size.{key}", value, f"a whole number from 1 to {limit}")
    match sorted(known):
        case ["height", "width"]:
            sizes["size"] = (known["height"], known["width"])
        case ["shortest_edge"] | ["longest_edge", "shortest_edge"]:
            sizes |= {"short_side": known["shortest_edge"], "max_side": known.get("longest_edge")}
        case ["longest_edge"]:
            sizes["max_side"] = known["longest_edge"]
        case _:
            raise _bad_processor(path, "size", size, "height and width, or shortest_edge and longest_edge")
    if ours:
        return sizes
    divisor = processor.get("size_divisor", 32)
    if divisor is not None and (type(divisor) is not int or not 0 <= divisor <= 1024):
        raise _bad_processor(path, "size_divisor", divisor, "a whole number from 0 to 1024")
    return sizes | {"size_divisor": divisor or None}


def _warn_of_unsupported_steps(processor: dict, path: Path) -> None:
    """Name the steps of a processor that are not followed, since they change results."""
    resample = processor.get("resample")
    if processor.get("do_resize", True) and resample not in (None, _BILINEAR):
        name = _RESAMPLING.get(resample, str(resample)) if isinstance(resample, int) else str(resample)
        logger.warning("%s: resample %s is not supported; images are resized bilinearly", path, printable(name))
    if processor.get("pad_size") and processor.get("do_pad", True):
        logger.warning(
            "%s: pad_size %s is not supported; images are padded to multiples of size_divisor",
            path,
            printable(processor["pad_size"]),
        )
    if processor.get("do_center_crop"):
        logger.warning("%s: do_center_crop is not supported; whole images are segmented", path)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(cast(float, value)) < 1e9  # false for NaN


def _bad_processor(path: Path, key: str, found: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{key} is {printable(found)}, expected {expected}",
        where=path,
        remedy="correct it",
    )


def model_config(
    config: ModelConfig,
    backbone: dict[str, Any],
    categories: tuple[Category, ...],
    evaluate: EvaluateConfig,
    train: TrainConfig | None,
) -> dict[str, Any]:
    """Return the content of `config.json`; `backbone` is the result of one of the three functions below."""
    names = [category.name for category in categories]
    values = {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": backbone,
        "feature_size": config.hidden_dim,
        "mask_feature_size": config.mask_dim or config.hidden_dim,
        "hidden_dim": config.hidden_dim,
        "encoder_feedforward_dim": config.pixel_decoder_feedforward_dim,
        "encoder_layers": config.pixel_decoder_layers,
        "decoder_layers": config.masked_decoder_layers + 1,  # includes the prediction before the first layer
        "num_attention_heads": config.num_heads,
        "dim_feedforward": config.masked_decoder_feedforward_dim,
        "num_queries": config.num_queries,
        "activation_function": "relu",
        "pre_norm": False,
        "enforce_input_projection": False,
        "common_stride": 4,
        "feature_strides": [4, 8, 16, 32],
        "dropout": 0.0,
        "ignore_value": 255,
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
        _SECTION: {
            "categories": [asdict(category) for category in categories],
            "evaluate": evaluate.model_dump(),
        },
    }
    return values | (loss_values(train) if train else {})


def loss_values(train: TrainConfig) -> dict[str, Any]:
    """Return the settings of the loss."""
    return {
        "no_object_weight": train.no_object_weight,
        "class_weight": train.class_loss_weight,
        "mask_weight": train.mask_loss_weight,
        "dice_weight": train.dice_loss_weight,
        "train_num_points": train.num_points,
        "oversample_ratio": train.oversample_ratio,
        "importance_sample_ratio": train.importance_sample_ratio,
    }


def swin_config(state: State, config: ModelConfig) -> dict[str, Any]:
    """Return the `backbone_config` of a Swin, inferred from its weights."""
    shape = swin_shape(state)
    return {
        "model_type": "swin",
        "image_size": 224,
        "patch_size": 4,
        "num_channels": state["backbone.patch_embed.proj.weight"].shape[1],
        "embed_dim": shape.width,
        "depths": list(shape.depths),
        "num_heads": list(shape.heads),
        "window_size": shape.window,
        "mlp_ratio": shape.mlp_ratio,
        "qkv_bias": shape.qkv_bias,
        "drop_path_rate": config.drop_path_rate,
        **_STAGES,
    }


def resnet_config(state: State) -> dict[str, Any]:
    """Return the `backbone_config` of a plain ResNet, inferred from its weights."""
    shape = resnet_shape(state)
    return {
        "model_type": "resnet",
        "num_channels": state["backbone.network.conv1.weight"].shape[1],
        "embedding_size": state["backbone.network.conv1.weight"].shape[0],
        "hidden_sizes": list(shape.widths),
        "depths": list(shape.depths),
        "layer_type": "bottleneck" if shape.bottleneck else "basic",
        **_STAGES,
    }


def timm_config(config: ModelConfig, indices: list[int]) -> dict[str, Any]:
    """Return the `backbone_config` of another timm network; `indices` select its levels at strides 4, 8, 16 and 32."""
    return {
        "model_type": "timm_backbone",
        "backbone": config.backbone,
        "num_channels": len(config.pixel_mean),
        "features_only": True,
        "use_pretrained_backbone": False,
        "freeze_batch_norm_2d": False,  # releases 4.x cannot load frozen norms
        "out_indices": indices,
    }


def image_processor(config: ModelConfig, categories: tuple[Category, ...], evaluate: EvaluateConfig) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json`.

    If the class ids are 1..K, transformers is told to subtract one from label maps and to ignore 0. Any other ids have
    to be mapped by its user.
    """
    short_side = evaluate.short_side or 800
    size = {"shortest_edge": short_side, "longest_edge": evaluate.max_side or 100 * short_side}
    if evaluate.size:
        size = {"height": evaluate.size[0], "width": evaluate.size[1]}
    return {
        "image_processor_type": "Mask2FormerImageProcessor",
        "do_resize": evaluate.short_side is not None or evaluate.size is not None,
        "size": size,
        "size_divisor": evaluate.size_divisor or (1 if evaluate.size else 32),
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in config.pixel_mean],
        "image_std": [value / 255 for value in config.pixel_std],
        "ignore_index": 255,
        "do_reduce_labels": [category.id for category in categories] == list(range(1, len(categories) + 1)),
        "num_labels": len(categories),
    }
