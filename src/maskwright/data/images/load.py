"""Pictures and label pictures in, arrays out: one reading rule for training, evaluation, prediction and serving.

Unusual here: Pillow decodes, and plain PNG files go a faster way (`png`) to the same numbers. torchvision's decoders
are deprecated since 0.29 and end the whole process on a damaged PNG. Content decides what a file is, never its name,
and only harmless formats are tried (Pillow would start Ghostscript for an EPS).

The rules:
    EXIF orientation is applied, to pictures and label pictures alike; damaged EXIF data is ignored with a warning.
    Alpha is composited on white, so colours hidden below transparent pixels never show.
    16 bits per channel: RGB keeps the upper byte. Gray (and uint16 arrays): values up to 255 stay; below 32768 the
    largest becomes 255, as for 10, 12 and 14 bit sensors; else value / 257.
    Floats must be finite and lie in 0..1.
    Of animations and multi-page files the first frame is read.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from maskwright.data.images import npy
from maskwright.data.images.png import decode_color, decode_labels, read_size
from maskwright.data.images.safe_pillow import (
    MAX_PIXELS,
    check_size,
    display_name,
    open_with_pillow,
    orientation,
    read_png_or_npy,
    stored_mode,
    upright,
)
from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError, ImageError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".jp2", ".j2k"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".npy"}
)
_LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000")
_WIDE_GRAY = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_SCALED_GRAY = {"L;2": 85, "L;4": 17}

ImageSource = str | os.PathLike | bytes | File | Image.Image | np.ndarray | torch.Tensor


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB, contiguous and writable, upright; the module's header has the rules.

    Args:
        source: a file, also one in an archive, the bytes of one, a Pillow image, an array (H, W), (H, W, 1), (H, W, 3)
            or (H, W, 4), or a tensor (H, W), (1, H, W), (3, H, W) or (4, H, W). Arrays and tensors: bool, uint8,
            uint16, or float in 0..1.
        max_pixels: larger pictures are refused before their pixels are read; at most `MAX_PIXELS` for files.
        name: what errors call the source; its path by default.

    Raises:
        ImageError: there is no such file, it is no picture, it is damaged, cut off or too large, or it holds values
            that are no colours. The message names the file.
    """
    if isinstance(source, torch.Tensor):
        return _from_tensor(source, max_pixels, name or "the given tensor")
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels, name or "the given array")
    name, source = name or display_name(source), read_png_or_npy(source)
    if isinstance(source, bytes):
        if source.startswith(npy.SIGNATURE):
            return _from_array(npy.read_npy(source, 4 * max_pixels, name, ImageError), max_pixels, name)
        if (pixels := decode_color(source, max_pixels)) is not None:
            return _from_array(pixels, max_pixels, name)
    with open_with_pillow(source, name, max_pixels, ImageError) as picture:
        return _from_array(_colour_array(picture, name), max_pixels, name)


def read_label_image(path: str | os.PathLike | File) -> np.ndarray:
    """The numbers in a label picture, (H, W) uint8, uint16 or int32; of a palette PNG its indices.

    Raises:
        DatasetError: the file is absent or damaged, is stored with loss (JPEG), or holds colours in place of numbers.
    """
    source = read_png_or_npy(path)
    if isinstance(source, bytes):
        if source.startswith(npy.SIGNATURE):
            return _label_array(npy.read_npy(source, MAX_PIXELS, str(path), DatasetError), str(path))
        if (numbers := decode_labels(source, MAX_PIXELS)) is not None:
            return numbers
    with open_with_pillow(source, str(path), MAX_PIXELS, DatasetError) as picture:
        if picture.format in _LOSSY:
            raise DatasetError(
                f"{path}: a label stored as {picture.format} has numbers that nobody drew, because that format loses "
                "detail; expected PNG; export the labels again as PNG"
            )
        if picture.mode not in ("P", "L", "1", *_WIDE_GRAY[:-1]):
            raise DatasetError(
                f"{path}: found {_channels(picture)} in a label picture, expected one number per pixel (palette or "
                "gray PNG); convert the colours to class ids"
            )
        factor = _SCALED_GRAY.get(stored_mode(picture), 1)
        array = np.array(upright(picture, str(path)))
    return array.astype(np.uint8) if array.dtype == bool else array // factor if factor > 1 else array


def read_rgb_values(path: str | os.PathLike | File) -> np.ndarray:
    """The bytes of an RGB PNG whose colours are numbers, (H, W, 3) uint8.

    Raises:
        DatasetError: the file is absent, damaged, or not an RGB PNG of 8 bits.
    """
    source = read_png_or_npy(path)
    colours = decode_color(source, MAX_PIXELS) if isinstance(source, bytes) else None
    if colours is not None and colours.shape[2] == 3:
        return colours
    with open_with_pillow(source, str(path), MAX_PIXELS, DatasetError) as picture:
        if picture.mode != "RGB" or picture.format in _LOSSY or stored_mode(picture) != "RGB":
            raise DatasetError(
                f"{path}: found {picture.format} with {_channels(picture)}, expected an RGB PNG of 8 bits whose "
                "colours are numbers; write the file again"
            )
        return np.array(upright(picture, str(path)))


def read_panoptic_png(path: str | os.PathLike | File) -> np.ndarray:
    """The segment ids of a COCO panoptic PNG, (H, W) int32: R + 256 G + 65536 B.

    Raises:
        DatasetError: the file is absent, damaged, or not an RGB picture of 8 bits.
    """
    colours = read_rgb_values(path)
    ids = np.zeros((*colours.shape[:2], 4), dtype=np.uint8)
    ids[..., :3] = colours
    return ids.view("<i4")[..., 0].astype(np.int32, copy=False)


def image_size(path: str | os.PathLike | File, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of a picture file in pixels, after EXIF rotation.

    A JPEG, and most PNG files, are not decoded for it. Other formats are, as EXIF data may follow the pixels, or have
    been applied or not before they are read (TIFF).

    Raises:
        ImageError: as `load_image`; damaged pixels of a JPEG or PNG are not noticed.
    """
    source = read_png_or_npy(path)
    if isinstance(source, bytes):
        if source.startswith(npy.SIGNATURE):
            return load_image(source, max_pixels=max_pixels, name=str(path)).shape[:2]
        if (size := read_size(source, max_pixels)) is not None:
            return size
    with open_with_pillow(source, str(path), max_pixels, ImageError) as picture:
        if picture.format != "JPEG":
            picture = upright(picture, str(path))
            return picture.height, picture.width
        turned = orientation(picture, str(path)) in (5, 6, 7, 8)
        return (picture.width, picture.height) if turned else (picture.height, picture.width)


def is_image_name(path: str | os.PathLike) -> bool:
    """Whether a file of this name is taken for a picture when a folder is searched; hidden files are not."""
    name = Path(path).name
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def find_images(inputs: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """The pictures that files, folders (searched recursively) and glob patterns name, sorted, each once.

    A file that is named itself is taken whatever its suffix. In folders and patterns only names that `is_image_name`
    accepts count, and folders named like pictures do not.

    Raises:
        ImageError: an input matches nothing.
    """
    found: set[Path] = set()
    for item in [inputs] if isinstance(inputs, str | os.PathLike) else inputs:
        found.update(_matches(Path(item)))
    return sorted(found)


def _matches(item: Path) -> list[Path]:
    if item.is_file():
        return [item]
    if item.is_dir():
        files, what = list(_walk(item)), "the folder holds no picture"
    elif glob.has_magic(str(item)):
        paths = [Path(path) for path in glob.glob(str(item), recursive=True)]
        files, what = [path for path in paths if is_image_name(path) and path.is_file()], "no picture matches"
    else:
        files, what = [], "no such file or folder"
    if not files:
        raise ImageError(f"{item}: {what}; expected pictures ({' '.join(sorted(IMAGE_SUFFIXES))}); check the path")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """All pictures below a folder; links to folders are followed, each real folder is entered once."""
    entered = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        yield from (Path(parent, file) for file in files if is_image_name(file))


def _label_array(array: np.ndarray, name: str) -> np.ndarray:
    """The numbers in an NPY file, as `read_label_image` gives them."""
    if array.ndim == 3 and 1 in array.shape[::2]:
        array = array.reshape([side for side in array.shape if side > 1] if array.size > 1 else (1, 1))
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "uib":
        raise DatasetError(
            f"{name}: found {array.dtype} of shape {array.shape}, expected whole numbers of shape (H, W); convert it"
        )
    if array.dtype in (np.uint8, np.uint16):
        return np.ascontiguousarray(array)
    limit = np.iinfo(np.int32)
    return np.ascontiguousarray(array.clip(limit.min, limit.max), dtype=np.int32)  # far out of range stays so


def _channels(picture: Image.Image) -> str:
    return {"RGB": "colours (RGB)", "RGBA": "colours (RGBA)"}.get(
        picture.mode, f"pixels of kind {stored_mode(picture)}"
    )


def _colour_array(picture: Image.Image, name: str) -> np.ndarray:
    """Gray as (H, W) where it has more than 8 bits; everything else as (H, W, 3) or, if transparent, (H, W, 4)."""
    picture = upright(picture, name)
    if picture.mode in _WIDE_GRAY:
        array = np.array(picture)
        array = array.astype(array.dtype.newbyteorder("="))
        if picture.mode == "I" and array.min() >= 0 and array.max() < 65536:
            array = array.astype(np.uint16)
        return array
    if picture.has_transparency_data:
        return np.array(picture.convert("RGBA"))
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _from_tensor(tensor: torch.Tensor, max_pixels: int, name: str) -> np.ndarray:
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and tensor.shape[0] not in (1, 3, 4)):
        raise ImageError(
            f"{name}: found shape {tuple(tensor.shape)}, expected (H, W) or (1, 3 or 4, H, W); move the axes"
        )
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    array = tensor.numpy()
    return _from_array(array if array.ndim == 2 else array.transpose(1, 2, 0), max_pixels, name)


def _from_array(array: np.ndarray, max_pixels: int, name: str) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ImageError(
            f"{name}: found shape {array.shape}, expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); move the axes"
        )
    check_size(*array.shape[:2], max_pixels, name, ImageError)
    array = _to_uint8(array, name)
    if array.shape[2] == 4:
        array = _on_white(array)
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return np.require(array, requirements=("C", "W"))


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        largest = int(array.max())
        factor = 1.0 if largest <= 255 else 255 / largest if largest < 32768 else 1 / 257
        return np.rint(array * np.float32(factor)).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"{name}: found {array.dtype} values, expected uint8, uint16, or float in 0..1; convert them")
    if not np.isfinite(array).all():
        count = np.count_nonzero(~np.isfinite(array))
        raise ImageError(f"{name}: {count} values are NaN or infinite, expected numbers in 0..1; mend the picture")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        raise ImageError(f"{name}: float values from {low:g} to {high:g}, expected 0..1; scale them, or store uint8")
    return np.rint(array * np.float32(255)).astype(np.uint8)


def _on_white(array: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 -> (H, W, 3) uint8, composited on white."""
    colour, alpha = array[..., :3], array[..., 3:]
    if alpha.min() == 255:
        return colour
    alpha = alpha.astype(np.float32) / 255
    return np.rint(colour * alpha + 255 * (1 - alpha)).astype(np.uint8)
