"""What the examined images of one split add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from maskwright.data.check.examine import Examination, Objects
from maskwright.data.pixel_statistics import PixelStatistics, pixel_statistics
from maskwright.structures.annotations import Category

SMALL, MEDIUM = 32**2, 96**2  # pixels; COCO's borders between small, medium and large objects


@dataclass
class ClassCount:
    """How often one class occurs in a split.

    Attributes:
        objects: of the class; in semantic data sets one per image at most.
        images: that have one.
        pixels: of all of them.
    """

    objects: int = 0
    images: int = 0
    pixels: int = 0


@dataclass
class SplitStatistics:
    """One split in numbers. Crowd regions count as pixels of their class, not as objects.

    Attributes:
        images: that the annotations list.
        read: how many of these were looked at.
        sizes: (height, width) -> how many pictures.
        classes: one per category.
        crowds: crowd regions.
        empty: paths of the images without any object.
        pixels: of all images whose annotations could be read.
        void: how many of these belong to no object: void, or the background of instances.
        objects_per_image: of every image with readable annotations.
        areas: how many objects are small (below 32x32 pixels), medium and large (from 96x96), as COCO divides them.
        channels: (3, C): pixels, sum, and sum of squares of each channel; None before the first picture.
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
    channels: np.ndarray | None = None

    def add(self, image: Examination) -> None:
        """Count one image."""
        self.read += 1
        if image.picture is not None:
            self.sizes[image.picture.size] += 1
            if self.channels is None or self.channels.shape == image.picture.channels.shape:
                self.channels = image.picture.channels + (0 if self.channels is None else self.channels)
        if image.objects is not None:
            self._add_objects(image.objects, image.path)

    def _add_objects(self, found: Objects, path: str) -> None:
        self.void += found.void
        self.pixels += found.void + int(found.areas.sum())
        single = ~found.is_crowd
        self.crowds += int(found.is_crowd.sum())
        self.objects_per_image.append(int(single.sum()))
        if not single.any():
            self.empty.append(path)
        sizes = np.bincount(np.searchsorted((SMALL, MEDIUM), found.areas[single], "right"), minlength=3)
        self.areas = [before + int(number) for before, number in zip(self.areas, sizes, strict=True)]
        numbers = np.bincount(found.labels[single], minlength=len(self.classes))
        pixels = np.bincount(found.labels, weights=found.areas, minlength=len(self.classes))
        for label in np.flatnonzero(pixels):
            count = self.classes[label]
            count.objects += int(numbers[label])
            count.images += 1
            count.pixels += int(pixels[label])

    @property
    def objects(self) -> int:
        """Of all classes, without crowds."""
        return sum(self.objects_per_image)

    @property
    def void_share(self) -> float:
        """Of all pixels, those without an object; 0 where there are no pixels."""
        return self.void / max(self.pixels, 1)

    @property
    def pixels_measured(self) -> PixelStatistics | None:
        """Of each channel, over all pixels, in the pictures' units; None without a picture."""
        return None if self.channels is None else pixel_statistics(self.channels, self.read)

    def to_json(self, categories: Sequence[Category]) -> dict:
        """Everything, with classes by name, as values that `json.dumps` takes."""
        measured = self.pixels_measured
        several = np.array(self.objects_per_image or [0])
        return {
            "images": self.images,
            "read": self.read,
            "sizes": {f"{height}x{width}": number for (height, width), number in self.sizes.most_common()},
            "objects": self.objects,
            "crowds": self.crowds,
            "objects_per_image": {"mean": round(float(several.mean()), 2), "max": int(several.max())},
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
