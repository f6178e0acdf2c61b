"""Pictures with any number of channels, 1 to 16, as they are stored: satellites, microscopes, depth cameras.

Nothing is scaled, composited or repeated: the network gets the file's own numbers, less `model.pixel_mean` and divided
by `model.pixel_std`, which are in the same units. Read are TIFF and NPY of whole numbers or floats, and whatever Pillow
reads (kornia-rs has the 16 bits of colour PNG files, of which Pillow keeps 8).

Unusual here: many programs write (height, width, channels) into a TIFF without saying so, and it then claims to be many
narrow pages. So where the stated channel axis has another length than the model wants, the axis that has it is taken.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image

from maskwright.data.images import npy
from maskwright.data.images.load import ImageSource, image_size, load_image
from maskwright.data.images.png import decode_channels
from maskwright.data.images.safe_pillow import (
    MAX_PIXELS,
    check_size,
    display_name,
    open_with_pillow,
    stored_mode,
    upright,
)
from maskwright.data.storage.folders import File
from maskwright.errors import ImageError, MaskwrightError

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MOST_CHANNELS = 16
_ORIENTATION = 274  # the tag of a TIFF that says how it is turned


def load_pixels(source: ImageSource, channels: int | None, *, name: str | None = None) -> np.ndarray:
    """A picture as a model wants it: as `load_image` gives it for None, else as `load_channels`."""
    return load_image(source, name=name) if channels is None else load_channels(source, channels, name=name)


def load_channels(
    source: ImageSource, channels: int, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> np.ndarray:
    """A picture with its stored numbers, (H, W, C) uint8 where they are bytes, else float32; upright.

    Args:
        source: a file, also one in an archive, the bytes of one, a Pillow image, an array (H, W), (H, W, C) or
            (C, H, W), or a tensor of these shapes; whole numbers or floats.
        channels: C, which the picture must have.
        max_pixels: larger pictures are refused.
        name: what errors call the source; its path by default.

    Raises:
        ImageError: there is no such file, it is no picture, it is damaged, it has another number of channels, or values
            that are not finite. The message names the file.
    """
    name = name or display_name(source)
    if isinstance(source, torch.Tensor):
        source = (source.float() if source.dtype == torch.bfloat16 else source).detach().cpu().numpy()
    array = source if isinstance(source, np.ndarray) else _stored(source, channels, max_pixels, name)
    return _checked(_channels_last(array, channels, name), max_pixels, name)


def read_image_size(source: File, channels: int | None) -> tuple[int, int]:
    """(height, width) of a picture file in pixels, as a model with that many channels reads it.

    Raises:
        ImageError: as `load_pixels`.
    """
    if channels is None:
        return image_size(source)
    height, width, _ = load_channels(source, channels).shape
    return height, width


def count_channels(source: File) -> int | None:
    """How many channels a picture file has that `load_image` cannot take; None for one that it can, or for no picture.

    Of an array that does not say which of its axes they are, the shortest one is taken.
    """
    try:
        load_image(source)
    except ImageError:
        try:
            data = source.read()
            array = npy.read_npy(data, MAX_PIXELS, str(source), ImageError) if data.startswith(npy.SIGNATURE) else None
            if array is None and data[:4] in _TIFF:
                array = _from_tiff(data, 0, MAX_PIXELS, str(source))
        except MaskwrightError:
            return None
        channels = 1 if array is not None and array.ndim == 2 else min(array.shape) if array is not None else 0
        return channels if 0 < channels <= _MOST_CHANNELS else None
    return None


def _stored(source, channels: int, max_pixels: int, name: str) -> np.ndarray:
    """The numbers in a file, with axes in any order."""
    if isinstance(source, Image.Image):
        return _from_picture(source, max_pixels, name)
    data = source if isinstance(source, bytes) else _bytes_of(source, name)
    if data.startswith(npy.SIGNATURE):
        return npy.read_npy(data, max_pixels * channels, name, ImageError)
    if data[:4] in _TIFF:
        return _from_tiff(data, channels, max_pixels, name)
    if (array := decode_channels(data, max_pixels)) is not None:
        return array
    return _from_picture(data, max_pixels, name)


def _bytes_of(source, name: str) -> bytes:
    try:
        return source.read() if isinstance(source, File) else Path(os.fspath(source)).read_bytes()
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror or error}); check the path") from None


def _from_tiff(data: bytes, channels: int, max_pixels: int, name: str) -> np.ndarray:
    """The first picture of a TIFF, with its channels last where they are those that it states."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series = file.series[0]
            if np.prod(series.shape, dtype=float) > max_pixels * max(channels, 4):
                raise ImageError(f"{name}: {series.shape} values are more than the limit; cut the picture into tiles")
            array, axes = series.asarray(), series.axes
            turned = int(series.keyframe.tags.valueof(_ORIENTATION, 1))
    except ImageError:
        raise
    except Exception as error:  # a damaged file makes it raise almost any type
        if "imagecodecs" in str(error):
            return _tiff_by_pillow(data, max_pixels, name)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: damaged or cut off ({reason}); fetch or export the file again") from None
    if turned > 1:
        return _tiff_by_pillow(data, max_pixels, name)
    kept = [place for place, axis in enumerate(axes) if axis in "YX" or array.shape[place] > 1]
    array = array.reshape([array.shape[place] for place in kept])
    other = [place for place, axis in enumerate(kept) if axes[axis] not in "YX"]
    stated = len(other) == 1 and array.shape[other[0]] == channels
    return np.moveaxis(array, other[0], -1) if stated else array


def _tiff_by_pillow(data: bytes, max_pixels: int, name: str) -> np.ndarray:
    try:
        return _from_picture(data, max_pixels, name)
    except ImageError:
        raise ImageError(
            f"{name}: a TIFF whose compression or rotation cannot be read here; install imagecodecs, or store it "
            "upright, with deflate or without compression"
        ) from None


def _from_picture(source, max_pixels: int, name: str) -> np.ndarray:
    """What Pillow reads, without any change of values."""
    with open_with_pillow(source, name, max_pixels, ImageError) as picture:
        if picture.mode in ("RGB", "RGBA") and "16" in stored_mode(picture):
            raise ImageError(
                f"{name}: 16 bits of colour in a {picture.format} that is turned or interlaced, of which only 8 could "
                "be read; store it plainly"
            )
        if picture.mode in ("P", "PA"):
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        array = np.array(upright(picture, name))
    return array.astype(array.dtype.newbyteorder("="))


def _channels_last(array: np.ndarray, channels: int, name: str) -> np.ndarray:
    """(H, W, channels) from (H, W), or with the axis of that length moved to the end, the last one first."""
    if array.ndim == 2 and channels == 1:
        return array[..., None]
    if array.ndim == 3:
        for axis in (2, 0, 1):
            if array.shape[axis] == channels:
                return np.moveaxis(array, axis, -1)
    found = f"shape {array.shape}" if array.ndim != 2 else "1 channel"
    if array.ndim == 3 and min(array.shape) <= _MOST_CHANNELS:
        found = f"{min(array.shape)} channels (shape {array.shape})"
    raise ImageError(f"{name}: found {found}, but model.channels is {channels}; correct one of them")


def _checked(array: np.ndarray, max_pixels: int, name: str) -> np.ndarray:
    check_size(*array.shape[:2], max_pixels, name, ImageError)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if array.dtype.kind not in "uif":
        raise ImageError(f"{name}: found {array.dtype} values, expected whole numbers or floats; convert them")
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            count = np.count_nonzero(~np.isfinite(array))
            raise ImageError(f"{name}: {count} values are NaN or infinite; give pixels without data a number")
    return np.require(array, requirements=("C", "W"))
