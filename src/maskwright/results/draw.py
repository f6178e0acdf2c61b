"""Overlays: a segmentation or ground truth drawn over its image.

All segments are drawn through one lookup table: they become one id map, each id has a color and an opacity, and a
single blend draws them all, so three hundred segments cost as much as three.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

from maskwright.results.rle import decode_runs
from maskwright.results.segmentation import Segmentation
from maskwright.structures.category import Category, Task

if TYPE_CHECKING:
    from maskwright.structures.annotations import Target

_GOLDEN_RATIO = 0.618034  # hues at multiples of it keep neighbors in a list far apart
_MAX_LABELS = 40  # more names are unreadable in one image
_BAND_PIXELS = 2**20  # pixels blended at once
_SAMPLE_PIXELS = 2**16  # pixels from which the display range is measured
_DISPLAY_PERCENTILES = (1.0, 99.0)  # shown as black and white


def overlay(
    segmentation: Segmentation,
    image: np.ndarray | PIL.Image.Image | None = None,
    alpha: float = 0.5,
    min_score: float = 0.3,
) -> PIL.Image.Image:
    """Draw the segments over the image, with names and scores where they fit.

    Semantic: in the colors of the classes. Panoptic: the same, with a different shade for each segment of a thing
    class, or a hue of its own if there is only one such class. Instance: each instance has its own color; where two
    overlap, the one with the higher score is on top.
    Panoptic and instance segments are outlined.

    Args:
        segmentation: the result; without segments, the image is returned unchanged.
        image: (H, W, 3) RGB or (H, W) gray, uint8, of the segmentation's size; None takes `segmentation.image`,
            converted for display if it has other channels.
        alpha: opacity of the segments, 0..1.
        min_score: instances with a lower score are not drawn, because a model always returns its best `top_k`.

    Raises:
        ValueError: there is no image, its shape does not fit, or alpha is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected 0..1")
    if image is None and segmentation.image is not None:
        image = to_display_rgb(segmentation.image)
    pixels = _check_image(image, segmentation.size)
    ids = _visible_ids(segmentation, min_score)
    outlined = segmentation.task != "semantic"
    drawing = PIL.Image.fromarray(_blend(pixels, ids, segment_colors(segmentation), alpha, outlined))
    _write_names(drawing, segmentation, ids)
    return drawing


def overlay_target(
    target: Target, image: np.ndarray | PIL.Image.Image, categories: Sequence[Category], task: Task
) -> PIL.Image.Image:
    """Draw ground truth in the style of `overlay`; pixels without an object are left as they are.

    Args:
        target: id maps of the image's size, on any device.
        image: see `overlay`.
        categories: the classes of the target's labels.
        task: "semantic" draws classes, "instance" the things, "panoptic" every segment.

    Raises:
        ValueError: the image's size is not the target's.
    """
    target, categories = target.to("cpu"), tuple(categories)
    height, width = target.id_maps.shape[-2:]
    size, labels = (height, width), target.labels.numpy()
    if task == "semantic":
        no_class = len(categories)
        label_map = target.label_map(ignore_index=no_class).numpy()
        labels = np.unique(label_map[label_map != no_class])
        return overlay(Segmentation(task, size, categories, labels, label_map=label_map), image)
    if task == "panoptic":
        segment_map = target.id_maps.amax(0).numpy()
        return overlay(Segmentation(task, size, categories, labels, segment_map=segment_map), image)
    is_thing = [categories[label].is_thing for label in labels]
    things = target.select(target.is_crowd.new_tensor(is_thing))
    masks = things.masks.numpy()
    return overlay(Segmentation(task, size, categories, things.labels.numpy(), instance_masks=masks), image)


def to_display_rgb(image: np.ndarray) -> np.ndarray:
    """Convert an image (H, W, C) of any type to (H, W, 3) uint8; RGB uint8 is returned as is.

    The first three channels are shown as red, green and blue; with fewer, the first is shown as gray. uint8 values are
    kept; other values are scaled in each channel so that the 1st percentile is black and the 99th is white.
    """
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return image
    shown = image[..., :3] if image.shape[2] >= 3 else image[..., :1]
    if shown.dtype != np.uint8:
        step = max(1, shown.shape[0] * shown.shape[1] // _SAMPLE_PIXELS)
        sample = shown.reshape(-1, shown.shape[2])[::step]
        low, high = np.percentile(sample, _DISPLAY_PERCENTILES, axis=0).astype(np.float32)
        scale = np.where(high > low, 255 / np.where(high > low, high - low, 1), 0)
        shown = np.clip((shown - low) * scale, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(shown, (*shown.shape[:2], 3)))


def segment_colors(segmentation: Segmentation) -> np.ndarray:
    """Return the colors of `overlay`, (N, 3) uint8 RGB, one per segment."""
    colors, seen = np.zeros((len(segmentation), 3), np.uint8), {}
    hues = 1.0 if sum(category.is_thing for category in segmentation.categories) == 1 else 0.16
    for i, label in enumerate(segmentation.labels.tolist()):
        category = segmentation.categories[label]
        index_in_class = seen[label] = seen.get(label, -1) + 1
        if segmentation.task == "instance":
            colors[i] = _distinct_color(i)
        elif segmentation.task == "panoptic" and category.is_thing:
            colors[i] = _shade(category.color, index_in_class, hues)
        else:
            colors[i] = category.color
    return colors


def _check_image(image: np.ndarray | PIL.Image.Image | None, size: tuple[int, int]) -> np.ndarray:
    """Return the image as (H, W, 3) uint8 RGB."""
    if image is None:
        raise ValueError("this result has no image to draw over; pass one of its size: overlay(image)")
    pixels = np.asarray(image.convert("RGB") if isinstance(image, PIL.Image.Image) else image)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape != (*size, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"the image is {pixels.shape} {pixels.dtype}, but the segments need ({size[0]}, {size[1]}, 3) uint8; "
            "pass the image that was segmented, at its original size"
        )
    return pixels


def _visible_ids(segmentation: Segmentation, min_score: float) -> np.ndarray:
    """Return an id map (H, W) int32: 0 is no segment, n is segment n-1; of overlapping instances, the best score."""
    if segmentation.task != "instance":
        return segmentation.id_map()
    ids = np.zeros(segmentation.size, np.int32)
    scores = np.ones(len(segmentation)) if segmentation.scores is None else segmentation.scores
    boxes = segmentation.boxes.astype(int)
    for i in np.argsort(scores, kind="stable"):
        if scores[i] >= min_score:
            x0, y0, x1, y1 = boxes[i]
            if segmentation.instance_runs is not None:
                mask = decode_runs(segmentation.instance_runs[i], (y0, x0, y1, x1), segmentation.size[0])
            else:
                mask = segmentation.masks[i, y0:y1, x0:x1]
            ids[y0:y1, x0:x1][mask] = i + 1
    return ids


def _distinct_color(index: int) -> tuple[int, int, int]:
    """Return the color with this index in an endless list of vivid colors."""
    return _rgb(0.58 + index * _GOLDEN_RATIO, (0.85, 0.62, 1.0)[index % 3], (1.0, 0.85)[index // 3 % 2])


def _shade(color: tuple[int, int, int], index: int, hues: float) -> tuple[int, int, int]:
    """Return a shade of a class's color: the color itself for index 0, then others from this share of all hues."""
    if index == 0:
        return color
    hue, saturation, brightness = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
    shift = index * _GOLDEN_RATIO % 1 - 0.5
    factor = (0.75, 1.0, 0.85, 0.65)[index % 4]
    return _rgb(hue + hues * shift, max(0.35, saturation * (1 - 0.4 * abs(shift))), max(0.4, brightness) * factor)


def _rgb(hue: float, saturation: float, brightness: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, brightness)
    return round(255 * red), round(255 * green), round(255 * blue)


def _blend(pixels: np.ndarray, ids: np.ndarray, colors: np.ndarray, alpha: float, outlined: bool) -> np.ndarray:
    """Blend the colors into the image, (H, W, 3) uint8.

    The lookup table has two halves, each with an entry for "no segment" and one per segment: `alpha` for the inside of
    segments, then opaque for their outlines.
    """
    count = len(colors) + 1
    opacity = np.zeros(2 * count, np.uint16)  # of 256
    opacity[1:count], opacity[count + 1 :] = round(256 * alpha), 256
    paint = np.zeros((2 * count, 3), np.uint16)
    paint[1:count] = paint[count + 1 :] = colors
    paint *= opacity[:, None]
    blended, height = np.empty_like(pixels), max(1, _BAND_PIXELS // max(1, ids.shape[1]))
    for start in range(0, len(ids), height):
        band, above = slice(start, start + height), min(start, 1)
        entries = ids[band].astype(np.int64)
        if outlined:
            outline = _outline(ids[start - above : start + height + 1])[above:]
            entries += count * outline[: len(entries)]
        blended[band] = (pixels[band] * (256 - opacity[entries])[..., None] + paint[entries]) >> 8
    return blended


def _outline(ids: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels of a segment that touch another segment or a pixel without one."""
    outline = np.zeros(ids.shape, bool)
    across, down = ids[:, 1:] != ids[:, :-1], ids[1:] != ids[:-1]
    outline[:, 1:] |= across
    outline[:, :-1] |= across
    outline[1:] |= down
    outline[:-1] |= down
    return outline & (ids > 0)


def _write_names(drawing: PIL.Image.Image, segmentation: Segmentation, ids: np.ndarray) -> None:
    """Write names into the largest segments, in place, where the text is mostly inside and covers no other text."""
    font_size = max(11, min(drawing.size) // 42)  # pixels
    font = ImageFont.load_default(font_size)
    pen = ImageDraw.Draw(drawing, "RGBA")
    step = max(1, max(ids.shape) // 256)  # search on a coarse map
    coarse = ids[::step, ::step]
    areas = np.bincount(coarse.ravel(), minlength=len(segmentation) + 1)[1:] * step**2
    taken: list[tuple[float, float, float, float]] = []
    for i in np.argsort(-areas, kind="stable")[:_MAX_LABELS]:
        if areas[i] < 4 * font_size**2:
            break
        inside = coarse == i + 1
        for text in _candidate_texts(segmentation, i):
            width, height = font.getlength(text) + 6, 1.3 * font_size
            center = _text_center(inside, height / step, width / step)
            if center is None:
                continue
            x, y = center[1] * step - width / 2, center[0] * step - height / 2
            x, y = max(0, min(x, drawing.width - width)), max(0, min(y, drawing.height - height))
            if any(x < x1 and x0 < x + width and y < y1 and y0 < y + height for x0, y0, x1, y1 in taken):
                continue
            taken.append((x, y, x + width, y + height))
            pen.rounded_rectangle(taken[-1], 3, fill=(0, 0, 0, 160))
            pen.text((x + width / 2, y + height / 2), text, "white", font, anchor="mm")
            break


def _text_center(inside: np.ndarray, height: float, width: float) -> tuple[float, float] | None:
    """Return the (row, column) at which to center a box so that most of it is inside; None if there is none.

    The largest box, up to four times the size, that fits completely marks the roomiest place.
    """
    sums = np.zeros((inside.shape[0] + 1, inside.shape[1] + 1), np.int64)
    sums[1:, 1:] = inside.cumsum(0).cumsum(1)
    for factor, min_share in ((4, 1.0), (3, 1.0), (2, 1.0), (1.5, 1.0), (1, 1.0), (1, 0.85)):
        rows, columns = max(1, round(factor * height)), max(1, round(factor * width))
        if rows > inside.shape[0] or columns > inside.shape[1]:
            continue
        covered = sums[rows:, columns:] - sums[:-rows, columns:] - sums[rows:, :-columns] + sums[:-rows, :-columns]
        tops, lefts = np.nonzero(covered >= min_share * rows * columns)
        if len(tops):
            middle = ((tops - tops.mean()) ** 2 + (lefts - lefts.mean()) ** 2).argmin()
            return tops[middle] + rows / 2, lefts[middle] + columns / 2
    return None


def _candidate_texts(segmentation: Segmentation, i: int) -> list[str]:
    """Return the texts for segment i, the preferred one first."""
    name = segmentation.names[i]
    return [name] if segmentation.scores is None else [f"{name} {segmentation.scores[i]:.0%}", name]
