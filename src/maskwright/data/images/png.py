"""Fast decoding of common PNG files, in a third of Pillow's time (palette, gray and bilevel files in a tenth).

kornia-rs decodes; without it, all functions that return pixels return None.

Unusual: kornia-rs must be given the size and color type, and ignores rotation. So the chunks of the file are
checked first. All functions return None for a file that needs Pillow, and also for one that is damaged or has more than
`max_pixels` pixels: Pillow then finds the reason.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import numpy as np

try:
    import kornia_rs.io
except ImportError:  # in maskwright-runtime
    kornia_rs = None

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_IHDR = struct.Struct(">IIBBBBB")
_CHUNK = struct.Struct(">I4s")
_GRAY, _RGB, _PALETTE, _RGBA = 0, 2, 3, 6
_MODES = {_GRAY: "mono", _PALETTE: "mono", _RGB: "rgb", _RGBA: "rgba"}
_HARMLESS = (b"PLTE", b"IDAT", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"tIME", b"bKGD", b"sBIT", b"hIST")
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_MAX_KEYWORD_LENGTH = 80


class _Header(NamedTuple):
    height: int
    width: int
    bits: int
    color_type: int

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def format(self) -> tuple[int, int]:
        return self.bits, self.color_type


def decode_color(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Return the pixels of an opaque RGB or gray PNG, (H, W, 3) uint8 or (H, W, 1) uint8 or uint16."""
    header = _read_header(data, max_pixels, allow_transparency=False)
    return _decode(data, header) if header and header.format in ((8, _RGB), (8, _GRAY), (16, _GRAY)) else None


def decode_labels(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Return the values of a gray (1, 8 or 16 bits) or palette PNG (8 bits), (H, W) uint8 or uint16.

    A bilevel image has the values 0 and 1.
    """
    header = _read_header(data, max_pixels, allow_transparency=True)
    if header and header.format == (1, _GRAY):
        return _decode_bilevel(data, header)
    if not header or header.format not in ((8, _GRAY), (8, _PALETTE), (16, _GRAY)):
        return None
    pixels = _decode(data, header)
    return None if pixels is None else pixels[..., 0]


def decode_channels(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Return all stored values of a gray, RGB or RGBA PNG, (H, W, C) uint8 or uint16, without compositing."""
    header = _read_header(data, max_pixels, allow_transparency=True)
    if header and header.bits in (8, 16) and header.color_type in (_GRAY, _RGB, _RGBA):
        return _decode(data, header)
    return None


def read_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Return the (height, width) of a PNG without rotation. The pixels are not decoded."""
    header = _read_header(data, max_pixels, allow_transparency=True)
    return header.size if header else None


def _read_header(data: bytes, max_pixels: int, allow_transparency: bool) -> _Header | None:
    """Return the header if no chunk changes the meaning of the stored values, else None."""
    if data[:8] != SIGNATURE or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, bits, color_type, *_, interlaced = _IHDR.unpack_from(data, 16)
    if interlaced or not 0 < width * height <= max_pixels:
        return None
    position, end = 33, len(data) - _CHUNK.size
    while position <= end:
        length, name = _CHUNK.unpack_from(data, position)
        if name == b"IEND":
            return _Header(height, width, bits, color_type)
        start = position + _CHUNK.size
        if name in _TEXT:
            keyword = data[start : start + min(length, _MAX_KEYWORD_LENGTH)].lower()
            if b"exif" in keyword or b"xmp" in keyword or b"app1" in keyword:  # may contain an orientation
                return None
        elif name not in _HARMLESS and not (allow_transparency and name == b"tRNS"):
            return None
        position = start + length + 4
    return None


def _decode(data: bytes, header: _Header) -> np.ndarray | None:
    if kornia_rs is None:
        return None
    decode = kornia_rs.io.decode_image_png_u16 if header.bits == 16 else kornia_rs.io.decode_image_png_u8
    try:
        return np.asarray(decode(data, header.size, _MODES[header.color_type]))
    except Exception:  # kornia-rs raises no narrower type
        return None


def _decode_bilevel(data: bytes, header: _Header) -> np.ndarray | None:
    """Return (H, W) uint8 of 0 and 1. kornia-rs does not support bilevel images.

    Eight pixels are stored in one byte, and the filters of PNG work on bytes. So the file is decoded as a gray image of
    an eighth of the width.
    """
    ihdr, packed_width = data[12:29], -(-header.width // 8)
    if zlib.crc32(ihdr).to_bytes(4, "big") != data[29:33]:
        return None
    *_, compression, filters, interlaced = _IHDR.unpack(ihdr[4:])
    gray_ihdr = b"IHDR" + _IHDR.pack(packed_width, header.height, 8, _GRAY, compression, filters, interlaced)
    gray = data[:12] + gray_ihdr + zlib.crc32(gray_ihdr).to_bytes(4, "big") + data[33:]
    packed = _decode(gray, _Header(header.height, packed_width, 8, _GRAY))
    return None if packed is None else np.unpackbits(packed[..., 0], axis=1, count=header.width)
