"""PNG files of the plain kinds, decoded in a third of Pillow's time (palette, gray and bilevel ones in a tenth).

Unusual here: kornia-rs must be told size and kind beforehand, and knows nothing of rotation; so the chunks of the file
are looked through first, and whatever is not plain is left to Pillow, as is everything that turns out to be damaged.
"""

from __future__ import annotations

import struct
import zlib

import kornia_rs.io
import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">IIBBBBB")
_CHUNK = struct.Struct(">I4s")
_GRAY, _RGB, _PALETTE, _RGBA = 0, 2, 3, 6
_MODES = {_GRAY: "mono", _PALETTE: "mono", _RGB: "rgb", _RGBA: "rgba"}
_WITHOUT_EFFECT = (b"PLTE", b"IDAT", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"tIME", b"bKGD", b"sBIT", b"hIST")
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_LONGEST_KEYWORD = 80


def decode_color(data: bytes, max_pixels: int) -> np.ndarray | None:
    """The pixels of an opaque RGB or gray PNG, (H, W, 3) uint8 or (H, W, 1) uint8 or uint16; None for any other file.

    None also where the file is damaged or has more than `max_pixels` pixels: a slower reader says why.
    """
    header = _header(data, max_pixels, transparent=False)
    return _decoded(data, header) if header and header[2:] in ((8, _RGB), (8, _GRAY), (16, _GRAY)) else None


def decode_labels(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Gray values of a PNG of 1, 8 or 16 bits or palette indices of 8, (H, W) uint8 or uint16; None as `decode_color`.

    A bilevel picture holds 0 and 1.
    """
    header = _header(data, max_pixels, transparent=True)
    if header and header[2:] == (1, _GRAY):
        return _decoded_bits(data, *header[:2])
    if not header or header[2:] not in ((8, _GRAY), (8, _PALETTE), (16, _GRAY)):
        return None
    pixels = _decoded(data, header)
    return None if pixels is None else pixels[..., 0]


def decode_channels(data: bytes, max_pixels: int) -> np.ndarray | None:
    """All numbers of a gray, RGB or RGBA PNG, (H, W, C) uint8 or uint16, not composited; None as `decode_color`."""
    header = _header(data, max_pixels, transparent=True)
    wanted = header and header[2] in (8, 16) and header[3] in (_GRAY, _RGB, _RGBA)
    return _decoded(data, header) if header and wanted else None


def read_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """(height, width) of a PNG that nothing turns, whatever its kind; None as `decode_color`, pixels are not read."""
    header = _header(data, max_pixels, transparent=True)
    return header[:2] if header else None


def _header(data: bytes, max_pixels: int, transparent: bool) -> tuple[int, int, int, int] | None:
    """(height, width, bits, kind) if no chunk changes what the stored numbers mean; None otherwise."""
    if data[:8] != SIGNATURE or data[12:16] != b"IHDR" or len(data) < 33:
        return None
    width, height, bits, kind, *_, interlaced = _HEADER.unpack_from(data, 16)
    if interlaced or not 0 < width * height <= max_pixels:
        return None
    place, end = 33, len(data) - _CHUNK.size
    while place <= end:
        length, name = _CHUNK.unpack_from(data, place)
        if name == b"IEND":
            return height, width, bits, kind
        start = place + _CHUNK.size
        if name in _TEXT:
            keyword = data[start : start + min(length, _LONGEST_KEYWORD)].lower()
            if b"exif" in keyword or b"xmp" in keyword or b"app1" in keyword:  # may say how the picture is turned
                return None
        elif name not in _WITHOUT_EFFECT and not (transparent and name == b"tRNS"):
            return None
        place = start + length + 4
    return None


def _decoded(data: bytes, header: tuple[int, int, int, int]) -> np.ndarray | None:
    height, width, bits, kind = header
    decode = kornia_rs.io.decode_image_png_u16 if bits == 16 else kornia_rs.io.decode_image_png_u8
    try:
        return np.asarray(decode(data, (height, width), _MODES[kind]))
    except Exception:  # it raises nothing more special
        return None


def _decoded_bits(data: bytes, height: int, width: int) -> np.ndarray | None:
    """(H, W) uint8 of 0 and 1 from a bilevel PNG, a kind that kornia-rs does not know.

    Eight pixels are a byte, and filters work on bytes: it is stored as a gray picture of an eighth of the width.
    """
    stated, packed_width = data[12:29], -(-width // 8)
    if zlib.crc32(stated).to_bytes(4, "big") != data[29:33]:
        return None
    *_, compression, filters, interlaced = _HEADER.unpack(stated[4:])
    header = b"IHDR" + _HEADER.pack(packed_width, height, 8, _GRAY, compression, filters, interlaced)
    gray = data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
    packed = _decoded(gray, (height, packed_width, 8, _GRAY))
    return None if packed is None else np.unpackbits(packed[..., 0], axis=1, count=width)
