"""Pictures of any number of channels, as people can look at them."""

from __future__ import annotations

import numpy as np

_SAMPLES = 1 << 16  # pixels that decide about black and white
_PERCENTILES = (1.0, 99.0)  # that become black and white


def displayable(image: np.ndarray) -> np.ndarray:
    """A picture (H, W, C) of any numbers as (H, W, 3) uint8; the same array where it is that already.

    The first three channels are shown as red, green and blue, or the first alone as gray where there are fewer. Bytes
    are shown as they are, other numbers from black to white between their 1st and 99th percentile in each channel.
    """
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return image
    shown = image[..., :3] if image.shape[2] >= 3 else image[..., :1]
    if shown.dtype != np.uint8:
        step = max(1, shown.shape[0] * shown.shape[1] // _SAMPLES)
        low, high = np.percentile(shown.reshape(-1, shown.shape[2])[::step], _PERCENTILES, axis=0).astype(np.float32)
        scale = np.where(high > low, 255 / np.where(high > low, high - low, 1), 0)
        shown = np.clip((shown - low) * scale, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(shown, (*shown.shape[:2], 3)))
