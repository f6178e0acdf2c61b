"""Label images: values, or numbers that are encoded as colors, read without changing any.

The EXIF orientation is applied, as `load` applies it to images. Common PNG files take the fast path of `png`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image

from maskwright.data.images import npy, tiff
from maskwright.data.images.load import MAX_BANDS, MAX_UINT16, WIDE_GRAY, count_pages, tags_of
from maskwright.data.images.png import decode_color, decode_labels
from maskwright.data.images.safe_pillow import (
    MAX_PIXELS,
    apply_orientation,
    check_size,
    is_lossless_webp,
    open_with_pillow,
    read_png_or_npy,
    stored_mode,
)
from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError, ImageError

_LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000")
_SCALED_GRAY = {"L;2": 85, "L;2I": 85, "L;4": 17, "L;4I": 17}  # Pillow's factors for gray of 2 and 4 bits
_MAX_INT32 = 2**31 - 128  # the largest float32 that is an int32


def read_label_image(path: str | os.PathLike | File, *, allow_colors: bool = False) -> np.ndarray:
    """Read the values of a label image, (H, W) uint8, uint16 or int32; for a palette PNG the indices.

    Args:
        path: the file.
        allow_colors: return a color image as (H, W, 3) uint8, if it is opaque or its transparent pixels have a color of
            their own.

    Raises:
        DatasetError: the file is missing or damaged, has lossy compression (JPEG), more than one page, colors in place
            of values, or floats that are not whole numbers.
    """
    source = read_png_or_npy(path)
    if isinstance(source, bytes):
        if source.startswith(npy.SIGNATURE):
            return _label_array(npy.read_npy(source, MAX_PIXELS, str(path), DatasetError), str(path))
        if (values := decode_labels(source, MAX_PIXELS)) is not None:
            return values
    identified = False
    try:
        with open_with_pillow(source, str(path), MAX_PIXELS, DatasetError) as image:
            identified = True
            return _label_values(image, source, str(path), allow_colors)
    except DatasetError:
        if identified or not tiff.is_tiff(source):
            raise
    return _label_values_of_tiff(source, str(path), allow_colors)


def _label_values(image: Image.Image, source: Any, name: str, allow_colors: bool) -> np.ndarray:
    """Return the values as they are stored; Pillow scales and inverts some kinds of gray."""
    kind, tags, stored = image.format, tags_of(image), stored_mode(image)
    is_jpeg = tags.get(tiff.COMPRESSION_TAG) in tiff.JPEG_COMPRESSIONS
    if is_jpeg or (kind in _LOSSY and not is_lossless_webp(source)):
        raise DatasetError(
            f"a label image stored as {'TIFF with JPEG' if is_jpeg else kind}, whose lossy compression changes the "
            "values; expected PNG",
            where=name,
            remedy="export the labels again as PNG",
        )
    if (pages := count_pages(image)) > 1:
        raise DatasetError(
            f"has {pages} pages, expected one label image", where=name, remedy="save one image with a value per class"
        )
    if tags.get(tiff.BANDS_TAG, 0) > len(image.getbands()):
        raise _too_many_bands(tags[tiff.BANDS_TAG], name)
    if allow_colors and (pixels := _painted_rgb(image, name)) is not None:
        return pixels
    if image.mode == "LA" and image.getchannel("A").getextrema() == (255, 255):
        image = image.getchannel("L")
    if image.mode not in ("P", "L", "1", *WIDE_GRAY):
        raise DatasetError(
            f"found {_describe_channels(image)} in a label image, expected one value per pixel (palette or gray PNG)",
            where=name,
            remedy="convert the colors to class ids",
        )
    factor = _gray_factor(image, stored)
    array = np.array(apply_orientation(image, name))
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind == "f":
        return _whole_numbers(array, name)
    if stored.startswith("L;") and stored.endswith("I"):  # a TIFF in which white is zero
        array = 255 - array
    return array if factor == 1 else np.rint(array / factor).astype(array.dtype)


def _gray_factor(image: Image.Image, stored: str) -> float:
    """Return what Pillow multiplies gray values by: those of 2 and 4 bits, and of a PGM by its maximum."""
    tiles = getattr(image, "tile", None) if image.format == "PPM" else None
    arguments = tiles[0].args if tiles else None
    if isinstance(arguments, tuple) and isinstance(arguments[-1], int) and image.mode in ("L", "I"):
        return (255 if image.mode == "L" else MAX_UINT16) / arguments[-1]
    return _SCALED_GRAY.get(stored, 1)


def _label_values_of_tiff(source: Any, name: str, allow_colors: bool) -> np.ndarray:
    """Return the values of a TIFF that Pillow does not know, such as whole numbers of 64 bits."""
    try:
        found = tiff.read_tiff(source, MAX_BANDS * MAX_PIXELS, name)
    except ImageError as error:
        raise DatasetError(error.found, where=name, remedy=error.remedy) from None
    except tiff.UnsupportedTiffError as error:
        raise DatasetError(str(error), where=name, remedy=tiff.UNSUPPORTED_REMEDY) from None
    check_size(*found.values.shape[:2], MAX_PIXELS, name, DatasetError)
    if found.channel_axis is None:
        return _label_array(found.values, name)
    if not allow_colors or found.channels != 3 or found.values.dtype != np.uint8:
        raise _too_many_bands(found.channels, name)
    return np.ascontiguousarray(np.moveaxis(found.values, found.channel_axis, -1))


def _too_many_bands(bands: int, name: str) -> DatasetError:
    return DatasetError(
        f"has {bands} bands, expected one value per pixel", where=name, remedy="save the band of the classes alone"
    )


def _whole_numbers(array: np.ndarray, name: str) -> np.ndarray:
    """Convert whole floats to int32; GIS tools store label images as floats."""
    array = array.astype(np.float32) if array.dtype == np.float16 else array  # which has no such large numbers
    with np.errstate(invalid="ignore"):
        is_whole = (array == np.rint(array)) & (np.abs(array) <= _MAX_INT32)
    if not is_whole.all():
        value = array[~is_whole][0]
        raise DatasetError(
            f"found floats in a label image, of which {np.count_nonzero(~is_whole)} are not whole numbers (such as "
            f"{value:g})",
            where=name,
            remedy="store integers, with a value of its own for pixels without data",
        )
    return array.astype(np.int32)


def read_rgb_values(path: str | os.PathLike | File) -> np.ndarray:
    """Read the bytes of an RGB PNG that encodes numbers as colors, (H, W, 3) uint8.

    Raises:
        DatasetError: the file is missing, damaged, or not an opaque RGB PNG with 8 bits.
    """
    source = read_png_or_npy(path)
    pixels = decode_color(source, MAX_PIXELS) if isinstance(source, bytes) else None
    if pixels is not None and pixels.shape[2] == 3:
        return pixels
    with open_with_pillow(source, str(path), MAX_PIXELS, DatasetError) as image:
        is_lossy = image.format in _LOSSY and not is_lossless_webp(source)
        pixels = None if is_lossy else _opaque_rgb(image, str(path))
        if pixels is None:
            raise DatasetError(
                f"found {image.format} with {_describe_channels(image)}, expected an RGB PNG with 8 bits that encodes "
                "numbers as colors",
                where=str(path),
                remedy="write the file again",
            )
        return pixels


def _opaque_rgb(image: Image.Image, name: str) -> np.ndarray | None:
    """Return the pixels of an RGB image with 8 bits, also of one with an alpha of 255 everywhere; None for others."""
    if image.mode not in ("RGB", "RGBA") or ";16" in stored_mode(image):
        return None
    pixels = np.array(apply_orientation(image, name))
    if image.mode == "RGBA" and pixels[..., 3].min() < 255:
        return None
    return np.ascontiguousarray(pixels[..., :3])


def _painted_rgb(image: Image.Image, name: str) -> np.ndarray | None:
    """Return the pixels of a label image in colors; transparent ones may have a color that no other pixel has."""
    if (pixels := _opaque_rgb(image, name)) is not None or image.mode != "RGBA" or ";16" in stored_mode(image):
        return pixels
    rgba = np.array(apply_orientation(image, name))
    colors, alpha = rgba[..., :3], rgba[..., 3]
    hidden, visible = (np.unique(colors[alpha == value], axis=0) for value in (0, 255))
    is_cut_out = np.isin(alpha, (0, 255)).all() and len(hidden) == 1
    return np.ascontiguousarray(colors) if is_cut_out and not (visible == hidden).all(1).any() else None


def read_panoptic_png(path: str | os.PathLike | File) -> np.ndarray:
    """Read the segment ids of a COCO panoptic PNG, (H, W) int32: R + 256 G + 65536 B.

    Raises:
        DatasetError: the file is missing, damaged, or not an RGB image with 8 bits.
    """
    pixels = read_rgb_values(path)
    ids = np.zeros((*pixels.shape[:2], 4), dtype=np.uint8)
    ids[..., :3] = pixels
    return ids.view("<i4")[..., 0].astype(np.int32, copy=False)


def _label_array(array: np.ndarray, name: str) -> np.ndarray:
    """Convert an array from an NPY file to a label image."""
    if array.ndim == 3 and 1 in array.shape[::2]:
        array = array.reshape([side for side in array.shape if side > 1] if array.size > 1 else (1, 1))
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "uibf":
        raise DatasetError(
            f"found {array.dtype} of shape {array.shape}, expected integers of shape (H, W)",
            where=name,
            remedy="convert the array",
        )
    if array.dtype.kind == "f":
        return _whole_numbers(array, name)
    if array.dtype in (np.uint8, np.uint16):
        return np.ascontiguousarray(array)
    limit = np.iinfo(np.int32)  # clipped values are still not a class id, and are reported as such
    return np.ascontiguousarray(array.clip(limit.min, limit.max), dtype=np.int32)


def _describe_channels(image: Image.Image) -> str:
    return {"RGB": "colors (RGB)", "RGBA": "colors (RGBA)"}.get(image.mode, f"pixels of type {stored_mode(image)}")
