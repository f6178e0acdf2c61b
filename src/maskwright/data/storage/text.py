"""Text files of datasets."""

from __future__ import annotations

from maskwright.config.text import decode_text
from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError


def read_text(file: File) -> str:
    """Read a text file in any of the encodings that `decode_text` knows.

    Raises:
        DatasetError: the file cannot be read, or is not text.
    """
    try:
        return decode_text(file.read(), file.name)
    except UnicodeError as error:
        raise DatasetError(str(error), where=file.name, remedy="export it again, or save it as UTF-8") from None
