"""Confidence maps on a CPU: a query is computed only in the blocks of pixels where it can be the one that is shown.

The functions are those of `confidence`, and results are equal up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskwright.inference import confidence
from maskwright.inference.blockwise_postprocess import (
    BAND_VALUES,
    CACHED_BLOCKS,
    ROUNDING,
    by_rank,
    output_bands,
)
from maskwright.inference.blockwise_upsampling import SIDE, BlockMasks
from maskwright.inference.mask_upsampling import CropPrediction, SemanticScores
from maskwright.inference.postprocess import confident_queries
from maskwright.inference.test_time_augmentation import MaskQueries
from maskwright.structures.predictions import MaskPrediction


def semantic(prediction: CropPrediction | SemanticScores, output_size: tuple[int, int], *, at_output: bool) -> Tensor:
    """Return the probability of the chosen class of each pixel; see `confidence.semantic`.

    A few blocks at a time are computed for all classes, which then never leave the cache.
    """
    if isinstance(prediction, SemanticScores) or not isinstance(prediction.prediction, MaskPrediction):
        return confidence.semantic(prediction, output_size, at_output=at_output)
    queries = MaskQueries([prediction], output_size)
    weights = queries.probabilities[:, :-1].T  # (K, Q)
    weights = torch.cat([weights, weights.sum(0, keepdim=True)])  # the last row gives the sum over classes
    bands = output_bands(queries, torch.arange(weights.shape[1]), BAND_VALUES, at_input=not at_output)
    return torch.cat([_share_of_best(masks, weights) for _, masks in bands])


def instance(queries: MaskQueries, numbers: Tensor, labels: Tensor) -> Tensor:
    """Return the confidence of the instance with the highest score at each pixel; see `confidence.instance`."""
    numbers, probabilities = confidence.first_of_each_query(queries, numbers, labels)
    if not len(numbers):
        return torch.zeros(queries.output_size)
    parts = []
    for _, masks in output_bands(queries, numbers, BAND_VALUES):
        possible = masks.upper_bound() > 0  # (n, blocks)
        order, values = _first_inside(masks, possible, probabilities)
        parts.append(_join(masks, order, values))
    return torch.cat(parts)


def panoptic(queries: MaskQueries, segment_map: Tensor, *, object_threshold: float) -> Tensor:
    """Return the confidence of a panoptic result; see `confidence.panoptic`."""
    candidates, _, scores = confident_queries(queries.probabilities, object_threshold)
    if not len(candidates):
        return torch.zeros(queries.output_size)
    parts = []
    for _, masks in output_bands(queries, candidates, BAND_VALUES):
        guaranteed = masks.lower_bound().sigmoid_().mul_(scores[:, None]).amax(0)
        possible = masks.upper_bound().sigmoid_().mul_(scores[:, None]) >= guaranteed.mul_(1 - ROUNDING)
        order, values = _largest(masks, possible, scores)
        parts.append(_join(masks, order, values))
    return torch.cat(parts).mul_(segment_map > 0)


def _share_of_best(masks: BlockMasks, weights: Tensor) -> Tensor:
    """Return the highest class score (H, W) of each pixel of a band, divided by the sum over classes if above 1.

    Args:
        masks: of all queries.
        weights: (K+1, Q) class probabilities of the queries, and their sum over classes.
    """
    parts = []
    for blocks in masks.every_block().split(CACHED_BLOCKS):
        scores = masks.to_output(blocks, weights @ masks.all_logits(blocks).sigmoid_())  # (B, K+1, SIDE, SIDE)
        parts.append(scores[:, :-1].amax(1).div_(scores[:, -1].clamp_min(1)).clamp_max_(1))
    return masks.join(torch.cat(parts))


def _first_inside(masks: BlockMasks, possible: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value of the first query whose mask has the pixel, 0 if none has.

    Args:
        masks: of n queries.
        possible: (n, blocks) which queries may have pixels in which blocks.
        probabilities: (n,) of the queries' classes.

    Returns:
        (B,) the blocks with a possible query, and (B, SIDE, SIDE) class times mask probability.
    """
    order, places, queries, sizes = by_rank(possible)
    values = probabilities.new_zeros(sizes[0] if sizes else 0, SIDE, SIDE)
    for blocks, query in zip(order[places].split(sizes), queries.split(sizes), strict=True):
        logits, found = masks.logits(blocks, query), values[: len(blocks)]
        free = (logits > 0).logical_and_(found == 0)
        found.copy_(torch.where(free, logits.sigmoid_().mul_(probabilities[query, None, None]), found))
    return order[: len(values)], values


def _largest(masks: BlockMasks, possible: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest product of class score and mask probability; see `_first_inside`."""
    order, places, queries, sizes = by_rank(possible)
    values = scores.new_zeros(sizes[0] if sizes else 0, SIDE, SIDE)
    for blocks, query in zip(order[places].split(sizes), queries.split(sizes), strict=True):
        found = values[: len(blocks)]
        found.copy_(torch.maximum(found, masks.logits(blocks, query).sigmoid_().mul_(scores[query, None, None])))
    return order[: len(values)], values


def _join(masks: BlockMasks, blocks: Tensor, values: Tensor) -> Tensor:
    """Return the values (B, SIDE, SIDE) of some blocks of a band as (H, W), 0 in the other blocks."""
    every = values.new_zeros(len(masks.every_block()), SIDE, SIDE)
    every[blocks] = values
    return masks.join(every)
