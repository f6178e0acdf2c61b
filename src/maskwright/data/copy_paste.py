"""Copy-paste augmentation: objects of another training image are pasted onto a sample (Ghiasi et al. 2021).

Both images are scaled and cropped at random first. Pasted objects lie on top: what they cover is cut from the objects
below. Pixels are not blended, which the paper found to make no difference.
    Differs from the paper: the two crops are shifted against each other at random if their sizes differ, and an object
    of which little remains is dropped, not only one that is covered completely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from maskwright.config.schema import CopyPasteConfig
from maskwright.structures.annotations import Category, Target
from maskwright.structures.id_maps import count_values, id_dtype, look_up

MIN_VISIBLE = 0.1  # fraction of its pixels that an object must keep


def paste_objects(
    image: Tensor,
    target: Target,
    source: Tensor,
    source_target: Target,
    categories: Sequence[Category],
    config: CopyPasteConfig,
    generator: np.random.Generator,
) -> tuple[Tensor, Target]:
    """Paste a random subset of the source's things onto an image.

    Args:
        image: (C, H, W), transformed.
        target: its objects, without crowds.
        source: (C, h, w) of the same type, transformed.
        source_target: its objects, without crowds; so ignored regions are never pasted.
        categories: of the labels; stuff is never pasted, but covered.
        config: the number of objects.
        generator: the only source of randomness.

    Returns:
        The image and its objects, those of `target` first. Objects that keep less than a tenth of their pixels are
        dropped from the target, or not pasted if it is the border that cuts them.
    """
    things = np.array([category.is_thing for category in categories])[source_target.labels.numpy()]
    candidates = np.flatnonzero(things)
    if not len(candidates):
        return image, target
    count = generator.integers(1, min(config.max_objects, len(candidates)) + 1)
    chosen = np.sort(generator.choice(candidates, count, replace=False))
    (rows, source_rows), (columns, source_columns) = (
        _align(*lengths, generator) for lengths in zip(image.shape[1:], source.shape[1:], strict=True)
    )
    source_ids = source_target.id_maps.numpy()
    whole, inside = (
        _areas(ids, len(source_target)) for ids in (source_ids, source_ids[:, source_rows, source_columns])
    )
    chosen = chosen[(inside >= np.maximum(1, MIN_VISIBLE * whole))[chosen]]
    if not len(chosen):
        return image, target
    total = len(target) + len(chosen)
    table = np.zeros(len(source_target) + 1, dtype=id_dtype(total))
    table[chosen + 1] = np.arange(len(target) + 1, total + 1)
    pasted = look_up(table, np.ascontiguousarray(source_ids[:, source_rows, source_columns]))
    covered = pasted.any(0)
    ids = np.zeros((max(len(target.id_maps), len(pasted)), *image.shape[1:]), dtype=id_dtype(total))
    ids[: len(target.id_maps)] = target.id_maps.numpy()
    below = ids[:, rows, columns]
    below[:, covered] = 0
    below[: len(pasted)] += pasted
    combined = replace(
        target,
        id_maps=torch.from_numpy(ids),
        labels=torch.cat([target.labels, source_target.labels[chosen]]),
        is_crowd=torch.zeros(total, dtype=torch.bool),
    )
    remaining, before = _areas(ids, total), _areas(target.id_maps.numpy(), len(target))
    before = np.concatenate([before, np.ones(len(chosen))])
    image = image.clone()
    part = image[:, rows, columns]
    mask = torch.from_numpy(covered)
    part[:, mask] = source[:, source_rows, source_columns][:, mask]
    return image, combined.select(torch.from_numpy(remaining >= np.maximum(1, MIN_VISIBLE * before)))


def _align(length: int, source_length: int, generator: np.random.Generator) -> tuple[slice, slice]:
    """Return the parts of two axes that lie on each other if the shorter one is at a random place of the longer."""
    common = min(length, source_length)
    start = int(generator.integers(max(length, source_length) - common + 1))
    shifted, whole = slice(start, start + common), slice(0, common)
    return (shifted, whole) if length > source_length else (whole, shifted)


def _areas(ids: np.ndarray, count: int) -> np.ndarray:
    """(N,) int64, pixels of each object of id maps (D, H, W)."""
    return np.sum([count_values(np.ascontiguousarray(layer), count + 1) for layer in ids], axis=0)[1:]
