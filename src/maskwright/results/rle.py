"""Run-length encoding of masks.

A run is a range of consecutive pixels of a mask, as in the COCO mask API: pixels are numbered from 0 down the columns,
one column after the other. It has two forms here:

- runs: an array (n, 2) of the first pixel and one past the last pixel of each run, ascending. Instances of very large
  images are kept in this form, because its size depends on the object, not on the image.
- RLE: COCO's dictionary with the image size and the run lengths compressed to text, as files and AP use it.

Unusual: all objects of an id map are encoded in one pass over the map, and no pixel is visited in column order;
only the few pixels at which a run begins or ends are sorted into it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from maskwright.results.segmentation import Segmentation

_BAND_PIXELS = 2**22  # pixels processed at once, to bound memory
_LIMITS = 16 << 5 * np.arange(7)  # numbers from -16 to 15 have one character, from -512 to 511 two, and so on

# "size": [height, width] in pixels; "counts": the compressed run lengths as text.
Rle = dict[str, Any]


def encode_masks(masks: np.ndarray) -> list[Rle]:
    """Encode masks (N, H, W) bool, which may overlap. Empty for N = 0."""
    return _compress(mask_runs(masks), masks.shape[1:])


def encode_id_map(ids: np.ndarray, count: int) -> list[Rle]:
    """Encode the objects 1..count of an id map; see `id_map_runs`."""
    return _compress(id_map_runs(ids, count), ids.shape)


def encode_segmentation(segmentation: Segmentation) -> list[Rle]:
    """Encode the segments of a result, in the order of its labels."""
    if segmentation.instance_runs is not None:
        return [encode_runs(runs, segmentation.size) for runs in segmentation.instance_runs]
    return _compress(segmentation.runs, segmentation.size)


def id_map_runs(ids: np.ndarray, count: int) -> list[np.ndarray]:
    """Return the runs (n, 2) of each object 1..count of an id map.

    Args:
        ids: (H, W) integers; pixels with any other value belong to no object.
        count: number of objects; one without a pixel has no runs.
    """
    height, _ = ids.shape
    starts = _id_map_boundaries(ids)
    ends = np.append(starts, ids.size)[1:]
    owners = ids[starts % height, starts // height]
    order = np.argsort(owners, kind="stable")
    first = np.searchsorted(owners[order], np.arange(1, count + 2))
    runs = np.stack([starts, ends], 1)[order]
    return [runs[first[i] : first[i + 1]] for i in range(count)]


def encode_runs(runs: np.ndarray, size: tuple[int, int]) -> Rle:
    """Encode a mask of `size` (height, width) given by its runs."""
    boundaries = runs.ravel()
    # `find_runs` splits a run at the bottom of each column; COCO's runs continue at the top of the next one.
    split = np.flatnonzero(boundaries[1:-1:2] == boundaries[2::2]) * 2 + 1
    return _compress([np.delete(boundaries, np.concatenate([split, split + 1]))], size)[0]


def find_runs(mask: np.ndarray, top: int, left: int, image_height: int) -> np.ndarray:
    """Return the runs (n, 2) uint32 of a mask that is part of a larger image; (0, 2) for an empty mask.

    Runs are split at the bottom of each column of the mask.

    Args:
        mask: (h, w) bool.
        top: row of the image at which the mask begins.
        left: column of the image at which the mask begins.
        image_height: in pixels; the image has fewer than 2**32 pixels.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.zeros((0, 2), dtype=np.uint32)
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    width = max(1, _BAND_PIXELS // len(mask))
    boundaries = []
    for start in range(0, mask.shape[1], width):
        column, row = _column_boundaries(mask[:, start : start + width])
        column += start + left + columns[0]
        column *= image_height
        column += row
        column += top + rows[0]
        boundaries.append(column.astype(np.uint32))
    return np.concatenate(boundaries).reshape(-1, 2)


def decode_runs(runs: np.ndarray, box: tuple[int, int, int, int], image_height: int) -> np.ndarray:
    """Return the part of the image inside `box` as a mask (h, w) bool.

    Args:
        runs: of `find_runs`, all inside the box.
        box: top, left, bottom, right in pixels, bottom and right exclusive.
        image_height: in pixels.
    """
    top, left, bottom, right = box
    columns, rows = np.divmod(runs[:, 0].astype(np.int64), image_height)
    columns, rows = columns - left, rows - top
    change = np.zeros((right - left, bottom - top + 1), dtype=np.int8)
    change[columns, rows] = 1
    change[columns, rows + runs[:, 1] - runs[:, 0]] = -1
    return np.cumsum(change, axis=1, dtype=np.int8)[:, :-1].T.astype(bool)


def runs_box(runs: np.ndarray, image_height: int) -> tuple[int, int, int, int]:
    """Return the bounding box top, left, bottom, right, bottom and right exclusive; zeros if there is no run."""
    if not len(runs):
        return 0, 0, 0, 0
    columns, rows = np.divmod(runs[:, 0], image_height)
    last_columns, last_rows = np.divmod(runs[:, 1] - 1, image_height)
    if (columns != last_columns).any():  # from the bottom of a column to the top of the next one
        return 0, int(columns[0]), image_height, int(last_columns[-1]) + 1
    return int(rows.min()), int(columns[0]), int(last_rows.max()) + 1, int(columns[-1]) + 1


def _column_boundaries(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns and rows at which runs begin and end, alternating."""
    padded = np.zeros((mask.shape[1], mask.shape[0] + 2), dtype=bool)
    padded[:, 1:-1] = mask.T
    columns, rows = np.nonzero(padded[:, 1:] != padded[:, :-1])
    return columns, rows


def mask_runs(masks: np.ndarray) -> list[np.ndarray]:
    """Return the runs (n, 2) of each mask (N, H, W) bool.

    Rows are compared with rows, eight pixels per byte, and only pixels that differ are put in column order. This takes
    a fifth of the time of going down the columns.
    """
    count, height, width = masks.shape
    packed = np.packbits(masks, axis=2)
    words = np.zeros(-(-packed.size // 8), dtype=np.uint64)
    changes = words.view(np.uint8)[: packed.size].reshape(packed.shape)
    np.bitwise_xor(packed[:, 1:], packed[:, :-1], out=changes[:, 1:])
    above = masks[:, -1, :-1]  # the pixel before the top of a column is the bottom of the previous column
    changes[:, 0] = np.packbits(np.concatenate([masks[:, 0, :1], masks[:, 0, 1:] ^ above], 1), axis=1)
    nonzero = np.flatnonzero(words != 0)
    bits = np.flatnonzero(np.unpackbits(words[nonzero].view(np.uint8)).view(bool))
    rows, columns = np.divmod(nonzero[bits // 64] * 64 + bits % 64, packed.shape[2] * 8)
    mask_indices, rows = np.divmod(rows, height)
    positions = np.sort((mask_indices * width + columns) * height + rows)
    stops = np.searchsorted(positions, np.arange(count + 1) * (height * width)).tolist()
    runs = []
    for i in range(count):
        boundaries = positions[stops[i] : stops[i + 1]] - i * (height * width)
        if len(boundaries) % 2:  # the last run goes to the end of the image
            boundaries = np.append(boundaries, height * width)
        runs.append(boundaries.reshape(-1, 2))
    return runs


def _id_map_boundaries(ids: np.ndarray) -> np.ndarray:
    """Return the pixel numbers at which the id changes, ascending; id 0 at pixel 0 is no change."""
    height, width = ids.shape
    changed = np.empty((height, width), dtype=bool)
    np.not_equal(ids[1:], ids[:-1], out=changed[1:])
    np.not_equal(ids[0, 1:], ids[-1, :-1], out=changed[0, 1:])
    changed[0, 0] = ids[0, 0] != 0
    rows, columns = np.divmod(np.flatnonzero(changed), width)
    return np.sort(columns * height + rows)


def _compress(all_runs: list[np.ndarray], size: tuple[int, ...]) -> list[Rle]:
    """Make the RLEs of masks from their runs, all in one pass.

    COCO's text has the lengths outside and inside of the mask in turn, from the fourth on as the difference to the last
    but one, with 5 bits per character.
    """
    if not all_runs:
        return []
    height, width = map(int, size)
    values, ends = _lengths(all_runs, height * width)
    sizes = np.diff(ends, prepend=0)
    later = np.flatnonzero(np.arange(len(values)) - np.repeat(ends - sizes, sizes) > 2)
    differences = values.copy()
    differences[later] -= values[later - 2]
    text, stops = _as_text(differences)
    stops = [0, *stops[ends - 1].tolist()]
    return [{"size": [height, width], "counts": text[start:stop]} for start, stop in pairwise(stops)]


def _lengths(all_runs: list[np.ndarray], pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths (n,) int64 outside and inside of each mask in turn, and where those of each mask end."""
    edges = np.array([0, pixels])
    lengths = np.diff(np.concatenate([part for runs in all_runs for part in (edges[:1], runs.ravel(), edges[1:])]))
    last = np.cumsum([runs.size + 2 for runs in all_runs]) - 2
    is_length = np.ones(len(lengths), dtype=bool)
    is_length[last[:-1] + 1] = False  # from the end of a mask to the start of the next one
    is_length[last[lengths[last] == 0]] = False  # after a run to the end of the image
    return lengths[is_length], np.cumsum(is_length)[last]


def _as_text(values: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the text of numbers (n,) int64, and for each number the index after its last character."""
    lengths = np.searchsorted(_LIMITS, np.where(values < 0, ~values, values), side="right") + 1
    place = np.arange(lengths.max())
    characters = (values[:, None] >> 5 * place & 31) + np.where(place < lengths[:, None] - 1, 32, 0) + 48
    text = characters.astype(np.uint8)[place < lengths[:, None]].tobytes().decode("ascii")
    return text, np.cumsum(lengths)
