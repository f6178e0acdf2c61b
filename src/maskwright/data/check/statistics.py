"""Statistics of the examined images of one split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from maskwright.data.check.examine import ExaminedImage, ObjectSummary
from maskwright.data.pixel_statistics import PixelStatistics, summarize_sums
from maskwright.structures.annotations import Category

SMALL, MEDIUM = 32**2, 96**2  # pixels; COCO's limits of small and medium objects


@dataclass
class ClassCount:
    """How often one class occurs in a split.

    Attributes:
        objects: number of objects; in semantic datasets at most one per image.
        images: number of images with the class.
        pixels: number of pixels.
    """

    objects: int = 0
    images: int = 0
    pixels: int = 0


@dataclass
class SplitStatistics:
    """Statistics of one split. Crowd regions count as pixels of their class, not as objects.

    Attributes:
        images: number of images in the annotations.
        read: number of images examined.
        sizes: (height, width) -> number of images.
        classes: one per category.
        crowds: number of crowd regions.
        empty: paths of the images without any object.
        pixels: number of pixels of all images with readable annotations.
        void: number of these without an object: void, or the background of instances.
        objects_per_image: of every image with readable annotations.
        areas: number of small objects (below 32x32 pixels), medium and large ones (from 96x96), as COCO divides them.
        channel_sums: (3, C): pixels, sum, and sum of squares of each channel; None before the first image.
    """

    images: int
    read: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    classes: list[ClassCount] = field(default_factory=list)
    crowds: int = 0
    empty: list[str] = field(default_factory=list)
    pixels: int = 0
    void: int = 0
    objects_per_image: list[int] = field(default_factory=list)
    areas: list[int] = field(default_factory=lambda: [0, 0, 0])
    channel_sums: np.ndarray | None = None

    def add(self, image: ExaminedImage) -> None:
        """Add one image."""
        self.read += 1
        if image.pixels is not None:
            self.sizes[image.pixels.size] += 1
            if self.channel_sums is None or self.channel_sums.shape == image.pixels.channel_sums.shape:
                self.channel_sums = image.pixels.channel_sums + (0 if self.channel_sums is None else self.channel_sums)
        if image.objects is not None:
            self._add_objects(image.objects, image.path)

    def _add_objects(self, found: ObjectSummary, path: str) -> None:
        self.void += found.void
        self.pixels += found.void + int(found.areas.sum())
        single = ~found.is_crowd
        self.crowds += int(found.is_crowd.sum())
        self.objects_per_image.append(int(single.sum()))
        if not single.any():
            self.empty.append(path)
        counts = np.bincount(np.searchsorted((SMALL, MEDIUM), found.areas[single], "right"), minlength=3)
        self.areas = [total + int(count) for total, count in zip(self.areas, counts, strict=True)]
        objects = np.bincount(found.labels[single], minlength=len(self.classes))
        pixels = np.bincount(found.labels, weights=found.areas, minlength=len(self.classes))
        for label in np.flatnonzero(pixels):
            total = self.classes[label]
            total.objects += int(objects[label])
            total.images += 1
            total.pixels += int(pixels[label])

    @property
    def objects(self) -> int:
        """Number of objects of all classes, without crowds."""
        return sum(self.objects_per_image)

    @property
    def void_share(self) -> float:
        """Fraction of pixels without an object; 0 if there are no pixels."""
        return self.void / max(self.pixels, 1)

    @property
    def pixel_statistics(self) -> PixelStatistics | None:
        """Mean and standard deviation of each channel, in the images' units; None without an image."""
        return None if self.channel_sums is None else summarize_sums(self.channel_sums, self.read)

    def to_json(self, categories: Sequence[Category]) -> dict:
        """Return the statistics, with classes by name, as values that `json.dumps` accepts."""
        measured = self.pixel_statistics
        objects_per_image = np.array(self.objects_per_image or [0])
        return {
            "images": self.images,
            "read": self.read,
            "sizes": {f"{height}x{width}": count for (height, width), count in self.sizes.most_common()},
            "objects": self.objects,
            "crowds": self.crowds,
            "objects_per_image": {
                "mean": round(float(objects_per_image.mean()), 2),
                "max": int(objects_per_image.max()),
            },
            "areas": dict(zip(("small", "medium", "large"), self.areas, strict=True)),
            "empty": self.empty,
            "void_share": round(self.void_share, 6),
            "pixel_mean": measured and measured.mean,
            "pixel_std": measured and measured.std,
            "classes": {
                category.name: {"id": category.id, "is_thing": category.is_thing, **vars(count)}
                for category, count in zip(categories, self.classes, strict=True)
            },
        }
