"""Models that come with the package, so that a first prediction needs neither a network nor a training."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def packaged_models() -> dict[str, Path]:
    """Return the weight files in the package by model name; each has a model card in Markdown next to it."""
    return {path.stem: path for path in sorted(_folder().glob("*.safetensors"))}


def find_packaged(source: str | Path) -> Path | None:
    """Return the weight file of the packaged model named `source`; None for other names, and for models on disk.

    A folder of that name only counts as a model on disk if transformers wrote it.
    """
    path = Path(source)
    if path.is_file() or (path / "config.json").is_file():
        return None
    return packaged_models().get(str(source))


def _folder() -> Path:
    return Path(str(resources.files("maskwright.checkpoints"))) / "packaged"
