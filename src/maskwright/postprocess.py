"""From a prediction to a result: which query is what, and where. Original: `maskformer_model.py`.

Masks are resized bilinearly twice, to the padded input and, after cropping the padding, to the image's own size, as the
original does. Unusual: queries are chosen by score before anything is resized, and resized one small group at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.recipe import EvaluateConfig
from maskwright.structures import Category, MaskPrediction, Segmentation, Task

_GROUP_VALUES = 16_000_000  # floats of full-size masks held at once


def segment(
    prediction: MaskPrediction,
    task: Task,
    *,
    padded_size: tuple[int, int],
    input_size: tuple[int, int],
    output_size: tuple[int, int],
    categories: tuple[Category, ...],
    config: EvaluateConfig,
) -> Segmentation:
    """The result for one image.

    Args:
        prediction: of this image alone (B = 1).
        task: which kind of result.
        padded_size: (height, width) of the network's input.
        input_size: of the image inside it.
        output_size: of the result.
        categories: in label order.
        config: thresholds, and the size at which semantic scores are combined.
    """
    masks = _Masks(prediction, padded_size, input_size, output_size)
    probabilities = prediction.class_logits[0].float().softmax(-1)[:, :-1]  # (Q, K)
    match task:
        case "semantic":
            label_map = semantic(probabilities, masks, at=config.semantic_at)
            labels = torch.bincount(label_map.flatten(), minlength=len(categories)).nonzero()[:, 0]
            return Segmentation(task, output_size, categories, _numpy(labels), label_map=_numpy(label_map))
        case "instance":
            things = torch.tensor([c.is_thing for c in categories], device=probabilities.device)
            labels, scores, found, _ = instance(
                probabilities, masks, things, top_k=config.top_k, score_threshold=config.score_threshold
            )
            return Segmentation(
                task, output_size, categories, _numpy(labels), _numpy(scores), instance_masks=_numpy(found)
            )
        case "panoptic":
            things = [c.is_thing for c in categories]
            labels, scores, segment_map = panoptic(
                prediction.class_logits[0].float().softmax(-1),
                masks,
                things,
                object_threshold=config.object_threshold,
                overlap_threshold=config.overlap_threshold,
            )
            return Segmentation(
                task, output_size, categories, _numpy(labels), _numpy(scores), segment_map=_numpy(segment_map)
            )
    raise ValueError(f"unknown task '{task}'; known: semantic, instance, panoptic")


class _Masks:
    """Mask logits of chosen queries at the output size, made group by group."""

    def __init__(
        self,
        prediction: MaskPrediction,
        padded_size: tuple[int, int],
        input_size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> None:
        self.embeddings = prediction.mask_embeddings[0].float()  # (Q, C)
        self.features = prediction.mask_features[0].float()  # (C, h, w)
        self.padded_size, self.input_size, self.output_size = padded_size, input_size, output_size

    def at_input(self, queries: Tensor) -> Tensor:
        """(N, H, W) logits at the network's input, padding cropped."""
        coarse = torch.einsum("qc,chw->qhw", self.embeddings[queries], self.features)
        return _resize(coarse, self.padded_size)[:, : self.input_size[0], : self.input_size[1]]

    def at_output(self, queries: Tensor) -> Tensor:
        """(N, H, W) logits at the output size."""
        return _resize(self.at_input(queries), self.output_size)

    def groups(self, queries: Tensor) -> Iterator[Tensor]:
        """The queries, as many at a time as memory should hold; nothing for none."""
        if not len(queries):
            return iter(())
        pixels = max(self.padded_size[0] * self.padded_size[1], self.output_size[0] * self.output_size[1])
        return iter(queries.split(max(1, _GROUP_VALUES // pixels)))


def semantic(probabilities: Tensor, masks: _Masks, *, at: str) -> Tensor:
    """(H, W) int64: per pixel the class with the largest sum of class probability times mask probability.

    Args:
        probabilities: (Q, K).
        masks: of all queries.
        at: "output" combines at the output size; "input" combines at the network's input and resizes the scores, as
            the original's purely semantic configurations do.
    """

    def class_scores(queries: Tensor) -> Tensor:
        logits = masks.at_output(queries) if at == "output" else masks.at_input(queries)
        return torch.einsum("qk,qhw->khw", probabilities[queries], logits.sigmoid())

    first, *others = masks.groups(torch.arange(len(probabilities), device=probabilities.device))
    scores = class_scores(first)  # (K, H, W)
    for queries in others:
        scores.add_(class_scores(queries))
    if at == "input":
        rows = torch.arange(len(scores)).split(max(1, _GROUP_VALUES // (masks.output_size[0] * masks.output_size[1])))
        best = torch.full(masks.output_size, -1.0, device=scores.device)
        label_map = torch.zeros(masks.output_size, dtype=torch.int64, device=scores.device)
        for part in rows:
            value, label = _resize(scores[part], masks.output_size).max(0)
            better = value > best
            label_map = torch.where(better, label + part[0].item(), label_map)
            best = torch.where(better, value, best)
        return label_map
    return scores.argmax(0)


def instance(
    probabilities: Tensor, masks: _Masks, things: Tensor, *, top_k: int, score_threshold: float
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
    probabilities: Tensor, masks: _Masks, things: list[bool], *, object_threshold: float, overlap_threshold: float
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


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) to (N, *size), bilinear, align_corners=False."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def _numpy(tensor: Tensor):
    return tensor.cpu().numpy()
