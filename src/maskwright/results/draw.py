"""Pictures for people: a segmentation over its image, training curves, and the report of a run.

Every overlay is painted through one lookup table: the segments become one map of small numbers, each number has a
colour and an opacity, and a single blend does the rest, for three hundred segments at the cost of three. The report is
one HTML file that opens offline: its page is `report.html` beside this file, filled in here.
"""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

from maskwright.results.display import displayable
from maskwright.results.mask_runs import paint_runs
from maskwright.results.rle import number_map

if TYPE_CHECKING:
    from maskwright.results.segmentation import Segmentation

GOLDEN = 0.618034  # steps of the golden section spread hues so that near neighbours in a list differ most
MOST_LABELS = 40  # more than that cannot be read in one picture
BAND = 2**20  # pixels that are blended together


def overlay(
    segmentation: Segmentation,
    image: np.ndarray | PIL.Image.Image | None = None,
    alpha: float = 0.5,
    least_score: float = 0.3,
) -> PIL.Image.Image:
    """The segments painted over the image, with names and scores where they fit.

    Semantic: the colours of the classes. Panoptic: the same, but the segments of one thing class differ in shade.
    Instance: every instance has its own colour; where two overlap the higher score lies on top. Both are outlined.

    Args:
        segmentation: what is painted; without segments the image comes back unchanged.
        image: (H, W, 3) RGB or (H, W) gray, uint8, of the segmentation's size; None takes `segmentation.image`, made
            visible where it has other channels.
        alpha: opacity of the segments, 0..1.
        least_score: instances below it are left out, since a model always names its best `top_k`, however weak.

    Raises:
        ValueError: there is no image, its shape does not fit, or alpha is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected 0..1")
    if image is None and segmentation.image is not None:
        image = displayable(segmentation.image)
    pixels = _pixels(image, segmentation.size)
    segment_numbers = _number_map(segmentation, least_score)
    contours = segmentation.task != "semantic"
    picture = PIL.Image.fromarray(_blend(pixels, segment_numbers, _colors(segmentation), alpha, contours))
    _write_labels(picture, segmentation, segment_numbers)
    return picture


def _pixels(image: np.ndarray | PIL.Image.Image | None, size: tuple[int, int]) -> np.ndarray:
    """The image as (H, W, 3) uint8 RGB, checked."""
    if image is None:
        raise ValueError("this result holds no image to paint over, expected one of its size. Pass it: overlay(image)")
    pixels = np.asarray(image.convert("RGB") if isinstance(image, PIL.Image.Image) else image)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape != (*size, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"the image is {pixels.shape} {pixels.dtype}, but the segments need ({size[0]}, {size[1]}, 3) uint8. "
            "Pass the image that was segmented, at its original size"
        )
    return pixels


def _number_map(segmentation: Segmentation, least_score: float) -> np.ndarray:
    """(H, W) int32: 0 is bare, n is segment number n-1; overlapping instances go by score."""
    if segmentation.task != "instance":
        return number_map(segmentation)
    numbers = np.zeros(segmentation.size, np.int32)
    scores = np.ones(len(segmentation)) if segmentation.scores is None else segmentation.scores
    boxes = segmentation.boxes.astype(int)
    for i in np.argsort(scores, kind="stable"):
        if scores[i] >= least_score:
            x0, y0, x1, y1 = boxes[i]
            if segmentation.instance_runs is not None:
                mask = paint_runs(segmentation.instance_runs[i], (y0, x0, y1, x1), segmentation.size[0])
            else:
                mask = segmentation.masks[i, y0:y1, x0:x1]
            numbers[y0:y1, x0:x1][mask] = i + 1
    return numbers


def _colors(segmentation: Segmentation) -> np.ndarray:
    """(N, 3) uint8 RGB, one colour per segment."""
    colors, seen = np.zeros((len(segmentation), 3), np.uint8), {}
    for i, label in enumerate(segmentation.labels.tolist()):
        category = segmentation.categories[label]
        number = seen[label] = seen.get(label, -1) + 1
        if segmentation.task == "instance":
            colors[i] = _distinct(i)
        elif segmentation.task == "panoptic" and category.is_thing:
            colors[i] = _shade(category.color, number)
        else:
            colors[i] = category.color
    return colors


def _distinct(number: int) -> tuple[int, int, int]:
    """Colour `number` of an endless list of vivid ones."""
    return _rgb(0.58 + number * GOLDEN, (0.85, 0.62, 1.0)[number % 3], (1.0, 0.85)[number // 3 % 2])


def _shade(color: tuple[int, int, int], number: int) -> tuple[int, int, int]:
    """The class's own colour for number 0, then neighbours of it in hue, strength and brightness."""
    if number == 0:
        return color
    hue, strength, brightness = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
    sway = number * GOLDEN % 1 - 0.5
    step = (0.75, 1.0, 0.85, 0.65)[number % 4]
    return _rgb(hue + 0.16 * sway, max(0.35, strength * (1 - 0.4 * abs(sway))), max(0.4, brightness) * step)


def _rgb(hue: float, strength: float, brightness: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, strength, brightness)
    return round(255 * red), round(255 * green), round(255 * blue)


def _blend(pixels: np.ndarray, numbers: np.ndarray, colors: np.ndarray, alpha: float, contours: bool) -> np.ndarray:
    """(H, W, 3) uint8. The table holds bare, the segments' insides, bare again, and the segments' contours."""
    count = len(colors) + 1
    weights = np.zeros(2 * count, np.uint16)  # of 256
    weights[1:count], weights[count + 1 :] = round(256 * alpha), 256
    paint = np.zeros((2 * count, 3), np.uint16)
    paint[1:count] = paint[count + 1 :] = colors
    paint *= weights[:, None]
    blended, height = np.empty_like(pixels), max(1, BAND // max(1, numbers.shape[1]))
    for start in range(0, len(numbers), height):
        band, above = slice(start, start + height), min(start, 1)
        entries = numbers[band].astype(np.int64)
        if contours:
            edges = _edges(numbers[start - above : start + height + 1])[above:]
            entries += count * edges[: len(entries)]
        blended[band] = (pixels[band] * (256 - weights[entries])[..., None] + paint[entries]) >> 8
    return blended


def _edges(numbers: np.ndarray) -> np.ndarray:
    """(H, W) bool: painted pixels that touch another segment or a bare pixel."""
    edges = np.zeros(numbers.shape, bool)
    across, down = numbers[:, 1:] != numbers[:, :-1], numbers[1:] != numbers[:-1]
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    return edges & (numbers > 0)


def _write_labels(picture: PIL.Image.Image, segmentation: Segmentation, numbers: np.ndarray) -> None:
    """Write names into the largest segments, in place, where the text lies mostly inside and the place is free."""
    font_size = max(11, min(picture.size) // 42)  # pixels
    font = ImageFont.load_default(font_size)
    pen = ImageDraw.Draw(picture, "RGBA")
    step = max(1, max(numbers.shape) // 256)  # places are sought on a coarse map
    coarse = numbers[::step, ::step]
    areas = np.bincount(coarse.ravel(), minlength=len(segmentation) + 1)[1:] * step**2
    taken: list[tuple[float, float, float, float]] = []
    for i in np.argsort(-areas, kind="stable")[:MOST_LABELS]:
        if areas[i] < 4 * font_size**2:
            break
        inside = coarse == i + 1
        for text in _texts(segmentation, i):
            width, height = font.getlength(text) + 6, 1.3 * font_size
            place = _roomiest(inside, height / step, width / step)
            if place is None:
                continue
            x, y = place[1] * step - width / 2, place[0] * step - height / 2
            x, y = max(0, min(x, picture.width - width)), max(0, min(y, picture.height - height))
            if any(x < x1 and x0 < x + width and y < y1 and y0 < y + height for x0, y0, x1, y1 in taken):
                continue
            taken.append((x, y, x + width, y + height))
            pen.rounded_rectangle(taken[-1], 3, fill=(0, 0, 0, 160))
            pen.text((x + width / 2, y + height / 2), text, "white", font, anchor="mm")
            break


def _roomiest(inside: np.ndarray, height: float, width: float) -> tuple[float, float] | None:
    """The centre (row, column) of a box of that size, or larger, that lies inside; None where most of none does.

    Of boxes up to four times as large the largest that fits tells where there is most room.
    """
    sums = np.zeros((inside.shape[0] + 1, inside.shape[1] + 1), np.int64)
    sums[1:, 1:] = inside.cumsum(0).cumsum(1)
    for factor, share in ((4, 1.0), (3, 1.0), (2, 1.0), (1.5, 1.0), (1, 1.0), (1, 0.85)):
        rows, columns = max(1, round(factor * height)), max(1, round(factor * width))
        if rows > inside.shape[0] or columns > inside.shape[1]:
            continue
        whole = sums[rows:, columns:] - sums[:-rows, columns:] - sums[rows:, :-columns] + sums[:-rows, :-columns]
        tops, lefts = np.nonzero(whole >= share * rows * columns)
        if len(tops):
            nearest = ((tops - tops.mean()) ** 2 + (lefts - lefts.mean()) ** 2).argmin()
            return tops[nearest] + rows / 2, lefts[nearest] + columns / 2
    return None


def _texts(segmentation: Segmentation, i: int) -> list[str]:
    """What may be written into segment i, the most telling first."""
    name = segmentation.names[i]
    return [name] if segmentation.scores is None else [f"{name} {segmentation.scores[i]:.0%}", name]
