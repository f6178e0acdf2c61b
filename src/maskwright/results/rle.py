"""Run-length encoded masks, the form in which COCO files, result files and AP carry them.

The encoding is that of the COCO mask API: column-major runs, alternating outside and inside, compressed to a string.
What is unusual: the objects of an id map are encoded in one pass over the map, not in one pass per object; and no pixel
is visited in column order, only the few where something changes are sorted into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hotcoco import mask as coco_mask

from maskwright.structures.annotations import Target

if TYPE_CHECKING:
    from maskwright.results.segmentation import Segmentation

_BAND = 2**22  # pixels of a map that are looked up together

# One mask: "size" is [height, width] in pixels, "counts" the compressed runs as text.
Rle = dict[str, Any]


def encode_masks(masks: np.ndarray) -> list[Rle]:
    """One RLE per mask; `masks` is (N, H, W) bool, and may overlap. Empty for N = 0."""
    height, width = masks.shape[1:]
    return [_compress(edges, height, width) for edges in _mask_edges(masks)]


def encode_map(ids: np.ndarray, count: int) -> list[Rle]:
    """One RLE for each of the objects 1..count of an id map.

    Args:
        ids: (H, W) integers; other values than 1..count belong to no object.
        count: how many objects there are; one without a pixel gives an empty mask.
    """
    height, width = ids.shape
    starts = _map_edges(ids)
    ends = np.append(starts, ids.size)[1:]
    owners = ids[starts % height, starts // height]
    order = np.argsort(owners, kind="stable")
    first = np.searchsorted(owners[order], np.arange(1, count + 2))
    edges = np.stack([starts, ends], 1)[order]
    return [_compress(edges[first[i] : first[i + 1]].ravel(), height, width) for i in range(count)]


def encode_segmentation(segmentation: Segmentation) -> list[Rle]:
    """One RLE per segment of a result, in the order of its labels."""
    if segmentation.instance_runs is not None:
        return [encode_runs(runs, segmentation.size) for runs in segmentation.instance_runs]
    if segmentation.instance_masks is not None:
        return encode_masks(segmentation.instance_masks)
    return encode_map(number_map(segmentation), len(segmentation))


def number_map(segmentation: Segmentation) -> np.ndarray:
    """(H, W) int32 of a semantic or panoptic result: 0 is no segment, n is segment number n-1."""
    if segmentation.segment_map is not None:
        return segmentation.segment_map
    nothing = len(segmentation.categories)
    table = np.zeros(nothing + 1, dtype=np.int32)
    table[segmentation.labels] = np.arange(1, len(segmentation) + 1)
    return look_up(table, np.asarray(segmentation.label_map))


def look_up(table: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """`table[numbers]`, with the last entry for numbers it lacks; a few rows at a time, to need no further memory."""
    found = np.empty(numbers.shape, dtype=table.dtype)
    rows = max(1, _BAND // max(1, numbers.shape[1]))
    for start in range(0, len(numbers), rows):
        band = np.minimum(numbers[start : start + rows].astype(np.uint64), len(table) - 1)
        np.take(table, band.astype(np.int64), out=found[start : start + rows])
    return found


def encode_runs(runs: np.ndarray, size: tuple[int, int]) -> Rle:
    """The RLE of a mask of `size` (height, width) that is given by its runs; see `runs`."""
    edges = runs.ravel()
    touching = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1  # from the foot of a column to the next one's head
    return _compress(np.delete(edges, np.concatenate([touching, touching + 1])), *size)


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


def _mask_edges(masks: np.ndarray) -> list[np.ndarray]:
    """For each mask where its runs of ones begin and end, as positions down the columns, ascending.

    Rows are compared with rows, eight pixels to the byte, and only the few that differ are put in column order: a fifth
    of the time of going down the columns.
    """
    count, height, width = masks.shape
    edges = np.packbits(masks, axis=2)
    edges[:, 1:] ^= edges[:, :-1].copy()
    above = masks[:, -1, :-1]  # a column goes on at the top of the next one
    edges[:, 0] = np.packbits(np.concatenate([masks[:, 0, :1], masks[:, 0, 1:] ^ above], 1), axis=1)
    flat = edges.ravel()
    used = np.flatnonzero(flat != 0)
    bits = np.flatnonzero(np.unpackbits(flat[used]).view(bool))
    rows, columns = np.divmod(used[bits // 8] * 8 + bits % 8, edges.shape[2] * 8)
    numbers, rows = np.divmod(rows, height)
    positions = np.sort((numbers * width + columns) * height + rows)
    first = np.searchsorted(positions, np.arange(count + 1) * (height * width))
    return [positions[first[i] : first[i + 1]] - i * (height * width) for i in range(count)]


def _map_edges(ids: np.ndarray) -> np.ndarray:
    """Where runs of one value begin, as positions down the columns, ascending; zeros at the start are no run."""
    height, width = ids.shape
    changed = np.empty((height, width), dtype=bool)
    np.not_equal(ids[1:], ids[:-1], out=changed[1:])
    np.not_equal(ids[0, 1:], ids[-1, :-1], out=changed[0, 1:])
    changed[0, 0] = ids[0, 0] != 0
    rows, columns = np.divmod(np.flatnonzero(changed), width)
    return np.sort(columns * height + rows)


def _compress(edges: np.ndarray, height: int, width: int) -> Rle:
    size = height * width
    bounds = np.empty(len(edges) + 2, dtype=np.int64)
    bounds[0], bounds[1:-1], bounds[-1] = 0, edges, size
    if len(edges) and edges[-1] == size:
        bounds = bounds[:-1]
    counts = (bounds[1:] - bounds[:-1]).tolist()
    return _text(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))


def _text(rle: Any) -> Rle:
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
