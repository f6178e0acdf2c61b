"""How sure the model is of each pixel of a result, 0..1.

- semantic: the probability of the chosen class. Mask2Former's class scores (the sum over queries of class times mask
  probability) need not sum to 1: below 1, the rest is "no class"; above 1, they are divided by their sum.
- instance and panoptic: the class probability times the mask probability of the segment that the pixel shows, 0 where
  there is none. So the mean over an instance that nothing hides is its score.

Only a bounded number of maps is held at a time. Accelerators run this file; a CPU runs `blockwise_confidence`, which
has the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from maskwright.inference.mask_upsampling import CropPrediction, SemanticScores, pixel_scores, resize
from maskwright.inference.postprocess import chunks, class_scores_in_chunks, confident_queries
from maskwright.inference.test_time_augmentation import MaskQueries
from maskwright.structures.predictions import MaskPrediction


def semantic(prediction: CropPrediction | SemanticScores, output_size: tuple[int, int], *, at_output: bool) -> Tensor:
    """Return the probability (H, W) float32 of the class with the highest score; see `postprocess.semantic`."""
    if isinstance(prediction, CropPrediction) and isinstance(prediction.prediction, MaskPrediction):
        size = output_size if at_output else prediction.input_size
        return _share_of_best(resize(scores, output_size) for scores in class_scores_in_chunks(prediction, size))
    scores = pixel_scores(prediction)
    values = scores.at_output(output_size)
    confidence = _softmax_of_best(values) if scores.are_logits else _share_of_best(values)
    return confidence.flip(-1) if scores.flipped else confidence


def instance(queries: MaskQueries, numbers: Tensor, labels: Tensor) -> Tensor:
    """Return the confidence (H, W) float32; where instances overlap, that of the one with the highest score.

    Args:
        queries: see `postprocess.instance`.
        numbers: (N,) the query of each instance, highest score first.
        labels: (N,).
    """
    numbers, probabilities = first_of_each_query(queries, numbers, labels)
    confidence = torch.zeros(queries.output_size, device=numbers.device)
    for chunk in chunks(torch.arange(len(numbers), device=numbers.device), queries.output_size):
        logits = queries.mask_logits(numbers[chunk])
        inside = logits > 0
        best = inside.int().argmax(0)[None]  # the first of equal values
        values = (logits.sigmoid().mul_(probabilities[chunk, None, None]) * inside).gather(0, best)[0]
        confidence = torch.where(confidence > 0, confidence, values)
    return confidence


def panoptic(queries: MaskQueries, segment_map: Tensor, *, object_threshold: float) -> Tensor:
    """Return the confidence (H, W) float32 of a panoptic result.

    Args:
        queries: see `postprocess.panoptic`.
        segment_map: (H, W), 0 is no segment.
        object_threshold: with which the segments were made.
    """
    candidates, _, scores = confident_queries(queries.probabilities, object_threshold)
    best = torch.zeros(queries.output_size, device=scores.device)
    for chunk in chunks(torch.arange(len(candidates), device=scores.device), queries.output_size):
        values = queries.mask_logits(candidates[chunk]).sigmoid().mul_(scores[chunk, None, None])
        best = torch.maximum(best, values.amax(0))
    return best.mul_(segment_map > 0)


def first_of_each_query(queries: MaskQueries, numbers: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries (n,) without repetitions and their class probabilities (n,); only the first of each can be seen.

    Args:
        queries: see `instance`.
        numbers: (N,) the query of each instance.
        labels: (N,).
    """
    first: dict[int, int] = {}
    for place, number in enumerate(numbers.tolist()):
        first.setdefault(number, place)
    places = torch.tensor(list(first.values()), dtype=torch.int64, device=numbers.device)
    return numbers[places], queries.probabilities[numbers[places], labels[places]]


def _share_of_best(scores: Iterable[Tensor]) -> Tensor:
    """Return the highest of several scores (H, W), which come in chunks (n, H, W), divided by their sum if above 1."""
    best = total = torch.zeros(())
    for chunk in scores:
        best = torch.maximum(best.to(chunk.device), chunk.amax(0))
        total = total.to(chunk.device) + chunk.sum(0)
    return best.div_(total.clamp_min_(1)).clamp_max_(1)


def _softmax_of_best(logits: Iterable[Tensor]) -> Tensor:
    """Return the softmax (H, W) of the highest of several logits, which come in chunks (n, H, W)."""
    best, total = torch.tensor(-torch.inf), torch.zeros(())
    for chunk in logits:
        before, best = best.to(chunk.device), torch.maximum(best.to(chunk.device), chunk.amax(0))
        total = total.to(chunk.device) * (before - best).exp() + (chunk - best).exp_().sum(0)
    return total.reciprocal_()
