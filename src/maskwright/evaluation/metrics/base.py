"""What all metrics share: they grow image by image, merge, and say their scores in one form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from maskwright.errors import DatasetError
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target, Task
from maskwright.structures.id_maps import count_values

# What a metric says, as plain values for JSON: name -> score in 0..1, the headline first; "images" -> how many; and
# tables like "per_class" -> class name -> column -> score or count. None: nothing in the data could be scored.
Scores = dict[str, Any]


class Metric(ABC):
    """A score that grows image by image. Picklable, so that processes can hand theirs to one that merges them.

    Attributes:
        task: the kind of results that it scores.
        truth: the task whose annotations it wants; others do where a data set annotates it no otherwise.
        categories: what labels mean, in results and annotations.
        image_ids: of the images so far.
    """

    task: ClassVar[Task]
    truth: ClassVar[Task]

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(categories)
        self.image_ids: set[int | str] = set()

    def update(self, result: Segmentation, target: Target) -> None:
        """Add one image.

        Args:
            result: the prediction at the original size of the image.
            target: all annotated objects at the same size, crowds included.

        Raises:
            ValueError: sizes or categories differ, the result is of a task that this metric cannot score, or the image
                was added before.
            DatasetError: the annotations are of a kind that it cannot score.
        """
        size = tuple(target.id_maps.shape[1:])
        if tuple(result.size) != size:
            raise ValueError(f"image {target.image_id}: the result is {result.size}, its annotations are {size}")
        if len(result.categories) != len(self.categories):
            found = f"{len(result.categories)} categories, the metric {len(self.categories)}"
            raise ValueError(f"image {target.image_id}: the result has {found}")
        self._refuse_repeated({target.image_id})
        self._add(result, target if target.id_maps.device.type == "cpu" else target.to("cpu"))
        self.image_ids.add(target.image_id)

    def merge(self, other: Metric) -> None:
        """Add all images of `other`, which must not share any with this metric.

        Raises:
            ValueError: an image is in both, or the two differ in kind or categories.
        """
        if type(self) is not type(other) or self.categories != other.categories:
            raise ValueError(f"cannot merge {type(other).__name__} into {type(self).__name__}: they score other things")
        self._refuse_repeated(other.image_ids)
        self._join(other)
        self.image_ids |= other.image_ids

    @abstractmethod
    def compute(self) -> Scores:
        """The scores of all images so far; more may be added afterwards."""

    @abstractmethod
    def _add(self, result: Segmentation, target: Target) -> None: ...

    @abstractmethod
    def _join(self, other) -> None: ...

    def _scores(self, summary: dict[str, float | None], columns: dict[str, list]) -> Scores:
        names = [category.name for category in self.categories]
        unique = [c.name if names.count(c.name) == 1 else f"{c.name} ({c.id})" for c in self.categories]
        return summary | {"images": len(self.image_ids), "per_class": as_table(unique, columns)}

    def _refuse_repeated(self, image_ids: set[int | str]) -> None:
        twice = self.image_ids & image_ids
        if twice:
            raise ValueError(f"image {min(map(str, twice))} is scored twice; give each image to one process, once")


def join_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of several metrics over the same images as one; rows of tables are joined by their names."""
    joined: Scores = {}
    for part in parts:
        joined |= {name: value for name, value in part.items() if not isinstance(value, dict)}
    joined["images"] = joined.pop("images")
    for name, table in ((name, value) for part in parts for name, value in part.items() if isinstance(value, dict)):
        rows = joined.setdefault(name, {})
        for row, columns in table.items():
            rows[row] = rows.get(row, {}) | columns
    return joined


def as_table(names: Sequence[str], columns: dict[str, list]) -> dict[str, dict[str, Any]]:
    """Columns of equal length as rows under their names."""
    return {name: {title: values[i] for title, values in columns.items()} for i, name in enumerate(names)}


def check_flat(target: Target, score: str) -> None:
    """Raise DatasetError where annotated objects overlap, which `score` does not allow."""
    if target.id_maps.shape[0] > 1:
        raise DatasetError(
            f"image {target.image_id}: annotated objects overlap, but {score} scores annotations in which every pixel "
            "is of one object; use such a data set, or other scores in evaluate.metrics"
        )


def overlaps(truth: np.ndarray, predicted: np.ndarray, objects: int, segments: int) -> np.ndarray:
    """Pixels that two (H, W) id maps share: (objects + 1, segments + 1) int64; numbers run from 0 on in both."""
    count = (objects + 1) * (segments + 1)
    kind = np.uint16 if count <= 2**16 else np.int64
    # converted on the way, a few thousand pixels at a time: no copy of a map leaves the cache
    pairs = np.multiply(truth.ravel(), segments + 1, dtype=kind, casting="unsafe")
    np.add(pairs, predicted.ravel(), out=pairs, dtype=kind, casting="unsafe")
    return count_values(pairs, count).reshape(objects + 1, segments + 1)


def ratio(part, whole):
    """`part / whole`, NaN where the whole is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(whole, 0), np.nan, np.divide(part, whole))


def mean(values: np.ndarray) -> float | None:
    """The mean of all that are not NaN; None where all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def number(value) -> float | None:
    """A score for JSON, which has no NaN."""
    return None if np.isnan(value) else float(value)


def column(values: np.ndarray) -> list[float | None]:
    """One score per class for JSON."""
    return [number(value) for value in values]
