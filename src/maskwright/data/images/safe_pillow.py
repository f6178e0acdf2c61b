"""Pillow with harmless formats only, a limit of pixels, and one-line errors that name the file."""

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
from maskwright.errors import MaskwrightError, one_line

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970
"""Largest image that is decoded, height x width: Pillow's own limit, about 13,377 x 13,377."""

_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "DIB", "PPM", "JPEG2000")
_ORIENTATION = 0x0112
_TRANSPOSE = {
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
    """Open a source as a Pillow image, with its header read. Pillow's warnings are logged with the name.

    Raises:
        MaskwrightError: of `error_type`, for any exception of Pillow within the block.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `check_size` has its own limit
        try:
            with contextlib.nullcontext(source) if isinstance(source, Image.Image) else _open(source) as image:
                check_size(image.height, image.width, max_pixels, name, error_type)
                yield image
        except MaskwrightError:
            raise
        except Exception as error:  # Pillow raises almost any type for a damaged file
            found, remedy = _explain(error, source, max_pixels)
            raise error_type(found, where=name, remedy=remedy) from None
    for warning in caught:
        logger.warning("%s: %s", name, " ".join(str(warning.message).split()))


def orientation(image: Image.Image, name: str) -> int:
    """Return the EXIF orientation, 1..8; 1 if it cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:
        logger.warning("%s: damaged EXIF data (%s); the image is not rotated", name, error)
        return 1


def apply_orientation(image: Image.Image, name: str) -> Image.Image:
    """Read the pixels, and rotate the image as EXIF says."""
    image.load()
    method = _TRANSPOSE.get(orientation(image, name))
    return image if method is None else image.transpose(method)


def check_size(height: int, width: int, max_pixels: int, name: str, error_type: type[MaskwrightError]) -> None:
    """Raise `error_type` if an image has no pixels, or more than allowed."""
    if height * width > max_pixels:
        raise error_type(
            f"{height} x {width} pixels exceed the limit of {max_pixels:,}",
            where=name,
            remedy="cut the image into tiles",
        )
    if height * width == 0:
        raise error_type(f"an empty image of {height} x {width} pixels", where=name, remedy="check its origin")


def display_name(source) -> str:
    """Return a name for errors of a source that has none."""
    if isinstance(source, str | os.PathLike | File):
        return str(source)
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "the given image"
    return "the given bytes"


def stored_mode(image: Image.Image) -> str:
    """Return the format of the pixels in the file, such as "L;4". Must be called before they are read."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else image.mode
    return arguments[0] if isinstance(arguments, tuple) else str(arguments)


def bytes_or_path(source):
    """Return the path of a `File` on disk, and the bytes of one in an archive; other sources unchanged."""
    if isinstance(source, File):
        return source.name if source.location is None else source.read()
    return source


def read_png_or_npy(source):
    """Return the bytes of a PNG or NPY file, and of everything that is not on disk; other sources unchanged."""
    source = bytes_or_path(source)
    if isinstance(source, str | os.PathLike):
        with contextlib.suppress(OSError), open(source, "rb") as file:
            start = file.read(8)
            return start + file.read() if start.startswith((png.SIGNATURE, npy.SIGNATURE)) else source
    return source


def _open(source) -> Image.Image:
    source = bytes_or_path(source)
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), formats=_FORMATS)


def _explain(error: Exception, source, max_pixels: int) -> tuple[str, str]:
    """Return what was found, and what to do about it."""
    match error:
        case FileNotFoundError():
            return "no such file", "check the path"
        case IsADirectoryError():
            return "is a folder, expected an image", "name a file in it"
        case PermissionError():
            return "permission denied", "change the permissions of the file"
        case Image.DecompressionBombError():
            limit = min(max_pixels, MAX_PIXELS)
            return f"the header states more pixels than the limit of {limit:,}", "cut the image into tiles"
        case Image.UnidentifiedImageError():
            source = bytes_or_path(source)
            start = source[:16] if isinstance(source, bytes) else _first_bytes(source)
            found = f"starts with {start!r}" if start else "is empty (0 bytes)"
            return f"not an image: {found}, expected {', '.join(_FORMATS)}", "download or export the file again"
    return f"damaged or truncated image ({one_line(error)})", "download or export the file again"


def _first_bytes(path) -> bytes:
    with open(path, "rb") as file:
        return file.read(16)
