"""Images that are read region by region: only the TIFF tiles or strips that a region needs are decoded.

Other formats cannot be entered in the middle (PNG and JPEG are one stream), so they are decoded by `load_image` and
kept in memory with 3 bytes per pixel. The same holds for a TIFF that is rotated, that is not 8-bit RGB, RGBA or gray,
or that has a compression which tifffile does not support by itself (without `imagecodecs`: none, deflate, LZMA,
PackBits).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from functools import cached_property
from typing import Protocol

import numpy as np
import tifffile

from maskwright.data.images.load import (
    ImageSource,
    load_image,
    looks_like_alpha,
    warn_about_bands,
    warn_about_fourth_band,
)
from maskwright.errors import ImageError, one_line

MAX_TILED_PIXELS = 2**31
"""Largest image that is read by regions, height x width: about 46,341 x 46,341."""

_CACHE_BYTES = 128 * 2**20  # of decoded tiles or strips
_MAX_SEGMENT_BYTES = 32 * 2**20  # reading by regions saves nothing with larger tiles or strips
_ORIENTATION_TAG = 274


class ImageReader(Protocol):
    """An RGB image after EXIF rotation whose regions can be read.

    Attributes:
        size: (height, width) in pixels.
        pixels: (H, W, 3) uint8 if the whole image is in memory, else None.
    """

    size: tuple[int, int]
    pixels: np.ndarray | None

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """Return a region as (h, w, 3) uint8, read-only; bottom and right are exclusive."""
        ...


class ArrayImage:
    """An image in memory, with any number of channels."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels: np.ndarray | None = pixels
        self.size = pixels.shape[:2]

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """See `ImageReader`."""
        assert self.pixels is not None
        return self.pixels[top:bottom, left:right]


class TiledTiffImage:
    """A TIFF on disk. Its tiles or strips are decoded on demand, with a cache of the last ones used."""

    def __init__(self, path: str | os.PathLike) -> None:
        """Open a file that `supports_partial_reads`."""
        self.name = str(path)
        self.pixels: np.ndarray | None = None
        self._file = tifffile.TiffFile(path)
        self._page = self._file.pages.first
        self.size = self._page.imagelength, self._page.imagewidth
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """See `ImageReader`.

        Raises:
            ImageError: a tile or strip is damaged.
        """
        height, width = self._page.chunks[:2]
        segments_per_row = -(-self.size[1] // width)
        region = np.empty((bottom - top, right - left, 3), dtype=np.uint8)
        for row in range(top // height, -(-bottom // height)):
            for column in range(left // width, -(-right // width)):
                segment = self._segment(row * segments_per_row + column)
                y0, x0 = max(top, row * height), max(left, column * width)
                y1, x1 = min(bottom, row * height + height), min(right, column * width + width)
                part = segment[y0 - row * height : y1 - row * height, x0 - column * width : x1 - column * width]
                region[y0 - top : y1 - top, x0 - left : x1 - left] = part
        return region

    def _segment(self, index: int) -> np.ndarray:
        """Return a tile or strip, (h, w, 3) uint8."""
        if index not in self._cache:
            bands = _decode_segment(self._page, index, self.name)
            self._cache[index] = load_image(bands if self._has_alpha else bands[..., :3], name=self.name)
            while len(self._cache) > max(1, _CACHE_BYTES // self._cache[index].nbytes):
                self._cache.popitem(last=False)
        self._cache.move_to_end(index)
        return self._cache[index]

    @cached_property
    def _has_alpha(self) -> bool:
        return _has_alpha(self._page, self.name)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_image(source: ImageSource) -> ImageReader:
    """Open anything that `load_image` accepts, for reading by regions.

    Raises:
        ImageError: see `load_image`. A TIFF that is read by regions may have up to `MAX_TILED_PIXELS`, and its damaged
            tiles are detected only when they are read.
    """
    if not isinstance(source, str | os.PathLike) or not supports_partial_reads(source):
        return ArrayImage(load_image(source))
    image = TiledTiffImage(source)
    if image.size[0] * image.size[1] > MAX_TILED_PIXELS:
        image.close()
        raise ImageError(
            f"{image.size[0]} x {image.size[1]} pixels exceed the limit of {MAX_TILED_PIXELS:,}, because the result is "
            "kept in memory",
            where=source,
            remedy="cut the image into several",
        )
    return image


def supports_partial_reads(path: str | os.PathLike) -> bool:
    """Return True if the file is a TIFF that `TiledTiffImage` can read."""
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            has_extra_band = len(page.extrasamples) == 1 and page.extrasamples[0] != tifffile.EXTRASAMPLE.ASSOCALPHA
            is_supported = (
                page.dtype == np.uint8
                and page.bitspersample == 8
                and page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.MINISBLACK)
                and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
                and (page.samplesperpixel in (1, 3) or (page.samplesperpixel == 4 and has_extra_band))
                and page.imagedepth == 1
                and page.tags.valueof(_ORIENTATION_TAG, 1) == 1
            )
            if not is_supported or int(np.prod(page.chunks)) > _MAX_SEGMENT_BYTES:
                return False
            _decode_segment(page, 0, str(path))
            return True
    except Exception:  # not a TIFF, damaged, or an unknown compression: `load_image` reports the reason
        return False


def _has_alpha(page: tifffile.TiffPage, name: str) -> bool:
    """Return True if the fourth of four bands of the whole image looks like alpha, as `load_image` decides it."""
    if page.samplesperpixel != 4 or page.extrasamples[0] != tifffile.EXTRASAMPLE.UNASSALPHA:
        if page.samplesperpixel == 4:
            warn_about_bands(4, 3, name)
        return False
    height, width = page.chunks[:2]
    across = -(-page.imagewidth // width)
    counts = np.zeros(256, dtype=np.int64)
    for index in range(len(page.dataoffsets)):
        row, column = divmod(index, across)
        bands = _decode_segment(page, index, name)[
            : page.imagelength - row * height, : page.imagewidth - column * width
        ]
        if bands.shape[2] == 4:
            counts += np.bincount(bands[..., 3].ravel(), minlength=256)
    if not looks_like_alpha(counts):
        warn_about_fourth_band(name)
        return False
    return True


def _decode_segment(page: tifffile.TiffPage, index: int, name: str) -> np.ndarray:
    """Return the bands of a tile or strip, (h, w, C) uint8; of an empty one, which is not stored, three of 0."""
    try:
        handle = page.parent.filehandle
        handle.seek(page.dataoffsets[index])
        data = handle.read(page.databytecounts[index])
        if len(data) < page.databytecounts[index]:
            raise ValueError("the file is truncated")
        segment, _, _ = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
    except Exception as error:  # decoders raise almost any type for a damaged file
        raise ImageError(
            f"damaged or truncated: tile or strip {index} cannot be read ({one_line(error)})",
            where=name,
            remedy="download or export the file again",
        ) from None
    return np.zeros((*page.chunks[:2], 3), dtype=np.uint8) if segment is None else segment[0]
