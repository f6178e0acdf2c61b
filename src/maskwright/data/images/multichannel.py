"""Images with 1 to 16 channels and unscaled values, for satellites, microscopes and depth cameras.

Values are not scaled, composited or repeated: the network gets the values of the file, minus `model.pixel_mean` and
divided by `model.pixel_std`, which have the same units. TIFF and NPY files of integers or floats are read, and whatever
Pillow reads (color PNGs with 16 bits by kornia-rs, because Pillow keeps only 8).

Unusual: many programs write (height, width, channels) into a TIFF without declaring it, so that the file seems
to have many narrow pages. If the declared channel axis has another length than the model expects, the axis with the
expected length is used.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from maskwright.data.images import npy, tiff
from maskwright.data.images.load import NO_DATA_VALUES, ImageSource, image_size, is_tensor, load_image, tensor_values
from maskwright.data.images.png import decode_channels
from maskwright.data.images.safe_pillow import (
    MAX_PIXELS,
    apply_orientation,
    check_size,
    display_name,
    open_with_pillow,
    stored_mode,
)
from maskwright.data.images.warn import warn
from maskwright.data.storage.folders import File
from maskwright.errors import ImageError, MaskwrightError, one_line

_MAX_CHANNELS = 16


def load_pixels(source: ImageSource, channels: int | None) -> np.ndarray:
    """Load an image for a model: with `load_image` for `channels` None, else with `load_channels`."""
    return load_image(source) if channels is None else load_channels(source, channels)


def load_channels(
    source: ImageSource, channels: int, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> np.ndarray:
    """Load an image with its stored values, (H, W, C) uint8 for bytes, else float32, after EXIF rotation.

    Args:
        source: a file, on disk or in an archive, its bytes, a Pillow image, an array (H, W), (H, W, C) or (C, H, W), or
            a tensor of these shapes; integers or floats.
        channels: C; any other number of channels is an error.
        max_pixels: larger images are rejected.
        name: name of the source in errors; default: its path.

    Raises:
        ImageError: the file is missing, damaged or not an image, or has another number of channels, or NaN or infinity.
    """
    name = name or display_name(source)
    if is_tensor(source):
        source = tensor_values(source)
    array = source if isinstance(source, np.ndarray) else _read(source, channels, max_pixels, name)
    return _convert(_move_channels_last(array, channels, name), max_pixels, name)


def read_image_size(source: File, channels: int | None) -> tuple[int, int]:
    """Return the (height, width) of an image file in pixels, as read for a model with that many channels.

    Raises:
        ImageError: see `load_pixels`.
    """
    if channels is None:
        return image_size(source)
    height, width, _ = load_channels(source, channels).shape
    return height, width


def count_channels(source: File) -> int | None:
    """Return the number of channels of a file that only `load_channels` reads; None for any other file.

    If the axes of an array are not declared, the shortest one counts as the channels.
    """
    try:
        load_image(source)
    except ImageError:
        try:
            data = source.read()
            array = npy.read_npy(data, MAX_PIXELS, str(source), ImageError) if data.startswith(npy.SIGNATURE) else None
            if array is None and tiff.is_tiff(data):
                array = _read_tiff(data, 0, MAX_PIXELS, str(source))
        except MaskwrightError:
            return None
        if array is None:
            return None
        channels = 1 if array.ndim == 2 else min(array.shape)
        return channels if 0 < channels <= _MAX_CHANNELS else None
    return None


def _read(source, channels: int, max_pixels: int, name: str) -> np.ndarray:
    """Return the values of a source, with the axes in any order."""
    if isinstance(source, Image.Image):
        return _read_with_pillow(source, max_pixels, name)
    data = source if isinstance(source, bytes) else _read_bytes(source, name)
    if data.startswith(npy.SIGNATURE):
        return npy.read_npy(data, max_pixels * channels, name, ImageError)
    if tiff.is_tiff(data):
        return _read_tiff(data, channels, max_pixels, name)
    if (array := decode_channels(data, max_pixels)) is not None:
        return array
    return _read_with_pillow(source, max_pixels, name)


def _read_bytes(source, name: str) -> bytes:
    try:
        return source.read() if isinstance(source, File) else Path(os.fspath(source)).read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read ({one_line(error)})", where=name, remedy="check the path") from None


def _read_tiff(data: bytes, channels: int, max_pixels: int, name: str) -> np.ndarray:
    """Return the first image of a TIFF; the channels are last if the declared channel axis has the expected length."""
    try:
        found = tiff.read_tiff(data, max_pixels * max(channels, 4), name)
    except tiff.UnsupportedTiffError as error:
        reason = str(error)
    else:
        values = tiff.fill_no_data(found.values, found.no_data, name)
        if found.channel_axis is not None and values.shape[found.channel_axis] == channels:
            return np.moveaxis(values, found.channel_axis, -1)
        return values
    try:
        return _read_with_pillow(data, max_pixels, name)
    except ImageError:
        raise ImageError(reason, where=name, remedy=tiff.UNSUPPORTED_REMEDY) from None


def _read_with_pillow(source, max_pixels: int, name: str) -> np.ndarray:
    """Return what Pillow reads, with unchanged values."""
    with open_with_pillow(source, name, max_pixels, ImageError) as image:
        if image.mode in ("RGB", "RGBA") and "16" in stored_mode(image):
            raise ImageError(
                f"a rotated or interlaced {image.format} with 16 bits per color, only 8 of which could be read",
                where=name,
                remedy="save it without rotation and interlacing",
            )
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        no_data = getattr(image, "tag_v2", {}).get(tiff.NO_DATA_TAG) if image.format == "TIFF" else None
        array = np.array(apply_orientation(image, name))
    array = array.astype(array.dtype.newbyteorder("="))
    return tiff.fill_no_data(array, tiff.declared_no_data(no_data), name)


def _move_channels_last(array: np.ndarray, channels: int, name: str) -> np.ndarray:
    """Return (H, W, channels); of several axes with that length, the last one, then the first one."""
    if array.ndim == 2 and channels == 1:
        return array[..., None]
    if array.ndim == 3:
        for axis in (2, 0, 1):
            if array.shape[axis] == channels:
                return np.moveaxis(array, axis, -1)
    found = f"shape {array.shape}" if array.ndim != 2 else "1 channel"
    if array.ndim == 3 and min(array.shape) <= _MAX_CHANNELS:
        found = f"{min(array.shape)} channels (shape {array.shape})"
    raise ImageError(
        f"found {found}, but model.channels is {channels}", where=name, remedy="change model.channels or the image"
    )


def _convert(array: np.ndarray, max_pixels: int, name: str) -> np.ndarray:
    """Check the values, and convert them to uint8 or float32."""
    check_size(*array.shape[:2], max_pixels, name, ImageError)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if array.dtype.kind not in "uif":
        raise ImageError(f"found {array.dtype} values, expected integers or floats", where=name, remedy="convert them")
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            count = np.count_nonzero(~np.isfinite(array))
            raise ImageError(
                f"{count} values are NaN or infinite",
                where=name,
                remedy="give pixels without data a value, or declare it in the tag GDAL_NODATA of a TIFF",
            )
        _warn_about_no_data(array, name)
    return np.require(array, requirements=("C", "W"))


def _warn_about_no_data(array: np.ndarray, name: str) -> None:
    """Warn about values far below zero that programs write for pixels without data."""
    low = array.min()
    if low in np.array(NO_DATA_VALUES, dtype=np.float32):
        warn(
            "undeclared no data",
            name,
            f"{np.count_nonzero(array == low)} values are {low:g}, which often means no data",
            "they are used unchanged: declare the value in the tag GDAL_NODATA of the TIFF, or give them another one",
        )
