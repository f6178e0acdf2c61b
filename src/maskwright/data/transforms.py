"""How a training sample is changed: image and id maps by one and the same geometry, colours on the image alone.

Facts of the original's mappers (large-scale jitter, short side with random crop, SSD colours), after the detectron2
transforms that they use.

Unusual here: scale, crop window and flip are drawn first, and the picture is resized once, straight into the crop, so
nothing is computed that the crop would throw away. Pillow's `resize` takes a fractional window, hence the result is
that of resizing everything and cropping then (to one or two levels of 255, from rounding).
    Differs from the reference: an image smaller than the crop is not padded here. It comes back at its own size,
    `collate` pads, and padded cells are 0 after normalisation (the original pads with 128 before it).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskwright.recipe import AugmentConfig
from maskwright.structures import Target

_FILTER_REACH = 1.0  # of the bilinear filter, in pixels of the coarser grid
_CROP_TRIALS = 10


class Window(NamedTuple):
    """A crop of an image that is thought of as resized to (height, width), and flipped after the crop.

    Attributes:
        height: of the whole resized image, in pixels.
        width: of the whole resized image, in pixels.
        top: first row of the crop in it.
        left: first column of the crop in it.
        crop_height: rows of the crop.
        crop_width: columns of the crop.
        flip: whether left and right are exchanged.
    """

    height: int
    width: int
    top: int
    left: int
    crop_height: int
    crop_width: int
    flip: bool


class Augment:
    """The recipe's random changes to a training sample."""

    def __init__(self, config: AugmentConfig):
        self.config = config

    def __call__(self, image: np.ndarray, target: Target, generator: np.random.Generator) -> tuple[Tensor, Target]:
        """A changed copy; everything random comes from `generator`.

        Args:
            image: (H, W, 3) uint8.
            target: of the same size.
            generator: drawn from in a fixed order, so equal generators give equal samples.

        Returns:
            The image, (3, h, w) uint8 with h, w at most the crop size, and the target at the same size. Objects without
            a pixel in it are gone; annotated areas and boxes, which speak of the whole image, are None.
        """
        ids = target.id_maps.numpy()
        window = self._choose(image.shape[:2], ids, target, generator)
        changed = torch.from_numpy(crop_image(image, window))
        if self.config.color:
            changed = jitter_color(changed, generator)
        return changed, _keep_visible(replace(target, areas=None, boxes=None), crop_ids(ids, window))

    def _choose(self, size: tuple[int, int], ids: np.ndarray, target: Target, generator: np.random.Generator) -> Window:
        flip = bool(generator.random() < self.config.flip)
        if self.config.resize == "large_scale_jitter":
            assert self.config.scale is not None  # AugmentConfig has seen to it
            return _jittered_window(size, self.config.crop, self.config.scale, flip, generator)
        height, width = self._resized(size, generator)
        window = _random_window(height, width, self.config.crop, flip, generator)
        if self.config.single_category_max_area < 1:
            for _ in range(_CROP_TRIALS - 1):
                if self._is_varied(ids, target, window):
                    break
                window = _random_window(height, width, self.config.crop, flip, generator)
        return window

    def _resized(self, size: tuple[int, int], generator: np.random.Generator) -> tuple[int, int]:
        if self.config.short_sides is not None:
            short_side = float(generator.choice(self.config.short_sides))
        else:
            assert self.config.scale is not None  # AugmentConfig has seen to it
            short_side = min(size) * generator.uniform(*self.config.scale)
        return shortest_edge_size(size, short_side, self.config.max_side)

    def _is_varied(self, ids: np.ndarray, target: Target, window: Window) -> bool:
        """Whether no class has more than the allowed share of the labelled pixels in the window."""
        numbers = np.bincount(crop_ids(ids, window).max(0).ravel(), minlength=len(target) + 1)[1:]
        counts = np.bincount(target.labels.numpy(), weights=numbers)
        counts = counts[counts > 0]
        return len(counts) > 1 and counts.max() < counts.sum() * self.config.single_category_max_area


def shortest_edge_size(size: tuple[int, int], short_side: float, max_side: int | None) -> tuple[int, int]:
    """(height, width) after the short side became `short_side` pixels, unless the long one would pass `max_side`.

    Rounding is that of detectron2's ResizeShortestEdge; no side gets below 1.
    """
    height, width = size
    factor = short_side / min(height, width)
    new_height, new_width = (short_side, factor * width) if height < width else (factor * height, short_side)
    if max_side is not None and max(new_height, new_width) > max_side:
        factor = max_side / max(new_height, new_width)
        new_height, new_width = new_height * factor, new_width * factor
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def resize_for_prediction(image: np.ndarray, short_side: int | None, max_side: int | None) -> np.ndarray:
    """The image at the size that the recipe's `evaluate` section wants, (H, W, 3) uint8.

    Args:
        image: (H, W, 3) uint8.
        short_side: in pixels, see `shortest_edge_size`; None keeps the size unless it passes `max_side`.
        max_side: limit of the long side in pixels; None is no limit.

    Returns:
        Resized with Pillow's antialiased bilinear filter, as detectron2 does; the same array if the size stays.
    """
    size = image.shape[:2]
    if short_side is None and (max_side is None or max(size) <= max_side):
        return image
    height, width = shortest_edge_size(size, min(size) if short_side is None else short_side, max_side)
    if (height, width) == size:
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def crop_image(image: np.ndarray, window: Window) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, crop_height, crop_width) uint8, contiguous; bilinear with antialiasing."""
    rows = _source_span(window.top, window.crop_height, window.height, image.shape[0])
    columns = _source_span(window.left, window.crop_width, window.width, image.shape[1])
    (top, bottom), (left, right) = (
        _with_margin(rows, window.height, image),
        _with_margin(columns, window.width, image, 1),
    )
    part = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
    box = (columns[0] - left, rows[0] - top, columns[1] - left, rows[1] - top)
    part = part.resize((window.crop_width, window.crop_height), Image.Resampling.BILINEAR, box=box)
    array = np.asarray(part)
    return np.array((array[:, ::-1] if window.flip else array).transpose(2, 0, 1), order="C")


def crop_ids(ids: np.ndarray, window: Window) -> np.ndarray:
    """(D, H, W) int32 -> (D, crop_height, crop_width) int32; nearest pixel."""
    rows = _nearest(window.top, window.crop_height, window.height, ids.shape[1])
    columns = _nearest(window.left, window.crop_width, window.width, ids.shape[2])
    return ids.take(rows, axis=1).take(columns[::-1] if window.flip else columns, axis=2)


def jitter_color(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Random brightness, contrast, saturation and hue as in SSD, each with probability one half.

    Brightness shifts by at most 32 levels of 255, contrast and saturation scale by 0.5 to 1.5, hue turns by at most 36
    degrees; contrast comes before saturation and hue, or after them.
        Differs from the reference: values stay real numbers between the steps; the original rounds to 8 bits each time.

    Args:
        image: (3, H, W) uint8 RGB.
        generator: nine numbers are drawn, whatever is chosen.
    """
    use = generator.random(5) < 0.5
    shift, turn = generator.uniform(-32, 32), generator.uniform(-36, 36)
    contrast, saturation = generator.uniform(0.5, 1.5, size=2)
    if not use[:4].any():
        return image
    values = image.float()
    if use[0]:
        values = (values + shift).clamp_(0, 255)
    if use[1] and use[4]:
        values = (values * contrast).clamp_(0, 255)
    if use[2] or use[3]:
        values = _turn_and_saturate(values, turn if use[3] else 0.0, saturation if use[2] else 1.0)
    if use[1] and not use[4]:
        values = (values * contrast).clamp_(0, 255)
    return values.round_().to(torch.uint8)


def _turn_and_saturate(rgb: Tensor, degrees: float, factor: float) -> Tensor:
    """Hue turned and saturation scaled in HSV space; (3, H, W) float in 0..255, value (the largest channel) kept."""
    red, green, blue = rgb
    value, lowest = rgb.amax(0), rgb.amin(0)
    chroma = value - lowest
    safe = chroma.clamp_min(1e-6)
    hue = torch.where(value == red, (green - blue) / safe, (blue - red) / safe + 2)
    hue = torch.where((value == blue) & (value != red) & (value != green), (red - green) / safe + 4, hue)
    hue += degrees / 60
    chroma = torch.minimum(chroma * factor, value)
    sectors = torch.stack([hue + 5, hue + 3, hue + 1]).remainder_(6)
    weight = torch.minimum(sectors, 4 - sectors).clamp_(0, 1)
    return value - chroma * weight


def _jittered_window(
    size: tuple[int, int], crop: tuple[int, int], scale: tuple[float, float], flip: bool, generator: np.random.Generator
) -> Window:
    """Large-scale jitter: fit the image into crop x factor, then take a crop at one random share of the free way.

    One share serves both directions, as in detectron2's FixedSizeCrop.
    """
    factor = generator.uniform(*scale)
    fit = min(crop[0] * factor / size[0], crop[1] * factor / size[1])
    height, width = (max(1, round(side * fit)) for side in size)
    share = generator.random()
    top, left = round(max(height - crop[0], 0) * share), round(max(width - crop[1], 0) * share)
    return Window(height, width, top, left, min(height, crop[0]), min(width, crop[1]), flip)


def _random_window(
    height: int, width: int, crop: tuple[int, int], flip: bool, generator: np.random.Generator
) -> Window:
    rows, columns = min(height, crop[0]), min(width, crop[1])
    top, left = generator.integers(height - rows + 1), generator.integers(width - columns + 1)
    return Window(height, width, int(top), int(left), rows, columns, flip)


def _source_span(start: int, length: int, resized: int, source: int) -> tuple[float, float]:
    scale = source / resized
    return start * scale, min((start + length) * scale, source)


def _with_margin(span: tuple[float, float], resized: int, image: np.ndarray, axis: int = 0) -> tuple[int, int]:
    """The whole source pixels that the filter touches for a span."""
    source = image.shape[axis]
    reach = _FILTER_REACH * max(source / resized, 1.0) + 1
    return max(0, int(span[0] - reach)), min(source, int(np.ceil(span[1] + reach)))


def _nearest(start: int, length: int, resized: int, source: int) -> np.ndarray:
    """Source indices of the pixels start .. start + length of the resized axis (pixel centres at half integers)."""
    centres = (np.arange(start, start + length) + 0.5) * (source / resized)
    return np.minimum(centres.astype(np.intp), source - 1)


def _keep_visible(target: Target, ids: np.ndarray) -> Target:
    """The target with these id maps, without the objects that have no pixel in them, and without empty layers."""
    used = ids.reshape(len(ids), -1).any(1)
    ids = ids[used] if used.any() else ids[:1]
    visible = np.bincount(ids.ravel(), minlength=len(target) + 1)[1:] > 0
    if visible.all():
        return replace(target, id_maps=torch.from_numpy(ids))
    table = np.concatenate([[0], np.where(visible, np.cumsum(visible), 0)]).astype(np.int32)
    keep = torch.from_numpy(visible)
    return replace(
        target,
        id_maps=torch.from_numpy(table[ids]),
        labels=target.labels[keep],
        is_crowd=target.is_crowd[keep],
    )
