"""Test-time augmentation: several scales and flips of one image become one prediction.

Semantic class scores are averaged at the size of the result. For instance and panoptic segmentation, the queries of an
image and of its horizontal flip that predict the same object are merged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskwright.inference.mask_upsampling import SCORE_VALUES, CropPrediction, SemanticScores, upsample
from maskwright.structures.predictions import MaskPrediction

_SAME_MASK = 0.5  # IoU above which two queries mean one object


class MeanScores:
    """Running mean of class scores over scales and flips; logits are averaged as probabilities.

    Original: `test_time_augmentation.py`; mmseg's `aug_test` for logits.

    Args:
        output_size: (height, width) at which scores are averaged.
    """

    def __init__(self, output_size: tuple[int, int]) -> None:
        self.output_size = output_size
        self.total = torch.zeros(())
        self.count = 0

    def add(self, scores: SemanticScores) -> None:
        """Add the scores of one scale or flip."""
        values = self._upright(scores)
        self.total = self.total.add_(values) if self.count else values
        self.count += 1

    def mean(self) -> SemanticScores:
        """Return the mean; needs at least one scale, and nothing can be added afterwards."""
        return SemanticScores(self.total.div_(self.count), False, self.output_size, self.output_size)

    def _upright(self, scores: SemanticScores) -> Tensor:
        values = torch.cat(list(scores.at_output(self.output_size)))
        if scores.are_logits:
            for rows in values.split(max(1, SCORE_VALUES // (len(values) * self.output_size[1])), dim=1):
                rows.copy_(rows.softmax(0))
        return values.flip(-1) if scores.flipped else values


class MaskQueries:
    """Class probabilities and masks of the queries of one crop, or of an image and its horizontal flip.

    Queries of two crops are matched one to one by mask IoU and class agreement. A pair
    with an IoU above one half is one object: its class probabilities are the mean of both, and so are its mask logits.
    A query without such a partner keeps its mask, and its class probabilities are averaged with "no object", as that is
    what the other crop predicts there.

    Args:
        crops: one; or the image and its flip, in this order.
        output_size: (height, width) of the masks.

    Attributes:
        probabilities: (N, K+1).

    Raises:
        ValueError: a prediction has no masks.
    """

    def __init__(self, crops: Sequence[CropPrediction], output_size: tuple[int, int]) -> None:
        self.crops, self.output_size = crops, output_size
        predictions = [crop.prediction for crop in crops if isinstance(crop.prediction, MaskPrediction)]
        if len(predictions) < len(crops):
            raise ValueError("a per-pixel prediction has no masks, so it has no instances or segments")
        self.embeddings = [prediction.mask_embeddings[0].float() for prediction in predictions]  # (Q, C) each
        self.features = [prediction.mask_features[0].float() for prediction in predictions]  # (C, h, w) each
        probabilities = [prediction.class_logits[0].float().softmax(-1) for prediction in predictions]
        if len(crops) == 1:
            (self.probabilities,) = probabilities
        else:
            self.partners = self._match(probabilities)  # (2, N) queries of each crop, -1 for none
            self.probabilities = self._mean_probabilities(probabilities)

    def mask_logits(self, queries: Tensor) -> Tensor:
        """Return the mask logits (n, H, W) of some queries (n,) at the output size."""
        masks = torch.zeros(())
        for crop, embeddings, features in zip(self.crops, self.embeddings_of(queries), self.features, strict=True):
            coarse = torch.einsum("nc,chw->nhw", embeddings, features)
            masks = masks + upsample(coarse, crop, self.output_size)
        return masks

    def embeddings_of(self, queries: Tensor) -> list[Tensor]:
        """Return the weighted embeddings (n, C) of some queries (n,) in each crop.

        Summing the crops' mask logits then gives the mean over those crops that have the query; elsewhere the
        embedding is zero.
        """
        if len(self.crops) == 1:
            return [self.embeddings[0][queries]]
        partners = self.partners[:, queries]  # (2, n)
        weights = (partners >= 0) / (partners >= 0).sum(0)
        return [
            embeddings[own.clamp_min(0)] * weight[:, None]
            for embeddings, own, weight in zip(self.embeddings, partners, weights, strict=True)
        ]

    def _match(self, probabilities: list[Tensor]) -> Tensor:
        from scipy.optimize import linear_sum_assignment  # takes 0.3 s to import, and only flips need it

        iou = self._mask_iou()
        rows, columns = linear_sum_assignment((iou + probabilities[0] @ probabilities[1].T).cpu().numpy(), True)
        rows, columns = (torch.from_numpy(queries).to(iou.device) for queries in (rows, columns))
        same = iou[rows, columns] > _SAME_MASK
        none = rows.new_full((int((~same).sum()),), -1)
        return torch.stack(
            [torch.cat([rows[same], rows[~same], none]), torch.cat([columns[same], none, columns[~same]])]
        )

    def _mean_probabilities(self, probabilities: list[Tensor]) -> Tensor:
        no_object = torch.eye(probabilities[0].shape[1], device=self.partners.device)[-1]
        first, second = (
            torch.where((queries >= 0)[:, None], values[queries], no_object)
            for values, queries in zip(probabilities, self.partners, strict=True)
        )
        return (first + second) / 2

    def _mask_iou(self) -> Tensor:
        """Return the IoU (Q, Q) of the masks of two crops; the second is flipped back to the cells of the first."""
        crop, (first, second) = self.crops[0], self.features
        cell = crop.padded_size[1] / first.shape[2]  # width in pixels
        rows = max(1, round(crop.input_size[0] / crop.padded_size[0] * first.shape[1]))
        columns = max(1, round(crop.input_size[1] / cell))
        place = (crop.input_size[1] / cell - 1 - torch.arange(columns, device=first.device)).clamp_min(0)
        left = place.long().clamp_max(second.shape[2] - 2)
        second = torch.lerp(second[:, :rows, left], second[:, :rows, left + 1], place - left)
        inside, other = (
            (embeddings @ features.flatten(1) > 0).float()
            for embeddings, features in zip(self.embeddings, (first[:, :rows, :columns], second), strict=True)
        )
        common = inside @ other.T
        return common / (inside.sum(1)[:, None] + other.sum(1) - common).clamp_min(1)
