"""Text files of datasets, in the encodings that tools write."""

from __future__ import annotations

import codecs
import logging

from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError

logger = logging.getLogger(__name__)

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(file: File) -> str:
    """Read a text file: UTF-8, UTF-16 (as Windows' PowerShell writes), or else Windows' cp1252, which is logged.

    Raises:
        DatasetError: the file cannot be read, or is not text.
    """
    content = file.read()
    encoding = _guess_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8" or _is_binary(content):
            raise DatasetError(
                f"not a text file ({error.reason} at byte {error.start})", where=file.name, remedy="export it again"
            ) from None
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        raise DatasetError(
            "neither UTF-8, UTF-16 nor cp1252 text", where=file.name, remedy="save the file as UTF-8"
        ) from None
    logger.warning(
        "%s: not UTF-8, so it is read as cp1252 (Western European); save it as UTF-8 if names look wrong", file
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
