"""Pillow, kept in check: only harmless formats, a limit of pixels, and every failure one line that names the file."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Generator

from PIL import Image

from maskwright.data.images import npy, png
from maskwright.data.storage.folders import File
from maskwright.errors import MaskwrightError

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970
"""Largest picture that is decoded, height x width; Pillow's own limit, about 13,377 x 13,377."""

_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "DIB", "PPM", "JPEG2000")
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


@contextlib.contextmanager
def open_with_pillow(source, name: str, max_pixels: int, error_type: type[MaskwrightError]) -> Generator[Image.Image]:
    """The source as a Pillow image whose header has been read; Pillow's complaints become errors and log lines."""
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_size` has a limit of its own
        try:
            with contextlib.nullcontext(source) if isinstance(source, Image.Image) else _open(source) as picture:
                check_size(picture.height, picture.width, max_pixels, name, error_type)
                yield picture
        except MaskwrightError:
            raise
        except Exception as error:  # a damaged file makes Pillow raise almost any type
            raise error_type(f"{name}: {_reason(error, source, max_pixels)}") from None
    for complaint in complaints:
        logger.warning("%s: %s", name, " ".join(str(complaint.message).split()))


def orientation(picture: Image.Image, name: str) -> int:
    """EXIF's number 1..8 for how the stored pixels are turned; 1 where that cannot be read."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception as error:
        logger.warning("%s: the EXIF data is damaged (%s); the picture is taken as it is stored", name, error)
        return 1


def upright(picture: Image.Image, name: str) -> Image.Image:
    """The picture with its pixels read, turned as EXIF says."""
    picture.load()
    method = _UPRIGHT.get(orientation(picture, name))
    return picture if method is None else picture.transpose(method)


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
            source = bytes_or_path(source)
            start = source[:16] if isinstance(source, bytes) else _first_bytes(source)
            found = f"starts with {start!r}" if start else "is empty (0 bytes)"
            return f"{found}, which is not a picture (expected {', '.join(_FORMATS)}); fetch or export the file again"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"damaged or cut off, the pixels cannot be read ({text}); fetch or export the file again"


def _first_bytes(path) -> bytes:
    with open(path, "rb") as file:
        return file.read(16)


def check_size(height: int, width: int, max_pixels: int, name: str, error_type: type[MaskwrightError]) -> None:
    """Raise an error of that type if a picture has more than the allowed pixels, or none."""
    if height * width > max_pixels:
        raise error_type(
            f"{name}: {height} x {width} pixels are more than the limit of {max_pixels:,}; cut the picture into tiles"
        )
    if height * width == 0:
        raise error_type(f"{name}: {height} x {width} pixels, so there is nothing to look at; check where it came from")


def display_name(source) -> str:
    """What errors call a picture that has no other name."""
    if isinstance(source, str | os.PathLike | File):
        return str(source)
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "the given picture"
    return "the given bytes"


def stored_mode(picture: Image.Image) -> str:
    """How the pixels are stored in the file, e.g. "L;4"; must be asked before they are read."""
    tiles = getattr(picture, "tile", None)
    arguments = tiles[0].args if tiles else picture.mode
    return arguments[0] if isinstance(arguments, tuple) else str(arguments)


def _open(source) -> Image.Image:
    source = bytes_or_path(source)
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), formats=_FORMATS)


def bytes_or_path(source):
    """What is not on disk as bytes; a file on disk by its path."""
    if isinstance(source, File):
        return source.name if source.place is None else source.read()
    return source


def read_png_or_npy(source):
    """The bytes of a PNG or NPY file, and of all that is not on disk; anything else as it is."""
    source = bytes_or_path(source)
    if isinstance(source, str | os.PathLike):
        with contextlib.suppress(OSError), open(source, "rb") as file:
            start = file.read(8)
            return start + file.read() if start.startswith((png.SIGNATURE, npy.SIGNATURE)) else source
    return source
