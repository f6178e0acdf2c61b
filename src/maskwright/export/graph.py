"""The modules that are exported: a model with its outputs, its masks, or the decision of `inference.postprocess`.

The results have static shapes, which all runtimes support: segments are stored in tables of a fixed size, whose unused
entries have label -1. Only standard operators are used.
"""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.config.schema import EvaluateConfig
from maskwright.inference.exported.metadata import Contents
from maskwright.models.segmenter import Segmenter
from maskwright.structures.annotations import Task
from maskwright.structures.predictions import MaskPrediction, PixelPrediction


class ExportGraph(nn.Module):
    """Maps images (B, C, H, W) float32, 0..255, to a tuple of outputs.

    Args:
        model: in evaluation mode.
        contents: see `ExportMetadata`.
        task: of the result; not used for other contents.
        config: thresholds of the result.

    Attributes:
        output_names: one per output.
    """

    output_names: tuple[str, ...]

    def __init__(self, model: Segmenter, contents: Contents, task: Task, config: EvaluateConfig) -> None:
        super().__init__()
        self.model = model
        self.head = _build_head(model, contents, task, config)
        self.output_names = type(self.head).output_names

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Predict; padding has the value `pixel_mean`, so that it is zero after normalization."""
        return self.head(self.model(images).final, images.shape[-2:])


def _build_head(model: Segmenter, contents: Contents, task: Task, config: EvaluateConfig) -> Head:
    has_masks = "panoptic" in model.tasks
    things = torch.tensor([category.is_thing for category in model.categories])
    match contents, task:
        case "raw", _:
            return RawMasks() if has_masks else RawPixels()
        case "masks", _:
            return Masks()
        case "result", "semantic":
            return SemanticResult() if has_masks else PixelResult()
        case "result", "instance":
            return InstanceResult(things, top_k=config.top_k, score_threshold=config.score_threshold)
        case _:
            return PanopticResult(
                things, object_threshold=config.object_threshold, overlap_threshold=config.overlap_threshold
            )


class RawMasks(nn.Module):
    """Class logits (B, Q, K+1), mask embeddings (B, Q, C) and mask features (B, C, h, w)."""

    output_names = ("class_logits", "mask_embeddings", "mask_features")

    def forward(self, prediction: MaskPrediction, size: tuple[int, int]) -> tuple[Tensor, ...]:  # noqa: D102
        return prediction.class_logits, prediction.mask_embeddings, prediction.mask_features


class RawPixels(nn.Module):
    """Class logits (B, K, h, w) of a model without masks."""

    output_names = ("pixel_logits",)

    def forward(self, prediction: PixelPrediction, size: tuple[int, int]) -> tuple[Tensor, ...]:  # noqa: D102
        return (prediction.class_logits,)


class Masks(nn.Module):
    """Class logits (B, Q, K+1) and mask logits (B, Q, h, w) at stride 4."""

    output_names = ("class_logits", "mask_logits")

    def forward(self, prediction: MaskPrediction, size: tuple[int, int]) -> tuple[Tensor, ...]:  # noqa: D102
        return prediction.class_logits, _mask_logits(prediction)


class PixelResult(nn.Module):
    """Label of each pixel (B, H, W) int32, of a model without masks."""

    output_names = ("label_map",)

    def forward(self, prediction: PixelPrediction, size: tuple[int, int]) -> tuple[Tensor, ...]:  # noqa: D102
        return (_upsample(prediction.class_logits, size).argmax(1).int(),)


class SemanticResult(nn.Module):
    """Label of each pixel (B, H, W) int32: the class with the largest sum over queries of class times mask score."""

    output_names = ("label_map",)

    def forward(self, prediction: MaskPrediction, size: tuple[int, int]) -> tuple[Tensor, ...]:  # noqa: D102
        classes = prediction.class_logits.float().softmax(-1)[..., :-1]
        masks = _upsample(_mask_logits(prediction), size).sigmoid()
        scores = classes.transpose(1, 2) @ masks.flatten(2)  # (B, K, H * W)
        return (scores.argmax(1).int().unflatten(1, size),)


class InstanceResult(nn.Module):
    """Masks (B, N, H, W) bool, labels (B, N) int32 and scores (B, N), highest first; see `postprocess.instance`.

    N is `top_k`, or the number of (query, class) pairs if that is smaller. Unused entries have label -1 and come
    last.
    """

    output_names = ("masks", "labels", "scores")
    things: Tensor

    def __init__(self, things: Tensor, *, top_k: int, score_threshold: float) -> None:
        super().__init__()
        self.register_buffer("things", things, persistent=False)
        self.top_k, self.score_threshold = top_k, score_threshold

    def forward(self, prediction: MaskPrediction, size: tuple[int, int]) -> tuple[Tensor, ...]:  # noqa: D102
        probabilities = prediction.class_logits.float().softmax(-1)[..., :-1]  # (B, Q, K)
        count, num_classes = min(self.top_k, probabilities[0].numel()), probabilities.shape[-1]
        best, pairs = probabilities.flatten(1).topk(count)
        queries, labels = pairs // num_classes, pairs % num_classes
        logits = _upsample(_mask_logits(prediction), size)  # (B, Q, H, W)
        inside = logits > 0
        quality = (logits.sigmoid() * inside).sum((2, 3)) / (_count(inside) + 1e-6)
        scores = best * quality.gather(1, queries)
        is_instance = self.things[labels] & (scores >= self.score_threshold)
        scores, order = torch.where(is_instance, scores, -1.0).topk(count)
        labels = torch.where(scores >= 0, labels.gather(1, order), -1)
        masks = _select(inside, queries.gather(1, order)) & (scores >= 0)[:, :, None, None]
        return masks, labels.int(), scores.clamp_min(0)


class PanopticResult(nn.Module):
    """Segment map (B, H, W) int32, labels (B, Q) int32 and scores (B, Q) of the segments; see `postprocess.panoptic`.

    In the map 0 is no segment and n is segment n-1, whose class and score are entry n-1 of the tables. Unused
    entries have label -1.
    """

    output_names = ("segment_map", "labels", "scores")
    things: Tensor

    def __init__(self, things: Tensor, *, object_threshold: float, overlap_threshold: float) -> None:
        super().__init__()
        self.register_buffer("things", things, persistent=False)
        self.object_threshold = object_threshold
        self.overlap_threshold = Fraction(str(overlap_threshold)).limit_denominator(10**6)

    def forward(self, prediction: MaskPrediction, size: tuple[int, int]) -> tuple[Tensor, ...]:  # noqa: D102
        scores, labels = prediction.class_logits.float().softmax(-1).max(-1)  # (B, Q) each
        no_object = len(self.things)
        candidate = (labels != no_object) & (scores > self.object_threshold)
        labels = labels.clamp_max(no_object - 1)
        probabilities = _upsample(_mask_logits(prediction), size).sigmoid()  # (B, Q, H, W)
        inside = (probabilities >= 0.5) & candidate[:, :, None, None]
        ranked = torch.where(candidate[:, :, None, None], probabilities * scores[:, :, None, None], -1.0)
        winner = ranked.argmax(1)  # (B, H, W)
        number = torch.arange(scores.shape[1], device=scores.device)
        won = winner[:, None] == number[:, None, None]  # (B, Q, H, W)
        visible = won & inside
        kept = candidate & self._is_visible(_count(inside), _count(won), _count(visible))
        is_first, segment_of = self._number_segments(kept, labels)
        numbers = segment_of.gather(1, winner.flatten(1)).unflatten(1, size)
        segment_map = torch.where(visible.any(1), numbers, 0)
        place = (segment_of[:, None] == number[:, None] + 1) & is_first[:, None]  # (B, segments, Q)
        found = place.any(-1)
        table = torch.where(found, (place * labels[:, None]).sum(-1), -1)
        return segment_map.int(), table.int(), (place * scores[:, None]).sum(-1)

    def _is_visible(self, area: Tensor, won: Tensor, visible: Tensor) -> Tensor:
        """Return whether a query wins enough of its mask; compared as integers, so that all devices agree."""
        share = self.overlap_threshold
        enough = won * share.denominator >= area * share.numerator
        return (area > 0) & (won > 0) & (visible > 0) & enough

    def _number_segments(self, kept: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether each query begins a segment, and the segment (from 1; 0 is none) of each, (B, Q) both.

        The queries of one stuff class share the segment of the first of them.
        """
        is_stuff = ~self.things[labels]
        same = (labels[:, :, None] == labels[:, None]) & is_stuff[:, :, None] & kept[:, :, None] & kept[:, None]
        number = torch.arange(labels.shape[1], device=labels.device)
        earlier = number[:, None] > number  # (Q, Q)
        is_first = kept & ~(same & earlier).any(-1)
        own = is_first.int().cumsum(1)
        shared = (same & is_first[:, None]).int() * own[:, None]
        return is_first, torch.where(is_first, own, shared.sum(-1))


Head = RawMasks | RawPixels | Masks | PixelResult | SemanticResult | InstanceResult | PanopticResult


def _mask_logits(prediction: MaskPrediction) -> Tensor:
    features = prediction.mask_features.float()  # (B, C, h, w)
    return (prediction.mask_embeddings.float() @ features.flatten(2)).unflatten(2, features.shape[2:])


def _upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False)


def _count(pixels: Tensor) -> Tensor:
    """Count the pixels (B, Q) of masks (B, Q, H, W); int32 during the sum, because runtimes store what is summed."""
    return pixels.int().sum((2, 3), dtype=torch.int32).long()


def _select(maps: Tensor, queries: Tensor) -> Tensor:
    """Return the maps (B, N, H, W) of some queries (B, N), from those of all, (B, Q, H, W)."""
    first = torch.arange(maps.shape[0], device=maps.device)[:, None] * maps.shape[1]
    return maps.flatten(0, 1)[first + queries]
