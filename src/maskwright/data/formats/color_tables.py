"""Label images painted in colors: the colors of the classes, from the class list or from a file of the dataset."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from maskwright.config.schema import CategoryConfig
from maskwright.data.storage.folders import File, Folder
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError

Color = tuple[int, int, int]

_BACKGROUND = ("background", "_background_")
_IGNORED = ("__ignore__", "_ignore_")
_TABLES = ("labelmap.txt", "class_names.txt", "class_dict.csv", "label_colors.txt")
_MAX_NAMED = 5  # unknown colors in a message


class ColorTable:
    """The value of each color."""

    def __init__(self, colors: Mapping[Color, int]):
        self._values = np.array([0, *colors.values()], dtype=np.int32)
        self._colors = list(colors)
        self._numbers: np.ndarray | None = None

    def look_up(self, pixels: np.ndarray, file: File) -> np.ndarray:
        """Return the values (H, W) of an image (H, W, 3) that is painted in the colors.

        An image that is gray throughout, and has other colors, is read as values that are stored in three channels.

        Raises:
            DatasetError: a color has no value.
        """
        if self._numbers is None:
            self._numbers = np.zeros(1 << 24, dtype=np.uint16)
            self._numbers[[color_code(color) for color in self._colors]] = np.arange(1, len(self._colors) + 1)
        codes = color_codes(pixels)
        numbers = self._numbers.take(codes)
        if numbers.all():
            return self._values.take(numbers)
        if (pixels[..., :1] == pixels).all():
            return np.ascontiguousarray(pixels[..., 0])
        raise self._unknown(codes[numbers == 0], file)

    def _unknown(self, codes: np.ndarray, file: File) -> DatasetError:
        unknown, counts = np.unique(codes, return_counts=True)
        order = np.argsort(-counts)[:_MAX_NAMED]
        named = ", ".join(str(list(color_of(int(unknown[i])))) for i in order)
        more = ", ..." if len(unknown) > _MAX_NAMED else ""
        classes = "no class has a color" if not self._colors else f"not those of the {len(self._colors)} classes"
        return DatasetError(
            f"a label image painted in colors, of which {len(unknown)} have no class ({named}{more}; {classes})",
            where=file.name,
            remedy="give each class in data.categories its color, like {id: 1, name: road, color: [128, 64, 128]}",
        )


def color_codes(pixels: np.ndarray) -> np.ndarray:
    """Return one number (H, W) int32 for each color of an image (H, W, 3) uint8."""
    wide = pixels.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def color_code(color: Color) -> int:
    """Return the number of a color in `color_codes`."""
    return color[0] << 16 | color[1] << 8 | color[2]


def color_of(code: int) -> Color:
    """Return the color of a number in `color_codes`."""
    return code >> 16, code >> 8 & 255, code & 255


def colors_of_classes(entries: Sequence[CategoryConfig]) -> dict[Color, int]:
    """Return the id of each color in a class list, without colors that several classes have."""
    colors = {entry.color: entry.id for entry in entries if entry.ignore and entry.color is not None}
    classes = [entry for entry in entries if not entry.ignore]
    counts = Counter(entry.color for entry in classes)
    colors |= {entry.color: entry.id for entry in classes if entry.color is not None}
    return {color: value for color, value in colors.items() if counts[color] <= 1}


def read_color_table(root: Folder) -> tuple[CategoryConfig, ...] | None:
    """Return the classes in a file that a tool wrote beside the folders of a dataset; None if there is none.

    Lines are "name:r,g,b:parts:actions" (CVAT), "name" (Labelme), "name,r,g,b", or "r g b name". Classes are numbered
    from 0; "__ignore__" is not counted.

    Raises:
        DatasetError: the file is malformed.
    """
    for name in _TABLES:
        try:
            file = root.file(name, "")
        except DatasetError:
            continue
        return _parsed_table(file)
    return None


def read_value_table(folder: Folder) -> tuple[CategoryConfig, ...]:
    """Return the classes in _classes.csv of Roboflow, "value, name" each; empty if it is not in the folder."""
    file = folder.find_file("_classes.csv")
    lines = read_text(file).splitlines() if file else []
    rows = [match for line in lines if (match := re.fullmatch(r"\s*(\d+)\s*,\s*(.+?)\s*", line))]
    return tuple(CategoryConfig(id=int(row[1]), name=row[2], is_thing=False) for row in rows)


def _parsed_table(file: File) -> tuple[CategoryConfig, ...]:
    lines = [line.strip() for line in read_text(file).splitlines()]
    entries = [_parsed_line(line) for line in lines if line and not line.startswith("#")]
    if file.name.endswith(".csv"):
        entries = [entry for entry in entries if entry[1] is not None]  # not the header
    named = [entry for entry in entries if entry[0] not in _IGNORED]
    try:
        return tuple(
            CategoryConfig(id=number, name=name, is_thing=name.lower() not in _BACKGROUND, color=color)
            for number, (name, color) in enumerate(named)
        )
    except ValueError:
        raise DatasetError("has a color outside 0..255", where=file.name, remedy="correct the file") from None


def _parsed_line(line: str) -> tuple[str, tuple[int, ...] | None]:
    """Return the name and the color of a class."""
    if match := re.fullmatch(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(.+)", line):
        return match[4].strip(), tuple(map(int, match.groups()[:3]))
    if match := re.fullmatch(r"(.+?)\s*[,:]\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*(?::.*)?", line):
        return match[1].strip(), tuple(map(int, match.groups()[1:4]))
    return line.partition(":")[0], None
