"""Random brightness, contrast, saturation and hue, as in SSD. Original: `ColorAugSSDTransform` of PointRend.

Unusual: the image is processed in chunks that stay in a core's cache, and operations on each channel alone are
lookups in a table of 256 values.
    Differs from the reference: values stay floats between the steps; the original rounds to 8 bits after each one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK_PIXELS = 1 << 14  # a dozen float32 arrays of this size fit in a cache of one MiB


def jitter_colors(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Apply random brightness, contrast, saturation and hue, each with probability 0.5.

    Brightness shifts by at most 32 levels of 255, contrast and saturation scale by 0.5 to 1.5, and hue rotates by at
    most 36 degrees. Contrast comes before or after saturation and hue, with equal probability.

    Args:
        image: (3, H, W) uint8 RGB.
        generator: nine numbers are always drawn.
    """
    brighten, scale_contrast, saturate, rotate, contrast_first = generator.random(5) < 0.5
    shift, degrees = generator.uniform(-32, 32), generator.uniform(-36, 36)
    contrast, saturation = generator.uniform(0.5, 1.5, size=2)
    if not (brighten or scale_contrast or saturate or rotate):
        return image
    contrast = contrast if scale_contrast else 1.0
    early, late = (contrast, 1.0) if contrast_first else (1.0, contrast)
    levels = np.clip(np.arange(256, dtype=np.float32) + np.float32(shift if brighten else 0.0), 0, 255)
    levels = np.clip(levels * np.float32(early), 0, 255)
    if saturate or rotate:
        degrees, saturation = degrees if rotate else 0.0, saturation if saturate else 1.0
        return torch.from_numpy(_jitter_in_chunks(image.numpy(), levels, degrees, saturation, late))
    table = np.rint(np.clip(levels * np.float32(late), 0, 255)).astype(np.uint8)
    changed = bytearray(image.contiguous().numpy()).translate(table.tobytes())
    return torch.frombuffer(changed, dtype=torch.uint8).view(image.shape)


def _jitter_in_chunks(
    image: np.ndarray, levels: np.ndarray, degrees: float, saturation: float, contrast: float
) -> np.ndarray:
    """Look up `levels`, then change hue, saturation and contrast."""
    flat = image.reshape(3, -1)
    changed = np.empty_like(flat)
    for start in range(0, flat.shape[1], _CHUNK_PIXELS):
        chunk = levels.take(flat[:, start : start + _CHUNK_PIXELS])  # (3, P)
        if degrees == 0:
            _scale_saturation(chunk, saturation)
        else:
            _rotate_hue_and_scale_saturation(chunk, degrees, saturation)
        chunk *= np.float32(contrast)
        changed[:, start : start + _CHUNK_PIXELS] = np.rint(np.clip(chunk, 0, 255, out=chunk), out=chunk)
    return changed.reshape(image.shape)


def _scale_saturation(rgb: np.ndarray, factor: float) -> None:
    """Scale the saturation in HSV space, in place; (3, P) in 0..255. The value (maximum of the channels) is kept."""
    value = rgb.max(0)
    chroma = value - rgb.min(0)
    if factor > 1:  # limits the saturation to 1
        scale = value / np.maximum(chroma, np.float32(1e-6))
        np.minimum(scale, np.float32(factor), out=scale)
    else:
        scale = np.float32(factor)
    rgb -= value
    rgb *= scale
    rgb += value


def _rotate_hue_and_scale_saturation(rgb: np.ndarray, degrees: float, factor: float) -> None:
    """Rotate the hue too. Each channel is value - chroma * weight, and the weight is a function of the hue in 0..6."""
    red, green, blue = rgb
    value = rgb.max(0)
    chroma = value - rgb.min(0)
    inverse = 1 / np.maximum(chroma, np.float32(1e-6))
    hue = (red - green) * inverse
    hue += np.float32(4)
    is_green = green == value
    np.copyto(hue, (blue - red) * inverse + np.float32(2), where=is_green)
    np.copyto(hue, (green - blue) * inverse, where=red == value)
    hue += np.float32(degrees / 60)
    hue -= np.float32(6) * (hue >= 6)
    hue += np.float32(6) * (hue < 0)
    chroma *= np.float32(factor)
    np.minimum(chroma, value, out=chroma)
    for channel, (center, sign, offset) in enumerate(((3, -1, 2), (2, 1, -1), (4, 1, -1))):
        weight = rgb[channel]
        np.abs(hue - np.float32(center), out=weight)
        if sign < 0:
            np.subtract(np.float32(offset), weight, out=weight)
        else:
            weight += np.float32(offset)
        np.clip(weight, 0, 1, out=weight)
        weight *= chroma
        np.subtract(value, weight, out=weight)
