"""Pictures that are read part by part: of a TIFF only the tiles or strips that a part needs are decoded.

The other formats cannot be entered in the middle (PNG and JPEG are one stream from the first row on), so they are
decoded once, as `load_image` does, and held with 3 bytes per pixel. That also holds for a TIFF whose compression
tifffile cannot undo by itself (without `imagecodecs` it knows none, deflate, LZMA and PackBits), that is turned, or
that is not 8-bit RGB, RGBA or gray.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Protocol

import numpy as np
import tifffile

from maskwright.data.images.load import ImageSource, load_image
from maskwright.errors import ImageError

MAX_TILED_PIXELS = 2**31
"""Largest picture that is read in parts, height x width; about 46,341 x 46,341."""

_CACHED_BYTES = 128 * 2**20  # of decoded tiles or strips
_LARGEST_SEGMENT = 32 * 2**20  # bytes; with larger tiles or strips than this nothing is won


class ImageReader(Protocol):
    """An upright RGB picture that can be asked for its parts.

    Attributes:
        size: (height, width) in pixels.
        pixels: (H, W, 3) uint8, where the whole picture is in memory anyway.
    """

    size: tuple[int, int]
    pixels: np.ndarray | None

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """Rows top..bottom and columns left..right, both ends exclusive, as (h, w, 3) uint8; not to be written to."""
        ...


class ArrayImage:
    """A picture in memory, of any number of channels."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels: np.ndarray | None = pixels
        self.size = pixels.shape[:2]

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """See `ImageReader`."""
        assert self.pixels is not None
        return self.pixels[top:bottom, left:right]


class TiledTiffImage:
    """A TIFF on disk, whose tiles or strips are decoded when they are needed; the last ones used are kept."""

    def __init__(self, path: str | os.PathLike) -> None:
        """Open a file of which `supports_partial_reads` is true."""
        self.name = str(path)
        self.pixels: np.ndarray | None = None
        self._file = tifffile.TiffFile(path)
        self._page = self._file.pages.first
        self.size = self._page.imagelength, self._page.imagewidth
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """See `ImageReader`.

        Raises:
            ImageError: a tile or strip is damaged.
        """
        height, width = self._page.chunks[:2]
        across = -(-self.size[1] // width)
        found = np.empty((bottom - top, right - left, 3), dtype=np.uint8)
        for row in range(top // height, -(-bottom // height)):
            for column in range(left // width, -(-right // width)):
                segment = self._segment(row * across + column)
                y0, x0 = max(top, row * height), max(left, column * width)
                y1, x1 = min(bottom, row * height + height), min(right, column * width + width)
                part = segment[y0 - row * height : y1 - row * height, x0 - column * width : x1 - column * width]
                found[y0 - top : y1 - top, x0 - left : x1 - left] = part
        return found

    def _segment(self, index: int) -> np.ndarray:
        """(h, w, 3) uint8, one tile or strip."""
        if index not in self._decoded:
            self._decoded[index] = _decode(self._page, index, self.name)
            while len(self._decoded) > max(1, _CACHED_BYTES // self._decoded[index].nbytes):
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(index)
        return self._decoded[index]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_image(source: ImageSource) -> ImageReader:
    """A picture to be read in parts, from anything that `load_image` takes.

    Raises:
        ImageError: as `load_image`; of a TIFF that is read in parts, damage shows only when the part is read, and it
            may have up to `MAX_TILED_PIXELS`.
    """
    if not isinstance(source, str | os.PathLike) or not supports_partial_reads(source):
        return ArrayImage(load_image(source))
    picture = TiledTiffImage(source)
    if picture.size[0] * picture.size[1] > MAX_TILED_PIXELS:
        picture.close()
        height, width = picture.size
        raise ImageError(
            f"{source}: {height} x {width} pixels are more than the limit of {MAX_TILED_PIXELS:,}, as the result is "
            "held in memory; cut the picture into several"
        )
    return picture


def supports_partial_reads(path: str | os.PathLike) -> bool:
    """Whether a file is a TIFF of a kind that `TiledTiffImage` reads."""
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            alpha = len(page.extrasamples) == 1 and page.extrasamples[0] == tifffile.EXTRASAMPLE.UNASSALPHA
            usual = (
                page.dtype == np.uint8
                and page.bitspersample == 8
                and page.photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.MINISBLACK)
                and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
                and (page.samplesperpixel in (1, 3) or (page.samplesperpixel == 4 and alpha))
                and page.imagedepth == 1
                and page.tags.valueof(274, 1) == 1  # orientation: as it is stored
            )
            if not usual or int(np.prod(page.chunks)) > _LARGEST_SEGMENT:
                return False
            _decode(page, 0, str(path))
            return True
    except Exception:  # not a TIFF, damaged, or of an unknown compression: `load_image` finds the words
        return False


def _decode(page: tifffile.TiffPage, index: int, name: str) -> np.ndarray:
    try:
        handle = page.parent.filehandle
        handle.seek(page.dataoffsets[index])
        data = handle.read(page.databytecounts[index])
        if len(data) < page.databytecounts[index]:
            raise ValueError("the file is cut off")
        segment, _, _ = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
    except Exception as error:  # a damaged file makes decoders raise almost any type
        text = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"{name}: damaged or cut off, tile or strip {index} cannot be read ({text}); fetch or export the file again"
        ) from None
    if segment is None:  # TIFF's way to say "nothing here"
        return np.zeros((*page.chunks[:2], 3), dtype=np.uint8)
    return load_image(segment[0], name=name)
