"""Read images as RGB: the rules of training, evaluation and prediction.

Unusual: Pillow decodes, and common PNG files take a faster path (`png`) with equal results. torchvision's
decoders are deprecated since 0.29, and a damaged PNG aborts the whole process. The content of a file decides its
format, not its name, and only harmless formats are tried (Pillow would start Ghostscript for an EPS).

The rules:
    The EXIF orientation is applied, as to label images (`label_images`); damaged EXIF data is ignored with a warning.
    Alpha is composited on white, so hidden colors of transparent pixels do not show. In TIFF, JPEG 2000 and NPY files,
    whose last band is often another measurement, it must look like alpha, or be declared as associated alpha; other
    bands after the colors are ignored with a warning. Alpha of other formats that does not look like it gets a warning.
    9 to 16 bits per channel are scaled by the range of the type, or by the range that a TIFF declares: the same factor
    for all images of a dataset. An image that uses less than half of the range gets a warning.
    Floats must be finite and within 0..1; values that a TIFF declares as no data (GDAL_NODATA) are 0.
    Only the first frame of animations and multi-page files is read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard, Union

import numpy as np
from PIL import Image

from maskwright.data.images import npy, tiff
from maskwright.data.images.png import decode_color, read_size
from maskwright.data.images.safe_pillow import (
    MAX_PIXELS,
    apply_orientation,
    check_size,
    display_name,
    open_with_pillow,
    orientation,
    read_png_or_npy,
    stored_mode,
)
from maskwright.data.images.warn import warn
from maskwright.data.storage.folders import File
from maskwright.errors import ImageError

if TYPE_CHECKING:
    import torch

WIDE_GRAY = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
MAX_BANDS = 16
MAX_UINT16 = 65535
NO_DATA_VALUES = (-9999, -99999, -32768, -3.4028234663852886e38)  # common ones
_ALL_BANDS = "set model.channels={} and model.pixel_mean=measure in the recipe, which use the stored values"
_BANDED = ("TIFF", "JPEG2000")  # formats whose fourth band is often not alpha
_FEW_VALUES = 16

ImageSource = Union[str, os.PathLike, bytes, File, Image.Image, np.ndarray, "torch.Tensor"]


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> np.ndarray:
    """Load an image as (H, W, 3) uint8 RGB, contiguous and writable, with the rules of this module.

    Args:
        source: a file, on disk or in an archive, its bytes, a Pillow image, an array (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4), or a tensor (H, W), (1, H, W), (3, H, W) or (4, H, W). Arrays and tensors: bool, uint8, uint16,
            or float in 0..1.
        max_pixels: larger images are rejected before they are decoded; at most `MAX_PIXELS` for files.
        name: name of the source in errors; default: its path.

    Raises:
        ImageError: the file is missing, not an image, damaged, truncated or too large, or has invalid values.
    """
    if is_tensor(source):
        return _from_tensor(source, max_pixels, name or "the given tensor")
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels, name or "the given array")
    name, source = name or display_name(source), read_png_or_npy(source)
    if isinstance(source, bytes):
        if source.startswith(npy.SIGNATURE):
            array = npy.read_npy(source, 4 * max_pixels, name, ImageError)
            return _from_array(_drop_band(array, name), max_pixels, name)
        if (pixels := decode_color(source, max_pixels)) is not None:
            _warn_about_alpha(pixels, name)
            return _from_array(pixels, max_pixels, name)
    array, max_value = _decode(source, max_pixels, name)
    return _from_array(array, max_pixels, name, max_value)


def count_pages(image: Image.Image) -> int:
    """Return the number of pages or frames of full size; a TIFF may also hold reduced copies of its image."""
    pages = getattr(image, "n_frames", 1)
    if pages == 1 or image.format != "TIFF":
        return pages
    image.seek(1)
    is_copy = tags_of(image).get(tiff.SUBFILE_TAG, 0) != 0
    image.seek(0)
    return 1 if is_copy else pages


def image_size(path: str | os.PathLike | File) -> tuple[int, int]:
    """Return the (height, width) of an image file in pixels, after EXIF rotation.

    JPEG and most PNG files are not decoded. Other formats are, because EXIF data may follow the pixels, or is applied
    only when they are read (TIFF).

    Raises:
        ImageError: as `load_image`, but damaged pixels of a JPEG or PNG are not detected.
    """
    source = read_png_or_npy(path)
    if isinstance(source, bytes):
        if source.startswith(npy.SIGNATURE):
            return load_image(source, name=str(path)).shape[:2]
        if (size := read_size(source, MAX_PIXELS)) is not None:
            return size
    identified = False
    try:
        with open_with_pillow(source, str(path), MAX_PIXELS, ImageError) as image:
            identified = True
            if image.format != "JPEG":
                image = apply_orientation(image, str(path))
                return image.height, image.width
            transposed = orientation(image, str(path)) in (5, 6, 7, 8)
            return (image.width, image.height) if transposed else (image.height, image.width)
    except ImageError:
        if identified or not tiff.is_tiff(source):
            raise
    return load_image(source, name=str(path)).shape[:2]


def _decode(source: Any, max_pixels: int, name: str) -> tuple[np.ndarray, int]:
    """Return the values of a file or Pillow image, and the value of white if they are integers."""
    if not isinstance(source, Image.Image) and tiff.is_tiff(source):
        return _decode_tiff(source, max_pixels, name)
    with open_with_pillow(source, name, max_pixels, ImageError) as image:
        return _pillow_to_array(image, name)


def _decode_tiff(source: Any, max_pixels: int, name: str) -> tuple[np.ndarray, int]:
    """Return the values of a TIFF, and the value of white.

    Pillow reads most kinds. Of colors with 16 bits it keeps 8, and it does not know colors as floats: these are read
    by tifffile, if that supports the compression.
    """
    identified = False
    try:
        with open_with_pillow(source, name, max_pixels, ImageError) as image:
            identified = True
            if not _has_deep_colors(image):
                return _pillow_to_array(image, name)
    except ImageError:
        if identified:
            raise
    try:
        return _read_with_tifffile(source, max_pixels, name)
    except tiff.UnsupportedTiffError as error:
        reason = str(error)
    with open_with_pillow(source, name, max_pixels, ImageError) as image:
        if identified and not _is_planar(image):
            return _pillow_to_array(image, name)
    raise ImageError(reason, where=name, remedy=tiff.UNSUPPORTED_REMEDY)


def _has_deep_colors(image: Image.Image) -> bool:
    tags = tags_of(image)
    return (
        image.mode in ("RGB", "RGBA")
        and max(tags.get(tiff.BITS_TAG, (8,))) > 8
        and tags.get(tiff.EXTRA_SAMPLES_TAG, (0,))[0] != tiff.ASSOCIATED_ALPHA
    )


def _is_planar(image: Image.Image) -> bool:
    return tags_of(image).get(tiff.PLANAR_TAG) == tiff.PLANAR


def tags_of(image: Image.Image) -> Mapping[int, Any]:
    """Return the tags of a TIFF; none for other formats."""
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def _read_with_tifffile(source: Any, max_pixels: int, name: str) -> tuple[np.ndarray, int]:
    found = tiff.read_tiff(source, MAX_BANDS * max_pixels, name)
    values, max_value = found.values, found.max_value or MAX_UINT16
    is_color = found.channel_axis is not None and found.is_rgb
    is_known_type = values.dtype in (np.uint8, np.uint16) or values.dtype.kind == "f"
    if not is_known_type or not (values.ndim == 2 or is_color):
        raise ImageError(
            f"a TIFF of {found.describe()}; expected RGB or gray of 8 or 16 bits, or floats in 0..1",
            where=name,
            remedy=_ALL_BANDS.format(found.channels),
        )
    values = tiff.fill_no_data(values, found.no_data, name)
    if found.channel_axis is None:
        return values, max_value
    values = np.moveaxis(values, found.channel_axis, -1)
    if found.extra[:1] == (tiff.UNASSOCIATED_ALPHA,):
        values = _drop_band(values[..., :4], name)
    elif found.channels > 3:
        warn_about_bands(found.channels, 3, name)
        values = values[..., :3]
    if values.dtype == np.uint16 and max_value == MAX_UINT16:
        _warn_if_dark(values[..., :3], max_value, name)
        values = (values >> 8).astype(np.uint8)  # as Pillow does for other formats
    return values, max_value


def _pillow_to_array(image: Image.Image, name: str) -> tuple[np.ndarray, int]:
    """Return the values of an image, and the value of white.

    Gray with more than 8 bits is (H, W), transparent images are (H, W, 4), and all others (H, W, 3).
    """
    kind, tags = image.format, tags_of(image)
    is_deep = kind in ("PNG", "TIFF") and image.mode in ("LA", "RGB", "RGBA") and "16" in stored_mode(image)
    extra = tags.get(tiff.BANDS_TAG, 0) - len(image.getbands())
    if extra > 0 and image.mode in ("L", "LA", "RGB", "RGBA"):
        warn_about_bands(tags[tiff.BANDS_TAG], len(image.getbands()), name)
    if kind == "TIFF" and (pages := count_pages(image)) > 1:
        warn(
            "pages",
            name,
            f"only the first of {pages} pages is used",
            f"if they are bands of one image, {_ALL_BANDS.format(pages)}",
        )
    image = apply_orientation(image, name)
    if image.mode in WIDE_GRAY:
        array = np.array(image)
        array = array.astype(array.dtype.newbyteorder("="))
        array = tiff.fill_no_data(array, tiff.declared_no_data(tags.get(tiff.NO_DATA_TAG)), name)
        if image.mode == "I" and array.min() >= 0 and array.max() <= MAX_UINT16:
            array = array.astype(np.uint16)
        bits = max(tags.get(tiff.BITS_TAG, (16,)))
        max_value = tiff.declared_max_value(bits, tags.get(tiff.MAX_VALUE_TAG)) or MAX_UINT16
        if array.dtype == np.uint16 and tags.get(tiff.PHOTOMETRIC_TAG) == tiff.WHITE_IS_ZERO:  # Pillow inverts 8 bits
            array = max_value - array.clip(max=max_value)
        return array, max_value
    if image.has_transparency_data:
        array = np.array(image.convert("RGBA"))
        declared = tags.get(tiff.EXTRA_SAMPLES_TAG, (tiff.UNASSOCIATED_ALPHA,))[0] == tiff.ASSOCIATED_ALPHA
        if kind not in _BANDED:
            _warn_about_alpha(array, name)
        elif not declared:
            array = _drop_band(array, name)
    else:
        array = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if is_deep:
        _warn_if_dark(array[..., :3].astype(np.uint16) << 8 | 255, MAX_UINT16, name)
    return array, MAX_UINT16


def _drop_band(array: np.ndarray, name: str) -> np.ndarray:
    """Drop the fourth of four bands unless it looks like alpha."""
    if array.ndim != 3 or array.shape[2] != 4 or _looks_like_alpha(array[..., 3]):
        return array
    warn_about_fourth_band(name)
    return array[..., :3]


def _looks_like_alpha(band: np.ndarray) -> bool:
    """Return True if a band (H, W) of integers or of floats in 0..1 looks like alpha, see `looks_like_alpha`."""
    if band.dtype == np.uint16:
        band = band >> 8
    elif band.dtype != np.uint8:
        band = np.nan_to_num(band * np.float32(255)).clip(0, 255)
    return looks_like_alpha(np.bincount(band.astype(np.uint8).ravel(), minlength=256))


def looks_like_alpha(counts: np.ndarray) -> bool:
    """Return True for the counts of the values 0..255 of an alpha band, False for those of another measurement.

    Some pixels of alpha are opaque, and it has few different values, or two thirds of the visible pixels are opaque.
    """
    few_values = np.count_nonzero(counts) <= _FEW_VALUES
    return bool(counts[255] > 0 and (few_values or 3 * counts[255] >= 2 * counts[1:].sum()))


def _warn_about_alpha(array: np.ndarray, name: str) -> None:
    """Warn about a fourth band of a PNG or the like that does not look like alpha; it is still used as alpha."""
    if array.ndim == 3 and array.shape[2] == 4 and not _looks_like_alpha(array[..., 3]):
        warn(
            "alpha",
            name,
            "its transparency has many different values or no opaque pixel; the image is composited on white by it",
            f"if it is another measurement such as infrared, {_ALL_BANDS.format(4)}",
        )


def warn_about_fourth_band(name: str) -> None:
    """Warn about a band that is marked as alpha and does not look like it."""
    warn(
        "band",
        name,
        "the last band is marked as transparency, but has many different values or no opaque pixel; it is not used",
        f"if it is another measurement such as infrared, {_ALL_BANDS.format(4)}",
    )


def warn_about_bands(bands: int, used: int, name: str) -> None:
    """Warn about bands after the colors."""
    warn("bands", name, f"only the first {used} of {bands} bands are used", f"to use all, {_ALL_BANDS.format(bands)}")


def _warn_if_dark(array: np.ndarray, max_value: int, name: str) -> None:
    """Warn about an image that uses less than half of its range, such as 12 bits stored in 16."""
    largest = int(array.max())
    if not 0 < largest <= max_value // 2:
        return
    bits = max_value.bit_length()
    channels = 1 if array.ndim == 2 else array.shape[2]
    warn(
        "dark",
        name,
        f"only the lowest {max(8, largest.bit_length())} of {bits} bits are used, so the image is dark",
        f"scale the files to {bits} bits, or {_ALL_BANDS.format(channels)}",
    )


def is_tensor(source: object) -> TypeGuard[torch.Tensor]:
    """Return whether a source is a PyTorch tensor. PyTorch is not imported for that."""
    return "torch" in sys.modules and isinstance(source, sys.modules["torch"].Tensor)


def tensor_values(tensor: torch.Tensor) -> np.ndarray:
    """Return the values of a tensor on any device; bfloat16 becomes float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def _from_tensor(tensor: torch.Tensor, max_pixels: int, name: str) -> np.ndarray:
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and tensor.shape[0] not in (1, 3, 4)):
        raise ImageError(
            f"found shape {tuple(tensor.shape)}, expected (H, W) or (1, 3 or 4, H, W)",
            where=name,
            remedy="permute the axes",
        )
    array = tensor_values(tensor)
    return _from_array(array if array.ndim == 2 else array.transpose(1, 2, 0), max_pixels, name)


def _from_array(array: np.ndarray, max_pixels: int, name: str, max_value: int = MAX_UINT16) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ImageError(
            f"found shape {array.shape}, expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)",
            where=name,
            remedy="permute the axes, or set model.channels in the recipe to read other bands",
        )
    check_size(*array.shape[:2], max_pixels, name, ImageError)
    array = _to_uint8(array, name, max_value)
    if array.shape[2] == 4:
        array = _composite_on_white(array)
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return np.require(array, requirements=("C", "W"))


def _to_uint8(array: np.ndarray, name: str, max_value: int) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    channels = array.shape[2]
    if array.dtype == np.uint16:
        _warn_if_dark(array, max_value, name)
        return np.rint(array.clip(max=max_value) * np.float32(255 / max_value)).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(
            f"found {array.dtype} values, expected uint8, uint16, or float in 0..1",
            where=name,
            remedy=f"convert them, or {_ALL_BANDS.format(channels)}",
        )
    if not np.isfinite(array).all():
        count = np.count_nonzero(~np.isfinite(array))
        raise ImageError(
            f"{count} values are NaN or infinite, expected values in 0..1",
            where=name,
            remedy="give pixels without data a value, or declare their value in the tag GDAL_NODATA of a TIFF",
        )
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        no_data = any(np.isclose(low, value) for value in NO_DATA_VALUES)
        hint = "declare the value of pixels without data in the tag GDAL_NODATA, " if no_data else ""
        raise ImageError(
            f"float values from {low:g} to {high:g}, expected 0..1",
            where=name,
            remedy=f"{hint}rescale the values, or {_ALL_BANDS.format(channels)}",
        )
    return np.rint(array * np.float32(255)).astype(np.uint8)


def _composite_on_white(array: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 -> (H, W, 3) uint8."""
    color, alpha = array[..., :3], array[..., 3:]
    if alpha.min() == 255:
        return color
    alpha = alpha.astype(np.float32) / 255
    return np.rint(color * alpha + 255 * (1 - alpha)).astype(np.uint8)
