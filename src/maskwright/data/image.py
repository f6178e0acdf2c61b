"""Pictures and label pictures in, arrays out: one reading rule for training, evaluation, prediction and serving.

Unusual here: Pillow alone decodes. torchvision's decoders are deprecated since 0.29 and end the whole process on a
damaged PNG; the time they would save is below one millisecond for a picture of 640 x 480. Content decides what a file
is, never its name, and only harmless formats are tried (Pillow would start Ghostscript for an EPS).

The rules:
    EXIF orientation is applied, to pictures and label pictures alike; damaged EXIF data is ignored with a warning.
    Alpha is composited on white, so colours hidden below transparent pixels never show.
    16 bits per channel: RGB keeps the upper byte. Gray (and uint16 arrays): values up to 255 stay; below 32768 the
    largest becomes 255, as for 10, 12 and 14 bit sensors; else value / 257.
    Floats must be finite and lie in 0..1.
    Of animations and multi-page files the first frame is read.
"""

from __future__ import annotations

import contextlib
import glob
import io
import logging
import os
import warnings
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from maskwright.errors import DatasetError, ImageError, MaskwrightError

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970
"""Largest picture that is decoded, height x width; Pillow's own limit, about 13,377 x 13,377."""

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".jp2", ".j2k"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "DIB", "PPM", "JPEG2000")
_LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000")
_WIDE_GRAY = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SCALED_GRAY = {"L;2": 85, "L;4": 17}

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray | torch.Tensor


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB, contiguous and writable, upright; the module's header has the rules.

    Args:
        source: a file, the bytes of one, a Pillow image, an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a
            tensor (H, W), (1, H, W), (3, H, W) or (4, H, W). Arrays and tensors: bool, uint8, uint16, or float in 0..1.
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
    name = name or _name(source)
    with _opened(source, name, max_pixels, ImageError) as picture:
        return _from_array(_colour_array(picture, name), max_pixels, name)


def read_label(path: str | os.PathLike) -> np.ndarray:
    """The numbers in a label picture, (H, W) uint8, uint16 or int32; of a palette PNG its indices.

    Raises:
        DatasetError: the file is absent or damaged, is stored with loss (JPEG), or holds colours in place of numbers.
    """
    with _opened(path, str(path), MAX_PIXELS, DatasetError) as picture:
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
        factor = _SCALED_GRAY.get(_raw_mode(picture), 1)
        array = np.array(_upright(picture, str(path)))
    return array.astype(np.uint8) if array.dtype == bool else array // factor if factor > 1 else array


def read_id_png(path: str | os.PathLike) -> np.ndarray:
    """The segment ids of a COCO panoptic PNG, (H, W) int32: R + 256 G + 65536 B.

    Raises:
        DatasetError: the file is absent, damaged, or not an RGB picture of 8 bits.
    """
    with _opened(path, str(path), MAX_PIXELS, DatasetError) as picture:
        if picture.mode != "RGB" or picture.format in _LOSSY or _raw_mode(picture) != "RGB":
            raise DatasetError(
                f"{path}: found {picture.format} with {_channels(picture)}, expected an RGB PNG of 8 bits whose colour "
                "is the segment id (R + 256 G + 65536 B); write the panoptic PNG again"
            )
        colours = np.asarray(_upright(picture, str(path)))
    ids = colours[..., 0].astype(np.int32)
    ids += colours[..., 1].astype(np.int32) << 8
    ids += colours[..., 2].astype(np.int32) << 16
    return ids


def image_size(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of a picture file in pixels, after EXIF rotation.

    Of a JPEG only the header is read. Other formats are decoded, as EXIF data may follow the pixels (PNG), or have been
    applied or not before they are read (TIFF).

    Raises:
        ImageError: as `load_image`; damaged pixels of a JPEG are not noticed.
    """
    with _opened(path, str(path), max_pixels, ImageError) as picture:
        if picture.format != "JPEG":
            picture = _upright(picture, str(path))
            return picture.height, picture.width
        turned = _orientation(picture, str(path)) in (5, 6, 7, 8)
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


@contextlib.contextmanager
def _opened(source, name: str, max_pixels: int, error_type: type[MaskwrightError]) -> Generator[Image.Image]:
    """The source as a Pillow image whose header has been read; Pillow's complaints become errors and log lines."""
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        try:
            with contextlib.nullcontext(source) if isinstance(source, Image.Image) else _open(source) as picture:
                _check_size(picture.height, picture.width, max_pixels, name, error_type)
                yield picture
        except MaskwrightError:
            raise
        except Exception as error:  # a damaged file makes Pillow raise almost any type
            raise error_type(f"{name}: {_reason(error, source, max_pixels)}") from None
    for complaint in complaints:
        logger.warning("%s: %s", name, " ".join(str(complaint.message).split()))


def _open(source) -> Image.Image:
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), formats=_FORMATS)


def _reason(error: Exception, source, max_pixels: int) -> str:
    match error:
        case FileNotFoundError():
            return "no such file; check the path"
        case IsADirectoryError():
            return "is a folder, expected a picture; name a file in it"
        case PermissionError():
            return "may not be read; change its permissions"
        case Image.DecompressionBombError():
            limit = min(max_pixels, MAX_PIXELS)
            return f"the header states more pixels than the limit of {limit:,}; cut the picture into tiles"
        case Image.UnidentifiedImageError():
            start = source[:16] if isinstance(source, bytes) else _first_bytes(source)
            found = f"starts with {start!r}" if start else "is empty (0 bytes)"
            return f"{found}, which is not a picture (expected {', '.join(_FORMATS)}); fetch or export the file again"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"damaged or cut off, the pixels cannot be read ({text}); fetch or export the file again"


def _first_bytes(path) -> bytes:
    with open(path, "rb") as file:
        return file.read(16)


def _check_size(height: int, width: int, max_pixels: int, name: str, error_type: type[MaskwrightError]) -> None:
    if height * width > max_pixels:
        raise error_type(
            f"{name}: {height} x {width} pixels are more than the limit of {max_pixels:,}; cut the picture into tiles"
        )
    if height * width == 0:
        raise error_type(f"{name}: {height} x {width} pixels, so there is nothing to look at; check where it came from")


def _name(source) -> str:
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "the given picture"
    return "the given bytes"


def _raw_mode(picture: Image.Image) -> str:
    """How the pixels are stored in the file, e.g. "L;4"; must be asked before they are read."""
    tiles = getattr(picture, "tile", None)
    arguments = tiles[0].args if tiles else picture.mode
    return arguments[0] if isinstance(arguments, tuple) else str(arguments)


def _channels(picture: Image.Image) -> str:
    return {"RGB": "colours (RGB)", "RGBA": "colours (RGBA)"}.get(picture.mode, f"pixels of kind {_raw_mode(picture)}")


def _orientation(picture: Image.Image, name: str) -> int:
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception as error:
        logger.warning("%s: the EXIF data is damaged (%s); the picture is taken as it is stored", name, error)
        return 1


def _upright(picture: Image.Image, name: str) -> Image.Image:
    picture.load()
    method = _UPRIGHT.get(_orientation(picture, name))
    return picture if method is None else picture.transpose(method)


def _colour_array(picture: Image.Image, name: str) -> np.ndarray:
    """Gray as (H, W) where it has more than 8 bits; everything else as (H, W, 3) or, if transparent, (H, W, 4)."""
    picture = _upright(picture, name)
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
    _check_size(*array.shape[:2], max_pixels, name, ImageError)
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
