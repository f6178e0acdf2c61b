"""Post-processing in NumPy for the raw outputs of a file; equals `inference.postprocess` up to rounding.

Unusual: a map is resized bilinearly to the input of the network, cropped to the image, and resized to the result. Each
of these steps is linear, so one matrix for rows and one for columns does all of them: a mask of the result is
rows @ coarse @ columns.T. Rows are processed in bands, so that few masks are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from maskwright.inference.exported.settings import Settings
from maskwright.results.segmentation import Segmentation
from maskwright.structures.category import Category

_BAND_VALUES = 2**22  # pixels of all masks in a band, which fit into the cache


@dataclass(frozen=True)
class Sizes:
    """(height, width) of an image at each stage.

    Attributes:
        padded: the input of the file.
        image: the resized image, at the top left of the input.
        result: the result.
    """

    padded: tuple[int, int]
    image: tuple[int, int]
    result: tuple[int, int]


def decide(
    outputs: dict[str, np.ndarray], settings: Settings, categories: tuple[Category, ...], sizes: Sizes
) -> Segmentation:
    """Return the result for one image.

    Args:
        outputs: of a file with contents "raw" or "masks" for one image, without the dimension B; see `docs/export.md`.
        settings: task and thresholds.
        categories: in label order.
        sizes: see the class.
    """
    size, things = sizes.result, [category.is_thing for category in categories]
    if "pixel_logits" in outputs:
        label_map = _argmax(Maps(outputs["pixel_logits"], sizes))
        return _semantic_result(label_map, categories)
    masks = outputs["mask_logits"] if "mask_logits" in outputs else _mask_logits(outputs)
    probabilities = _softmax(outputs["class_logits"].astype(np.float32))
    if settings.task == "semantic":
        return _semantic_result(semantic(probabilities, masks, settings, sizes), categories)
    if settings.task == "instance":
        labels, scores, instance_masks = instance(probabilities, masks, things, settings, sizes)
        return Segmentation("instance", size, categories, labels, scores, instance_masks=instance_masks)
    labels, scores, segment_map = panoptic(probabilities, masks, things, settings, sizes)
    return Segmentation("panoptic", size, categories, labels, scores, segment_map=segment_map)


def semantic(probabilities: np.ndarray, masks: np.ndarray, settings: Settings, sizes: Sizes) -> np.ndarray:
    """Return for each pixel (H, W) int64 the class with the largest sum over queries of class times mask probability.

    Args:
        probabilities: (Q, K+1) of the classes.
        masks: (Q, h, w) logits.
        settings: `semantic_resolution` is "output", or "input" to add up the queries at the size of the resized image.
        sizes: see the class.
    """
    weights = probabilities[:, :-1].T  # (K, Q)
    if settings.semantic_resolution == "output":
        label_map = np.empty(sizes.result, dtype=np.int64)
        for rows, logits in Maps(masks, sizes).bands():
            label_map[rows] = np.tensordot(weights, _sigmoid(logits), 1).argmax(0)
        return label_map
    scores = np.empty((len(weights), *sizes.image), dtype=np.float32)
    for rows, logits in Maps(masks, Sizes(sizes.padded, sizes.image, sizes.image)).bands():
        scores[:, rows] = np.tensordot(weights, _sigmoid(logits), 1)
    return _argmax(Maps(scores, Sizes(sizes.image, sizes.image, sizes.result)))


def instance(
    probabilities: np.ndarray, masks: np.ndarray, things: Sequence[bool], settings: Settings, sizes: Sizes
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels (N,), scores (N,) and masks (N, H, W) bool, highest score first; see `postprocess.instance`."""
    every = probabilities[:, :-1].ravel()
    best = np.argsort(-every, kind="stable")[: settings.top_k]
    queries, labels = np.divmod(best, len(things))
    is_thing = np.array(things)[labels]
    best, queries, labels = best[is_thing], queries[is_thing], labels[is_thing]
    distinct, position = np.unique(queries, return_inverse=True)
    inside = np.zeros((len(distinct), *sizes.result), dtype=bool)
    total = np.zeros(len(distinct), dtype=np.float64)
    for rows, logits in Maps(masks[distinct], sizes).bands():
        inside[:, rows] = logits > 0
        total += (_sigmoid(logits) * inside[:, rows]).sum((1, 2), dtype=np.float64)
    quality = total / (np.count_nonzero(inside, axis=(1, 2)) + 1e-6)
    scores = (every[best] * quality[position]).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= settings.score_threshold]
    return labels[order], scores[order], inside[position[order]]


def panoptic(
    probabilities: np.ndarray, masks: np.ndarray, things: Sequence[bool], settings: Settings, sizes: Sizes
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels (N,), scores (N,) and the segment map (H, W) int32; see `postprocess.panoptic`."""
    scores, labels = probabilities.max(-1), probabilities.argmax(-1)
    candidates = np.flatnonzero((labels != len(things)) & (scores > settings.object_threshold))
    scores, labels = scores[candidates], labels[candidates]
    codes = np.zeros(sizes.result, dtype=np.int64)  # 2 * the query that wins a pixel, + 1 if the pixel is in its mask
    areas = np.zeros(len(candidates), dtype=np.int64)
    for rows, logits in Maps(masks[candidates], sizes).bands():
        mask_probabilities = _sigmoid(logits)
        inside = mask_probabilities >= 0.5
        areas += np.count_nonzero(inside, axis=(1, 2))
        winner = (mask_probabilities * scores[:, None, None]).argmax(0)
        codes[rows] = 2 * winner + np.take_along_axis(inside, winner[None], 0)[0]
    outside, visible = np.bincount(codes.ravel(), minlength=2 * len(labels))[: 2 * len(labels)].reshape(-1, 2).T
    columns = (labels, scores, areas, outside + visible, visible)
    segments, table = number_segments(
        zip(*(column.tolist() for column in columns), strict=True), things, settings.overlap_threshold
    )
    found = [label for label, _ in segments], [score for _, score in segments]
    return np.array(found[0], np.int64), np.array(found[1], np.float32), np.array(table, np.int32)[codes]


def number_segments(
    queries: Iterable[tuple[int, float, int, int, int]], things: Sequence[bool], overlap_threshold: float
) -> tuple[list[tuple[int, float]], list[int]]:
    """Drop queries that are mostly hidden, and merge those of one stuff class.

    Args:
        queries: label, score, and pixels: of the mask, won from other queries, and won inside the mask.
        things: for each class whether it is a thing.
        overlap_threshold: minimum share of its mask that a query must win.

    Returns:
        (label, score) of each segment; and the table of codes: entry 2 q is 0, entry 2 q + 1 is the segment, from 1, of
        query q, or 0 if it was dropped. Without queries, the table is [0].
    """
    segments: list[tuple[int, float]] = []
    stuff_segments: dict[int, int] = {}
    table = []
    for label, score, area, won, visible in queries:
        segment = 0
        if area and won and visible and won / area >= overlap_threshold:
            if label not in stuff_segments:
                segments.append((label, score))
                if not things[label]:
                    stuff_segments[label] = len(segments)
            segment = stuff_segments.get(label, len(segments))
        table += [0, segment]
    return segments, table or [0]


class Maps:
    """Coarse maps, which are resized to the result band by band.

    Args:
        coarse: (N, h, w).
        sizes: see the class.
    """

    def __init__(self, coarse: np.ndarray, sizes: Sizes) -> None:
        self.coarse = coarse.astype(np.float32)
        self.rows, self.columns = (
            resize_matrix(cells, *lengths)
            for cells, *lengths in zip(coarse.shape[1:], sizes.padded, sizes.image, sizes.result, strict=True)
        )

    def bands(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield rows of the result, and the maps (N, rows, W) there; nothing for N = 0."""
        count = len(self.coarse)
        height = max(1, _BAND_VALUES // max(1, count * len(self.columns)))
        for start in range(0, len(self.rows) if count else 0, height):
            rows = self.rows[start : start + height]
            used = np.flatnonzero(rows.any(0))
            cells = slice(used[0], used[-1] + 1)
            yield slice(start, start + len(rows)), (rows[:, cells] @ self.coarse[:, cells]) @ self.columns.T


def resize_matrix(cells: int, padded: int, image: int, result: int) -> np.ndarray:
    """Return the matrix (result, cells) that resizes cells to a padded length, crops that, and resizes it again."""
    return _bilinear(image, result) @ _bilinear(cells, padded)[:image]


def _bilinear(source: int, target: int) -> np.ndarray:
    """Return the matrix (target, source) of bilinear resizing, align_corners=False, with PyTorch's rounding."""
    scale = np.float32(source) / np.float32(target)
    position = np.maximum(scale * (np.arange(target, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
    low = position.astype(int)
    matrix = np.zeros((target, source), dtype=np.float32)
    row = np.arange(target)
    matrix[row, low] = 1 - (position - low)
    matrix[row, np.minimum(low + 1, source - 1)] += position - low
    return matrix


def _mask_logits(outputs: dict[str, np.ndarray]) -> np.ndarray:
    return np.tensordot(outputs["mask_embeddings"].astype(np.float32), outputs["mask_features"].astype(np.float32), 1)


def _argmax(maps: Maps) -> np.ndarray:
    return np.concatenate([values.argmax(0) for _, values in maps.bands()])


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # the exponential of 89 is infinity, which gives 0
        return 1 / (1 + np.exp(-logits))


def _semantic_result(label_map: np.ndarray, categories: tuple[Category, ...]) -> Segmentation:
    labels = np.flatnonzero(np.bincount(label_map.ravel(), minlength=len(categories)))
    size = label_map.shape[0], label_map.shape[1]
    return Segmentation("semantic", size, categories, labels, label_map=label_map)
