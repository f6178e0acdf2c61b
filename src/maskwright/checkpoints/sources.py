"""Where weights come from: a file, a folder that transformers wrote, or a Hub id; with what stands beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from maskwright.checkpoints.readers.weight_file import WeightFile, read_weight_file
from maskwright.checkpoints.transformers_config import (
    CONFIG,
    PROCESSOR,
    Settings,
    read_backbone_settings,
    read_json,
    read_settings,
)
from maskwright.errors import CheckpointError

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_FILES = (".safetensors", ".pkl", ".pth", ".pt", ".bin")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


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
        return _described(path, weights, path.parent if _is_theirs(path.parent) else None)
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: a link that leads nowhere; name the file itself")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: neither a file nor a folder; name a weight file")
    folder = path if path.is_dir() else _download(str(source))
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: a folder without config.json; name a weight file, or a folder of transformers"
        )
    return _described(folder, _read_folder(folder), folder)


def read_backbone_source(source: str | Path) -> Source:
    """As `read_source`, for a network that was trained alone.

    Raises:
        CheckpointError: as `read_source`.
    """
    path = Path(source)
    if path.is_file():
        weights, folder = read_weight_file(path), path.parent
    else:
        path = folder = path if path.is_dir() else _download(str(source))
        weights = _read_folder(folder)
    described = _model_type(folder) in ("swin", "resnet")
    return Source(path, weights, read_backbone_settings(folder) if described else Settings())


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a model on the Hugging Face Hub, and not that of a file."""
    return bool(_HUB_ID.fullmatch(name)) and Path(name).suffix not in _FILES


def _described(path: Path, weights: WeightFile, folder: Path | None) -> Source:
    """Weights with what `folder` says about them; None is no folder of transformers."""
    settings = read_settings(folder) if folder else Settings()
    settings.class_names = settings.class_names or weights.class_names
    return Source(path, weights, settings)


def _is_theirs(folder: Path) -> bool:
    """Whether the folder of a file is one that transformers wrote for this kind of model."""
    return _model_type(folder) == "mask2former"


def _model_type(folder: Path) -> str | None:
    return read_json(folder / CONFIG).get("model_type") if (folder / CONFIG).is_file() else None


def _read_folder(folder: Path) -> WeightFile:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return read_weight_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return WeightFile(_read_shards(index))
    raise CheckpointError(f"{folder}: no weights; expected {' or '.join(_WEIGHTS)}, or an index of them")


def _read_shards(index: Path) -> dict:
    table = read_json(index).get("weight_map")
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
    if not is_hub_id(name):
        raise CheckpointError(f"no checkpoint file {name}; check the path")
    by_hand = (
        f"no file or folder '{name}'; if it is a model on the Hub, download its config.json, "
        "preprocessor_config.json and model.safetensors into a folder and name that folder"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f"{by_hand}, or install huggingface_hub") from None
    try:
        described = [CONFIG, PROCESSOR]
        safe = ["model*.safetensors", "model.safetensors.index.json"]
        folder = Path(snapshot_download(name, allow_patterns=[*described, *safe]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*described, "pytorch_model*"]))
    except Exception as error:  # the hub's client raises many kinds
        raise CheckpointError(f"{by_hand} (the download failed: {type(error).__name__})") from None
    return folder
