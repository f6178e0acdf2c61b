"""Pillow with harmless formats only, a limit of pixels, and one-line errors that name the file."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import warnings
from collections.abc import Generator
from contextvars import ContextVar
from typing import BinaryIO

from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from maskwright.data.images import npy, png
from maskwright.data.storage.folders import File
from maskwright.errors import MaskwrightError, one_line

logger = logging.getLogger(__name__)

MAX_PIXELS = 178_956_970
"""Largest image that is decoded, height x width: Pillow's own limit, about 13,377 x 13,377."""

_FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "DIB", "PPM", "JPEG2000")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_SIGNATURES = (  # of contents that images are mistaken for
    ("JPEG", (b"\xff\xd8\xff",)),
    ("PNG", (b"\x89PNG\r\n\x1a\n",)),
    ("TIFF", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("GIF", (b"GIF8",)),
    ("JPEG2000", (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")),
    ("a PDF document", (b"%PDF",)),
    ("PostScript", (b"%!",)),
    ("a web page", (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML")),
    ("XML or SVG", (b"<?xml", b"<svg")),
    ("a zip archive", (b"PK\x03\x04",)),
    ("a pointer of Git LFS to the file, which was not fetched", (b"version https://git-lfs",)),
    ("HDF5", (b"\x89HDF",)),
)
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


class _PillowWarnings:
    """Replaces the module `warnings` inside Pillow: warnings about an image that is read here are logged with its name.

    `warnings.catch_warnings` would do that too, but for the warnings of all threads.
    """

    def __init__(self) -> None:
        self.name: ContextVar[str | None] = ContextVar("name", default=None)

    def warn(self, message: Warning | str, category: type[Warning] | None = None, stacklevel: int = 1) -> None:
        name = self.name.get()
        if name is None:
            warnings.warn(message, category, stacklevel + 1)
        elif category is not Image.DecompressionBombWarning:  # `check_size` has its own limit
            logger.warning("%s: %s", name, " ".join(str(message).split()))

    def __getattr__(self, attribute: str) -> object:
        return getattr(warnings, attribute)


_pillow_warnings = _PillowWarnings()


@contextlib.contextmanager
def _logging_warnings(name: str) -> Generator[None]:
    """Log Pillow's warnings with this name inside the block, in this thread."""
    for module in (Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin):
        module.warnings = _pillow_warnings  # ty: ignore[invalid-assignment]
    token = _pillow_warnings.name.set(name)
    try:
        yield
    finally:
        _pillow_warnings.name.reset(token)


@contextlib.contextmanager
def open_with_pillow(source, name: str, max_pixels: int, error_type: type[MaskwrightError]) -> Generator[Image.Image]:
    """Open a source as a Pillow image, with its header read. Pillow's warnings are logged with the name.

    Raises:
        MaskwrightError: of `error_type`, for any exception of Pillow within the block.
    """
    with _logging_warnings(name):
        try:
            with contextlib.nullcontext(source) if isinstance(source, Image.Image) else _open(source) as image:
                check_size(image.height, image.width, max_pixels, name, error_type)
                yield image
        except MaskwrightError:
            raise
        except Exception as error:  # Pillow raises almost any type for a damaged file
            found, remedy = _explain(error, source, max_pixels)
            raise error_type(found, where=name, remedy=remedy) from None


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
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def bytes_or_path(source):
    """Return the path of a `File` on disk, and the bytes of any other `File`; other sources unchanged."""
    if isinstance(source, File):
        return source.name if source.is_on_disk else source.read()
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
    formats = (*_FORMATS, "HEIF") if _is_heic(_first_bytes(source)) and _has_heic() else _FORMATS
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), formats=formats)


@functools.cache
def _has_heic() -> bool:
    """Return True if `pillow-heif` is installed, and register it with Pillow."""
    try:
        from pillow_heif import register_heif_opener  # ty: ignore[import-not-found]
    except ImportError:
        return False
    register_heif_opener()
    return True


def _is_heic(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS


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
            return _explain_content(_first_bytes(bytes_or_path(source)))
    return f"damaged or truncated image ({one_line(error)})", "download or export the file again"


def _explain_content(start: bytes) -> tuple[str, str]:
    """Explain a file that Pillow does not know.

    Its first bytes are not shown: a link, a path in an annotation file or an archive may lead to any file.
    """
    if _is_heic(start) and not _has_heic():
        return "a HEIC image, which needs the package pillow-heif", "run: pip install 'maskwright[heic]'"
    if not start:
        return "not an image: is empty (0 bytes)", "download or export the file again"
    found = next((kind for kind, signatures in _SIGNATURES if start.startswith(signatures)), None)
    if start[4:8] == b"ftyp":
        found = "a video, or an image of the AVIF or HEIC kind"
    if found in _FORMATS:
        return f"a {found} file that is damaged or of an unsupported kind", "export the file again"
    return (
        f"not an image: {found or 'unknown content'}, expected {', '.join(_FORMATS)}",
        "download or export the file again",
    )


def _first_bytes(source) -> bytes:
    if isinstance(source, bytes):
        return source[:64]
    try:
        with open(source, "rb") as file:
            return file.read(64)
    except OSError:
        return b""


def is_lossless_webp(source) -> bool:
    """Return True for the bytes or the path of a WebP image without lossy compression (chunk VP8L) or animation."""
    if isinstance(source, bytes):
        return _has_lossless_chunk(io.BytesIO(source))
    with contextlib.suppress(OSError), open(source, "rb") as file:
        return _has_lossless_chunk(file)
    return False


def _has_lossless_chunk(file: BinaryIO) -> bool:
    start = file.read(12)
    if start[:4] != b"RIFF" or start[8:] != b"WEBP":
        return False
    while len(header := file.read(8)) == 8:
        name, size = header[:4], int.from_bytes(header[4:], "little")
        if name in (b"VP8L", b"VP8 ", b"ANIM"):
            return name == b"VP8L"
        file.seek(size + size % 2, os.SEEK_CUR)
    return False
