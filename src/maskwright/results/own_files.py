"""Recognize result files of earlier predictions: they may be overwritten, and are never read as inputs.

PNGs have the text chunk `Software: maskwright`. JSON files have no room for a mark; they are recognized by their first
bytes, which contain the name of the file, as files for annotation tools are. The table of a ranking is recognized by
its header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import PIL.Image
import PIL.PngImagePlugin

from maskwright.errors import MaskwrightError

RANK_COLUMNS = ("rank", "file", "uncertainty", "distance", "unsure_of")  # of the table that `rank` writes

# First bytes of files for annotation tools.
COCO_MARK = '{"info": {"description": "results of maskwright", "contributor": '
LABELME_MARK = '{"generator": "maskwright", '
TEXT_MARK = "# Written by maskwright.\n"
XML_MARK = "<!-- Written by maskwright. -->\n"
_LABEL_STUDIO_MARK = '[{"predictions": [{"model_version": "maskwright '  # the first entry of a list of tasks
_TOOL_MARKS = tuple(mark.encode() for mark in (COCO_MARK, LABELME_MARK, TEXT_MARK, XML_MARK, _LABEL_STUDIO_MARK))

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SOFTWARE = b"tEXtSoftware\0maskwright"
_MAX_NAME_BYTES = 255  # of a file, on all common file systems


def png_mark() -> PIL.PngImagePlugin.PngInfo:
    """Return the text chunk for Pillow's `save`."""
    mark = PIL.PngImagePlugin.PngInfo()
    mark.add_text("Software", "maskwright")
    return mark


def is_result(path: Path) -> bool:
    """Return True if a file was written by a prediction."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError:
        return False
    if start.startswith(_PNG_SIGNATURE):
        return _SOFTWARE in start[:256]  # Pillow writes text before the pixels
    name = json.dumps(path.stem).encode()
    panoptic = b'{"image_id": ' + name + b', "file_name": ' + json.dumps(f"{path.stem}_panoptic.png").encode()
    table = f"{','.join(RANK_COLUMNS)}\n".encode()
    if start.startswith(_TOOL_MARKS):
        return True
    return start == b"[]\n" or start.startswith((b'[{"image_id": ' + name + b', "category_id": ', panoptic, table))


def check_replaceable(paths: Iterable[Path]) -> None:
    """Check that results can be written to these paths without loss.

    Raises:
        MaskwrightError: a file exists and is not a result of ours, or a name is longer than file systems allow.
    """
    for path in paths:
        size = len(os.fsencode(path.name))
        if size > _MAX_NAME_BYTES:
            raise MaskwrightError(
                f"the name of the result would have {size} bytes, but file systems allow {_MAX_NAME_BYTES}",
                where=path,
                remedy="rename the image",
            )
        if os.path.lexists(path) and not is_result(path):
            raise MaskwrightError(
                "exists, and is not a result of maskwright",
                where=path,
                remedy="choose another output folder, or move it; an early version wrote results without a mark",
            )


def not_replaceable(paths: Iterable[Path]) -> MaskwrightError | None:
    """Return the error of `check_replaceable`, or None."""
    try:
        check_replaceable(paths)
    except MaskwrightError as error:
        return error
    return None
