"""Find images by name: in files, folders and glob patterns."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath

from maskwright.data.storage.folders import walk_files
from maskwright.errors import ImageError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"}
    | {".jp2", ".j2k", ".j2c", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".npy", ".heic", ".heif"}
)
_UNREAD_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".nii", ".dcm", ".nrrd", ".mha"}
    | {".svg", ".pdf", ".eps", ".psd", ".ai", ".tga", ".exr", ".hdr", ".jxl", ".avif", ".npz", ".mat", ".h5", ".hdf5"}
    | {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".czi", ".nd2", ".lif", ".svs", ".mrxs"}
)  # images and videos of other formats, counted when a folder is searched


def is_image_name(path: str | os.PathLike) -> bool:
    """Return True if a file with this name counts as an image in a folder; hidden files do not."""
    name = os.path.basename(path)  # many times faster than Path
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def find_images(inputs: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """Return the images in files, folders (recursively) and glob patterns, sorted and without duplicates.

    A file that is given itself may have any suffix. In folders and patterns only names that `is_image_name` accepts
    count, and folders with such names do not.

    Raises:
        ImageError: an input matches nothing.
    """
    found: set[Path] = set()
    for item in [inputs] if isinstance(inputs, str | os.PathLike) else inputs:
        if not os.fspath(item):  # which `Path` would take for the current folder
            raise ImageError(
                "an empty text as input, expected a file, folder or pattern",
                remedy="check the shell variable that it comes from",
            )
        found.update(_expand(Path(item)))
    return sorted(found)


def _expand(item: Path) -> list[Path]:
    if item.is_file():
        return [item]
    if item.is_dir():
        names = list(walk_files(item))
        _log_unread(item, names)
        files, problem = [item / name for name in names if is_image_name(name)], "the folder has no images"
    elif glob.has_magic(str(item)):
        paths = [Path(path) for path in glob.glob(str(item), recursive=True)]
        files, problem = [path for path in paths if is_image_name(path) and path.is_file()], "no image matches"
    else:
        files, problem = [], "neither a file nor a folder" if item.exists() else "no such file or folder"
    if not files:
        raise ImageError(
            f"{problem}; expected images ({' '.join(sorted(IMAGE_SUFFIXES))})", where=item, remedy="check the path"
        )
    return files


def _log_unread(folder: Path, names: Iterable[str]) -> None:
    """Count the images and videos of a folder that are of a format that is not read."""
    suffixes = Counter(PurePath(name.lower().removesuffix(".gz")).suffix for name in names)  # .nii.gz
    unread = [f"{count} {suffix}" for suffix, count in sorted(suffixes.items()) if suffix in _UNREAD_SUFFIXES]
    if unread:
        logger.warning("%s: skipped files of formats that are not read: %s", folder, ", ".join(unread))
