"""Many small images with captions on one large image."""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image
from PIL import ImageDraw, ImageFont

CELL = (320, 240)  # width and height in pixels of the space for one image

_COLUMNS = 4
_GAP = 12
_FONT_SIZE = 13
_LINE = 18


def contact_sheet(images: Sequence[PIL.Image.Image], captions: Sequence[tuple[str, ...]]) -> PIL.Image.Image:
    """Draw images row by row, each fitted into `CELL` and with the same number of lines of text below it.

    Args:
        images: at least one.
        captions: the lines of each image; lines that are too long are shortened in the middle.
    """
    columns = min(_COLUMNS, len(images))
    width, height = CELL[0] + _GAP, CELL[1] + _LINE * max(map(len, captions)) + _GAP
    sheet = PIL.Image.new("RGB", (columns * width + _GAP, -(-len(images) // columns) * height + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for number, (image, lines) in enumerate(zip(images, captions, strict=True)):
        left, top = _GAP + number % columns * width, _GAP + number // columns * height
        small = image.copy()
        small.thumbnail(CELL)
        sheet.paste(small, (left + (CELL[0] - small.width) // 2, top + (CELL[1] - small.height) // 2))
        for line, text in enumerate(lines):
            pen.text((left, top + CELL[1] + line * _LINE + 2), _shorten(text, font), "black", font)
    return sheet


def _shorten(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Return the text, with its middle replaced by dots if it is wider than a cell."""
    text = text.encode("utf-8", "replace").decode()  # names of files need not be valid text
    kept = len(text)
    shown = text
    while font.getlength(shown) > CELL[0] and kept > 2:
        kept -= 1
        shown = f"{text[: kept // 2]}...{text[len(text) - (kept - kept // 2) :]}"
    return shown
