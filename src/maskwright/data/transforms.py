"""Random scale, crop, flip and color jitter of a training sample: large-scale jitter, or short side with random crop.

Follows the original's dataset mappers and the detectron2 transforms that they use.

Unusual: scale, crop and flip are drawn first, from the image size alone. Then the pixels of the crop are
resized straight from the source image with Pillow's fractional `box`, which equals resizing the whole image and
cropping, up to one or two levels of 255 from rounding.
    Differs from the reference: an image smaller than the crop is not padded here, but in `collate`, and padded pixels
    are 0 after normalization (the original pads with 128 before it).
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
from maskwright.data.images.resize import shortest_edge_size
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import count_values, look_up

_FILTER_RADIUS = 1.0  # of the bilinear filter, in pixels of the coarser grid
_CROP_TRIALS = 10


class CropBox(NamedTuple):
    """A crop of a resized image, optionally flipped horizontally.

    Attributes:
        height: height of the resized image in pixels.
        width: width of the resized image in pixels.
        top: first row of the crop in the resized image.
        left: first column of the crop in the resized image.
        crop_height: in pixels.
        crop_width: in pixels.
        flip: True for a horizontal flip.
    """

    height: int
    width: int
    top: int
    left: int
    crop_height: int
    crop_width: int
    flip: bool


class Augment:
    """The random transforms of a training sample, as configured by the recipe."""

    def __init__(self, config: AugmentConfig):
        self.config = config

    def __call__(self, image: np.ndarray, target: Target, generator: np.random.Generator) -> tuple[Tensor, Target]:
        """Transform a sample: `sample_crop`, then `apply`."""
        return self.apply(image, target, self.sample_crop(target, generator), generator)

    def sample_crop(self, target: Target, generator: np.random.Generator) -> CropBox:
        """Draw a random crop of the image with these objects; `generator` is the only source of randomness."""
        flip = bool(generator.random() < self.config.flip_probability)
        size = target.id_maps.shape[1], target.id_maps.shape[2]
        if self.config.resize == "large_scale_jitter":
            assert self.config.scale_range is not None  # checked by AugmentConfig
            return _large_scale_jitter(size, self.config.crop_size, self.config.scale_range, flip, generator)
        height, width = self._sample_size(size, generator)
        crop = _random_crop(height, width, self.config.crop_size, flip, generator)
        if self.config.single_category_max_area < 1:
            for _ in range(_CROP_TRIALS - 1):
                if self._has_several_classes(target, crop):
                    break
                crop = _random_crop(height, width, self.config.crop_size, flip, generator)
        return crop

    def apply(
        self, image: np.ndarray, target: Target, crop: CropBox, generator: np.random.Generator
    ) -> tuple[Tensor, Target]:
        """Crop a sample and jitter its colors.

        Args:
            image: (H, W, C) uint8 or float32.
            target: of the whole image.
            crop: of `sample_crop`.
            generator: draws are made in a fixed order, so equal generators give equal samples.

        Returns:
            The image, (C, h, w) with h, w at most the crop size, and the target at the same size. Crowds, which are
            never trained on, and objects without a visible pixel are dropped. Annotated areas and boxes, which refer to
            the whole image, are None.
        """
        cropped = torch.from_numpy(crop_image(image, crop))
        if self.config.color_jitter:
            cropped = jitter_colors(cropped, generator)
        ids = crop_id_maps(target.id_maps.numpy(), crop)
        return cropped, _keep_visible(replace(target, areas=None, boxes=None), ids)

    def _sample_size(self, size: tuple[int, int], generator: np.random.Generator) -> tuple[int, int]:
        if self.config.short_sides is not None:
            short_side = float(generator.choice(self.config.short_sides))
        else:
            assert self.config.scale_range is not None  # checked by AugmentConfig
            short_side = min(size) * generator.uniform(*self.config.scale_range)
        return shortest_edge_size(size, short_side, self.config.max_side)

    def _has_several_classes(self, target: Target, crop: CropBox) -> bool:
        """Return whether no class covers more than `single_category_max_area` of the labeled pixels in the crop."""
        ids = crop_id_maps(target.id_maps.numpy(), crop).max(0)
        areas = count_values(ids, len(target) + 1)[1:]
        not_crowd = ~target.is_crowd.numpy()
        class_areas = np.bincount(target.labels.numpy()[not_crowd], weights=areas[not_crowd])
        class_areas = class_areas[class_areas > 0]
        return len(class_areas) > 1 and class_areas.max() < class_areas.sum() * self.config.single_category_max_area


def progressive_scale(config: TrainConfig, step: int) -> float:
    """Return the scale of the samples of a step (from 0) relative to `augment`; see `train.progressive_resizing`."""
    return next((part.size for part in config.progressive_resizing if step < round(part.until * config.steps)), 1.0)


def scale_augment(config: AugmentConfig, scale: float) -> AugmentConfig:
    """Multiply all sizes of the transforms by `scale`; crop sizes remain multiples of 32 pixels."""
    height, width = (min(side, max(32, round(side * scale / 32) * 32)) for side in config.crop_size)
    changed: dict[str, object] = {"crop_size": (height, width)}
    if config.resize == "short_side":  # large-scale jitter is relative to the crop size
        changed["scale_range"] = config.scale_range and tuple(scale * factor for factor in config.scale_range)
        changed["short_sides"] = config.short_sides and tuple(
            max(1, round(scale * side)) for side in config.short_sides
        )
        changed["max_side"] = config.max_side and max(1, round(scale * config.max_side))
    return config.model_copy(update=changed)


def crop_image(image: np.ndarray, crop: CropBox) -> np.ndarray:
    """Resize and crop an image, bilinear with antialiasing.

    Args:
        image: (H, W, C) uint8 or float32.
        crop: see `CropBox`.

    Returns:
        (C, crop_height, crop_width) of the same type.
    """
    height, width, channels = image.shape
    rows = _source_span(crop.top, crop.crop_height, crop.height, height)
    columns = _source_span(crop.left, crop.crop_width, crop.width, width)
    top, bottom = _with_margin(rows, crop.height, height)
    left, right = _with_margin(columns, crop.width, width)
    source = image[top:bottom, left:right]
    box = (columns[0] - left, rows[0] - top, columns[1] - left, rows[1] - top)
    size = (crop.crop_width, crop.crop_height)
    if image.dtype == np.uint8 and channels == 3:
        planes = Image.fromarray(source).resize(size, Image.Resampling.BILINEAR, box=box).split()
    else:
        bands = (Image.fromarray(np.ascontiguousarray(source[..., channel])) for channel in range(channels))
        planes = [band.resize(size, Image.Resampling.BILINEAR, box=box) for band in bands]
    cropped = np.empty((channels, crop.crop_height, crop.crop_width), image.dtype)
    for channel, plane in enumerate(planes):
        cropped[channel] = np.asarray(plane)[:, ::-1] if crop.flip else np.asarray(plane)
    return cropped


def crop_id_maps(ids: np.ndarray, crop: CropBox) -> np.ndarray:
    """Resize and crop id maps (D, H, W) -> (D, crop_height, crop_width), nearest neighbor."""
    rows = _nearest(crop.top, crop.crop_height, crop.height, ids.shape[1])
    columns = _nearest(crop.left, crop.crop_width, crop.width, ids.shape[2])
    top, bottom = rows[0], rows[-1] + 1
    return ids[:, top:bottom].take(columns[::-1] if crop.flip else columns, axis=2).take(rows - top, axis=1)


def _large_scale_jitter(
    size: tuple[int, int], crop: tuple[int, int], scale: tuple[float, float], flip: bool, generator: np.random.Generator
) -> CropBox:
    """Fit the image into the crop size times a random factor, then crop at a random position.

    One random number gives both coordinates of the position, as in detectron2's FixedSizeCrop.
    """
    factor = generator.uniform(*scale)
    fit = min(crop[0] * factor / size[0], crop[1] * factor / size[1])
    height, width = (max(1, round(side * fit)) for side in size)
    position = generator.random()
    top, left = round(max(height - crop[0], 0) * position), round(max(width - crop[1], 0) * position)
    return CropBox(height, width, top, left, min(height, crop[0]), min(width, crop[1]), flip)


def _random_crop(height: int, width: int, crop: tuple[int, int], flip: bool, generator: np.random.Generator) -> CropBox:
    rows, columns = min(height, crop[0]), min(width, crop[1])
    top, left = generator.integers(height - rows + 1), generator.integers(width - columns + 1)
    return CropBox(height, width, int(top), int(left), rows, columns, flip)


def _source_span(start: int, length: int, resized: int, source: int) -> tuple[float, float]:
    """Return where a range of pixels of the resized axis begins and ends in the source axis."""
    scale = source / resized
    return start * scale, min((start + length) * scale, source)


def _with_margin(span: tuple[float, float], resized: int, source: int) -> tuple[int, int]:
    """Return the range of source pixels that the filter reads for a span."""
    radius = _FILTER_RADIUS * max(source / resized, 1.0) + 1
    return max(0, int(span[0] - radius)), min(source, int(np.ceil(span[1] + radius)))


def _nearest(start: int, length: int, resized: int, source: int) -> np.ndarray:
    """Return the source index of each pixel start .. start + length of the resized axis.

    Pixel centers are at half integers. They are summed up as Pillow does it, so that centers on the border of two
    source pixels are rounded to the same one.
    """
    steps = np.full(start + length, source / resized)
    steps[0] /= 2
    return np.minimum(np.cumsum(steps)[start:].astype(np.intp), source - 1)


def _keep_visible(target: Target, ids: np.ndarray) -> Target:
    """Replace the id maps of a target, and drop its crowds, objects without a pixel, and empty layers."""
    counts = [count_values(layer, len(target) + 1) for layer in ids]
    kept = (np.sum(counts, axis=0)[1:] > 0) & ~target.is_crowd.numpy()
    if not kept.all():
        table = np.concatenate([[0], np.where(kept, np.cumsum(kept), 0)])
        ids, keep = look_up(table.astype(ids.dtype), ids), torch.from_numpy(kept)
        target = replace(target, labels=target.labels[keep], is_crowd=target.is_crowd[keep])
    used = [bool(count[1:][kept].any()) for count in counts]
    if not all(used):
        ids = ids[used] if any(used) else ids[:1]
    return replace(target, id_maps=torch.from_numpy(ids))
