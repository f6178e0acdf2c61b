"""Matching and losses over all decoder layers, on sampled points (Mask2Former, section 3.3).

Original files `modeling/matcher.py` and `modeling/criterion.py`, detectron2's PointRend `point_features.py`. Unusual:
the matcher never sees a mask. A mask is a product of an embedding with shared features, so the features are sampled at
the points and multiplied there; full masks are made only of the queries that were matched. All in float32.

Coordinates are (x, y) in 0..1 of the padded image, sampled bilinearly with zeros outside and align_corners=False.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from maskwright.errors import TrainingError
from maskwright.structures import MaskPrediction, ModelOutput, Target

TERMS = ("class", "mask", "dice")

Matching = tuple[Tensor, Tensor]  # queries and objects of one image, both (min(Q, N),) int64, ascending queries


class Points(Protocol):
    """Where masks are compared. Layers are numbered as in `ModelOutput`: the intermediate ones, then the final one."""

    def matching(self, image: int, layers: int, count: int) -> Tensor:
        """(layers, count, 2): shared by all queries and objects of the image."""

    def candidates(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        """(masks, count, 2): among these the most uncertain are chosen; one row per matched query, ascending."""

    def uniform(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        """(masks, count, 2): used as they are."""


class RandomPoints:
    """Uniform points that depend only on the run's seed, the step and the sample, never on how a batch is divided.

    Args:
        seed: of the run.
        step: of the run.
        keys: (epoch, index) of each image.
        device: where points are drawn.
    """

    def __init__(self, seed: int, step: int, keys: Sequence[tuple[int, int]], device: torch.device | str) -> None:
        self.device = device
        self.generators = [torch.Generator(device).manual_seed(_mix(seed, step, *key)) for key in keys]

    def matching(self, image: int, layers: int, count: int) -> Tensor:
        """See `Points`."""
        return self._draw(image, layers, count)

    def candidates(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        """See `Points`."""
        return self._draw(image, masks, count)

    def uniform(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        """See `Points`."""
        return self._draw(image, masks, count)

    def _draw(self, image: int, rows: int, count: int) -> Tensor:
        return torch.rand(rows, count, 2, generator=self.generators[image], device=self.device)


@dataclass(frozen=True)
class Normalisers:
    """What sums are divided by: the number of objects, and the class weights of all queries of the whole step."""

    masks: float
    class_weights: float


def count_normalisers(targets: Sequence[Target], queries: int, no_object_weight: float) -> Normalisers:
    """Normalisers of a step, which follow from the targets alone.

    Differs from the reference: the class loss of several processes is the mean over all their queries, not the mean of
    each process's mean, so that the number of processes does not change it.
    """
    matched = sum(min(len(target), queries) for target in targets)
    unmatched = queries * len(targets) - matched
    objects = sum(len(target) for target in targets)
    return Normalisers(max(objects, 1), matched + no_object_weight * unmatched)


class Criterion:
    """Losses of all decoder layers, each matched on its own.

    Args:
        class_weight: weight of the classification term, in the matching costs and in the total.
        mask_weight: weight of the cross-entropy of masks, likewise.
        dice_weight: weight of the dice term, likewise.
        no_object_weight: weight of "no object" in the classification loss.
        points: P, locations per mask.
        oversample_ratio: candidates per location of the uncertain share.
        importance_ratio: share of the P locations that are chosen for uncertainty; the others are uniform.
    """

    def __init__(
        self,
        *,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_ratio: float = 0.75,
    ) -> None:
        self.weights = (class_weight, mask_weight, dice_weight)
        self.no_object_weight = no_object_weight
        self.points = points
        self.candidates = int(points * oversample_ratio)
        self.uncertain = int(points * importance_ratio)

    def __call__(
        self, output: ModelOutput, targets: Sequence[Target], points: Points, normalisers: Normalisers | None = None
    ) -> Tensor:
        """Losses, unweighted.

        Args:
            output: with its intermediate predictions.
            targets: one per image, id maps padded to the batch's size; an image may hold no object.
            points: where to look.
            normalisers: of the whole step, where this is a part of it; None takes these targets for the whole.

        Returns:
            (layers, 3) in the order of `TERMS`; mask and dice are 0 without objects.

        Raises:
            TrainingError: a matching cost is not finite.
        """
        predictions = [*output.intermediate, output.final]
        queries = output.final.class_logits.shape[1]
        normalisers = normalisers or count_normalisers(targets, queries, self.no_object_weight)
        with torch.autocast(output.final.class_logits.device.type, enabled=False):
            matchings = self.match(predictions, targets, points)
            classes = [
                self._class_loss(prediction, targets, matching) / normalisers.class_weights
                for prediction, matching in zip(predictions, matchings, strict=True)
            ]
            masks = self._mask_losses(predictions, targets, matchings, points) / normalisers.masks
        return torch.cat([torch.stack(classes)[:, None], masks], 1)

    def total(self, losses: Tensor) -> Tensor:
        """The weighted sum of (layers, 3) losses: what is minimised."""
        return (losses * losses.new_tensor(self.weights)).sum()

    @torch.no_grad()
    def match(
        self, predictions: Sequence[MaskPrediction], targets: Sequence[Target], points: Points
    ) -> list[list[Matching]]:
        """Assign each object to one query, at least total cost; layer by layer, image by image.

        The costs of all layers and images leave the device in one copy.

        Returns:
            For each layer, for each image: queries and objects, on the predictions' device; empty without objects.

        Raises:
            TrainingError: a cost is not finite; the message names the image and the terms.
        """
        costs = [
            self._costs(predictions, image, target, points.matching(image, len(predictions), self.points))
            for image, target in enumerate(targets)
        ]  # (layers, Q, N) each
        flat = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
        parts = np.split(flat, np.cumsum([cost.numel() for cost in costs])[:-1])
        matchings: list[list[Matching]] = [[] for _ in predictions]
        for part, cost, target in zip(parts, costs, targets, strict=True):
            if not np.isfinite(part).all():
                terms = _overflowed(predictions)
                raise TrainingError(f"matching costs of image {target.image_id} are not finite ({terms})")
            for layer, matrix in enumerate(part.reshape(cost.shape)):
                rows, columns = linear_sum_assignment(matrix)
                pair = torch.from_numpy(np.stack([rows, columns])).to(cost.device, non_blocking=True)
                matchings[layer].append((pair[0], pair[1]))
        return matchings

    def _costs(self, predictions: Sequence[MaskPrediction], image: int, target: Target, points: Tensor) -> Tensor:
        """(layers, Q, N)."""
        class_weight, mask_weight, dice_weight = self.weights
        logits = _logits_at(predictions, image, points)  # (layers, Q, P)
        truth = (
            object_shares(target, points.flatten(0, 1)).unflatten(1, points.shape[:2]).transpose(0, 1)
        )  # (layers, N, P)
        probabilities = logits.sigmoid()
        objects = truth.transpose(1, 2)  # (layers, P, N)
        # softplus(-x) = softplus(x) - x turns the two products of the cross-entropy into one.
        mask_cost = (F.softplus(logits).sum(-1, keepdim=True) - logits @ objects) / points.shape[1]
        overlap = 2 * (probabilities @ objects)
        sizes = probabilities.sum(-1, keepdim=True) + truth.sum(-1)[:, None]
        dice_cost = 1 - (overlap + 1) / (sizes + 1)
        classes = torch.stack([p.class_logits[image] for p in predictions]).float().softmax(-1)
        class_cost = -classes[:, :, target.labels]
        return class_weight * class_cost + mask_weight * mask_cost + dice_weight * dice_cost

    def _class_loss(self, prediction: MaskPrediction, targets: Sequence[Target], matching: list[Matching]) -> Tensor:
        """Weighted cross-entropy, summed over images and queries."""
        logits = prediction.class_logits.float()
        no_object = logits.shape[-1] - 1
        truth = torch.full(logits.shape[:2], no_object, dtype=torch.int64, device=logits.device)
        for row, target, (queries, objects) in zip(truth, targets, matching, strict=True):
            row[queries] = target.labels[objects]
        weights = torch.ones(no_object + 1, device=logits.device)
        weights[no_object] = self.no_object_weight
        return F.cross_entropy(logits.flatten(0, 1), truth.flatten(), weights, reduction="sum")

    def _mask_losses(
        self,
        predictions: Sequence[MaskPrediction],
        targets: Sequence[Target],
        matchings: list[list[Matching]],
        points: Points,
    ) -> Tensor:
        """(layers, 2): cross-entropy and dice of the matched masks, summed over images, all layers at once."""
        shared = _shares_features(predictions)
        features = [p.mask_features.float().unbind() for p in (predictions[:1] if shared else predictions)]
        total = features[0][0].new_zeros(len(predictions), 2)
        for image, target in enumerate(targets):
            pairs = [matching[image] for matching in matchings]
            embeddings = [
                p.mask_embeddings[image, queries].float() for p, (queries, _) in zip(predictions, pairs, strict=True)
            ]  # (M, C) each
            if shared:
                masks = torch.einsum("mc,chw->mhw", torch.cat(embeddings), features[0][image])
            else:
                products = zip(embeddings, features, strict=True)
                masks = torch.cat([torch.einsum("mc,chw->mhw", e, f[image]) for e, f in products])
            chosen = self._choose(masks, points, len(predictions), image)  # (layers*M, P, 2)
            truth = object_at(target, torch.cat([objects for _, objects in pairs]), chosen)
            logits = sample(masks, chosen)  # (layers*M, P)
            cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
            probabilities = logits.sigmoid()
            overlap = 2 * (probabilities * truth).sum(1)
            dice = 1 - (overlap + 1) / (probabilities.sum(1) + truth.sum(1) + 1)
            total = total + torch.stack([cross_entropy, dice], 1).view(
                len(predictions), len(masks) // len(predictions), 2
            ).sum(1)
        return total

    @torch.no_grad()
    def _choose(self, masks: Tensor, points: Points, layers: int, image: int) -> Tensor:
        """(layers*M, P, 2): of each mask the candidates whose logits are nearest 0, then uniform ones."""
        count, rest = len(masks) // layers, self.points - self.uncertain
        candidates = torch.cat([points.candidates(layer, image, count, self.candidates) for layer in range(layers)])
        uniform = torch.cat([points.uniform(layer, image, count, rest) for layer in range(layers)])
        nearest = sample(masks, candidates).abs().topk(self.uncertain, dim=1, largest=False).indices
        return torch.cat([candidates.gather(1, nearest[..., None].expand(-1, -1, 2)), uniform], 1)


def sample(masks: Tensor, points: Tensor) -> Tensor:
    """Values of masks (M, h, w) at their own points (M, P, 2): (M, P)."""
    if not len(masks):
        return masks.new_zeros(points.shape[:2]) + masks.sum()
    grid = (points * 2 - 1)[:, None]
    return F.grid_sample(masks[:, None], grid, "bilinear", "zeros", align_corners=False)[:, 0, 0]


def object_shares(target: Target, points: Tensor) -> Tensor:
    """How much of each object lies at each point: (N, P) float32 for points (P, 2), without making a mask."""
    ids, shares = _ids_at(target, points)  # (D, P, 4), (P, 4)
    result = shares.new_zeros(len(target) + 1, len(points))
    for layer in ids:
        for corner in range(4):
            result.scatter_add_(0, layer[None, :, corner], shares[None, :, corner])
    return result[1:]


def object_at(target: Target, objects: Tensor, points: Tensor) -> Tensor:
    """How much of object m lies at its own points: (M, P) float32 for objects (M,) and points (M, P, 2)."""
    ids, shares = _ids_at(target, points)  # (D, M, P, 4), (M, P, 4)
    own = (ids == (objects + 1)[:, None, None]).any(0)
    return (shares * own).sum(-1)


def _ids_at(target: Target, points: Tensor) -> tuple[Tensor, Tensor]:
    """Object numbers at the four neighbours of each point (D, ..., 4) int64, 0 outside, and their shares (..., 4)."""
    height, width = target.id_maps.shape[-2:]
    rows, shares, inside = _neighbours(points, height, width)
    ids = target.id_maps.flatten(1)[:, rows]
    return torch.where(inside, ids, 0).long(), shares


def _overflowed(predictions: Sequence[MaskPrediction]) -> str:
    """Which losses the predictions cannot give."""
    if all(p.class_logits.isfinite().all() for p in predictions):
        return "mask, dice"
    parts = (part for p in predictions for part in (p.mask_embeddings, p.mask_features))
    return "class" if all(part.isfinite().all() for part in parts) else "class, mask, dice"


def _logits_at(predictions: Sequence[MaskPrediction], image: int, points: Tensor) -> Tensor:
    """(layers, Q, P): masks of one image at points (layers, P, 2), as embeddings times features sampled there."""
    embeddings = torch.stack([p.mask_embeddings[image] for p in predictions]).float()
    if _shares_features(predictions):
        sampled = _sample_features(predictions[0].mask_features[image], points.flatten(0, 1))
        sampled = sampled.unflatten(0, points.shape[:2])
    else:
        pairs = zip(predictions, points, strict=True)
        sampled = torch.stack([_sample_features(p.mask_features[image], places) for p, places in pairs])
    return embeddings @ sampled.transpose(1, 2)


def _shares_features(predictions: Sequence[MaskPrediction]) -> bool:
    return all(p.mask_features is predictions[0].mask_features for p in predictions)


def _sample_features(features: Tensor, points: Tensor) -> Tensor:
    """(P, C): features (C, h, w) at points (P, 2), each a bag of four rows."""
    _, height, width = features.shape
    rows, shares, inside = _neighbours(points, height, width)
    table = features.float().flatten(1).t().contiguous()  # (h*w, C)
    return F.embedding_bag(rows, table, per_sample_weights=torch.where(inside, shares, 0), mode="sum")


def _neighbours(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cell numbers (..., 4) int64 (0 where outside), bilinear shares (..., 4), and whether they are inside."""
    places = points * points.new_tensor([width, height]) - 0.5
    corner = places.floor()
    right, down = (places - corner).unbind(-1)
    left, up = 1 - right, 1 - down
    x, y = corner.long().unbind(-1)
    x = torch.stack([x, x + 1, x, x + 1], -1)
    y = torch.stack([y, y, y + 1, y + 1], -1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    shares = torch.stack([up * left, up * right, down * left, down * right], -1)
    return torch.where(inside, y * width + x, 0), shares, inside


def _mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
