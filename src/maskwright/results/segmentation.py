"""The result for one image: the same object for overlays, files, HTTP and metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskwright.structures.annotations import Category, Task

if TYPE_CHECKING:
    import PIL.Image


@dataclass
class Segmentation:
    """The result for one image: the same object for pictures, files, HTTP and metrics. All arrays are numpy.

    Attributes:
        task: "semantic", "instance" or "panoptic".
        size: (height, width) of the image.
        categories: what labels mean; `categories[label]`.
        labels: (N,) int64; the class of each segment. Semantic: the classes that occur, ascending.
        scores: (N,) float32 in 0..1; None for semantic.
        label_map: (H, W) integers 0..K-1; semantic only. int64; of an image in tiles the smallest that hold K.
        segment_map: (H, W) int32; 0 is no segment, n is segment number n-1; panoptic only.
        instance_masks: (N, H, W) bool; instance only.
        instance_runs: in its place the runs (see `runs`) of each of the N masks; of an image in tiles, whose masks
            might not fit into memory side by side. `masks` makes arrays of them.
        image: (H, W, 3) uint8 RGB, or (H, W, C) as it is stored; what was segmented, where it is known.
        source: the file it came from, where there is one.
    """

    task: Task
    size: tuple[int, int]
    categories: tuple[Category, ...]
    labels: np.ndarray
    scores: np.ndarray | None = None
    label_map: np.ndarray | None = None
    segment_map: np.ndarray | None = None
    instance_masks: np.ndarray | None = None
    instance_runs: list[np.ndarray] | None = None
    image: np.ndarray | None = field(default=None, repr=False)
    source: str | None = None

    def __post_init__(self) -> None:
        wanted = {"semantic": "label_map", "panoptic": "segment_map", "instance": "instance_masks"}[self.task]
        if self.task == "instance" and self.instance_runs is not None:
            return
        array = getattr(self, wanted)
        if array is None or array.shape[-2:] != tuple(self.size):
            found = "nothing" if array is None else f"shape {array.shape}"
            raise ValueError(f"a {self.task} result of size {self.size} needs {wanted} of that size, found {found}")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def masks(self) -> np.ndarray:
        """(N, H, W) bool, one mask per segment, whatever the task."""
        if self.instance_masks is not None:
            return self.instance_masks
        if self.instance_runs is not None:
            from maskwright.results.mask_runs import paint_runs

            masks = np.zeros((len(self), *self.size), dtype=bool)
            for mask, runs in zip(masks, self.instance_runs, strict=True):
                mask[:] = paint_runs(runs, (0, 0, *self.size), self.size[0])
            return masks
        if self.segment_map is not None:
            return self.segment_map == np.arange(1, len(self) + 1, dtype=np.int32)[:, None, None]
        assert self.label_map is not None  # __post_init__ has seen to it
        return self.label_map == self.labels[:, None, None]

    @cached_property
    def areas(self) -> np.ndarray:
        """(N,) int64, pixels of each segment."""
        if self.segment_map is not None:
            return _count(self.segment_map, len(self) + 1)[1:]
        if self.label_map is not None:
            return _count(self.label_map, len(self.categories))[self.labels]
        if self.instance_runs is not None:
            return np.array(
                [(runs[:, 1] - runs[:, 0]).sum(dtype=np.int64) for runs in self.instance_runs], dtype=np.int64
            )
        return np.count_nonzero(self.masks, axis=(1, 2))

    @cached_property
    def boxes(self) -> np.ndarray:
        """(N, 4) float32 x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros for an empty mask."""
        if self.instance_runs is not None:
            from maskwright.results.mask_runs import bounds

            found = [bounds(runs, self.size[0]) for runs in self.instance_runs]
            return np.array(found, dtype=np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]
        from maskwright.results.rle import boxes, encode_segmentation

        corners = boxes(encode_segmentation(self)).astype(np.float32)
        corners[:, 2:] += corners[:, :2]
        return corners

    @property
    def names(self) -> list[str]:
        """The class name of each segment."""
        return [self.categories[label].name for label in self.labels]

    def overlay(self, image: np.ndarray | None = None) -> PIL.Image.Image:
        """The segments painted over the image; see `draw.overlay`."""
        from maskwright.results.draw import overlay

        return overlay(self, image)

    def to_json(self) -> dict:
        """A description with RLE masks that `json.dumps` takes; see `results.to_json`."""
        from maskwright.results.save import to_json

        return to_json(self)

    def save(self, directory: str | Path, name: str | None = None) -> list[Path]:
        """Write overlay, label or id PNG and json; returns the files. See `results.save`."""
        from maskwright.results.save import save

        return save(self, Path(directory), name)


def _count(numbers: np.ndarray, count: int) -> np.ndarray:
    """How often each of 0..count-1 occurs in a map; a few rows at a time, as `bincount` makes 8 bytes of each pixel."""
    rows = max(1, 2**22 // max(1, numbers.shape[1]))
    return sum(
        (np.bincount(numbers[start : start + rows].ravel(), minlength=count) for start in range(0, len(numbers), rows)),
        np.zeros(count, dtype=np.int64),
    )
