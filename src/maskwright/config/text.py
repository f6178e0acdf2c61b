"""Text files in the encodings that editors and tools write: UTF-8, UTF-16, UTF-32, and Windows' cp1252."""

from __future__ import annotations

import codecs
import logging

logger = logging.getLogger(__name__)

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_logged: set[str] = set()


def decode_text(content: bytes, name: str) -> str:
    """Decode UTF-8, UTF-16 (as PowerShell writes it), else cp1252, which is logged once per file.

    Args:
        content: the bytes of the file.
        name: its name in the log.

    Raises:
        UnicodeError: it is not text.
    """
    encoding = _guess_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8" or _is_binary(content):
            raise UnicodeError(f"not a text file ({error.reason} at byte {error.start})") from None
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        raise UnicodeError("neither UTF-8, UTF-16 nor cp1252 text") from None
    if name not in _logged:
        _logged.add(name)
        logger.warning(
            "%s: not UTF-8, so it is read as cp1252 (Western European); save it as UTF-8 if names look wrong", name
        )
    return text


def _guess_encoding(content: bytes) -> str:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return encoding
    start = content[:64]  # the first characters of all formats are ASCII
    if len(start) > 1 and not any(start[1::2]) and all(start[0::2]):
        return "utf-16-le"
    if len(start) > 1 and not any(start[0::2]) and all(start[1::2]):
        return "utf-16-be"
    return "utf-8"


def _is_binary(content: bytes) -> bool:
    return any(byte < 32 and byte not in b"\t\n\r\f\x1a\x1b" for byte in content[:4096])
