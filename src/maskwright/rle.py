"""Run-length encoded masks, the form in which COCO files, result files and AP carry them.

The encoding is that of the COCO mask API: column-major runs, alternating outside and inside, compressed to a string.
What is unusual: the objects of an id map are encoded in one pass over the map, not in one pass per object.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hotcoco import mask as coco_mask

from maskwright.structures import Segmentation, Target

# One mask: "size" is [height, width] in pixels, "counts" the compressed runs as text.
Rle = dict[str, Any]


def encode_masks(masks: np.ndarray) -> list[Rle]:
    """One RLE per mask; `masks` is (N, H, W) bool, and may overlap. Empty for N = 0."""
    return [_text(rle) for rle in coco_mask.encode(masks.transpose(1, 2, 0))]


def encode_map(ids: np.ndarray, count: int) -> list[Rle]:
    """One RLE for each of the objects 1..count of an id map.

    Args:
        ids: (H, W) integers; other values than 1..count belong to no object.
        count: how many objects there are; one without a pixel gives an empty mask.
    """
    height, width = ids.shape
    column_major = ids.T.ravel()
    starts = np.flatnonzero(np.diff(column_major, prepend=0))
    ends = np.append(starts, column_major.size)[1:]
    owners = column_major[starts]
    order = np.argsort(owners, kind="stable")
    first = np.searchsorted(owners[order], np.arange(1, count + 2))
    edges = np.stack([starts, ends], 1)[order]
    return [_compress(edges[first[i] : first[i + 1]].ravel(), height, width) for i in range(count)]


def encode_segmentation(segmentation: Segmentation) -> list[Rle]:
    """One RLE per segment of a result, in the order of its labels."""
    if segmentation.instance_masks is not None:
        return encode_masks(segmentation.instance_masks)
    if segmentation.segment_map is not None:
        return encode_map(segmentation.segment_map, len(segmentation))
    nothing = len(segmentation.categories)
    numbers = np.zeros(nothing + 1, dtype=np.int32)
    numbers[segmentation.labels] = np.arange(1, len(segmentation) + 1)
    labels = np.minimum(np.asarray(segmentation.label_map).astype(np.uint64), nothing)
    return encode_map(numbers[labels.astype(np.int64)], len(segmentation))


def encode_target(target: Target) -> list[Rle]:
    """One RLE per annotated object, at the target's current size."""
    layers = [encode_map(layer, len(target)) for layer in target.id_maps.cpu().numpy()]
    if len(layers) == 1:
        return layers[0]
    return [_text(coco_mask.merge(list(parts))) for parts in zip(*layers, strict=True)]


def areas(rles: list[Rle]) -> np.ndarray:
    """(N,) float64, pixels of each mask."""
    return np.asarray(coco_mask.area(rles), dtype=np.float64)


def boxes(rles: list[Rle]) -> np.ndarray:
    """(N, 4) float64 x, y, width, height in pixels, as COCO files write boxes; zeros for an empty mask."""
    return np.asarray(coco_mask.to_bbox(rles), dtype=np.float64).reshape(-1, 4)


def _compress(edges: np.ndarray, height: int, width: int) -> Rle:
    size = height * width
    bounds = edges if len(edges) and edges[-1] == size else np.append(edges, size)
    counts = np.diff(bounds, prepend=0).tolist()
    return _text(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))


def _text(rle: Any) -> Rle:
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
