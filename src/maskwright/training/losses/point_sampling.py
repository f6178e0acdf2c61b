"""Point sampling: the locations at which masks are compared, and the values of masks, features and objects there.

Points are (x, y) in 0..1 of the padded image. Sampling is bilinear, with align_corners=False and zeros outside.
Original: detectron2's PointRend, `point_features.py`.
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

MAX_CPU_CHUNK = 2**21  # values per tensor; all layers of a large image at once would be the peak memory of a step


class Points(Protocol):
    """Locations for the matching and the mask losses. Layers are in the order of `ModelOutput`, the final one last."""

    def matching(self, image: int, layers: int, count: int) -> Tensor:
        """Return (layers, count, 2), shared by all queries and objects of the image."""

    def candidates(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        """Return (masks, count, 2), one row per matched query in ascending order; the most uncertain are used."""

    def uniform(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        """Return (masks, count, 2); all points are used."""


class RandomPoints:
    """Uniform points that depend on the seed, the step and the sample only, not on how a batch is split.

    Args:
        seed: of the run.
        step: of the run.
        keys: (epoch, index) of each image.
        device: device on which points are drawn.
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


def mix_seeds(*seeds: int) -> int:
    """Hash several integers into one 63-bit seed."""
    digest = hashlib.blake2b(",".join(map(str, seeds)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def chunk_layers(layers: int, values_per_layer: int, device: torch.device) -> list[range]:
    """Split the decoder layers into chunks that are processed at once: all of them, except on a CPU."""
    chunk = max(1, MAX_CPU_CHUNK // max(1, values_per_layer)) if device.type == "cpu" else layers
    return [range(layers)[start : start + chunk] for start in range(0, layers, chunk)]


def sample_masks(masks: Tensor, points: Tensor) -> Tensor:
    """Sample each mask (M, h, w) at its own points (M, P, 2): (M, P)."""
    if not len(masks):
        return masks.new_zeros(points.shape[:2]) + masks.sum()  # keeps the graph connected
    if has_plain_operators(masks.device.type):
        cells, weights, inside = _neighbors(points, *masks.shape[-2:])
        values = masks.flatten(1).gather(1, cells.flatten(1)).view(cells.shape)
        return (values * weights * inside).sum(-1)
    grid = (points * 2).sub_(1)[:, None]
    return F.grid_sample(masks[:, None], grid, "bilinear", "zeros", align_corners=False)[:, 0, 0]


def sample_features(features: Tensor, points: Tensor) -> Tensor:
    """Sample features (C, h, w) at points (P, 2): (P, C), in the features' dtype. A point is a bag of four cells."""
    _, height, width = features.shape
    cells, weights, inside = _neighbors(points, height, width)
    table = features.flatten(1).t().contiguous()  # (h*w, C)
    weights = torch.where(inside, weights, 0).to(table.dtype)
    if has_plain_operators(features.device.type):
        corners = table.index_select(0, cells.flatten()).unflatten(0, cells.shape)  # (P, 4, C)
        return (corners * weights[..., None]).sum(1)
    return F.embedding_bag(cells, table, per_sample_weights=weights, mode="sum")


def _neighbors(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the four cells around each point (..., 4) int64, 0 if outside, their weights, and which are inside."""
    x, y = points.unbind(-1)
    x, y = x * width - 0.5, y * height - 0.5
    column, row = x.floor(), y.floor()
    right, down = x - column, y - row
    left, up = 1 - right, 1 - down
    column, row = column.long(), row.long()
    column = torch.stack([column, column + 1, column, column + 1], -1)
    row = torch.stack([row, row, row + 1, row + 1], -1)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    weights = torch.stack([up * left, up * right, down * left, down * right], -1)
    return torch.where(inside, row * width + column, 0), weights, inside


def sample_objects(target: Target, points: Tensor) -> Tensor:
    """Sample the masks of all objects at shared points (P, 2): (N, P) float32, straight from the id maps."""
    result = points.new_zeros(len(target) + 1, len(points))
    for id_maps, weight in _id_map_corners(target, points):
        for ids in id_maps:
            result.scatter_add_(0, ids.long()[None], weight[None])
    return result[1:]


def sample_matched_objects(target: Target, objects: Tensor, points: Tensor) -> Tensor:
    """Sample the mask of each object (M,) at its own points (M, P, 2): (M, P) float32, straight from the id maps."""
    own_id = (objects + 1)[:, None]
    result = torch.zeros_like(points[..., 0])
    for id_maps, weight in _id_map_corners(target, points):
        hit = id_maps[0] == own_id  # (M, P)
        for ids in id_maps[1:]:
            hit |= ids == own_id
        result.addcmul_(weight, hit.to(weight.dtype))
    return result


def _id_map_corners(target: Target, points: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield the ids of each map at each of the four pixels around points (..., 2), 0 if outside, and their weights."""
    height, width = target.id_maps.shape[-2:]
    padded = F.pad(target.id_maps, (1, 1, 1, 1)).flatten(1)  # (D, (H + 2) * (W + 2)), so no point needs a bounds check
    x, y = (points[..., axis] * size + 0.5 for axis, size in enumerate((width, height)))
    left, top = x.floor(), y.floor()
    right, down = x - left, y - top
    first = (top.int() * (width + 2) + left.int()).flatten()
    for offset, weight in (
        (0, (1 - down) * (1 - right)),
        (1, (1 - down) * right),
        (width + 2, down * (1 - right)),
        (width + 3, down * right),
    ):
        # one-dimensional, with 32-bit numbers: `index_select` is a third as fast otherwise
        yield [id_map.index_select(0, first + offset).view(weight.shape) for id_map in padded], weight
