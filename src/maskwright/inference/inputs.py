"""Find the images that the inputs of a prediction name."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from maskwright.data.images.load import find_images
from maskwright.errors import ImageError
from maskwright.results.own_files import is_result

logger = logging.getLogger(__name__)


def find_inputs(inputs: Sequence[str], output: Path) -> list[Path]:
    """Return the images that the inputs name, without results of predictions.

    Raises:
        ImageError: an input matches nothing, or nothing but results.
    """
    found: set[Path] = set()
    skipped: set[Path] = set()
    for item in inputs:
        inside = _contains(_search_root(item), output)
        for path in find_images(item):
            is_ours = (inside and _contains(output, path)) or (path.suffix.lower() == ".png" and is_result(path))
            (skipped if is_ours else found).add(path)
    if skipped:
        logger.info("skipped %d images that are results of predictions or in %s", len(skipped), output)
    if not found:
        raise ImageError(
            "holds only results of predictions", where=", ".join(inputs), remedy="name the images to segment"
        )
    return sorted(found)


def _search_root(item: str) -> Path:
    """Return the folder that is searched for an input; for a glob, the part before its first pattern."""
    path = Path(item)
    if path.is_dir():
        return path
    while glob.has_magic(str(path)) and not path.exists():
        path = path.parent
    return path.parent if path.is_file() else path


def _contains(folder: Path, path: Path) -> bool:
    """Return True if the path is below the folder, and is not the folder itself."""
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents
