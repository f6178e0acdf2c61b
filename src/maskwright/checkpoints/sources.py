"""Find and read weights: a file, a folder that transformers wrote, or a Hub model, and the settings beside them."""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

from maskwright.checkpoints.readers.weight_file import WeightFile, read_weight_file
from maskwright.checkpoints.transformers_config import (
    BACKBONES,
    CONFIG,
    MODELS,
    PROCESSOR,
    SourceSettings,
    read_backbone_settings,
    read_json,
    read_settings,
)
from maskwright.errors import CheckpointError

logger = logging.getLogger(__name__)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pkl", ".pth", ".pt", ".bin")
_HUB_MARK = "hub:"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass
class WeightSource:
    """Weights, and the settings stored beside them; `path` is the file or folder, for messages."""

    path: Path
    weights: WeightFile
    settings: SourceSettings = field(default_factory=SourceSettings)


def read_source(source: str | Path) -> WeightSource:
    """Read the weights of a whole model.

    Args:
        source: a weight file; a folder with `config.json` and weights, which may be sharded; or "hub:owner/name" on
            the Hugging Face Hub, where "hub:" may be omitted if there is no folder "owner".

    Raises:
        CheckpointError: the source does not exist, is damaged, or is an unsupported model.
    """
    path = Path(source)
    if path.is_file():
        weights, settings = read_weight_file(path), SourceSettings()
        if _is_described(path) and _model_type(path.parent) in MODELS:
            settings = read_settings(path.parent)
    else:
        if path.is_symlink() and not path.exists():
            raise CheckpointError("a broken symlink", where=path, remedy="name the file itself")
        if path.exists() and not path.is_dir():
            raise CheckpointError("neither a file nor a folder", where=path, remedy="name a weight file")
        path = folder = path if path.is_dir() else _download(str(source))
        if not (folder / CONFIG).is_file():
            raise CheckpointError(
                "a folder without config.json",
                where=folder,
                remedy="name a weight file, or a folder that transformers wrote",
            )
        weights, settings = _read_folder(folder), read_settings(folder)
    if settings.class_names is None and weights.class_names:
        settings.class_names = dict(enumerate(weights.class_names))
    return WeightSource(path, weights, settings)


def read_backbone_source(source: str | Path) -> WeightSource:
    """Read the weights of a backbone that was trained on its own; as `read_source` otherwise.

    Raises:
        CheckpointError: as for `read_source`.
    """
    path = Path(source)
    if path.is_file():
        weights, folder = read_weight_file(path), path.parent
        is_described = _is_described(path)
    else:
        path = folder = path if path.is_dir() else _download(str(source))
        weights, is_described = _read_folder(folder), True
    is_described = is_described and _model_type(folder) in BACKBONES
    return WeightSource(path, weights, read_backbone_settings(folder) if is_described else SourceSettings())


def is_hub_id(name: str) -> bool:
    """Check whether a name has the form of a Hugging Face Hub id, with or without "hub:", rather than of a file."""
    name = name.removeprefix(_HUB_MARK)
    return bool(_HUB_ID.fullmatch(name)) and Path(name).suffix not in _SUFFIXES


def _is_described(path: Path) -> bool:
    """Check whether config.json beside a weight file is about that file: other files may be of any other model."""
    return path.name in _WEIGHTS


def _model_type(folder: Path) -> str | None:
    return read_json(folder / CONFIG).get("model_type") if (folder / CONFIG).is_file() else None


def _read_folder(folder: Path) -> WeightFile:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return read_weight_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return WeightFile(_read_shards(index))
    raise CheckpointError(f"no weights; expected {' or '.join(_WEIGHTS)}, or an index of their shards", where=folder)


def _read_shards(index: Path) -> dict:
    table, state = _read_index(index), {}
    for name in sorted(set(table.values())):
        state |= read_weight_file(index.parent / name).state
    if missing := table.keys() - state.keys():
        raise CheckpointError(f"{len(missing)} of its keys are in none of its files, e.g. {min(missing)}", where=index)
    return state


def _read_index(index: Path) -> dict[str, str]:
    """Return the table from keys to files, which must be in the same folder."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError("has no 'weight_map' from keys to files", where=index, remedy="download it again")
    for name in sorted(set(table.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(
                f"names '{name}', which is not in {index.parent}", where=index, remedy="put all its files there"
            )
    return table


def weight_digest(path: Path) -> str:
    """Compute the SHA-256 of a weight file, or of the weight files of a folder one after the other, as hex digits.

    Raises:
        CheckpointError: a folder has no weights.
    """
    total = hashlib.sha256()
    for file in _weight_files(path):
        with file.open("rb") as content:
            while part := content.read(1 << 22):
                total.update(part)
    return total.hexdigest()


def _weight_files(path: Path) -> list[Path]:
    """Return the files that `_read_folder` reads, or the file itself."""
    if path.is_file():
        return [path]
    for name in _WEIGHTS:
        if (path / name).is_file():
            return [path / name]
        if (index := path / f"{name}.index.json").is_file():
            return [path / shard for shard in sorted(set(_read_index(index).values()))]
    raise CheckpointError("has no weights", where=path)


def _download(name: str) -> Path:
    """Return the folder of a Hub model, from the cache or the network."""
    marked, name = name.startswith(_HUB_MARK), name.removeprefix(_HUB_MARK)
    if not is_hub_id(name):
        raise CheckpointError(f"no checkpoint file {name}", remedy="check the path")
    if not marked and Path(name).parent.exists():  # a mistyped path must not load a stranger's model
        raise CheckpointError(
            f"no file or folder '{name}' in the existing folder '{Path(name).parent}'",
            remedy=f"check the path; a model on the Hub is written {_HUB_MARK}{name}",
        )
    logger.info("%s is not a path here, so it is taken from the Hugging Face Hub", name)
    remedy = (
        "if it is a model on the Hub, download its config.json, preprocessor_config.json and model.safetensors into a "
        "folder and name that folder"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f"no file or folder '{name}'", remedy=f"{remedy}, or install huggingface_hub") from None
    try:
        configs = [CONFIG, PROCESSOR]
        safe = ["model*.safetensors", "model.safetensors.index.json"]
        folder = Path(snapshot_download(name, allow_patterns=[*configs, *safe]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*configs, "pytorch_model*"]))
    except Exception as error:  # the Hub's client raises many types
        raise CheckpointError(
            f"no file or folder '{name}', and downloading it failed ({type(error).__name__})", remedy=remedy
        ) from None
    return folder
