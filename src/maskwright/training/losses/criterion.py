"""Losses of a model's output: classes and masks of matched queries (Mask2Former), and pixels (Semantic FPN, SeMask).

Original: `modeling/criterion.py`. Mask losses are computed at sampled points (Mask2Former, section 3.3), and full masks
only for matched queries. Everything is in float32, but for products of the matching (`HungarianMatcher`).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.structures.annotations import Target, to_device
from maskwright.structures.predictions import MaskPrediction, ModelOutput, PixelPrediction
from maskwright.training.losses.matcher import HungarianMatcher, Matching, have_shared_features
from maskwright.training.losses.point_sampling import Points, chunk_layers, sample_masks, sample_matched_objects

Losses = dict[str, Tensor]  # term -> (layers,), unweighted; see `Criterion`

_NO_CLASS = -1


@dataclass(frozen=True)
class Normalizers:
    """Divisors of the summed losses, counted over a whole step: all micro-batches of all processes.

    Numbers in a run of one process, else () on the device.

    Attributes:
        objects: in all images; the losses divide by at least 1.
        class_weights: summed over all queries.
        pixels: of all images, padding included.
        labeled_pixels: pixels that have a class; the losses divide by at least 1.
    """

    objects: float | Tensor
    class_weights: float | Tensor
    pixels: float | Tensor
    labeled_pixels: float | Tensor


def count_normalizers(
    targets: Sequence[Target], queries: int, no_object_weight: float, class_weights: Sequence[float] | None = None
) -> Normalizers:
    """Count the normalizers of a step, which depend on its targets only; `queries` is 0 for a model without queries.

    With more objects than queries, it is not yet known which are matched, so their mean weight is counted.

    Differs from the reference: the class loss of several processes is the mean over all their queries, not the mean of
    each process's mean, so that the number of processes does not change it. So is the semantic loss.
    """
    matched = sum(min(len(target), queries) for target in targets)
    unmatched = queries * len(targets) - matched
    matched_weight = matched
    if class_weights is not None:
        matched_weight = sum(_matched_weight(target, queries, np.asarray(class_weights)) for target in targets)
    return Normalizers(
        objects=sum(len(target) for target in targets),
        class_weights=matched_weight + no_object_weight * unmatched,
        pixels=sum(target.id_maps[0].numel() for target in targets),
        labeled_pixels=sum(target.labeled_pixels for target in targets),
    )


def _matched_weight(target: Target, queries: int, class_weights: np.ndarray) -> float:
    weights = class_weights[target.labels.cpu().numpy()]
    return float(weights.mean()) * min(len(weights), queries) if len(weights) else 0.0


class Criterion:
    """Compute the losses of a model's output, term by term.

    Mask predictions have "class", "mask" (cross-entropy) and "dice" for each decoder layer, each layer matched on its
    own. Per-pixel predictions have "pixel", their cross-entropy. Semantic layers add "semantic", the cross-entropy of
    their logits.

    Args:
        class_weight: weight of the class term, in the matching costs and in the total.
        mask_weight: weight of the mask term, likewise.
        dice_weight: weight of the dice term, likewise.
        no_object_weight: weight of "no object" in the class loss.
        num_points: P, points per mask.
        oversample_ratio: candidates per point of the importance-sampled share.
        importance_sample_ratio: share of the P points that are sampled by importance; the others are uniform.
        semantic_weight: weight of the semantic term.
        ohem_pixels: pixels per image that the pixel term counts, those with the highest loss in a micro-batch (online
            hard example mining); None counts all.
        class_weights: (K,) weights of the classes in the class or pixel term and in the matching cost; None is 1 for
            all. The class term is divided by the sum of the queries' weights, the pixel term by the number of pixels.
            The semantic term has no such weights.
    """

    def __init__(
        self,
        *,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        semantic_weight: float = 0.4,
        ohem_pixels: int | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        self.weights = {
            "class": class_weight,
            "mask": mask_weight,
            "dice": dice_weight,
            "pixel": 1.0,
            "semantic": semantic_weight,
        }
        self.no_object_weight = no_object_weight
        self.num_points = num_points
        self.oversample_ratio, self.importance_sample_ratio = oversample_ratio, importance_sample_ratio
        self.ohem_pixels = ohem_pixels
        self.class_weights = None if class_weights is None else tuple(class_weights)
        self.matcher = HungarianMatcher(class_weight, mask_weight, dice_weight, num_points, self.class_weights)

    def with_num_points(self, num_points: int) -> Criterion:
        """Return the same criterion with another number of points per mask, for images of another size."""
        changed = copy(self)
        changed.num_points, changed.matcher = num_points, replace(self.matcher, num_points=num_points)
        return changed

    def __call__(
        self, output: ModelOutput, targets: Sequence[Target], points: Points, normalizers: Normalizers | None = None
    ) -> Losses:
        """Compute the unweighted losses.

        Args:
            output: of the model, with its intermediate predictions and semantic logits.
            targets: one per image, id maps padded to the batch's size; an image may have no objects.
            points: source of the points at which masks are compared.
            normalizers: of the whole step, if these targets are only a part of it; None counts these targets.

        Returns:
            (layers,) for each term, (1,) for pixel terms. Mask and dice are 0 without objects, pixel terms are 0
            without labeled pixels.

        Raises:
            TrainingError: a matching cost is not finite.
        """
        final = output.final
        with torch.autocast(final.class_logits.device.type, enabled=False):
            if isinstance(final, MaskPrediction):
                queries = final.class_logits.shape[1]
                normalizers = normalizers or count_normalizers(
                    targets, queries, self.no_object_weight, self.class_weights
                )
                losses = self._query_losses([*output.intermediate, final], targets, points, normalizers)
                pixels = _at_least_one(normalizers.labeled_pixels)
            else:
                normalizers = normalizers or count_normalizers(targets, 0, self.no_object_weight)
                pixels = normalizers.pixels  # in this family also those without a class, for both terms
                losses = {"pixel": self._pixel_loss(final, targets) / pixels}
            if output.semantic_logits is not None:
                losses["semantic"] = _pixel_cross_entropy(output.semantic_logits, targets).sum()[None] / pixels
        return losses

    def total(self, losses: Losses) -> Tensor:
        """Return the weighted sum of all terms, which the optimizer minimizes."""
        return torch.stack([self.weights[term] * values.sum() for term, values in losses.items()]).sum()

    def _query_losses(
        self,
        predictions: Sequence[MaskPrediction],
        targets: Sequence[Target],
        points: Points,
        normalizers: Normalizers,
    ) -> Losses:
        matchings = self.matcher(predictions, targets, points)
        weights = self._label_weights(predictions[0].class_logits)
        classes = [
            _class_loss(prediction, targets, matching, weights) / _or_one(normalizers.class_weights)
            for prediction, matching in zip(predictions, matchings, strict=True)
        ]
        masks = self._mask_losses(predictions, targets, matchings, points) / _at_least_one(normalizers.objects)
        return {"class": torch.stack(classes), "mask": masks[:, 0], "dice": masks[:, 1]}

    def _label_weights(self, class_logits: Tensor) -> Tensor:
        """(K+1,) float32: weights of all labels, with "no object" as the last, for logits (B, Q, K+1)."""
        no_object, device = class_logits.shape[-1] - 1, class_logits.device
        if self.class_weights is None:
            weights = torch.ones(no_object + 1, device=device)
        else:
            weights = to_device(torch.tensor([*self.class_weights, 1.0]), device)
        weights[no_object] = self.no_object_weight
        return weights

    def _mask_losses(
        self,
        predictions: Sequence[MaskPrediction],
        targets: Sequence[Target],
        matchings: list[list[Matching]],
        points: Points,
    ) -> Tensor:
        """(layers, 2): cross-entropy and dice of the matched masks, summed over images, all layers at once."""
        layers = len(predictions)
        shared = have_shared_features(predictions)
        if shared:
            features = [predictions[0].mask_features.float().unbind()]
        else:  # channels last, as EoMT's, so that their gradients need no copies: 5 % of a step
            features = [p.mask_features.float().permute(0, 2, 3, 1).unbind() for p in predictions]
        total = features[0][0].new_zeros(layers, 2)
        for image, target in enumerate(targets):
            pairs = [matching[image] for matching in matchings]
            embeddings = [
                p.mask_embeddings[image, queries].float() for p, (queries, _) in zip(predictions, pairs, strict=True)
            ]  # (M, C) each
            if shared:
                masks = torch.einsum("mc,chw->mhw", torch.cat(embeddings), features[0][image])
            else:
                products = zip(features, embeddings, strict=True)
                masks = torch.cat([torch.einsum("hwc,mc->hwm", f[image], e).permute(2, 0, 1) for f, e in products])
            locations = self._importance_sample(masks, points, layers, image)  # (layers*M, P, 2)
            truth = sample_matched_objects(target, torch.cat([objects for _, objects in pairs]), locations)
            logits = sample_masks(masks, locations)  # (layers*M, P)
            losses = torch.stack([_mask_cross_entropy(logits, truth), _dice_loss(logits, truth)], 1)
            total = total + losses.view(layers, len(masks) // layers, 2).sum(1)
        return total

    @torch.no_grad()
    def _importance_sample(self, masks: Tensor, points: Points, layers: int, image: int) -> Tensor:
        """Choose points for each mask, (layers*M, P, 2): candidates whose logits are nearest to 0, then uniform ones.

        PointRend (Kirillov et al. 2020), section 3.1.
        """
        masks_per_layer = len(masks) // layers
        num_candidates = int(self.num_points * self.oversample_ratio)
        num_uncertain = int(self.num_points * self.importance_sample_ratio)
        num_uniform = self.num_points - num_uncertain
        uncertain = []
        for chunk in chunk_layers(layers, masks_per_layer * num_candidates, masks.device):
            candidates = torch.cat(
                [points.candidates(layer, image, masks_per_layer, num_candidates) for layer in chunk]
            )
            logits = sample_masks(masks[chunk.start * masks_per_layer : chunk.stop * masks_per_layer], candidates)
            nearest = logits.abs_().topk(num_uncertain, 1, largest=False, sorted=False).indices
            uncertain.append(candidates.gather(1, nearest[..., None].expand(-1, -1, 2)))
        uniform = torch.cat([points.uniform(layer, image, masks_per_layer, num_uniform) for layer in range(layers)])
        return torch.cat([torch.cat(uncertain), uniform], 1)

    def _pixel_loss(self, prediction: PixelPrediction, targets: Sequence[Target]) -> Tensor:
        """(1,): cross-entropy, summed over pixels."""
        weights = None
        if self.class_weights is not None:
            weights = to_device(torch.tensor(self.class_weights), prediction.class_logits.device)
        losses = _pixel_cross_entropy(prediction.class_logits, targets, weights)
        if self.ohem_pixels is not None:  # pixels without a class have loss 0: they come last, or add nothing
            losses = losses.flatten().topk(min(self.ohem_pixels * len(targets), losses.numel())).values
        return losses.sum()[None]


def _class_loss(
    prediction: MaskPrediction, targets: Sequence[Target], matching: list[Matching], weights: Tensor
) -> Tensor:
    """Cross-entropy of one layer with weights (K+1,), summed over images and queries."""
    logits = prediction.class_logits.float()
    labels = torch.full(logits.shape[:2], logits.shape[-1] - 1, dtype=torch.int64, device=logits.device)  # (B, Q)
    for image_labels, target, (queries, objects) in zip(labels, targets, matching, strict=True):
        image_labels[queries] = target.labels[objects]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weights, reduction="sum")


def _mask_cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """(M,): binary cross-entropy at points (M, P)."""
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)


def _dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """(M,): dice loss at points (M, P)."""
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * truth).sum(1)
    return 1 - (overlap + 1) / (probabilities.sum(1) + truth.sum(1) + 1)


def _pixel_cross_entropy(logits: Tensor, targets: Sequence[Target], weights: Tensor | None = None) -> Tensor:
    """(B, H, W) float32, for logits (B, K, h, w) resized bilinearly; 0 for pixels without a class; weights (K,)."""
    labels = torch.stack([target.label_map(_NO_CLASS) for target in targets])
    resized = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(resized, labels, weights, ignore_index=_NO_CLASS, reduction="none")


def _or_one(value: Tensor | float) -> Tensor | float:
    """Return 1 in place of 0: a step without objects has no class loss if `no_object_weight` is 0."""
    return value + (value == 0)


def _at_least_one(count: float | Tensor) -> float | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
