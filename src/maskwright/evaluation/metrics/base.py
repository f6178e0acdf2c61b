"""The base of all metrics: they accumulate image by image, merge, and report scores in one form.

Unusual: every metric streams. It keeps counts or the outcome of matching, never a mask of an earlier image; it
can be pickled, and merging the metrics of several processes gives exactly the metric of a single one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from maskwright.errors import DatasetError
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target, Task
from maskwright.structures.id_maps import count_values

# Plain values for JSON: name -> score in 0..1, the main score first; "images" -> number of images; and tables such as
# "per_class" -> class name -> column -> score or count. None: the data has nothing to score.
Scores = dict[str, Any]


class Metric(ABC):
    """A metric that accumulates image by image. Picklable, so that processes can send theirs to one that merges them.

    Attributes:
        task: the kind of results that it scores.
        target_task: the task whose annotations it is scored on, if the dataset annotates tasks separately.
        needs_confidence: whether results need a confidence map.
        higher_is_better: whether its scores can decide which model is best.
        categories: the classes of the labels in results and annotations.
        image_ids: ids of the images so far.
    """

    task: ClassVar[Task]
    target_task: ClassVar[Task]
    needs_confidence: ClassVar[bool] = False
    higher_is_better: ClassVar[bool] = True

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(categories)
        self.image_ids: set[int | str] = set()

    def update(self, result: Segmentation, target: Target) -> None:
        """Add one image.

        Args:
            result: the prediction at the original size of the image.
            target: all annotated objects at the same size, crowds included.

        Raises:
            ValueError: sizes or categories differ, the metric does not score this task, or the image was added before.
            DatasetError: the metric cannot score such annotations.
        """
        size = tuple(target.id_maps.shape[1:])
        if tuple(result.size) != size:
            raise ValueError(f"image {target.image_id}: the result has size {result.size}, the annotations {size}")
        if len(result.categories) != len(self.categories):
            found = f"the result has {len(result.categories)} categories, the metric {len(self.categories)}"
            raise ValueError(f"image {target.image_id}: {found}")
        self._check_unseen({target.image_id})
        self._add(result, target if target.id_maps.device.type == "cpu" else target.to("cpu"))
        self.image_ids.add(target.image_id)

    def merge(self, other: Metric) -> None:
        """Add all images of `other`; no image may be in both.

        Raises:
            ValueError: an image is in both, or the two differ in kind or categories.
        """
        if type(self) is not type(other) or self.categories != other.categories:
            raise ValueError(
                f"cannot merge {type(other).__name__} into {type(self).__name__}: metric or categories differ"
            )
        self._check_unseen(other.image_ids)
        self._merge(other)
        self.image_ids |= other.image_ids

    @abstractmethod
    def compute(self) -> Scores:
        """Return the scores of all images so far; more images may be added afterwards."""

    @abstractmethod
    def _add(self, result: Segmentation, target: Target) -> None: ...

    @abstractmethod
    def _merge(self, other) -> None: ...

    def _scores(self, summary: dict[str, float | None], columns: dict[str, list]) -> Scores:
        names = [category.name for category in self.categories]
        unique = [c.name if names.count(c.name) == 1 else f"{c.name} ({c.id})" for c in self.categories]
        return summary | {"images": len(self.image_ids), "per_class": as_table(unique, columns)}

    def _check_unseen(self, image_ids: set[int | str]) -> None:
        if duplicates := self.image_ids & image_ids:
            raise ValueError(
                f"image {min(map(str, duplicates))} is scored twice; assign each image to one process, once"
            )


def combine_scores(parts: Sequence[Scores]) -> Scores:
    """Combine the scores of several metrics over the same images; rows of tables are merged by name."""
    combined: Scores = {}
    for part in parts:
        combined |= {name: value for name, value in part.items() if not isinstance(value, dict)}
    combined["images"] = combined.pop("images")
    for name, table in ((name, value) for part in parts for name, value in part.items() if isinstance(value, dict)):
        rows = combined.setdefault(name, {})
        for row, columns in table.items():
            rows[row] = rows.get(row, {}) | columns
    return combined


def as_table(names: Sequence[str], columns: dict[str, list]) -> dict[str, dict[str, Any]]:
    """Turn columns of equal length into named rows."""
    return {name: {title: values[i] for title, values in columns.items()} for i, name in enumerate(names)}


def check_no_overlap(target: Target, metric: str) -> None:
    """Raise DatasetError if annotated objects overlap, which `metric` does not support."""
    if target.id_maps.shape[0] > 1:
        raise DatasetError(
            f"annotated objects overlap, but {metric} needs at most one object per pixel",
            where=f"image {target.image_id}",
            remedy="use other metrics in evaluate.metrics, or annotations without overlap",
        )


def count_overlaps(truth: np.ndarray, predicted: np.ndarray, objects: int, segments: int) -> np.ndarray:
    """Count the pixels that the ids of two (H, W) maps share, (objects + 1, segments + 1) int64; id 0 is the first."""
    count = (objects + 1) * (segments + 1)
    kind = np.uint16 if count <= 2**16 else np.int64
    # numpy converts a few thousand pixels at a time, so no copy of a map leaves the cache
    pairs = np.multiply(truth.ravel(), segments + 1, dtype=kind, casting="unsafe")
    np.add(pairs, predicted.ravel(), out=pairs, dtype=kind, casting="unsafe")
    return count_values(pairs, count).reshape(objects + 1, segments + 1)


def ratio(part, whole):
    """Return `part / whole`, NaN where the whole is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(whole, 0), np.nan, np.divide(part, whole))


def mean(values: np.ndarray) -> float | None:
    """Return the mean of the values that are not NaN; None if all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def json_score(value) -> float | None:
    """Convert a score for JSON, which has no NaN."""
    return None if np.isnan(value) else float(value)


def json_scores(values: np.ndarray) -> list[float | None]:
    """Convert one score per class for JSON."""
    return [json_score(value) for value in values]
