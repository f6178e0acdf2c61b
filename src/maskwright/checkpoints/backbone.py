"""Load weights of only the backbone: from timm, torchvision, detectron2, the official Swin, an installed package, or a
whole checkpoint.

Files are recognized by their keys. For weights trained on BGR images or another scale, the first convolution is
converted instead of the input, which gives the same features from the recipe's RGB images.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
import yaml

from maskwright.checkpoints.checkpoint import Checkpoint
from maskwright.checkpoints.compare_weights import describe_mismatch
from maskwright.checkpoints.key_maps.backbones import (
    BACKBONE_KEY_MAPS,
    CAFFE2,
    CAFFE2_FOLDED,
    DETECTRON2_RESNET,
    BackboneKeyMap,
    Normalization,
)
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.key_maps.translate import find_key_map, translate
from maskwright.checkpoints.load import read_checkpoint
from maskwright.checkpoints.sources import is_hub_id, read_backbone_source
from maskwright.checkpoints.weight_packages import find_package_weights, is_package_source, weight_packages
from maskwright.checkpoints.zoo import cache_folder, published_models
from maskwright.config.schema import ModelConfig
from maskwright.errors import CheckpointError, printable_list
from maskwright.models import build_model
from maskwright.models.segmenter import Segmenter

_DERIVED = r"(.*\.)?(attn_mask|relative_position_index|num_batches_tracked)"  # not parameters, and not in every release
_ADDED = r"(backbone\.(?:norms|semantic_layers|neck))\..*"  # not part of a backbone that was trained on its own
_RESNET_FIRST_CONVOLUTION = "backbone.network.conv1.weight"
_EPSILON = 1e-5  # that a batch norm adds to its variance
_NORMALIZATION_TOLERANCE = 0.01  # for pixels in 0..255


@dataclass
class BackboneWeights:
    """Weights of a backbone in our names.

    Attributes:
        state: our names, with the prefix `backbone.`, to tensors.
        origin: where they come from, for messages.
        normalization: the input that they were trained on, if known.
        folded_norms: the statistics of batch norms are folded into their scale and shift.
    """

    state: State
    origin: str
    normalization: Normalization | None = None
    folded_norms: bool = False


def load_backbone_weights(model: Segmenter) -> list[str]:
    """Load the weights that `config.backbone_weights` names into the backbone; None changes nothing.

    Returns:
        One line for each decision.

    Raises:
        CheckpointError: the weights are not available (the message says which file to put where), or do not fit.
    """
    config = model.config
    if config.backbone_weights is None:
        return []
    try:
        weights = _find(model)
        expected = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("backbone.")}
        state = {key: tensor for key, tensor in weights.state.items() if not re.fullmatch(_DERIVED, key)}
        lines = [f"model.backbone_weights: {weights.origin}"]
        if weights.folded_norms:
            lines += _unfold_norms(state, config)
        lines += resize_position_tables(state, expected)
        lines += fit_plain_vit(state, model)
        lines += inflate_first_convolution(state, expected, weights.normalization)
        needed = {key: tensor for key, tensor in expected.items() if key in state or not _is_optional(key)}
        if mismatch := describe_mismatch(needed, state):
            raise CheckpointError(f"{weights.origin} does not fit '{config.backbone}'; {mismatch}")
        if new := {match[1] for key in expected.keys() - state.keys() if (match := re.fullmatch(_ADDED, key))}:
            lines.append(f"not in the weights, so initialized as in a new model: {printable_list(new)}")
        lines += _fit_normalization(state, weights.normalization, config)
    except CheckpointError as error:
        raise error.located_in("model.backbone_weights") from None
    model.load_state_dict(state, strict=False)
    return lines


def resize_position_tables(state: State, expected: State) -> list[str]:
    """Resize the relative position tables of a Swin to another window, in place, by bicubic interpolation.

    This follows mmsegmentation and the official code (`mmcv_custom/checkpoint.py`); timm interpolates differently.

    Returns:
        One line if a table was resized.
    """
    resized, windows = 0, ""
    for key, wanted in expected.items():
        table = state.get(key)  # (side * side, heads) with side = 2 * window - 1
        if table is None or not key.endswith(".relative_position_bias_table") or table.shape == wanted.shape:
            continue
        old, new = math.isqrt(len(table)), math.isqrt(len(wanted))
        if table.shape[1] != wanted.shape[1] or old * old != len(table):
            continue  # of another width, which is reported later
        square = table.T.unflatten(1, (old, old))[None].float()
        square = F.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
        state[key] = square[0].flatten(1).T.to(table.dtype)
        resized, windows = resized + 1, f"from window {(old + 1) // 2} to {(new + 1) // 2}"
    return [f"relative position tables of {resized} blocks resized bicubically {windows}"] if resized else []


def fit_plain_vit(state: State, model: Segmenter) -> list[str]:
    """Fit the weights of a plain ViT to the model's image and patch size, in place; see `timm_weights.fit_vit`."""
    if "backbone.network.patch_embed.proj.weight" not in model.state_dict():
        return []
    from maskwright.checkpoints.timm_weights import fit_vit  # imports timm
    from maskwright.models.backbones.vit import VitBackbone

    return fit_vit(state, model.backbone) if isinstance(model.backbone, VitBackbone) else []


def add_base(checkpoint: Checkpoint, source: str) -> list[str]:
    """Add the weights of a backbone to a checkpoint that stores deltas from them, in place; see `is_delta`.

    Args:
        checkpoint: read with `allow_delta`.
        source: weights as `model.backbone_weights` names them.

    Returns:
        One line for each decision.

    Raises:
        CheckpointError: there is nothing to add to, or the base cannot be read or does not fit.
    """
    if not checkpoint.delta:
        raise CheckpointError("its weights are complete, not deltas from a base", remedy="leave out --base")
    config = checkpoint.config.model_copy(update={"backbone_weights": source})
    model = build_model(config, checkpoint.categories)
    try:
        lines = load_backbone_weights(model)
    except CheckpointError as error:
        raise CheckpointError(error.found, where="--base", remedy=error.remedy) from None
    for key, tensor in model.state_dict().items():
        if key.startswith("backbone."):
            checkpoint.state[key] = checkpoint.state[key] + tensor
    checkpoint.state["mask_probabilities"] = torch.zeros(checkpoint.config.query_blocks)  # as after training
    checkpoint.delta = False
    checkpoint.provenance["base"] = source
    return lines


def _find(model: Segmenter) -> BackboneWeights:
    source = str(model.config.backbone_weights)
    if source == "timm":
        return _timm_weights(model.config.backbone, model)
    if is_package_source(source):
        path, origin = find_package_weights(source)
        return replace(_read(path, model), origin=origin)
    for path in (Path(source).expanduser(), cache_folder() / source):
        if path.exists():
            return _read(path, model)
    if source in published_models():
        return _in_checkpoint(source)
    from maskwright.checkpoints.timm_weights import timm_name, timm_names  # imports timm

    if name := timm_name(source):
        return _timm_weights(name, model)
    if address := _upstream_files().get(source):
        raise CheckpointError(f"no file {cache_folder() / source}", remedy=f"download {address} to that path")
    if is_hub_id(source):
        return _read(source, model)
    near = difflib.get_close_matches(source, [*weight_packages(), *_upstream_files(), *timm_names()], 3, 0.5)
    raise CheckpointError(
        f"no file {source}, neither here nor in {cache_folder()}, and no weights of that name",
        remedy=f"nearest known: {', '.join(near)}" if near else "check the path",
    )


@cache
def _upstream_files() -> dict[str, str]:
    """Return the addresses of the files that others publish, by name."""
    values = yaml.safe_load((resources.files("maskwright.checkpoints") / "backbones.yaml").read_text("utf-8"))
    return {entry["name"]: entry["address"] for entry in values["files"]}


def _timm_weights(name: str, model: Segmenter) -> BackboneWeights:
    """Load weights that timm publishes, from the cache folder, else from timm's own caches or the network."""
    from maskwright.checkpoints.timm_weights import download, timm_config  # imports timm

    known = timm_config(name)
    name = f"{known.architecture}.{known.tag}" if known.tag else str(known.architecture)
    places = {f"{name}.safetensors": f"https://huggingface.co/timm/{name}/resolve/main/model.safetensors"}
    if isinstance(known.url, str) and known.url:
        places[PurePosixPath(known.url).name] = known.url
    mean, std = (tuple(round(255 * value, 4) for value in values) for values in (known.mean, known.std))
    for place in places:
        if (path := cache_folder() / place).is_file():
            return replace(_read(path, model), origin=f"{name} from {path}", normalization=Normalization(mean, std))
    try:
        state = download(name)
    except Exception as error:  # the Hub's client raises many types
        place, address = list(places.items())[-1]
        raise CheckpointError(
            f"the weights of '{name}' are not in the cache, and downloading them failed ({type(error).__name__})",
            remedy=f"download {address} to {cache_folder() / place}",
        ) from None
    return BackboneWeights(_rename_timm(state, model), f"{name} from timm", Normalization(mean, std))


def _read(source: str | Path, model: Segmenter) -> BackboneWeights:
    """Read the backbone in a file, folder or Hub model of any known layout."""
    found = read_backbone_source(source)
    path, state = found.path, found.weights.state
    if found.weights.header.get("format", "").startswith("maskwright-") or find_key_map(state):
        return _in_checkpoint(str(path))
    renamed = _rename_timm(state, model)
    backbone_map = next((each for each in BACKBONE_KEY_MAPS if find_key_map(state, [each.key_map])), None)
    expected = (f"backbone.{key}" for key in model.backbone.state_dict())
    if backbone_map is None or all(key in renamed or _is_optional(key) for key in expected):
        return BackboneWeights(renamed, str(path))
    weights = _translate(path, state, backbone_map)
    settings = found.settings.model
    if {"pixel_mean", "pixel_std"} <= settings.keys():
        weights = replace(weights, normalization=Normalization(settings["pixel_mean"], settings["pixel_std"]))
    return weights


def _is_optional(key: str) -> bool:
    return re.fullmatch(f"{_DERIVED}|{_ADDED}", key) is not None


def _rename_timm(weights: State, model: Segmenter) -> State:
    """Rename the weights of a whole timm network; its classifier is dropped, and keys unknown to timm are kept."""
    from maskwright.checkpoints.timm_weights import expected_names  # imports timm

    whole = expected_names(model.config.backbone, model.config.backbone_options)
    ours = model.backbone.state_dict()
    renamed = {}
    for key, tensor in weights.items():
        key = key.removeprefix("module.")
        # timm calls Swin's stages `layers`, and its feature extraction merges the first two parts of some names.
        names = (re.sub(r"^layers\.", "stages.", key), f"network.{key}", f"network.{key.replace('.', '_', 1)}")
        ours_name = next((name for name in names if name in ours), None)
        if ours_name or key not in whole:
            renamed[f"backbone.{ours_name or key}"] = tensor
    return renamed


def _translate(path: Path, state: State, backbone_map: BackboneKeyMap) -> BackboneWeights:
    key_map = backbone_map.key_map
    if key_map is DETECTRON2_RESNET and "stem.conv1.weight" not in state:
        raise CheckpointError(
            "a whole detectron2 detector, which does not record whether its images are RGB or BGR",
            where=path,
            remedy="name the weights that it was trained from",
        )
    try:
        ours = translate(state, key_map).state
    except CheckpointError as error:
        raise error.located_in(path) from None
    if key_map in (CAFFE2, CAFFE2_FOLDED):
        _refuse_early_strides(path, ours)
    origin = f"{path} ({key_map.name})"
    return BackboneWeights(ours, origin, backbone_map.normalization, backbone_map.folded_norms)


def _refuse_early_strides(path: Path, state: State) -> None:
    """Refuse MSRA ResNets (`STRIDE_IN_1X1` in detectron2): among Caffe2's networks, those without groups."""
    middle = state.get("backbone.network.layer1.0.conv2.weight")
    if middle is not None and middle.shape[0] == middle.shape[1]:
        raise CheckpointError(
            "an MSRA ResNet, whose stages have their stride in the first 1x1 convolution; ours, like torchvision's and "
            "the original Mask2Former's, have it in the 3x3 convolution",
            where=path,
            remedy="use torchvision/R-50.pkl, or timm with model.backbone=resnet50.tv_in1k",
        )


def _in_checkpoint(source: str) -> BackboneWeights:
    checkpoint = read_checkpoint(source)
    state = {key: tensor for key, tensor in checkpoint.state.items() if key.startswith("backbone.")}
    normalization = Normalization(checkpoint.config.pixel_mean, checkpoint.config.pixel_std)
    return BackboneWeights(state, f"the backbone of {source}", normalization)


def _unfold_norms(state: State, config: ModelConfig) -> list[str]:
    """Add identity statistics to folded norms, in place."""
    if config.backbone_norm != "frozen":
        raise CheckpointError(
            "the statistics of its batch norms are folded into scale and shift, so they cannot be trained with "
            f"model.backbone_norm={config.backbone_norm}",
            remedy="use model.backbone_norm=frozen",
        )
    for key in [key for key in state if re.search(r"\.(bn\d|downsample\.1)\.weight$", key)]:
        norm, scale = key.removesuffix(".weight"), state[key]
        state[f"{norm}.running_mean"] = torch.zeros_like(scale)
        state[f"{norm}.running_var"] = torch.full_like(scale, 1 - _EPSILON)
    return ["batch norms: the statistics are folded into scale and shift, so mean and variance are set to 0 and 1"]


def inflate_first_convolution(state: State, expected: State, normalization: Normalization | None) -> list[str]:
    """Extend a first convolution that was trained on RGB to the model's number of channels, in place, as timm does.

    A single channel gets the sum of red, green and blue. More channels repeat them in turn, scaled to the same sum.
    """
    for key, wanted in expected.items():
        weight = state.get(key)
        if weight is None or weight.ndim != 4 or weight.shape == wanted.shape or weight.shape[1] != 3:
            continue
        channels = wanted.shape[1]
        if (weight.shape[0], *weight.shape[2:]) == (wanted.shape[0], *wanted.shape[2:]):
            rgb = weight.flip(1) if normalization is not None and normalization.bgr else weight
            repeated = rgb.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)
            state[key] = rgb.sum(1, keepdim=True) if channels == 1 else repeated
            return [
                f"first convolution: from 3 channels to {channels}, by {'adding' if channels == 1 else 'repeating'}"
            ]
    return []


def _fit_normalization(state: State, normalization: Normalization | None, config: ModelConfig) -> list[str]:
    """Convert the first convolution to the recipe's channel order and scale, in place; report what still differs."""
    if normalization is None:
        return []
    if config.channels is not None:  # not in the units of images
        if config.channels != 3 or not normalization.bgr:
            return []
        state[_RESNET_FIRST_CONVOLUTION] = state[_RESNET_FIRST_CONVOLUTION].flip(1)
        return ["first convolution: converted from BGR to the recipe's channels, assumed to be red, green and blue"]
    lines = []
    if normalization.bgr:
        scale = torch.tensor(config.pixel_std) / torch.tensor(normalization.std)  # of red, green, blue
        state[_RESNET_FIRST_CONVOLUTION] = state[_RESNET_FIRST_CONVOLUTION].flip(1) * scale[:, None, None]
        bgr_std = list(normalization.std[::-1])
        lines.append(f"first convolution: converted from BGR (divided by {bgr_std}) to the recipe's RGB")
        normalization = replace(normalization, std=config.pixel_std)
    return lines + compare_normalization("backbone", normalization, config)


def compare_normalization(what: str, normalization: Normalization, config: ModelConfig) -> list[str]:
    """Return a warning for mean and for standard deviation if they differ from the recipe's; none for non-RGB input."""
    if config.channels is not None:
        return []
    pairs = (
        ("pixel_mean", normalization.mean, config.pixel_mean),
        ("pixel_std", normalization.std, config.pixel_std),
    )
    return [
        f"warning: the {what} was trained with {name} {list(theirs)}, model.{name} is {list(ours)}"
        for name, theirs, ours in pairs
        if any(abs(their - our) > _NORMALIZATION_TOLERANCE for their, our in zip(theirs, ours, strict=True))
    ]
