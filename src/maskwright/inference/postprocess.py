"""From a prediction to a result: which query is what, and where. Original: `maskformer_model.py`.

Unusual: queries are chosen by score before anything is resized, and only those blocks of pixels are computed in which
a mask can make a difference; see `block_masks`. Results are those of whole masks up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import cast

import numpy as np
import torch
from torch import Tensor

from maskwright.config.schema import EvaluateConfig
from maskwright.inference.bitpacked_masks import BitBlocks
from maskwright.inference.mask_upsampling import SIDE, BlockMasks, pieces
from maskwright.inference.test_time_augmentation import ClassScores, Objects, View, class_scores, mean_scores
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Task
from maskwright.structures.predictions import MaskPrediction

BAND_VALUES = 32_000_000  # pixels of all masks in a band; held are the bounds of their blocks
_ROUNDING = 1e-5  # relative: by how much a computed score may leave its bounds
_BORDER = 1e-4  # by how much a logit may
_MANY = 0.2  # share of the pairs of a block and a query from which on it is faster to look at all
_CACHED = 64  # blocks of which all masks stay in the cache
_BLOCKS = 512  # blocks whose classes are decided together


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
        label_map = semantic(iter(views), output_size, at_output=config.semantic_resolution == "output")
        labels = torch.bincount(label_map.flatten(), minlength=len(categories)).nonzero()[:, 0]
        return Segmentation(task, output_size, categories, _numpy(labels), label_map=_numpy(label_map))
    objects = Objects(cast(list[View], list(views)), output_size)
    match task:
        case "instance":
            things = torch.tensor([c.is_thing for c in categories], device=objects.probabilities.device)
            labels, scores, _, found = instance(
                objects.probabilities[:, :-1],
                objects,
                things,
                top_k=config.top_k,
                score_threshold=config.score_threshold,
            )
            return Segmentation(task, output_size, categories, _numpy(labels), _numpy(scores), instance_masks=found)
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
    weights = objects.probabilities[:, :-1].T.contiguous()  # (K, Q)
    every = torch.arange(weights.shape[1], device=weights.device)
    parts = []
    for _, masks in objects.bands(every, BAND_VALUES, middle=not at_output):
        least, largest = masks.least().sigmoid_(), masks.largest().sigmoid_()  # (Q, blocks)
        sure, reachable = (weights @ least).amax(0), weights @ largest
        possible = reachable >= sure - _ROUNDING * reachable.amax(0)  # (K, blocks)
        classes, blocks = possible.nonzero().T
        labels = torch.zeros_like(sure, dtype=torch.int64)
        labels[blocks] = classes  # right where it is the only one
        labels = labels[:, None, None].repeat(1, SIDE, SIDE)
        counts = torch.bincount(blocks, minlength=len(sure))
        classes = classes[blocks.argsort(stable=True)]
        first = counts.cumsum(0) - counts
        contested = counts.argsort(stable=True)[int((counts < 2).sum()) :]
        for some in contested.split(_BLOCKS) if len(contested) else ():  # of about as many classes
            number = torch.arange(int(counts[some[-1]]), device=some.device)
            chosen = classes[first[some, None] + torch.minimum(number, counts[some, None] - 1)]  # (B, k)
            fits = _fits(masks, some, weights[chosen], least[:, some].T, largest[:, some].T, sure[some])
            found = masks.to_output(some, fits).max(1).indices  # (B, SIDE, SIDE); argmax takes five times as long
            labels[some] = chosen.gather(1, found.flatten(1)).view_as(found)
        parts.append(masks.whole(labels))
    return torch.cat(parts)


def _fits(masks: BlockMasks, blocks: Tensor, weights: Tensor, least: Tensor, largest: Tensor, sure: Tensor) -> Tensor:
    """(B, k, s * t) how well k classes fit the middle pixels of B blocks: sums over queries.

    A query whose part in the scores changes so little within a block that even all such changes together are less than
    the rounding of a sum counts as constant there.

    Args:
        masks: of all queries.
        blocks: (B,).
        weights: (B, k, Q) probability of the classes.
        least: (B, Q) no mask probability is below it,
        largest: and none above it.
        sure: (B,) which score the best class has at least.
    """
    negligible = torch.finfo(sure.dtype).eps / least.shape[1]
    matters = weights.amax(1).mul_(largest - least) > negligible * sure[:, None]
    if int(matters.sum()) > _MANY * matters.numel():
        few = zip(weights.split(_CACHED), blocks.split(_CACHED), strict=True)
        return torch.cat([weight @ masks.middle_of_all(some).sigmoid_() for weight, some in few])
    constant = (weights @ least.masked_fill(matters, 0)[:, :, None])[:, :, 0]  # (B, k)
    order, places, queries, sizes = _in_ranks(matters.T)
    inside = masks.middle(blocks[order][places], queries).sigmoid_().movedim(0, 2)  # (s, t, P)
    shares = weights[order[places], :, queries].T.contiguous()  # (k, P)
    fits = constant[order].T[:, None, None].repeat(1, *inside.shape[:2], 1)  # (k, s, t, B)
    for share, part in zip(shares.split(sizes, 1), inside.split(sizes, 2), strict=True):
        fits[..., : part.shape[2]].addcmul_(share[:, None, None], part)
    found = torch.empty_like(fits).permute(3, 0, 1, 2)
    found[order] = fits.permute(3, 0, 1, 2)
    return found.flatten(2)


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
) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """The best (query, class) pairs; a query may appear with several classes.

    The best `top_k` of all classes are taken before stuff is dropped, as in the original, so fewer may remain.

    Args:
        probabilities: (Q, K).
        masks: of all queries.
        things: (K,) bool.
        top_k: pairs.
        score_threshold: least score kept; 0 keeps all.

    Returns:
        labels (N,), scores (N,) = class probability times mean mask probability inside the mask, queries (N,), best
        score first; and as an array the masks (N, H, W) bool.
    """
    num_classes = probabilities.shape[1]
    best, flat = probabilities.flatten().topk(min(top_k, probabilities.numel()))
    queries, labels = flat // num_classes, flat % num_classes
    keep = things[labels]
    best, queries, labels = best[keep], queries[keep], labels[keep]
    distinct, position = queries.unique(return_inverse=True)
    found = BitBlocks(masks.bands(distinct, BAND_VALUES), len(distinct), masks.output_size)
    quality = torch.from_numpy(found.quality()).to(best.device)
    scores, order = (best * quality[position]).sort(descending=True, stable=True)
    kept = order[scores >= score_threshold]
    return labels[kept], scores[: len(kept)], queries[kept], found.masks(_numpy(position[kept]))


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
    codes, own = _compete(masks, queries, scores[queries])
    won, visible = torch.bincount(codes.flatten(), minlength=2 * len(queries)).view(-1, 2).T
    won = won + visible
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
    table = torch.tensor([meant for one in number for meant in (0, one)], dtype=torch.int32, device=device)
    return (
        torch.tensor([label for label, _ in chosen], dtype=torch.int64, device=device),
        torch.tensor([score for _, score in chosen], dtype=torch.float32, device=device),
        table.index_select(0, codes.flatten()).view(codes.shape),
    )


def _compete(masks: Objects, queries: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Who has the largest product of score and mask probability.

    A query is looked at in the blocks where it and another may win, and in those where its mask has a border.

    Returns:
        (H, W) int32, twice the place in `queries` of each pixel's winner, and one more where its mask is at least one
        half; and (n,) the areas of all masks.
    """
    parts, own = [], torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for _, band in masks.bands(queries, BAND_VALUES):
        least, largest = band.least(), band.largest()  # (n, blocks)
        sure = least.sigmoid().mul_(scores[:, None]).amax(0)
        candidate = largest.sigmoid().mul_(scores[:, None]) >= sure.mul_(1 - _ROUNDING)
        border = (least < _BORDER).logical_and_(largest > -_BORDER)
        contested = (candidate.sum(0) > 1) | (candidate & border).any(0)
        codes = torch.zeros(len(contested), dtype=torch.int32, device=queries.device)
        objects, blocks = candidate.nonzero().T
        codes[blocks] = (2 * objects + (least[objects, blocks] > 0)).int()  # right where nothing is contested
        codes = codes[:, None, None].repeat(1, SIDE, SIDE)
        competing = candidate.logical_and_(contested)
        own += (((least >= _BORDER) & ~competing).float() @ band.areas().float()).long()
        for objects, blocks in pieces(border & ~competing):
            hit = band.clip_(band.middle(blocks, objects).sigmoid_() >= 0.5, blocks)
            own.index_add_(0, objects, hit.float().sum((1, 2)).long())
        decided, found = _best(band, competing, scores, own)
        codes[decided] = found
        parts.append(band.whole(codes))
    return torch.cat(parts), own


def _best(band: BlockMasks, competing: Tensor, scores: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """The winners of those blocks in which pixels decide.

    Args:
        band: blocks.
        competing: (n, blocks) which objects in which blocks.
        scores: (n,).
        own: (n,) int64, to which the areas of the competing pairs' masks are added.

    Returns:
        (B,) the blocks, and (B, SIDE, SIDE) int32 as in `_compete`.
    """
    order, places, objects, sizes = _in_ranks(competing)
    best, codes = scores.new_zeros(0, SIDE, SIDE), scores.new_zeros(0, SIDE, SIDE, dtype=torch.int32)
    for number, (block, found) in enumerate(zip(order[places].split(sizes), objects.split(sizes), strict=True)):
        probabilities = band.middle(block, found).sigmoid_()
        hit = probabilities >= 0.5
        value, code = probabilities.mul_(scores[found, None, None]), hit + (2 * found).int()[:, None, None]
        own.index_add_(0, found, band.clip_(hit, block).float().sum((1, 2)).long())
        if number:
            best_before, code_before = best[: len(value)], codes[: len(value)]
            better = value > best_before
            code_before.copy_(torch.where(better, code, code_before))
            best_before.copy_(torch.where(better, value, best_before))
        else:
            best, codes = value, code
    return order[: len(codes)], codes


def _in_ranks(pairs: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The true places of (n, blocks): the first object of every block, then the second ones, and so on.

    Blocks are put in order by how many objects they have, so that those that still have one are the first.

    Returns:
        (blocks,) this order, (P,) places in it, (P,) objects, and how many pairs are first ones, second ones, ...
    """
    objects, blocks = pairs.nonzero().T
    counts = torch.bincount(blocks, minlength=pairs.shape[1])
    order = counts.argsort(descending=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    blocks, by_block = blocks.sort(stable=True)
    rank = torch.arange(len(blocks), device=blocks.device) - (counts.cumsum(0) - counts)[blocks]
    places = place[blocks]
    by_rank = (rank * len(counts) + places).argsort()
    return order, places[by_rank], objects[by_block[by_rank]], torch.bincount(rank).tolist()


def _numpy(tensor: Tensor):
    return tensor.cpu().numpy()
