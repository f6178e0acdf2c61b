"""Hungarian matching of queries and objects (Mask2Former, sections 3.1 and 3.3). Original: `modeling/matcher.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from maskwright.errors import TrainingError
from maskwright.structures.annotations import Target, to_device
from maskwright.structures.predictions import MaskPrediction
from maskwright.training.losses.point_sampling import Points, chunk_layers, sample_features, sample_objects

Matching = tuple[Tensor, Tensor]  # queries and objects of one image, both (min(Q, N),) int64, queries ascending


@dataclass(frozen=True)
class HungarianMatcher:
    """Assign each object to one query, at minimum total cost, independently for each decoder layer and image.

    The cost of a pair is `class_weight` times the negative probability of the object's class, plus `mask_weight` times
    the binary cross-entropy and `dice_weight` times the dice loss of the masks. Masks are compared at `num_points`
    locations shared by all masks of an image. Full masks are never computed: a mask is a product of an embedding and
    the shared features, so the features are sampled first. The product has the dtype of the features, under
    autocast bfloat16 as the original's masks; everything else is in float32. Gain: 0.14 -> 0.08 s of a bfloat16 step of
    2.1 s (ResNet-50, 512x512, two threads, AMD EPYC).

    With `class_weights` (K,), the class term is multiplied by the weight of the object's class.

    Args:
        predictions: one per decoder layer.
        targets: one per image; an image may have no objects.
        points: source of the locations.

    Returns:
        For each layer, for each image, a `Matching` on the predictions' device; empty for an image without objects.

    Raises:
        TrainingError: a cost is not finite; the message names the image and the terms.
    """

    class_weight: float
    mask_weight: float
    dice_weight: float
    num_points: int
    class_weights: tuple[float, ...] | None = None

    @torch.no_grad()
    def __call__(
        self, predictions: Sequence[MaskPrediction], targets: Sequence[Target], points: Points
    ) -> list[list[Matching]]:
        """See the class."""
        predictions = _channels_last(predictions)
        layers = len(predictions)
        costs = [
            self.cost(predictions, image, target, points.matching(image, layers, self.num_points))
            for image, target in enumerate(targets)
        ]  # (layers, Q, N) each
        matchings = []  # (2, min(Q, N)) each, by image, then by layer
        for cost, target in zip(_copy_to_host(costs), targets, strict=True):
            if not np.isfinite(cost).all():
                raise TrainingError(
                    f"matching costs of image {target.image_id} are not finite ({_nonfinite_terms(predictions)})"
                )
            matchings += [np.stack(linear_sum_assignment(layer_cost)) for layer_cost in cost]
        pairs = _copy_to_device(matchings, costs[0].device)
        return [[(queries, objects) for queries, objects in pairs[layer::layers]] for layer in range(layers)]

    def cost(self, predictions: Sequence[MaskPrediction], image: int, target: Target, points: Tensor) -> Tensor:
        """Compute the cost (layers, Q, N) of each pair of one image at points (layers, P, 2)."""
        queries, num_points = predictions[0].class_logits.shape[1], points.shape[1]
        chunks = chunk_layers(len(predictions), queries * num_points, points.device)
        if len(chunks) > 1:
            slices = (slice(chunk.start, chunk.stop) for chunk in chunks)
            return torch.cat([self.cost(predictions[part], image, target, points[part]) for part in slices])
        logits = _mask_logits(predictions, image, points)  # (layers, P, Q)
        truth = sample_objects(target, points.flatten(0, 1)).unflatten(1, points.shape[:2]).transpose(0, 1)
        probabilities = logits.sigmoid()
        # Products with ones are sums over points: along columns, CPUs are slow at sums.
        ones = logits.new_ones(1, num_points)
        # softplus(-x) = softplus(x) - x turns the two products of the cross-entropy into one.
        mask_cost = (ones @ F.softplus(logits) - truth @ logits) / num_points  # (layers, N, Q)
        overlap = 2 * (truth @ probabilities)
        areas = ones @ probabilities + truth.sum(-1, keepdim=True)
        dice_cost = 1 - (overlap + 1) / (areas + 1)
        classes = torch.stack([p.class_logits[image] for p in predictions]).float().softmax(-1)
        class_cost = -classes[:, :, target.labels]
        if self.class_weights is not None:
            class_cost = class_cost * to_device(torch.tensor(self.class_weights), class_cost.device)[target.labels]
        masks_cost = self.mask_weight * mask_cost + self.dice_weight * dice_cost
        return self.class_weight * class_cost + masks_cost.transpose(1, 2)


def have_shared_features(predictions: Sequence[MaskPrediction]) -> bool:
    """Return whether all layers use the same tensor of mask features."""
    return all(p.mask_features is predictions[0].mask_features for p in predictions)


def _channels_last(predictions: Sequence[MaskPrediction]) -> Sequence[MaskPrediction]:
    """Make shared features channels-last once, the layout in which every layer samples them."""
    if not have_shared_features(predictions):
        return predictions
    features = predictions[0].mask_features.contiguous(memory_format=torch.channels_last)
    return [replace(prediction, mask_features=features) for prediction in predictions]


def _mask_logits(predictions: Sequence[MaskPrediction], image: int, points: Tensor) -> Tensor:
    """Compute the mask logits of one image at points (layers, P, 2): (layers, P, Q) float32."""
    embeddings = [p.mask_embeddings[image].to(p.mask_features.dtype) for p in predictions]
    if have_shared_features(predictions):
        sampled = sample_features(predictions[0].mask_features[image], points.flatten(0, 1))
        logits = sampled.unflatten(0, points.shape[:2]) @ torch.stack(embeddings).transpose(1, 2)
    else:
        layers = zip(embeddings, predictions, points, strict=True)
        logits = torch.stack([sample_features(p.mask_features[image], place) @ e.t() for e, p, place in layers])
    return logits.float()


def _copy_to_host(costs: list[Tensor]) -> list[np.ndarray]:
    """Copy the costs of all layers and images in one transfer, the only host synchronization of a training step."""
    flat = _to_numpy(torch.cat([cost.flatten() for cost in costs]))
    parts = np.split(flat, np.cumsum([cost.numel() for cost in costs])[:-1])
    return [part.reshape(cost.shape) for part, cost in zip(parts, costs, strict=True)]


def _to_numpy(costs: Tensor) -> np.ndarray:
    return costs.cpu().numpy()


def _copy_to_device(matchings: list[np.ndarray], device: torch.device) -> tuple[Tensor, ...]:
    """Copy all matchings (2, M) at once, without waiting for the device."""
    pairs = to_device(torch.from_numpy(np.concatenate(matchings, 1)), device)
    return pairs.split([matching.shape[1] for matching in matchings], 1)


def _nonfinite_terms(predictions: Sequence[MaskPrediction]) -> str:
    """Name the terms that cannot be computed from the predictions."""
    if all(p.class_logits.isfinite().all() for p in predictions):
        return "mask, dice"
    mask_tensors = (tensor for p in predictions for tensor in (p.mask_embeddings, p.mask_features))
    return "class" if all(tensor.isfinite().all() for tensor in mask_tensors) else "class, mask, dice"
