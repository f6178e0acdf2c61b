"""Turn masks and class probabilities into a result: the algorithm of the paper. Original: `maskformer_model.py`.

Queries are filtered by score, only the masks that are kept are upsampled, a bounded number at a time, and pixels are
decided. Accelerators run this file; a CPU runs `blockwise_postprocess`, which has the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from maskwright.inference.exported.postprocess import number_segments
from maskwright.inference.mask_upsampling import CropPrediction, SemanticScores, pixel_scores, resize
from maskwright.inference.test_time_augmentation import MaskQueries
from maskwright.structures.predictions import MaskPrediction

CHUNK_VALUES = 128_000_000  # mask pixels, or class scores, that are held at a time


def semantic(prediction: CropPrediction | SemanticScores, output_size: tuple[int, int], *, at_output: bool) -> Tensor:
    """Return for each pixel (H, W) int64 the class with the highest score.

    Args:
        prediction: of the whole image.
        output_size: (height, width).
        at_output: whether masks are combined to class scores at the output size; otherwise at the size of the network's
            input, and the scores are resized.
    """
    if isinstance(prediction, CropPrediction) and isinstance(prediction.prediction, MaskPrediction):
        size = output_size if at_output else prediction.input_size
        return _argmax(resize(scores, output_size) for scores in class_scores_in_chunks(prediction, size))
    scores = pixel_scores(prediction)
    label_map = _argmax(scores.at_output(output_size))
    return label_map.flip(-1) if scores.flipped else label_map


def class_scores(prediction: CropPrediction, size: tuple[int, int]) -> Tensor:
    """Return the class scores (K, H, W) at a size: the sum over queries of class times mask probability."""
    return torch.cat(list(class_scores_in_chunks(prediction, size)))


def instance(
    queries: MaskQueries, things: list[bool], *, top_k: int, score_threshold: float
) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """Return the (query, class) pairs with the highest scores; a query may appear with several classes.

    Args:
        queries: their class probabilities and masks.
        things: for each class whether it is a thing.
        top_k: number of pairs, see `best_pairs`.
        score_threshold: minimum score; 0 keeps all.

    Returns:
        labels (N,), scores (N,) = class probability times mean mask probability inside the mask, queries (N,), highest
        score first; and the masks (N, H, W) bool as an array.
    """
    probabilities, labels, pairs = best_pairs(queries.probabilities, things, top_k)
    distinct, position = pairs.unique(return_inverse=True)
    masks, quality = [np.zeros((0, *queries.output_size), dtype=bool)], [probabilities[:0]]
    for chunk in chunks(distinct, queries.output_size):
        logits = queries.mask_logits(chunk)
        inside = logits > 0
        quality.append((logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6))
        masks.append(inside.cpu().numpy())
    scores, order = (probabilities * torch.cat(quality)[position]).sort(descending=True, stable=True)
    kept = order[scores >= score_threshold]
    return labels[kept], scores[: len(kept)], pairs[kept], np.concatenate(masks)[position[kept].cpu().numpy()]


def panoptic(
    queries: MaskQueries, things: list[bool], *, object_threshold: float, overlap_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign each pixel to at most one segment.

    A query competes for pixels with its class score times its mask probability. It becomes a segment if its class score
    is above `object_threshold`, and if it wins at least `overlap_threshold` of the area of its mask.

    Args:
        queries: their class probabilities and masks.
        things: for each class whether it is a thing; segments of one stuff class are merged.
        object_threshold: 0..1.
        overlap_threshold: 0..1.

    Returns:
        labels (N,), scores (N,) and the segment map (H, W) int32: 0 is no segment, n is segment n-1.
    """
    candidates, labels, scores = confident_queries(queries.probabilities, object_threshold)
    best = torch.full(queries.output_size, -1.0, device=scores.device)
    winner = torch.zeros_like(best, dtype=torch.int32)
    inside_winner = torch.zeros_like(best, dtype=torch.bool)
    areas = []
    for chunk in chunks(torch.arange(len(candidates), device=scores.device), queries.output_size):
        probabilities = queries.mask_logits(candidates[chunk]).sigmoid()
        inside = probabilities >= 0.5
        areas.append(inside.sum((1, 2)))
        value, index = probabilities.mul_(scores[chunk, None, None]).max(0)
        better = value > best
        best = torch.where(better, value, best)
        winner = torch.where(better, chunk[index].int(), winner)
        inside_winner = torch.where(better, inside.gather(0, index[None])[0], inside_winner)
    codes = 2 * winner + inside_winner
    return merge_segments(codes, torch.cat(areas) if areas else labels[:0], labels, scores, things, overlap_threshold)


def best_pairs(probabilities: Tensor, things: list[bool], top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return probability, class and query, each (N,), of the `top_k` most probable pairs whose class is a thing.

    Stuff is dropped from the best `top_k` of all classes, as in the original, so that fewer may remain.
    """
    every = probabilities[:, :-1].flatten()
    values, flat = every.topk(min(top_k, len(every)))
    queries, labels = flat // len(things), flat % len(things)
    keep = torch.tensor(things, device=labels.device)[labels]
    return values[keep], labels[keep], queries[keep]


def confident_queries(probabilities: Tensor, object_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return number, class and score, each (N,), of the queries whose best class is an object above the threshold."""
    scores, labels = probabilities.max(-1)
    no_object = probabilities.shape[-1] - 1
    queries = ((labels != no_object) & (scores > object_threshold)).nonzero()[:, 0]
    return queries, labels[queries], scores[queries]


def merge_segments(
    codes: Tensor, areas: Tensor, labels: Tensor, scores: Tensor, things: list[bool], overlap_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop queries that are mostly hidden and merge those of one stuff class; returns the result of `panoptic`.

    Args:
        codes: (H, W) int32, twice the number of the query that wins the pixel, and 1 more if the pixel is in its mask.
        areas: (N,) pixels of the masks.
        labels: (N,).
        scores: (N,).
        things: for each class whether it is a thing.
        overlap_threshold: minimum share of its mask that a query must win.
    """
    count, device = len(labels), labels.device
    won_outside, won_inside = torch.bincount(codes.flatten(), minlength=2 * count)[: 2 * count].view(-1, 2).T
    columns = (labels, scores, areas, won_outside + won_inside, won_inside)
    segments, table = number_segments(zip(*(c.tolist() for c in columns), strict=True), things, overlap_threshold)
    table = torch.tensor(table, dtype=torch.int32, device=device)
    return (
        torch.tensor([label for label, _ in segments], dtype=torch.int64, device=device),
        torch.tensor([score for _, score in segments], dtype=torch.float32, device=device),
        table.index_select(0, codes.flatten()).view(codes.shape),
    )


def class_scores_in_chunks(prediction: CropPrediction, size: tuple[int, int]) -> Iterator[Tensor]:
    """Yield class scores (k, H, W), a few classes at a time; those of all classes might not fit into memory."""
    queries = MaskQueries([prediction], size)
    weights = queries.probabilities[:, :-1].T  # (K, Q)
    numbers = torch.arange(weights.shape[1], device=weights.device)
    for classes in chunks(weights, size):
        scores = weights.new_zeros(len(classes), *size)
        for chunk in chunks(numbers, size):
            scores += torch.einsum("kq,qhw->khw", classes[:, chunk], queries.mask_logits(chunk).sigmoid())
        yield scores


def _argmax(chunks: Iterable[Tensor]) -> Tensor:
    """Return the index (H, W) int64 of the largest of several maps, which come in chunks (n, H, W); the first if equal.

    At least one chunk must come.
    """
    best = label_map = torch.zeros(0)
    start = 0
    for chunk in chunks:
        value, label = chunk.max(0)
        if start:
            better = value > best
            best, label_map = torch.where(better, value, best), torch.where(better, label + start, label_map)
        else:
            best, label_map = value, label
        start += len(chunk)
    return label_map


def chunks(rows: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Split (N, ...) into parts so small that `CHUNK_VALUES` holds their maps of a size; none for N = 0."""
    return rows.split(max(1, CHUNK_VALUES // (size[0] * size[1]))) if len(rows) else ()
