"""From a prediction to a result: which query is what, and where. Original: `maskformer_model.py`.

Unusual: queries are chosen by score before anything is resized, and only those blocks of pixels are computed in which
a mask can make a difference; see `block_masks`. Results are those of whole masks up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from maskwright.block_masks import SIDE
from maskwright.recipe_sections import EvaluateConfig
from maskwright.structures import Category, MaskPrediction, Segmentation, Task
from maskwright.views import GROUP_VALUES, ClassScores, Objects, View, class_scores, mean_scores

_ROUNDING = 1e-5  # relative: by how much a computed score may leave its bounds
_BORDER = 1e-4  # by how much a logit may


def segment(
    views: Iterable[View | ClassScores],
    task: Task,
    *,
    output_size: tuple[int, int],
    categories: tuple[Category, ...],
    config: EvaluateConfig,
) -> Segmentation:
    """The result for one image.

    Semantic: the scores of all views are averaged at the output size. Instance and panoptic: of two views, the image
    and its flip, the queries that mean one object are averaged; see `views.Objects`.

    Args:
        views: of the image; taken one at a time where the task is semantic.
        task: which kind of result.
        output_size: (height, width) of the result.
        categories: in label order.
        config: thresholds, and the size at which semantic scores are combined.

    Raises:
        ValueError: a prediction has no masks, which the task needs.
    """
    if task == "semantic":
        label_map = semantic(iter(views), output_size, at_output=config.semantic_at == "output")
        labels = torch.bincount(label_map.flatten(), minlength=len(categories)).nonzero()[:, 0]
        return Segmentation(task, output_size, categories, _numpy(labels), label_map=_numpy(label_map))
    objects = Objects(cast(list[View], list(views)), output_size)
    match task:
        case "instance":
            things = torch.tensor([c.is_thing for c in categories], device=objects.probabilities.device)
            labels, scores, found, _ = instance(
                objects.probabilities[:, :-1],
                objects,
                things,
                top_k=config.top_k,
                score_threshold=config.score_threshold,
            )
            return Segmentation(
                task, output_size, categories, _numpy(labels), _numpy(scores), instance_masks=_numpy(found)
            )
        case "panoptic":
            labels, scores, segment_map = panoptic(
                objects.probabilities,
                objects,
                [c.is_thing for c in categories],
                object_threshold=config.object_threshold,
                overlap_threshold=config.overlap_threshold,
            )
            return Segmentation(
                task, output_size, categories, _numpy(labels), _numpy(scores), segment_map=_numpy(segment_map)
            )
    raise ValueError(f"unknown task '{task}'; known: semantic, instance, panoptic")


def semantic(views: Iterator[View | ClassScores], output_size: tuple[int, int], *, at_output: bool) -> Tensor:
    """(H, W) int64: per pixel the class with the largest score; of several views, of their mean.

    Args:
        views: at least one.
        output_size: (height, width).
        at_output: whether masks are combined to scores at the output, not at the network's input.
    """
    first, second = next(views), next(views, None)
    if second is not None:
        every = chain([first, second], views)
        scores = (class_scores(one, output_size if at_output else None) for one in every)
        return mean_scores(scores, output_size).argmax(0)
    if isinstance(first, View) and isinstance(first.prediction, MaskPrediction):
        return _semantic_of_masks(Objects([first], output_size), at_output)
    only = class_scores(first)
    label_map = _largest(only.at_output(output_size))
    return label_map.flip(-1) if only.flipped else label_map


def _semantic_of_masks(objects: Objects, at_output: bool) -> Tensor:
    """The class of each pixel; those of a block that the bounds of its masks leave to one class are not computed."""
    weights = objects.probabilities[:, :-1]  # (Q, K)
    every = torch.arange(len(weights), device=weights.device)
    parts = []
    for _, masks in objects.masks(every, middle=not at_output).bands(GROUP_VALUES):
        least, largest = (bound.sigmoid_() @ weights for bound in (masks.least(), masks.largest()))  # (blocks, K)
        sure, best = least.max(1)
        possible = largest >= (sure - _ROUNDING * largest.amax(1))[:, None]
        labels = best[:, None, None].repeat(1, SIDE, SIDE)
        open_blocks = (possible.sum(1) > 1).nonzero()[:, 0]
        if len(open_blocks):
            classes = possible[open_blocks].any(0).nonzero()[:, 0]
            fits = weights[:, classes].T @ masks.middle_of_all(open_blocks).sigmoid_()  # (B, k, s * t)
            labels[open_blocks] = classes[masks.to_output(open_blocks, fits).max(1).indices]
        parts.append(masks.whole(labels))
    return torch.cat(parts)


def _largest(parts: Iterable[Tensor]) -> Tensor:
    """(H, W) int64: which of all maps is largest, the parts (n, H, W) put one behind the other; the first of equals."""
    best = label_map = torch.zeros(0)
    start = 0
    for part in parts:
        value, label = part.max(0)
        if start:
            better = value > best
            best, label_map = torch.where(better, value, best), torch.where(better, label + start, label_map)
        else:
            best, label_map = value, label
        start += len(part)
    return label_map


def instance(
    probabilities: Tensor, masks: Objects, things: Tensor, *, top_k: int, score_threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best (query, class) pairs; a query may appear with several classes.

    The best `top_k` of all classes are taken before stuff is dropped, as in the original, so fewer may remain.

    Args:
        probabilities: (Q, K).
        masks: of all queries.
        things: (K,) bool.
        top_k: pairs.
        score_threshold: least score kept; 0 keeps all.

    Returns:
        labels (N,), scores (N,) = class probability times mean mask probability inside the mask, masks (N, H, W) bool
        and queries (N,), best score first.
    """
    num_classes = probabilities.shape[1]
    best, flat = probabilities.flatten().topk(min(top_k, probabilities.numel()))
    queries, labels = flat // num_classes, flat % num_classes
    keep = things[labels]
    best, queries, labels = best[keep], queries[keep], labels[keep]
    distinct, position = queries.unique(return_inverse=True)
    if not len(distinct):
        empty = torch.zeros(0, *masks.output_size, dtype=torch.bool, device=labels.device)
        return labels, best, empty, queries
    found, quality = _mask_and_quality(masks, distinct)
    scores, order = (best * quality[position]).sort(descending=True, stable=True)
    kept = order[scores >= score_threshold]
    return labels[kept], scores[: len(kept)], found[position[kept]], queries[kept]


def _mask_and_quality(masks: Objects, queries: Tensor) -> tuple[Tensor, Tensor]:
    """(n, H, W) bool, and (n,) the mean mask probability inside each."""
    height, width = (-(-size // SIDE) for size in masks.output_size)
    found = torch.zeros(len(queries), height, SIDE, width, SIDE, dtype=torch.bool, device=queries.device)
    total = torch.zeros(2, len(queries), device=queries.device)  # probabilities inside, and pixels
    for rows, band in masks.masks(queries).bands(GROUP_VALUES):
        largest = band.largest()
        blocks, objects = (largest > 0).nonzero().T
        probabilities = band.middle(blocks, objects)
        inside = (probabilities > 0) & band.pixels()[blocks]
        probabilities.sigmoid_()
        by_block = largest.new_zeros(2, *largest.shape)
        by_block[:, blocks, objects] = torch.stack([(probabilities * inside).sum((1, 2)), inside.sum((1, 2))])
        total += by_block.sum(1)
        found[objects, rows.start // SIDE + blocks // width, :, blocks % width] = inside
    whole = found.flatten(3).flatten(1, 2)[:, : masks.output_size[0], : masks.output_size[1]]
    return whole, total[0] / (total[1] + 1e-6)


def panoptic(
    probabilities: Tensor, masks: Objects, things: list[bool], *, object_threshold: float, overlap_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each pixel to at most one segment.

    A query competes for pixels with its class score times its mask probability. It becomes a segment if its class score
    is above `object_threshold` and at least `overlap_threshold` of its mask is left to it. Pieces of one stuff class
    are one segment.

    Args:
        probabilities: (Q, K+1).
        masks: of all queries.
        things: for each class whether it is a thing.
        object_threshold: 0..1.
        overlap_threshold: 0..1.

    Returns:
        labels (N,), scores (N,) and the segment map (H, W) int32: 0 is no segment, n is segment n-1.
    """
    scores, labels = probabilities.max(-1)
    no_object = probabilities.shape[-1] - 1
    queries = ((labels != no_object) & (scores > object_threshold)).nonzero()[:, 0]
    if not len(queries):
        return labels[:0], scores[:0], torch.zeros(masks.output_size, dtype=torch.int32, device=labels.device)
    winner, inside, own = _compete(masks, queries, scores[queries])
    won = torch.bincount(winner.flatten(), minlength=len(queries))
    visible = torch.bincount(winner[inside], minlength=len(queries))
    chosen: list[tuple[int, float]] = []
    number = [0] * len(queries)  # of the segment that each query became; 0 is none
    stuff: dict[int, int] = {}
    rows = zip(
        labels[queries].tolist(), scores[queries].tolist(), own.tolist(), won.tolist(), visible.tolist(), strict=True
    )
    for query, (label, score, own_area, won_area, visible_area) in enumerate(rows):
        if not (own_area and won_area and visible_area) or won_area / own_area < overlap_threshold:
            continue
        if not things[label] and label in stuff:
            number[query] = stuff[label]
            continue
        chosen.append((label, score))
        number[query] = len(chosen)
        if not things[label]:
            stuff[label] = len(chosen)
    device = labels.device
    table = torch.tensor(number, dtype=torch.int32, device=device)
    return (
        torch.tensor([label for label, _ in chosen], dtype=torch.int64, device=device),
        torch.tensor([score for _, score in chosen], dtype=torch.float32, device=device),
        torch.where(inside, table[winner], 0),
    )


def _compete(masks: Objects, queries: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Who has the largest product of score and mask probability.

    A query is looked at in the blocks where it may win, and in those where its mask has a border, for its area.

    Returns:
        (H, W) int32 the place in `queries` of each pixel's winner, (H, W) bool whether the winner's mask is at least
        one half, and (n,) the areas of all masks.
    """
    winners, insides, own = [], [], torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for _, band in masks.masks(queries).bands(GROUP_VALUES):
        least, largest = band.least(), band.largest()
        sure = (least.sigmoid() * scores).amax(1, keepdim=True)
        looked_at = (largest.sigmoid() * scores >= sure * (1 - _ROUNDING)) | ((least < _BORDER) & (largest > -_BORDER))
        pixels = band.pixels()
        own += (((least >= _BORDER) & ~looked_at) * pixels.sum((1, 2))[:, None]).sum(0)
        best = torch.full(pixels.shape, -1.0, device=queries.device)
        winner = torch.zeros(pixels.shape, dtype=torch.int32, device=queries.device)
        inside = torch.zeros_like(pixels)
        for blocks, objects in _one_a_block(looked_at):
            probabilities = band.middle(blocks, objects).sigmoid_()
            hit = probabilities >= 0.5
            own.index_add_(0, objects, (hit & pixels[blocks]).sum((1, 2)))
            value, before = probabilities.mul_(scores[objects, None, None]), best[blocks]
            better = value > before
            best[blocks] = torch.where(better, value, before)
            winner[blocks] = torch.where(better, objects[:, None, None].int(), winner[blocks])
            inside[blocks] = torch.where(better, hit, inside[blocks])
        winners.append(band.whole(winner))
        insides.append(band.whole(inside))
    return torch.cat(winners), torch.cat(insides), own


def _one_a_block(looked_at: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The true pairs of (blocks, n): of every block the first object, then of those that have one the second, ..."""
    blocks, objects = looked_at.nonzero().T
    counts = looked_at.sum(1)
    rank = torch.arange(len(blocks), device=blocks.device) - (counts.cumsum(0) - counts)[blocks]
    order = rank.argsort(stable=True)
    sizes = torch.bincount(rank).tolist()
    return zip(blocks[order].split(sizes), objects[order].split(sizes), strict=True)


def _numpy(tensor: Tensor):
    return tensor.cpu().numpy()
