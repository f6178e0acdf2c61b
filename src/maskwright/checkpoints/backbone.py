"""Weights for the backbone alone: from timm, torchvision, detectron2, the official Swin, or inside a whole checkpoint.

What a file is, its keys say. Unusual: weights that were trained on BGR, or on another scale, are not run on other
pixels than those; their first convolution is turned instead, which gives the same features from the recipe's pixels.
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

from maskwright.checkpoints.checkpoint import read_checkpoint
from maskwright.checkpoints.key_maps.backbones import (
    BACKBONE_LAYOUTS,
    CAFFE2,
    CAFFE2_FOLDED,
    DETECTRON2_RESNET,
    BackboneLayout,
    Pixels,
)
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.key_maps.translate import listing, recognise, translate
from maskwright.checkpoints.sources import is_hub_id, read_backbone_source
from maskwright.checkpoints.zoo import cache_folder, published_models
from maskwright.config.schema import ModelConfig
from maskwright.errors import CheckpointError
from maskwright.models.segmenter import Segmenter

_DERIVED = r"(.*\.)?(attn_mask|relative_position_index|num_batches_tracked)"  # no weights, and not in every release
_ADDED = r"(backbone\.(?:norms|semantic_layers))\..*"  # what a backbone that was trained alone does not have
_FIRST = "backbone.network.conv1.weight"  # of a ResNet
_EPSILON = 1e-5  # of a batch norm, added to its variance
_SAME_PIXELS = 0.01  # in units of 0..255


@dataclass
class BackboneWeights:
    """Weights that were found.

    Attributes:
        state: our names, from `backbone.` on.
        origin: what they are, for people.
        pixels: what they were trained on, where that is known.
        folded: whether batch norms have their statistics folded into scale and shift.
    """

    state: State
    origin: str
    pixels: Pixels | None = None
    folded: bool = False


def load_backbone_weights(model: Segmenter) -> list[str]:
    """Fill the backbone of a model as its `config.backbone_weights` says; None keeps what it has.

    Returns:
        What was done, one line for each decision.

    Raises:
        CheckpointError: the weights cannot be had, the message says which file to put where; or they do not fit the
            backbone, the message says what differs.
    """
    config = model.config
    if config.backbone_weights is None:
        return []
    try:
        weights = _find(model)
        expected = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("backbone.")}
        state = {key: tensor for key, tensor in weights.state.items() if not re.fullmatch(_DERIVED, key)}
        lines = [f"model.backbone_weights: {weights.origin}"]
        if weights.folded:
            lines += _unfold_norms(state, config)
        lines += resize_position_tables(state, expected)
        lines += inflate(state, expected, weights.pixels)
        needed = {key: tensor for key, tensor in expected.items() if key in state or not _is_optional(key)}
        if found := differences(needed, state):
            raise CheckpointError(f"{weights.origin} does not fit '{config.backbone}'; {found}")
        if new := {match[1] for key in expected.keys() - state.keys() if (match := re.fullmatch(_ADDED, key))}:
            lines.append(f"not among them, so as in a new model: {listing(new)}")
        lines += _fit_pixels(state, weights.pixels, config)
    except CheckpointError as error:
        raise CheckpointError(f"model.backbone_weights: {error}") from None
    model.load_state_dict(state, strict=False)
    return lines


def differences(expected: State, found: State) -> str:
    """What keeps weights from a model, in one line; empty where they fit."""
    problems = []
    there, here = _depths(found), _depths(expected)
    if there and here and there != here:
        problems.append(f"depths {', '.join(map(str, there))} instead of {', '.join(map(str, here))}")
    wrong = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        problems.append(f"of another shape: {', '.join(wrong[:2])}{more}")
    for kind, keys in (("missing", expected.keys() - found.keys()), ("left over", found.keys() - expected.keys())):
        if keys:
            problems.append(f"{kind}: {listing(keys, 4)}")
    return "; ".join(problems)


def resize_position_tables(state: State, expected: State) -> list[str]:
    """Fit the relative position tables of a Swin to another window, in place, by bicubic interpolation.

    As mmsegmentation and the official code do it (`mmcv_custom/checkpoint.py`); timm has another interpolation.

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
            continue  # of another width: what differs is said elsewhere
        square = table.T.unflatten(1, (old, old))[None].float()
        square = F.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
        state[key] = square[0].flatten(1).T.to(table.dtype)
        resized, windows = resized + 1, f"from window {(old + 1) // 2} to {(new + 1) // 2}"
    return [f"relative position tables of {resized} blocks resized bicubically {windows}"] if resized else []


def _depths(state: State) -> list[int]:
    """Blocks of each stage of a backbone."""
    blocks: dict[int, int] = {}
    for key in state:
        if match := re.match(r"backbone\.(?:network\.)?(?:layer|stages[._])(\d+)\.(?:blocks\.)?(\d+)\.", key):
            stage, block = int(match[1]), int(match[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    return [blocks[stage] for stage in sorted(blocks)]


def _find(model: Segmenter) -> BackboneWeights:
    source = str(model.config.backbone_weights)
    if source == "timm":
        return _named_by_timm(model.config.backbone, model)
    for path in (Path(source).expanduser(), cache_folder() / source):
        if path.exists():
            return _read(path, model)
    if source in published_models():
        return _in_checkpoint(source)
    from maskwright.checkpoints.timm_weights import timm_name, timm_names  # imports timm

    if name := timm_name(source):
        return _named_by_timm(name, model)
    if address := _upstream_files().get(source):
        raise CheckpointError(f"no {cache_folder() / source}; download {address} to there")
    if is_hub_id(source):
        return _read(source, model)
    near = difflib.get_close_matches(source, [*_upstream_files(), *timm_names()], 3, 0.5)
    hint = f"; nearest known: {', '.join(near)}" if near else ""
    raise CheckpointError(f"no file {source}, neither here nor in {cache_folder()}, and no weights of that name{hint}")


@cache
def _upstream_files() -> dict[str, str]:
    """Addresses by name."""
    values = yaml.safe_load((resources.files("maskwright.checkpoints") / "backbones.yaml").read_text("utf-8"))
    return {entry["name"]: entry["address"] for entry in values["files"]}


def _named_by_timm(name: str, model: Segmenter) -> BackboneWeights:
    """Weights that timm knows: from a file in the cache folder, else from timm's own caches or the network."""
    from maskwright.checkpoints.timm_weights import download, timm_config  # imports timm

    known = timm_config(name)
    name = f"{known.architecture}.{known.tag}" if known.tag else str(known.architecture)
    places = {f"{name}.safetensors": f"https://huggingface.co/timm/{name}/resolve/main/model.safetensors"}
    if isinstance(known.url, str) and known.url:
        places[PurePosixPath(known.url).name] = known.url
    mean, std = (tuple(round(255 * value, 4) for value in values) for values in (known.mean, known.std))
    for place in places:
        if (path := cache_folder() / place).is_file():
            return replace(_read(path, model), origin=f"{name} from {path}", pixels=Pixels(mean, std))
    try:
        state = download(name)
    except Exception as error:  # the hub's client raises many kinds
        place, address = list(places.items())[-1]
        raise CheckpointError(
            f"the weights of '{name}' are not in the cache, and cannot be downloaded ({type(error).__name__}); "
            f"put {address} at {cache_folder() / place}"
        ) from None
    return BackboneWeights(_named_as_timm_does(state, model), f"{name} from timm", Pixels(mean, std))


def _read(source: str | Path, model: Segmenter) -> BackboneWeights:
    """The backbone in a file, folder or Hub model, whatever program wrote it."""
    found = read_backbone_source(source)
    path, state = found.path, found.weights.state
    if found.weights.header.get("format", "").startswith("maskwright-") or recognise(state):
        return _in_checkpoint(str(path))
    plain = _named_as_timm_does(state, model)
    table = next((table for table in BACKBONE_LAYOUTS if recognise(state, [table.names])), None)
    expected = (f"backbone.{key}" for key in model.backbone.state_dict())
    if table is None or all(key in plain or _is_optional(key) for key in expected):
        return BackboneWeights(plain, str(path))
    weights = _translated(path, state, table)
    told = found.settings.model
    if {"pixel_mean", "pixel_std"} <= told.keys():
        weights = replace(weights, pixels=Pixels(told["pixel_mean"], told["pixel_std"]))
    return weights


def _is_optional(key: str) -> bool:
    return re.fullmatch(f"{_DERIVED}|{_ADDED}", key) is not None


def _named_as_timm_does(weights: State, model: Segmenter) -> State:
    """Weights of a whole timm network in our names. Its classifier is left out; what is none of its own is kept."""
    from maskwright.checkpoints.timm_weights import expected_names  # imports timm

    whole = expected_names(model.config.backbone, model.config.backbone_options)
    ours = model.backbone.state_dict()
    named = {}
    for key, tensor in weights.items():
        key = key.removeprefix("module.")
        # Swin's stages are `layers` in timm; its own feature extraction joins the first two parts of some names.
        names = (re.sub(r"^layers\.", "stages.", key), f"network.{key}", f"network.{key.replace('.', '_', 1)}")
        place = next((name for name in names if name in ours), None)
        if place or key not in whole:
            named[f"backbone.{place or key}"] = tensor
    return named


def _translated(path: Path, state: State, table: BackboneLayout) -> BackboneWeights:
    if table.names is DETECTRON2_RESNET and "stem.conv1.weight" not in state:
        raise CheckpointError(
            f"{path} is a whole detector of detectron2, and nothing in it says whether its pixels are RGB or BGR; "
            "name the weights that it was trained from"
        )
    try:
        ours = translate(state, table.names).state
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if table.names in (CAFFE2, CAFFE2_FOLDED):
        _refuse_early_strides(path, ours)
    return BackboneWeights(ours, f"{path} ({table.names.name})", table.pixels, table.folded)


def _refuse_early_strides(path: Path, state: State) -> None:
    """Caffe2's plain ResNets are MSRA's (`STRIDE_IN_1X1` of detectron2's configurations); those with groups are not."""
    middle = state.get("backbone.network.layer1.0.conv2.weight")
    if middle is not None and middle.shape[0] == middle.shape[1]:
        raise CheckpointError(
            f"{path} is a ResNet of MSRA: its stages begin with a stride in the first 1x1 convolution, ours, like "
            "torchvision's and those of the original Mask2Former, in the 3x3 behind it. Use torchvision/R-50.pkl, or "
            "timm with model.backbone=resnet50.tv_in1k"
        )


def _in_checkpoint(source: str) -> BackboneWeights:
    checkpoint = read_checkpoint(source)
    state = {key: tensor for key, tensor in checkpoint.state.items() if key.startswith("backbone.")}
    pixels = Pixels(checkpoint.config.pixel_mean, checkpoint.config.pixel_std)
    return BackboneWeights(state, f"the backbone of {source}", pixels)


def _unfold_norms(state: State, config: ModelConfig) -> list[str]:
    """Give folded norms statistics that change nothing, in place."""
    if config.backbone_norm != "frozen":
        raise CheckpointError(
            f"its batch norms have their statistics folded into scale and shift, so model.backbone_norm="
            f"{config.backbone_norm} cannot train them; use model.backbone_norm=frozen"
        )
    for key in [key for key in state if re.search(r"\.(bn\d|downsample\.1)\.weight$", key)]:
        norm, scale = key.removesuffix(".weight"), state[key]
        state[f"{norm}.running_mean"] = torch.zeros_like(scale)
        state[f"{norm}.running_var"] = torch.full_like(scale, 1 - _EPSILON)
    return ["batch norms: their statistics are folded into scale and shift, so they are set to 0 and 1"]


def inflate(state: State, expected: State, pixels: Pixels | None) -> list[str]:
    """Give a first convolution that was trained on RGB as many channels as the model has, in place.

    One channel gets the sum of red, green and blue; more get them in turn, scaled so that sums stay as large, as timm
    does it.
    """
    for key, wanted in expected.items():
        weight = state.get(key)
        if weight is None or weight.ndim != 4 or weight.shape == wanted.shape or weight.shape[1] != 3:
            continue
        channels = wanted.shape[1]
        if (weight.shape[0], *weight.shape[2:]) == (wanted.shape[0], *wanted.shape[2:]):
            rgb = weight.flip(1) if pixels is not None and pixels.bgr else weight
            repeated = rgb.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)
            state[key] = rgb.sum(1, keepdim=True) if channels == 1 else repeated
            return [
                f"first convolution: from 3 channels to {channels}, by {'adding' if channels == 1 else 'repeating'}"
            ]
    return []


def _fit_pixels(state: State, pixels: Pixels | None, config: ModelConfig) -> list[str]:
    """Turn the first convolution to the recipe's channels and scale, in place; or tell where pixels differ."""
    if pixels is None:
        return []
    if config.channels is not None:  # in other units than those of pictures
        if config.channels != 3 or not pixels.bgr:
            return []
        state[_FIRST] = state[_FIRST].flip(1)
        return ["first convolution: turned from BGR to the recipe's channels, taken for red, green and blue"]
    lines = []
    if pixels.bgr:
        scale = torch.tensor(config.pixel_std) / torch.tensor(pixels.std)  # of red, green, blue
        state[_FIRST] = state[_FIRST].flip(1) * scale[:, None, None]
        lines.append(f"first convolution: turned from BGR (divided by {list(pixels.std[::-1])}) to the recipe's RGB")
        pixels = replace(pixels, std=config.pixel_std)
    return lines + compare_pixels("backbone", pixels, config)


def compare_pixels(what: str, pixels: Pixels, config: ModelConfig) -> list[str]:
    """One line for each of mean and deviation that is another than the recipe's, where both speak of pictures."""
    if config.channels is not None:
        return []
    pairs = (("pixel_mean", pixels.mean, config.pixel_mean), ("pixel_std", pixels.std, config.pixel_std))
    return [
        f"mind: the {what} was trained with {name} {list(theirs)}, model.{name} is {list(ours)}"
        for name, theirs, ours in pairs
        if any(abs(there - here) > _SAME_PIXELS for there, here in zip(theirs, ours, strict=True))
    ]
