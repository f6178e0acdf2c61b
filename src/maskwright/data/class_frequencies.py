"""How often each class occurs in a split, and the repeat factors of its images (Gupta et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from maskwright.data.formats.base import AnnotatedImages
from maskwright.errors import DatasetError, MaskwrightError
from maskwright.runtime.process_pool import available_cores, map_unordered
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import count_values

_IMAGES_PER_PROCESS = 64  # for fewer, a process is not worth its start


class _ImageClasses(NamedTuple):
    index: int
    labels: np.ndarray  # (n,) classes that occur, ascending
    objects: np.ndarray  # (n,) of each
    pixels: np.ndarray  # (n,) of each


@dataclass(frozen=True)
class ClassFrequencies:
    """How often each class occurs in a split; crowds are not counted, since they are not trained on.

    Attributes:
        objects: (K,) int64; in task semantic, where a class is one object in each image, images with the class.
        pixels: (K,) int64.
        labels_of_images: for each image the labels of the classes in it, ascending.
    """

    objects: np.ndarray
    pixels: np.ndarray
    labels_of_images: list[np.ndarray]

    @property
    def images(self) -> np.ndarray:
        """(K,) int64, images with the class."""
        return np.bincount(np.concatenate([*self.labels_of_images, []]).astype(int), minlength=len(self.objects))

    def class_repeat_factors(self, threshold: float) -> np.ndarray:
        """(K,) float64: max(1, sqrt(threshold / f)) for a class in a fraction f of the images; 1 for an absent one."""
        fractions = self.images / max(len(self.labels_of_images), 1)
        return np.maximum(1.0, np.sqrt(threshold / np.where(fractions > 0, fractions, np.inf)))

    def repeat_factors(self, threshold: float) -> np.ndarray:
        """(N,) float64, how often each image is drawn per epoch: the largest factor of its classes, at least 1."""
        factors = self.class_repeat_factors(threshold)
        return np.array([factors[labels].max(initial=1.0) for labels in self.labels_of_images])


def count_classes(annotated: AnnotatedImages) -> ClassFrequencies:
    """Read all annotations of a split, and no image, in one process per core.

    Raises:
        DatasetError: annotations of an image cannot be read; names the first such image.
    """
    counter, count, classes = _Counter(annotated), len(annotated), len(annotated.categories)
    workers = min(available_cores(), count // _IMAGES_PER_PROCESS)
    found = sorted(map_unordered(counter.count, range(count), workers, counter.crashed), key=lambda item: item[0])
    objects, pixels = np.zeros(classes, dtype=np.int64), np.zeros(classes, dtype=np.int64)
    images = []
    for image in found:
        if not isinstance(image, _ImageClasses):
            raise image[1]
        images.append(image.labels)
        objects[image.labels] += image.objects
        pixels[image.labels] += image.pixels
    return ClassFrequencies(objects, pixels, images)


@dataclass(frozen=True)
class _Counter:
    """Counts in a worker process; returns errors, which must not be raised there."""

    annotated: AnnotatedImages

    def count(self, index: int) -> _ImageClasses | tuple[int, MaskwrightError]:
        try:
            return _count_image(self.annotated.target(index), index)
        except MaskwrightError as error:
            return index, error

    def crashed(self, index: int) -> tuple[int, MaskwrightError]:
        where, remedy = str(self.annotated.file(index)), "export them again"
        return index, DatasetError("reading the annotations killed the process", where=where, remedy=remedy)


def _count_image(target: Target, index: int) -> _ImageClasses:
    areas = np.sum([count_values(layer, len(target) + 1) for layer in target.id_maps.numpy()], axis=0)[1:]
    kept = ~target.is_crowd.numpy()
    labels, inverse, objects = np.unique(target.labels.numpy()[kept], return_inverse=True, return_counts=True)
    return _ImageClasses(index, labels, objects, np.bincount(inverse, areas[kept], len(labels)).astype(np.int64))
