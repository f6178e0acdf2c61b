"""Losses: of masks over all decoder layers, on sampled points (Mask2Former, section 3.3), and of pixels (SeMask).

Original files `modeling/matcher.py` and `modeling/criterion.py`, detectron2's PointRend `point_features.py`. Unusual:
the matcher never sees a mask. A mask is a product of an embedding with shared features, so the features are sampled at
the points and multiplied there; full masks are made only of the queries that were matched. All in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from maskwright.errors import TrainingError
from maskwright.structures.annotations import Target, send
from maskwright.structures.predictions import MaskPrediction, ModelOutput, PixelPrediction
from maskwright.training.losses.point_sampling import (
    Points,
    RandomPoints,
    object_at,
    object_shares,
    sample,
    sample_features,
)

__all__ = ["Criterion", "Losses", "Matching", "Normalisers", "Points", "RandomPoints", "count_normalisers"]

VALUES_AT_ONCE = 2**21  # of costs, or of candidates for points, of several layers on a CPU

Losses = dict[str, Tensor]  # term -> (layers,), unweighted; see `Criterion`
Matching = tuple[Tensor, Tensor]  # queries and objects of one image, both (min(Q, N),) int64, ascending queries


@dataclass(frozen=True)
class Normalisers:
    """What sums are divided by, counted over a whole step: all parts of the batch and all processes.

    Numbers where one process knows them all, else (), on the device.

    Attributes:
        objects: of all images; at least one is assumed where it is used.
        class_weights: summed over all queries.
        pixels: of all images, padding included.
        labelled_pixels: those among them that have a class; at least one is assumed where it is used.
    """

    objects: float | Tensor
    class_weights: float | Tensor
    pixels: float | Tensor
    labelled_pixels: float | Tensor


def count_normalisers(targets: Sequence[Target], queries: int, no_object_weight: float) -> Normalisers:
    """Normalisers of a step, which follow from the targets alone; `queries` is 0 for a model without any.

    Differs from the reference: the class loss of several processes is the mean over all their queries, not the mean of
    each process's mean, so that the number of processes does not change it; so is the semantic loss over pixels.
    """
    matched = sum(min(len(target), queries) for target in targets)
    unmatched = queries * len(targets) - matched
    return Normalisers(
        objects=sum(len(target) for target in targets),
        class_weights=matched + no_object_weight * unmatched,
        pixels=sum(target.id_maps[0].numel() for target in targets),
        labelled_pixels=sum(target.labelled_pixels for target in targets),
    )


class Criterion:
    """Losses of whatever a model gives, term by term.

    Predicted masks have "class", "mask" and "dice" for every decoder layer, each matched on its own. A per-pixel
    prediction has "pixel", its cross-entropy. Semantic layers add "semantic", the cross-entropy of their maps as one.

    Args:
        class_weight: weight of the classification term, in the matching costs and in the total.
        mask_weight: weight of the cross-entropy of masks, likewise.
        dice_weight: weight of the dice term, likewise.
        no_object_weight: weight of "no object" in the classification loss.
        points: P, locations per mask.
        oversample_ratio: candidates per location of the uncertain share.
        importance_ratio: share of the P locations that are chosen for uncertainty; the others are uniform.
        semantic_weight: weight of the semantic term.
        hard_pixels: pixels per image that the per-pixel term counts, those of highest loss in the part of the batch
            that is seen at once; None counts all.
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
        semantic_weight: float = 0.4,
        hard_pixels: int | None = None,
    ) -> None:
        self.weights = {
            "class": class_weight,
            "mask": mask_weight,
            "dice": dice_weight,
            "pixel": 1.0,
            "semantic": semantic_weight,
        }
        self.hard_pixels = hard_pixels
        self.no_object_weight = no_object_weight
        self.oversample_ratio, self.importance_ratio = oversample_ratio, importance_ratio
        self._look_at(points)

    def _look_at(self, points: int) -> None:
        self.points = points
        self.candidates = int(points * self.oversample_ratio)
        self.uncertain = int(points * self.importance_ratio)

    def with_points(self, points: int) -> Criterion:
        """The same losses with another number of locations per mask, for masks of another size."""
        changed = copy(self)
        changed._look_at(points)
        return changed

    def __call__(
        self, output: ModelOutput, targets: Sequence[Target], points: Points, normalisers: Normalisers | None = None
    ) -> Losses:
        """Losses, unweighted.

        Args:
            output: with its intermediate predictions and semantic logits.
            targets: one per image, id maps padded to the batch's size; an image may hold no object.
            points: where to look for masks.
            normalisers: of the whole step, where this is a part of it; None takes these targets for the whole.

        Returns:
            (layers,) of each term; mask and dice are 0 without objects, pixel terms without labelled pixels. Terms of
            pixels have one entry.

        Raises:
            TrainingError: a matching cost is not finite.
        """
        final = output.final
        with torch.autocast(final.class_logits.device.type, enabled=False):
            if isinstance(final, MaskPrediction):
                queries = final.class_logits.shape[1]
                normalisers = normalisers or count_normalisers(targets, queries, self.no_object_weight)
                losses = self._of_masks([*output.intermediate, final], targets, points, normalisers)
                pixels = _at_least_one(normalisers.labelled_pixels)
            else:
                normalisers = normalisers or count_normalisers(targets, 0, self.no_object_weight)
                pixels = normalisers.pixels  # also those without a class, in both terms of this family
                losses = {"pixel": self._pixel_loss(final, targets) / pixels}
            if output.semantic_logits is not None:
                losses["semantic"] = _cross_entropies(output.semantic_logits, targets).sum()[None] / pixels
        return losses

    def total(self, losses: Losses) -> Tensor:
        """The weighted sum of all terms: what is minimised."""
        return torch.stack([self.weights[term] * values.sum() for term, values in losses.items()]).sum()

    def _of_masks(
        self,
        predictions: Sequence[MaskPrediction],
        targets: Sequence[Target],
        points: Points,
        normalisers: Normalisers,
    ) -> Losses:
        matchings = self.match(predictions, targets, points)
        classes = [
            self._class_loss(prediction, targets, matching) / normalisers.class_weights
            for prediction, matching in zip(predictions, matchings, strict=True)
        ]
        masks = self._mask_losses(predictions, targets, matchings, points) / _at_least_one(normalisers.objects)
        return {"class": torch.stack(classes), "mask": masks[:, 0], "dice": masks[:, 1]}

    def _pixel_loss(self, prediction: PixelPrediction, targets: Sequence[Target]) -> Tensor:
        """(1,): cross-entropy, summed over pixels."""
        entropies = _cross_entropies(prediction.class_logits, targets)
        if self.hard_pixels is not None:  # pixels without a class have 0 and come last, or add nothing
            entropies = entropies.flatten().topk(min(self.hard_pixels * len(targets), entropies.numel())).values
        return entropies.sum()[None]

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
        predictions = _by_pixels(predictions)
        costs = [
            self._costs(predictions, image, target, points.matching(image, len(predictions), self.points))
            for image, target in enumerate(targets)
        ]  # (layers, Q, N) each
        flat = _to_host(torch.cat([cost.flatten() for cost in costs]))
        parts = np.split(flat, np.cumsum([cost.numel() for cost in costs])[:-1])
        pairs = []
        for part, cost, target in zip(parts, costs, targets, strict=True):
            if not np.isfinite(part).all():
                terms = _overflowed(predictions)
                raise TrainingError(f"matching costs of image {target.image_id} are not finite ({terms})")
            pairs += [np.stack(linear_sum_assignment(matrix)) for matrix in part.reshape(cost.shape)]
        sent = send(torch.from_numpy(np.concatenate(pairs, 1)), costs[0].device).split([p.shape[1] for p in pairs], 1)
        layers = len(predictions)
        return [[(pair[0], pair[1]) for pair in sent[layer::layers]] for layer in range(layers)]

    def _costs(self, predictions: Sequence[MaskPrediction], image: int, target: Target, points: Tensor) -> Tensor:
        """(layers, Q, N)."""
        parts = _some_layers(len(predictions), predictions[0].class_logits.shape[1] * points.shape[1], points.device)
        if len(parts) > 1:
            some = (slice(part.start, part.stop) for part in parts)
            return torch.cat([self._costs(predictions[part], image, target, points[part]) for part in some])
        class_weight, mask_weight, dice_weight = (self.weights[term] for term in ("class", "mask", "dice"))
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
        chosen = []
        for some in _some_layers(layers, count * self.candidates, masks.device):
            candidates = torch.cat([points.candidates(layer, image, count, self.candidates) for layer in some])
            logits = sample(masks[some.start * count : some.stop * count], candidates)
            nearest = logits.abs_().topk(self.uncertain, 1, largest=False, sorted=False).indices
            chosen.append(candidates.gather(1, nearest[..., None].expand(-1, -1, 2)))
        uniform = torch.cat([points.uniform(layer, image, count, rest) for layer in range(layers)])
        return torch.cat([torch.cat(chosen), uniform], 1)


def _some_layers(layers: int, values: int, device: torch.device) -> list[range]:
    """The layers in parts that are taken at once; on a CPU all of a large picture would be the peak of a step."""
    at_once = max(1, VALUES_AT_ONCE // max(1, values)) if device.type == "cpu" else layers
    return [range(layers)[start : start + at_once] for start in range(0, layers, at_once)]


def _cross_entropies(logits: Tensor, targets: Sequence[Target]) -> Tensor:
    """(B, H, W) float32 of logits (B, K, h, w), resized bilinearly; 0 where no class is labelled."""
    labels = torch.stack([target.label_map(_NO_CLASS) for target in targets])
    resized = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(resized, labels, ignore_index=_NO_CLASS, reduction="none")


_NO_CLASS = -1


def _at_least_one(count: float | Tensor) -> float | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _to_host(costs: Tensor) -> np.ndarray:
    """The one copy of a training step that the host waits for."""
    return costs.cpu().numpy()


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
        sampled = sample_features(predictions[0].mask_features[image], points.flatten(0, 1))
        sampled = sampled.unflatten(0, points.shape[:2])
    else:
        pairs = zip(predictions, points, strict=True)
        sampled = torch.stack([sample_features(p.mask_features[image], places) for p, places in pairs])
    return embeddings @ sampled.transpose(1, 2)


def _by_pixels(predictions: Sequence[MaskPrediction]) -> Sequence[MaskPrediction]:
    """The same, where they share features with the channels of a pixel side by side, as all layers look them up."""
    if not _shares_features(predictions):
        return predictions
    features = predictions[0].mask_features.float().contiguous(memory_format=torch.channels_last)
    return [replace(prediction, mask_features=features) for prediction in predictions]


def _shares_features(predictions: Sequence[MaskPrediction]) -> bool:
    return all(p.mask_features is predictions[0].mask_features for p in predictions)
