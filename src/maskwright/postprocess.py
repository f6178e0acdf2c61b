"""From a prediction to a result: which query is what, and where. Original: `maskformer_model.py`.

Unusual: queries are chosen by score before anything is resized, and resized one small group at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from maskwright.recipe import EvaluateConfig
from maskwright.structures import Category, Segmentation, Task
from maskwright.views import ClassScores, Objects, View, class_scores, mean_scores


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
        scores = (_class_scores(view, output_size, config) for view in views)
        label_map = semantic(scores, output_size)
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


def _class_scores(view: View | ClassScores, output_size: tuple[int, int], config: EvaluateConfig) -> ClassScores:
    if isinstance(view, ClassScores):
        return view
    return class_scores(view, output_size if config.semantic_at == "output" else None)


def semantic(views: Iterable[ClassScores], output_size: tuple[int, int]) -> Tensor:
    """(H, W) int64: per pixel the class with the largest score; of several views, of their mean."""
    views = iter(views)
    first, second = next(views), next(views, None)
    if second is not None:
        return mean_scores(chain([first, second], views), output_size).argmax(0)
    label_map = _largest(first.at_output(output_size))
    return label_map.flip(-1) if first.flipped else label_map


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
    found, quality = [], []
    for group in masks.groups(distinct):
        logits = masks.at_output(group)
        inside = logits > 0
        quality.append((logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6))
        found.append(inside)
    if not found:
        empty = torch.zeros(0, *masks.output_size, dtype=torch.bool, device=labels.device)
        return labels, best, empty, queries
    scores, order = (best * torch.cat(quality)[position]).sort(descending=True, stable=True)
    kept = order[scores >= score_threshold]
    return labels[kept], scores[: len(kept)], torch.cat(found)[position[kept]], queries[kept]


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
    device = probabilities.device
    best = torch.full(masks.output_size, -1.0, device=device)
    winner = torch.full(masks.output_size, -1, dtype=torch.int64, device=device)
    inside = torch.zeros(masks.output_size, dtype=torch.bool, device=device)  # is the winner's mask at least one half?
    own_areas, start = [], 0
    for group in masks.groups(queries):
        mask = masks.at_output(group).sigmoid_()
        hit = mask >= 0.5
        own_areas.append(hit.sum((1, 2)))
        value, index = mask.mul_(scores[group, None, None]).max(0)
        better = value > best
        winner = torch.where(better, index + start, winner)
        inside = torch.where(better, hit.gather(0, index[None])[0], inside)
        best = torch.where(better, value, best)
        start += len(group)
    if not own_areas:
        return labels[:0], scores[:0], torch.zeros(masks.output_size, dtype=torch.int32, device=device)
    own = torch.cat(own_areas)
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
    table = torch.tensor(number, dtype=torch.int32, device=device)
    segment_map = torch.where(inside, table[winner], 0)
    return (
        torch.tensor([label for label, _ in chosen], dtype=torch.int64, device=device),
        torch.tensor([score for _, score in chosen], dtype=torch.float32, device=device),
        segment_map.to(torch.int32),
    )


def _numpy(tensor: Tensor):
    return tensor.cpu().numpy()
