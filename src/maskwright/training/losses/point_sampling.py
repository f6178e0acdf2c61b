"""Where masks are compared: points of an image, and what lies at them.

Coordinates are (x, y) in 0..1 of the padded image, sampled bilinearly with zeros outside and align_corners=False.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.runtime.device import has_plain_operators
from maskwright.structures.annotations import Target


class Points(Protocol):
    """Where masks are compared. Layers are numbered as in `ModelOutput`: the intermediate ones, then the final one."""

    def matching(self, image: int, layers: int, count: int) -> Tensor:
        """(layers, count, 2): shared by all queries and objects of the image."""

    def candidates(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        """(masks, count, 2): among these the most uncertain are chosen; one row per matched query, ascending."""

    def uniform(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        """(masks, count, 2): used as they are."""


class RandomPoints:
    """Uniform points that depend only on the run's seed, the step and the sample, never on how a batch is divided.

    Args:
        seed: of the run.
        step: of the run.
        keys: (epoch, index) of each image.
        device: where points are drawn.
    """

    def __init__(self, seed: int, step: int, keys: Sequence[tuple[int, int]], device: torch.device | str) -> None:
        self.device = device
        self.generators = [torch.Generator(device).manual_seed(mix_seeds(seed, step, *key)) for key in keys]

    def matching(self, image: int, layers: int, count: int) -> Tensor:
        """See `Points`."""
        return self._draw(image, layers, count)

    def candidates(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        """See `Points`."""
        return self._draw(image, masks, count)

    def uniform(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        """See `Points`."""
        return self._draw(image, masks, count)

    def _draw(self, image: int, rows: int, count: int) -> Tensor:
        return torch.rand(rows, count, 2, generator=self.generators[image], device=self.device)


def sample(masks: Tensor, points: Tensor) -> Tensor:
    """Values of masks (M, h, w) at their own points (M, P, 2): (M, P)."""
    if not len(masks):
        return masks.new_zeros(points.shape[:2]) + masks.sum()
    if has_plain_operators(masks.device.type):
        rows, shares, inside = _neighbours(points, *masks.shape[-2:])
        values = masks.flatten(1).gather(1, rows.flatten(1)).view(rows.shape)
        return (values * shares * inside).sum(-1)
    grid = (points * 2 - 1)[:, None]
    return F.grid_sample(masks[:, None], grid, "bilinear", "zeros", align_corners=False)[:, 0, 0]


def object_shares(target: Target, points: Tensor) -> Tensor:
    """How much of each object lies at each point: (N, P) float32 for points (P, 2), without making a mask."""
    result = points.new_zeros(len(target) + 1, len(points))
    for ids, share in _corners(target, points):
        result.scatter_add_(0, ids.long(), share[None].expand(len(ids), -1))
    return result[1:]


def object_at(target: Target, objects: Tensor, points: Tensor) -> Tensor:
    """How much of object m lies at its own points: (M, P) float32 for objects (M,) and points (M, P, 2)."""
    number = (objects + 1)[:, None]
    result = torch.zeros_like(points[..., 0])
    for ids, share in _corners(target, points):
        hit = ids == number  # (D, M, P); `any` takes ten times as long as all else here, and D is mostly 1
        result.addcmul_(share, (hit[0] if len(hit) == 1 else hit.any(0)).to(share.dtype))
    return result


def _corners(target: Target, points: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each of the four pixels around points (..., 2) the object numbers (D, ...), 0 outside, and the share."""
    depth, height, width = target.id_maps.shape
    padded = F.pad(target.id_maps, (1, 1, 1, 1)).flatten(1)  # (D, (H + 2) * (W + 2)): no point has to be asked
    across, along = (points[..., axis] * size + 0.5 for axis, size in enumerate((width, height)))
    left, top = across.floor(), along.floor()
    right, down = across - left, along - top
    first = top.long() * (width + 2) + left.long()
    for step, share in (
        (0, (1 - down) * (1 - right)),
        (1, (1 - down) * right),
        (width + 2, down * (1 - right)),
        (width + 3, down * right),
    ):
        places = (first + step).flatten()
        yield padded.index_select(1, places).view(depth, *first.shape), share


def sample_features(features: Tensor, points: Tensor) -> Tensor:
    """Features (C, h, w) at points (P, 2), each a bag of four rows: (P, C) float32."""
    _, height, width = features.shape
    rows, shares, inside = _neighbours(points, height, width)
    table = features.float().flatten(1).t().contiguous()  # (h*w, C)
    shares = torch.where(inside, shares, 0)
    if has_plain_operators(features.device.type):
        corners = table.index_select(0, rows.flatten()).unflatten(0, rows.shape)  # (P, 4, C)
        return (corners * shares[..., None]).sum(1)
    return F.embedding_bag(rows, table, per_sample_weights=shares, mode="sum")


def _neighbours(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cell numbers (..., 4) int64 (0 where outside), bilinear shares (..., 4), and whether they are inside."""
    across, along = points.unbind(-1)
    across, along = across * width - 0.5, along * height - 0.5
    x, y = across.floor(), along.floor()
    right, down = across - x, along - y
    left, up = 1 - right, 1 - down
    x, y = x.long(), y.long()
    x = torch.stack([x, x + 1, x, x + 1], -1)
    y = torch.stack([y, y, y + 1, y + 1], -1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    shares = torch.stack([up * left, up * right, down * left, down * right], -1)
    return torch.where(inside, y * width + x, 0), shares, inside


def mix_seeds(*numbers: int) -> int:
    """A 63-bit seed from several numbers."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
