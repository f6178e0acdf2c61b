"""Random colours of a training sample, as in SSD. Original: `ColorAugSSDTransform` of detectron2's PointRend.

Unusual here: the picture is worked on in pieces that stay in a core's cache, and what changes each channel alone is
looked up in a table of 256 values.
    Differs from the reference: values stay real numbers between the steps; the original rounds to 8 bits each time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_PIECE = 1 << 14  # pixels; with a dozen arrays of 4 bytes they fit a cache of one MiB


def jitter_colors(image: Tensor, generator: np.random.Generator) -> Tensor:
    """Random brightness, contrast, saturation and hue, each with probability one half.

    Brightness shifts by at most 32 levels of 255, contrast and saturation scale by 0.5 to 1.5, hue turns by at most 36
    degrees; contrast comes before saturation and hue, or after them.

    Args:
        image: (3, H, W) uint8 RGB.
        generator: nine numbers are drawn, whatever is chosen.
    """
    use = generator.random(5) < 0.5
    shift, turn = generator.uniform(-32, 32), generator.uniform(-36, 36)
    contrast, saturation = generator.uniform(0.5, 1.5, size=2)
    if not use[:4].any():
        return image
    contrast = contrast if use[1] else 1.0
    levels = np.clip(np.arange(256, dtype=np.float32) + np.float32(shift if use[0] else 0.0), 0, 255)
    early, late = (contrast, 1.0) if use[4] else (1.0, contrast)
    levels = np.clip(levels * np.float32(early), 0, 255)
    if use[2] or use[3]:
        turn, saturation = turn if use[3] else 0.0, saturation if use[2] else 1.0
        return torch.from_numpy(_in_pieces(image.numpy(), levels, turn, saturation, late))
    table = np.rint(np.clip(levels * np.float32(late), 0, 255)).astype(np.uint8)
    changed = bytearray(image.contiguous().numpy()).translate(table.tobytes())
    return torch.frombuffer(changed, dtype=torch.uint8).view(image.shape)


def _in_pieces(image: np.ndarray, levels: np.ndarray, degrees: float, factor: float, late: float) -> np.ndarray:
    """Colours of `image` looked up in `levels`, turned, saturated, and scaled by the `late` contrast."""
    flat = image.reshape(3, -1)
    changed = np.empty_like(flat)
    for start in range(0, flat.shape[1], _PIECE):
        piece = levels.take(flat[:, start : start + _PIECE])  # (3, P)
        _saturate(piece, factor) if degrees == 0 else _turn_and_saturate(piece, degrees, factor)
        piece *= np.float32(late)
        changed[:, start : start + _PIECE] = np.rint(np.clip(piece, 0, 255, out=piece), out=piece)
    return changed.reshape(image.shape)


def _saturate(rgb: np.ndarray, factor: float) -> None:
    """Saturation scaled in HSV space, in place; (3, P) in 0..255, value (the largest channel) kept."""
    value = rgb.max(0)
    chroma = value - rgb.min(0)
    if factor > 1:  # up to a saturation of 1
        scale = value / np.maximum(chroma, np.float32(1e-6))
        np.minimum(scale, np.float32(factor), out=scale)
    else:
        scale = np.float32(factor)
    rgb -= value
    rgb *= scale
    rgb += value


def _turn_and_saturate(rgb: np.ndarray, degrees: float, factor: float) -> None:
    """Hue turned too: each channel is value - chroma * weight, where the weight is a function of the hue in 0..6."""
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
    for channel, (centre, sign, offset) in enumerate(((3, -1, 2), (2, 1, -1), (4, 1, -1))):
        weight = rgb[channel]
        np.abs(hue - np.float32(centre), out=weight)
        if sign < 0:
            np.subtract(np.float32(offset), weight, out=weight)
        else:
            weight += np.float32(offset)
        np.clip(weight, 0, 1, out=weight)
        weight *= chroma
        np.subtract(value, weight, out=weight)
