"""Where weights come from: a file, a folder that transformers wrote, or a Hub id; with what stands beside them.

Unusual: `config.json` is read only for what leaves no trace in the weights (attention heads, class names, how pixels
are prepared), and to refuse models that compute something else than ours.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskwright.errors import CheckpointError
from maskwright.weight_files import WeightFile, read_weight_file

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass
class Settings:
    """What is known about a model beside its weights; None where nothing is said.

    Attributes:
        heads: attention heads of both decoders.
        class_names: of the labels 0..K-1.
        pixel_mean: RGB, in units of 0..255.
        pixel_std: RGB, in units of 0..255.
        short_side: pixels.
        max_side: pixels.
    """

    heads: int | None = None
    class_names: tuple[str, ...] | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    short_side: int | None = None
    max_side: int | None = None

    def pixels(self) -> dict[str, tuple[float, ...]]:
        """What is known, as values of a `ModelConfig`."""
        return self._known("pixel_mean", "pixel_std")

    def sizes(self) -> dict[str, int]:
        """What is known, as values of an `EvaluateConfig`."""
        return self._known("short_side", "max_side")

    def _known(self, *names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass
class Source:
    """Weights and what is known beside them; `path` is the file or folder for messages."""

    path: Path
    weights: WeightFile
    settings: Settings = field(default_factory=Settings)


def read_source(source: str | Path) -> Source:
    """Read weights from a file, a folder of transformers, or the Hub.

    Args:
        source: a weight file; a folder with `config.json` and weights, which may be in several files; or "owner/name"
            on the Hugging Face Hub.

    Raises:
        CheckpointError: there is no such thing, it is broken, or it is a model that we do not have.
    """
    path = Path(source)
    if path.is_file():
        weights = read_weight_file(path)
        return Source(path, weights, _settings(path.parent, weights) if _is_theirs(path.parent) else _plain(weights))
    folder = path if path.is_dir() else _download(str(source))
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: a folder without config.json; name a weight file, or a folder of transformers"
        )
    weights = _read_folder(folder)
    return Source(folder, weights, _settings(folder, weights))


def _plain(weights: WeightFile) -> Settings:
    return Settings(class_names=weights.class_names)


def _is_theirs(folder: Path) -> bool:
    """Whether the folder of a file is one that transformers wrote for this kind of model."""
    path = folder / "config.json"
    return path.is_file() and _read_json(path).get("model_type") == "mask2former"


def _read_folder(folder: Path) -> WeightFile:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return read_weight_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return WeightFile(_read_shards(index))
    raise CheckpointError(f"{folder}: no weights; expected {' or '.join(_WEIGHTS)}, or an index of them")


def _read_shards(index: Path) -> dict:
    table = _read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{index}: has no 'weight_map' from keys to files; download it again")
    state = {}
    for name in sorted(set(table.values())):
        path = index.parent / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{index}: names '{name}', which is not in {index.parent}; put all its files there")
        state |= read_weight_file(path).state
    if missing := table.keys() - state.keys():
        raise CheckpointError(f"{index}: {len(missing)} of its keys are in none of its files, e.g. {min(missing)}")
    return state


def _download(name: str) -> Path:
    """The folder of a Hub model, from the cache or the network."""
    if not _HUB_ID.fullmatch(name) or Path(name).suffix in (".safetensors", ".pkl", ".pth", ".pt", ".bin"):
        raise CheckpointError(f"no checkpoint file {name}")
    by_hand = (
        f"no file or folder '{name}'; if it is a model on the Hub, download its config.json, "
        "preprocessor_config.json and model.safetensors into a folder and name that folder"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f"{by_hand}, or install huggingface_hub") from None
    try:
        described = ["config.json", "preprocessor_config.json"]
        safe = ["model*.safetensors", "model.safetensors.index.json"]
        folder = Path(snapshot_download(name, allow_patterns=[*described, *safe]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*described, "pytorch_model*"]))
    except Exception as error:  # the hub's client raises many kinds
        raise CheckpointError(f"{by_hand} (the download failed: {type(error).__name__})") from None
    return folder


# What changes the computation and leaves no trace in the weights: (key, the only value that ours equals).
_FIXED = (("activation_function", "relu"), ("pre_norm", False), ("common_stride", 4))
_FIXED_BACKBONE = {
    "swin": (("hidden_act", "gelu"), ("layer_norm_eps", 1e-5), ("patch_size", 4)),
    "resnet": (("hidden_act", "relu"), ("downsample_in_bottleneck", False), ("downsample_in_first_stage", False)),
}


def _settings(folder: Path, weights: WeightFile) -> Settings:
    path = folder / "config.json"
    config = _read_json(path)
    if config.get("model_type") != "mask2former":
        raise CheckpointError(f"{path}: a model of type '{config.get('model_type')}'; expected 'mask2former'")
    backbone = config.get("backbone_config") or {}
    checks: list[tuple[str, Any, Any]] = [(key, config.get(key, value), value) for key, value in _FIXED]
    kind = backbone.get("model_type") if isinstance(backbone, dict) else None
    checks += [(key, backbone.get(key, value), value) for key, value in _FIXED_BACKBONE.get(kind, ())]
    for key, found, expected in checks:
        if found != expected:
            raise CheckpointError(f"{path}: {key} is {found!r}; maskwright's model computes with {expected!r} only")
    heads = config.get("num_attention_heads")
    if heads is not None and not (isinstance(heads, int) and heads > 0):
        raise CheckpointError(f"{path}: num_attention_heads is {heads!r}; expected a positive number")
    return Settings(heads=heads, class_names=_label_names(path, config) or weights.class_names, **_pixels(folder))


def _label_names(path: Path, config: dict) -> tuple[str, ...] | None:
    """Names of the labels 0..K-1, or None where they are absent or only numbered."""
    names = config.get("id2label") or {}
    try:
        numbered = {int(label): str(name) for label, name in names.items()}
    except (AttributeError, ValueError):
        raise CheckpointError(f"{path}: id2label does not map numbers to names") from None
    if not numbered or all(re.fullmatch(r"LABEL_\d+", name) for name in numbered.values()):
        return None
    if sorted(numbered) != list(range(len(numbered))):
        raise CheckpointError(f"{path}: id2label does not number its {len(numbered)} classes from 0 without gaps")
    return tuple(numbered[label] for label in range(len(numbered)))


def _pixels(folder: Path) -> dict[str, Any]:
    """What `preprocessor_config.json` says about colours and sizes."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    config, settings = _read_json(path), {}
    unit = 1 / config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if config.get("do_normalize", True):
        for key, name in (("image_mean", "pixel_mean"), ("image_std", "pixel_std")):
            values = config.get(key)
            if isinstance(values, list) and len(values) == 3:
                settings[name] = tuple(round(value * unit, 4) for value in values)
    else:
        settings |= {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (unit, unit, unit)}
    size = config.get("size")
    if isinstance(size, dict) and isinstance(size.get("shortest_edge"), int):
        settings |= {"short_side": size["shortest_edge"], "max_side": size.get("longest_edge")}
    return settings


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected an object")
    return content
