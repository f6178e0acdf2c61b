"""Explain why a run found no segments: the best scores, and the threshold that dropped them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from maskwright.config.schema import EvaluateConfig
from maskwright.inference.mask_upsampling import CropPrediction, SemanticScores
from maskwright.inference.segment import postprocess_for
from maskwright.inference.test_time_augmentation import MaskQueries
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Task

_MAX_IMAGES = 16  # images searched for their best instance, which takes as long as segmenting them


@dataclass
class NothingFound:
    """Collects the best candidates of images without a segment, until an image has one.

    Attributes:
        config: the thresholds.
        segments: whether an image has a segment.
        images: number of images, all without a segment.
        score: the best score: of an instance, or the class probability of a query. Panoptic: of the queries that
            prefer a class to "no object", if there is one.
        name: of its class.
        prefers_object: panoptic: whether a query prefers a class to "no object".
    """

    config: EvaluateConfig
    segments: bool = False
    images: int = 0
    score: float = 0.0
    name: str = ""
    prefers_object: bool = False

    def add(self, result: Segmentation, predictions: Sequence[CropPrediction | SemanticScores]) -> None:
        """Add an image, or a tile: its result and the predictions that `segment` made it of."""
        self.segments = self.segments or len(result) > 0
        if self.segments or (result.task == "instance" and self.images >= _MAX_IMAGES):
            return
        self.images += 1
        queries = MaskQueries([one for one in predictions if isinstance(one, CropPrediction)], result.size)
        if result.task == "instance":
            things = [category.is_thing for category in result.categories]
            algorithm = postprocess_for(queries.probabilities.device)
            labels, scores, *_ = algorithm.instance(queries, things, top_k=self.config.top_k, score_threshold=0.0)
        else:
            scores, labels = queries.probabilities[:, :-1].max(-1)
            preferred = scores > queries.probabilities[:, -1]
            if preferred.any() and not self.prefers_object:
                self.prefers_object, self.score = True, 0.0
            if self.prefers_object:
                scores, labels = scores[preferred], labels[preferred]
        if len(scores) and float(scores.max()) > self.score:
            self.score = float(scores.max())
            self.name = result.categories[int(labels[scores.argmax()])].name

    def merge(self, other: NothingFound) -> None:
        """Add the images of `other`."""
        self.segments, self.images = self.segments or other.segments, self.images + other.images
        if (other.prefers_object, other.score) > (self.prefers_object, self.score):
            self.prefers_object, self.score, self.name = other.prefers_object, other.score, other.name

    def hint(self, task: str) -> str | None:
        """Return what to change, on one line; None if a segment was found or nothing was segmented."""
        if self.segments or not self.images:
            return None
        config, best = self.config, f"the best score is {self.score:.3f} ('{self.name}')"
        start = f"no segment in any of {self.images} images" if self.images > 1 else "no segment"
        if task == "instance":
            if not self.name:
                return f"{start}: none of the top_k {config.top_k} best candidates is a thing; raise --top-k"
            return f"{start}: {best}, below score_threshold {config.score_threshold:g}; {_try('score', self.score)}"
        if not self.prefers_object:
            return (
                f"{start}: every query says 'no object', and {best}; no threshold helps, so train longer, or compare "
                "the images with those of the training in size and colors"
            )
        if self.score > config.object_threshold:
            return (
                f"{start}: {best}, but each mask is hidden by others over more than its overlap_threshold "
                f"{config.overlap_threshold:g} allows; {_try('overlap', config.overlap_threshold / 2)}"
            )
        return f"{start}: {best}, not above object_threshold {config.object_threshold:g}; {_try('object', self.score)}"


Parts = dict[Task, NothingFound]


def merge_all(parts: Iterable[Parts]) -> Parts:
    """Merge what several processes found."""
    merged: Parts = {}
    for part in parts:
        for task, found in part.items():
            if task in merged:
                merged[task].merge(found)
            else:
                merged[task] = found
    return merged


def first_hint(parts: Parts) -> str | None:
    """Return the hint of the first task for which nothing was found; None if there is none."""
    return next((hint for task, found in parts.items() if (hint := found.hint(task))), None)


def _try(name: str, score: float) -> str:
    """Suggest a threshold just below a score: its first digit."""
    if score <= 0:
        return "train longer"
    unit = 10.0 ** math.floor(math.log10(score * 0.999))
    return f"try --{name}-threshold {math.floor(score * 0.999 / unit) * unit:g}"
