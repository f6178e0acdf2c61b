"""How a training sample is changed: image and id maps by one and the same geometry; colours are in `colors`.

Facts of the original's mappers (large-scale jitter, short side with random crop), after the detectron2 transforms that
they use.

Unusual here: scale, crop window and flip are drawn first, from the size alone; then only the part of the picture that
the window shows is read, and resized once, straight into the crop. Pillow's `resize` takes a fractional window, hence
the result is that of resizing everything and cropping then (to one or two levels of 255, from rounding).
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

from maskwright.config.schema import AugmentConfig, TrainConfig
from maskwright.data.color_jitter import jitter_colors
from maskwright.structures.annotations import Target, look_up
from maskwright.structures.id_maps import count_values

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
        """A changed copy: `choose`, then `apply`."""
        return self.apply(image, target, self.choose(target, generator), generator)

    def choose(self, target: Target, generator: np.random.Generator) -> Window:
        """A random crop of an image with these objects; everything random comes from `generator`."""
        flip = bool(generator.random() < self.config.flip_probability)
        size = target.id_maps.shape[1], target.id_maps.shape[2]
        if self.config.resize == "large_scale_jitter":
            assert self.config.scale_range is not None  # AugmentConfig has seen to it
            return _jittered_window(size, self.config.crop_size, self.config.scale_range, flip, generator)
        height, width = self._resized(size, generator)
        window = _random_window(height, width, self.config.crop_size, flip, generator)
        if self.config.single_category_max_area < 1:
            for _ in range(_CROP_TRIALS - 1):
                if self._is_varied(target, window):
                    break
                window = _random_window(height, width, self.config.crop_size, flip, generator)
        return window

    def apply(
        self, image: np.ndarray, target: Target, window: Window, generator: np.random.Generator
    ) -> tuple[Tensor, Target]:
        """The crop of a sample, with other colours where the recipe says so.

        Args:
            image: (H, W, C) uint8 or float32; rows below the window's reach (`needed_rows`) may be missing.
            target: of the whole image.
            window: what to show.
            generator: drawn from in a fixed order, so equal generators give equal samples.

        Returns:
            The image, (C, h, w) with h, w at most the crop size, and the target at the same size. Crowds, which are
            never trained on, and objects without a pixel in it are gone; annotated areas and boxes, which speak of the
            whole image, are None.
        """
        ids = target.id_maps.numpy()
        changed = torch.from_numpy(crop_image(image, window, ids.shape[1]))
        if self.config.color_jitter:
            changed = jitter_colors(changed, generator)
        return changed, _keep_visible(replace(target, areas=None, boxes=None), crop_ids(ids, window))

    def _resized(self, size: tuple[int, int], generator: np.random.Generator) -> tuple[int, int]:
        if self.config.short_sides is not None:
            short_side = float(generator.choice(self.config.short_sides))
        else:
            assert self.config.scale_range is not None  # AugmentConfig has seen to it
            short_side = min(size) * generator.uniform(*self.config.scale_range)
        return shortest_edge_size(size, short_side, self.config.max_side)

    def _is_varied(self, target: Target, window: Window) -> bool:
        """Whether no class has more than the allowed share of the labelled pixels in the window."""
        ids = crop_ids(target.id_maps.numpy(), window).max(0)
        numbers = count_values(ids, len(target) + 1)[1:]
        single = ~target.is_crowd.numpy()
        counts = np.bincount(target.labels.numpy()[single], weights=numbers[single])
        counts = counts[counts > 0]
        return len(counts) > 1 and counts.max() < counts.sum() * self.config.single_category_max_area


def relative_size(config: TrainConfig, step: int) -> float:
    """Height and width of the samples of a step (from 0), relative to what `augment` says; see `progressive`."""
    return next((part.size for part in config.progressive_resizing if step < round(part.until * config.steps)), 1.0)


def resized(config: AugmentConfig, size: float) -> AugmentConfig:
    """The same changes with everything `size` times as large; crops keep multiples of 32 pixels."""
    height, width = (min(side, max(32, round(side * size / 32) * 32)) for side in config.crop_size)
    changed: dict[str, object] = {"crop_size": (height, width)}
    if config.resize == "short_side":  # the other goes by the crop
        changed["scale_range"] = config.scale_range and tuple(size * factor for factor in config.scale_range)
        changed["short_sides"] = config.short_sides and tuple(max(1, round(size * side)) for side in config.short_sides)
        changed["max_side"] = config.max_side and max(1, round(size * config.max_side))
    return config.model_copy(update=changed)


def shortest_edge_size(size: tuple[int, int], short_side: float, max_side: float | None) -> tuple[int, int]:
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


def resize_for_prediction(image: np.ndarray, short_side: float | None, max_side: float | None) -> np.ndarray:
    """The image at the size that the recipe's `evaluate` section wants, (H, W, C).

    Args:
        image: (H, W, C) uint8 or float32.
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
    return np.array(_scaled(image, (height, width)))


def needed_rows(window: Window, height: int) -> int:
    """How many rows of an image of this height, counted from its top, `crop_image` looks at."""
    return _with_margin(_source_span(window.top, window.crop_height, window.height, height), window.height, height)[1]


def crop_image(image: np.ndarray, window: Window, height: int | None = None) -> np.ndarray:
    """(H, W, C) uint8 or float32 -> (C, crop_height, crop_width) of that type; bilinear with antialiasing.

    Args:
        image: the picture, or its upper rows, at least `needed_rows`.
        window: of the whole picture.
        height: of the whole picture; None if `image` is all of it.
    """
    height, width = height or image.shape[0], image.shape[1]
    rows = _source_span(window.top, window.crop_height, window.height, height)
    columns = _source_span(window.left, window.crop_width, window.width, width)
    top, bottom = _with_margin(rows, window.height, height)
    left, right = _with_margin(columns, window.width, width)
    part = image[top:bottom, left:right]
    box = (columns[0] - left, rows[0] - top, columns[1] - left, rows[1] - top)
    size, channels = (window.crop_width, window.crop_height), image.shape[2]
    cropped = np.empty((channels, window.crop_height, window.crop_width), image.dtype)
    if image.dtype == np.uint8 and channels == 3:
        planes = Image.fromarray(part).resize(size, Image.Resampling.BILINEAR, box=box).split()
    else:
        bands = (Image.fromarray(np.ascontiguousarray(part[..., channel])) for channel in range(channels))
        planes = [band.resize(size, Image.Resampling.BILINEAR, box=box) for band in bands]
    for number, plane in enumerate(planes):
        cropped[number] = np.asarray(plane)[:, ::-1] if window.flip else np.asarray(plane)
    return cropped


def _scaled(
    image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """(H, W, C) uint8 or float32 -> (height, width, C). Pillow scales RGB at once, other channels one by one."""

    def scale(part: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(part))
        return np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR, box=box))

    if image.shape[2] == 3 and image.dtype == np.uint8:
        return scale(image)
    return np.stack([scale(image[..., channel]) for channel in range(image.shape[2])], axis=2)


def crop_ids(ids: np.ndarray, window: Window) -> np.ndarray:
    """(D, H, W) -> (D, crop_height, crop_width) of the same type; nearest pixel."""
    rows = _nearest(window.top, window.crop_height, window.height, ids.shape[1])
    columns = _nearest(window.left, window.crop_width, window.width, ids.shape[2])
    top, bottom = rows[0], rows[-1] + 1
    return ids[:, top:bottom].take(columns[::-1] if window.flip else columns, axis=2).take(rows - top, axis=1)


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


def _with_margin(span: tuple[float, float], resized: int, source: int) -> tuple[int, int]:
    """The whole source pixels that the filter touches for a span."""
    reach = _FILTER_REACH * max(source / resized, 1.0) + 1
    return max(0, int(span[0] - reach)), min(source, int(np.ceil(span[1] + reach)))


def _nearest(start: int, length: int, resized: int, source: int) -> np.ndarray:
    """Source indices of the pixels start .. start + length of the resized axis (pixel centres at half integers).

    Centres are added up as Pillow does, so that those on the border of two pixels fall to the same side.
    """
    steps = np.full(start + length, source / resized)
    steps[0] /= 2
    return np.minimum(np.cumsum(steps)[start:].astype(np.intp), source - 1)


def _keep_visible(target: Target, ids: np.ndarray) -> Target:
    """The target with these id maps, without crowds, objects that have no pixel in them, and empty layers."""
    counts = [count_values(layer, len(target) + 1) for layer in ids]
    kept = (np.sum(counts, axis=0)[1:] > 0) & ~target.is_crowd.numpy()
    if not kept.all():
        table = np.concatenate([[0], np.where(kept, np.cumsum(kept), 0)])
        ids, keep = look_up(table, ids), torch.from_numpy(kept)
        target = replace(target, labels=target.labels[keep], is_crowd=target.is_crowd[keep])
    used = [bool(count[1:][kept].any()) for count in counts]
    if not all(used):
        ids = ids[used] if any(used) else ids[:1]
    return replace(target, id_maps=torch.from_numpy(ids))
