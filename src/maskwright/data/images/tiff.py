"""TIFF files by tifffile: bands of any number and type, and the tags that say what the values mean.

Unusual: many programs write (height, width, channels) into a TIFF without declaring it, so that the file claims
to have many narrow pages. Such arrays are returned as they are declared; `channel_axis` is None.
"""

from __future__ import annotations

import io
import math
import os
from typing import NamedTuple

import numpy as np

from maskwright.data.images.safe_pillow import MAX_PIXELS
from maskwright.data.images.warn import warn
from maskwright.errors import ImageError, one_line

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS_TAG, ORIENTATION_TAG, BANDS_TAG, MAX_VALUE_TAG, EXTRA_SAMPLES_TAG, NO_DATA_TAG = 258, 274, 277, 281, 338, 42113
PLANAR_TAG, PLANAR = 284, 2
COMPRESSION_TAG, JPEG_COMPRESSIONS = 259, (6, 7)
SUBFILE_TAG = 254  # not 0 in reduced copies of an image, and in masks
PHOTOMETRIC_TAG, WHITE_IS_ZERO = 262, 0
ASSOCIATED_ALPHA, UNASSOCIATED_ALPHA = 1, 2
UNSUPPORTED_REMEDY = "install imagecodecs, or save it without rotation and with deflate or no compression"


class Tiff(NamedTuple):
    """The first image of a TIFF.

    Attributes:
        values: as stored, without axes of length 1.
        channel_axis: the axis of the bands, if it is declared.
        is_rgb: whether the first three bands are declared as red, green and blue.
        extra: what the bands after the colors are declared to be, see `ASSOCIATED_ALPHA`.
        max_value: the value of white, if it is declared and is not that of the type.
        no_data: the value of pixels without data, if it is declared.
    """

    values: np.ndarray
    channel_axis: int | None
    is_rgb: bool
    extra: tuple[int, ...]
    max_value: int | None
    no_data: float | None

    @property
    def channels(self) -> int:
        """The number of bands; the shortest axis if no axis is declared."""
        shape = self.values.shape
        return 1 if len(shape) == 2 else shape[self.channel_axis] if self.channel_axis is not None else min(shape)

    def describe(self) -> str:
        """Return the number and type of the bands."""
        return _describe(self.channels, self.values.dtype)


class UnsupportedTiffError(Exception):
    """The file may be fine, but tifffile cannot decompress or does not rotate it; the text says what it is."""


def is_tiff(source: bytes | str | os.PathLike) -> bool:
    """Return True if a path or bytes begin like a TIFF."""
    if isinstance(source, bytes):
        return source.startswith(SIGNATURES)
    try:
        with open(source, "rb") as file:
            return file.read(4) in SIGNATURES
    except OSError:
        return False


def read_tiff(source: bytes | str | os.PathLike, max_values: float, name: str) -> Tiff:
    """Read the first image.

    Raises:
        ImageError: it is damaged, or has more values than allowed, or tifffile is not installed.
        UnsupportedTiffError: it is rotated, or needs `imagecodecs`.
    """
    try:
        import tifffile
    except ImportError:  # in maskwright-runtime
        raise ImageError(
            "a TIFF that needs the package tifffile, which is not installed",
            where=name,
            remedy="pip install tifffile",
        ) from None
    try:
        with tifffile.TiffFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            series = file.series[0]
            page, tags = series.keyframe, series.keyframe.tags
            if math.prod(series.shape) > max_values or page.imagelength * page.imagewidth > MAX_PIXELS:
                raise ImageError(
                    f"{series.shape} values exceed the limit", where=name, remedy="cut the image into tiles"
                )
            if int(tags.valueof(ORIENTATION_TAG, 1)) > 1:
                raise UnsupportedTiffError(f"a rotated TIFF of {_describe(page.samplesperpixel, series.dtype)}")
            array, axes = series.asarray(), series.axes
            kept = [axis for axis, kind in enumerate(axes) if kind in "YX" or array.shape[axis] > 1]
            array = array.reshape([array.shape[axis] for axis in kept])
            channel_axes = [i for i, axis in enumerate(kept) if axes[axis] not in "YX"]
            declared = array.ndim == 3 and len(channel_axes) == 1
            return Tiff(
                array,
                channel_axes[0] if declared else None,
                page.photometric == tifffile.PHOTOMETRIC.RGB,
                tuple(int(kind) for kind in page.extrasamples),
                declared_max_value(int(page.bitspersample), tags.valueof(MAX_VALUE_TAG)),
                declared_no_data(tags.valueof(NO_DATA_TAG)),
            )
    except (ImageError, UnsupportedTiffError):
        raise
    except Exception as error:  # tifffile raises almost any type for a damaged file
        if "imagecodecs" in str(error):
            bands = _describe(page.samplesperpixel, series.dtype)
            raise UnsupportedTiffError(f"a TIFF of {bands} with a compression that is not supported") from None
        raise ImageError(
            f"damaged or truncated TIFF ({one_line(error)})", where=name, remedy="download or export the file again"
        ) from None


def _describe(channels: int, dtype: object) -> str:
    return f"{channels} {'band' if channels == 1 else 'bands'} of {dtype}"


def declared_max_value(bits: int, stated: object) -> int | None:
    """Return the value of white that a file with 9 to 15 of 16 bits declares, else None.

    A maximum counts only if it is 2^n - 1: some programs state that of the image itself.
    """
    if 8 < bits < 16:
        return 2**bits - 1
    values = set(stated) if isinstance(stated, tuple | list) else {stated}
    value = values.pop()
    if values or bits != 16 or not isinstance(value, int) or not 255 < value < 65535 or value & (value + 1):
        return None
    return value


def declared_no_data(text: object) -> float | None:
    """Return the number in the tag GDAL_NODATA."""
    try:
        return float(str(text).strip("\0 "))
    except ValueError:
        return None


def fill_no_data(array: np.ndarray, no_data: float | None, name: str) -> np.ndarray:
    """Set pixels without data to 0 where that is declared; values of 8 bits are left alone."""
    if no_data is None or no_data == 0 or array.dtype == np.uint8 or array.dtype.kind not in "uif":
        return array
    value = np.float32(no_data) if array.dtype == np.float32 else no_data  # -3.4028234663852886e+38 is a text
    missing = np.isnan(array) if math.isnan(no_data) else array == value
    if not missing.any():
        return array
    warn(
        "no data",
        name,
        f"{np.count_nonzero(missing)} values are {no_data:g}, which the file declares as no data (GDAL_NODATA)",
        "they are read as 0",
    )
    return np.where(missing, array.dtype.type(0), array)
