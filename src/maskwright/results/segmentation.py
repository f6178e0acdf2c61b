"""The result for one image, as used by callers, overlays, files and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskwright.structures.category import Category, Task

if TYPE_CHECKING:
    import PIL.Image
    import supervision

_BAND_PIXELS = 2**22  # pixels of a map processed at once: counting and looking up need 8 bytes for each


@dataclass
class Segmentation:
    """The result for one image. All arrays are numpy.

    Attributes:
        task: "semantic", "instance" or "panoptic".
        size: (height, width) of the image in pixels.
        categories: the classes; `categories[label]`.
        labels: (N,) int64; the class of each segment. Semantic: the classes present, ascending.
        scores: (N,) float32 in 0..1; None for semantic.
        label_map: (H, W) integers 0..K-1; semantic only. int64; for tiled images, the smallest type that holds K.
        segment_map: (H, W) int32; 0 is no segment, n is segment n-1; panoptic only.
        instance_masks: (N, H, W) bool; instance only.
        instance_runs: instead of `instance_masks`, the runs of each mask (see `results.rle`). Used for tiled images,
            whose masks might not fit into memory together; `masks` decodes them.
        image: (H, W, 3) uint8 RGB, or (H, W, C) as stored in the file; the segmented image, if known.
        source: the file it was read from, if any.
        confidence: (H, W) float32 in 0..1, if it was asked for. Semantic: the probability of the pixel's class.
            Instance and panoptic: class probability times mask probability of the segment at the pixel, of overlapping
            instances the one with the highest score; 0 where there is none. Where tiles overlap, instances have the
            highest value of all tiles.
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
    confidence: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.task == "instance" and self.instance_runs is not None:
            return
        name = {"semantic": "label_map", "panoptic": "segment_map", "instance": "instance_masks"}[self.task]
        array = getattr(self, name)
        if array is None or array.shape[-2:] != tuple(self.size):
            found = "nothing" if array is None else f"shape {array.shape}"
            raise ValueError(f"a {self.task} result of size {self.size} needs {name} of that size, found {found}")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def masks(self) -> np.ndarray:
        """(N, H, W) bool, one mask per segment, for any task."""
        if self.instance_masks is not None:
            return self.instance_masks
        if self.instance_runs is not None:
            from maskwright.results.rle import decode_runs

            masks = np.zeros((len(self), *self.size), dtype=bool)
            for mask, runs in zip(masks, self.instance_runs, strict=True):
                mask[:] = decode_runs(runs, (0, 0, *self.size), self.size[0])
            return masks
        if self.segment_map is not None:
            return self.segment_map == np.arange(1, len(self) + 1, dtype=np.int32)[:, None, None]
        assert self.label_map is not None  # checked by __post_init__
        return self.label_map == self.labels[:, None, None]

    @cached_property
    def areas(self) -> np.ndarray:
        """(N,) int64, number of pixels of each segment."""
        if self.segment_map is not None:
            return _count(self.segment_map, len(self) + 1)[1:]
        if self.label_map is not None:
            return _count(self.label_map, len(self.categories))[self.labels]
        if self.instance_runs is not None:
            pixels = [(runs[:, 1] - runs[:, 0]).sum(dtype=np.int64) for runs in self.instance_runs]
            return np.array(pixels, dtype=np.int64)
        return np.count_nonzero(self.masks, axis=(1, 2))

    @cached_property
    def mean_confidence(self) -> np.ndarray | None:
        """(N,) float64, the mean of `confidence` over the pixels of each segment, NaN for none; None without a map."""
        if self.confidence is None:
            return None
        if self.task == "instance":
            totals = np.array([self._total_confidence(i) for i in range(len(self))], dtype=np.float64)
        else:
            totals = np.zeros(len(self) + 1)
            ids = self.id_map()
            for rows in _bands(ids):
                totals += np.bincount(ids[rows].ravel(), self.confidence[rows].ravel(), len(self) + 1)
            totals = totals[1:]
        with np.errstate(invalid="ignore"):
            return totals / self.areas

    def _total_confidence(self, instance: int) -> float:
        assert self.confidence is not None
        if self.instance_runs is None:
            return self.confidence[self.masks[instance]].sum(dtype=np.float64)
        from maskwright.results.rle import decode_runs, runs_box

        runs = self.instance_runs[instance]  # all masks together might not fit into memory
        top, left, bottom, right = box = runs_box(runs, self.size[0])
        mask = decode_runs(runs, box, self.size[0])
        return self.confidence[top:bottom, left:right][mask].sum(dtype=np.float64)

    @cached_property
    def runs(self) -> list[np.ndarray]:
        """The runs (n, 2) of each mask, see `results.rle`; those of an image in tiles are split at every column."""
        from maskwright.results.rle import id_map_runs, mask_runs

        if self.instance_runs is not None:
            return self.instance_runs
        if self.instance_masks is not None:
            return mask_runs(self.instance_masks)
        return id_map_runs(self.id_map(), len(self))

    @cached_property
    def boxes(self) -> np.ndarray:
        """(N, 4) float32 x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros for an empty mask."""
        from maskwright.results.rle import runs_box

        corners = [runs_box(runs, self.size[0]) for runs in self.runs]
        return np.array(corners, dtype=np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]

    @property
    def names(self) -> list[str]:
        """The class name of each segment."""
        return [self.categories[label].name for label in self.labels]

    def id_map(self) -> np.ndarray:
        """(H, W) int32 of a semantic or panoptic result: 0 is no segment, n is segment n-1."""
        if self.segment_map is not None:
            return self.segment_map
        table = np.zeros(len(self.categories) + 1, dtype=np.int32)
        table[self.labels] = np.arange(1, len(self) + 1)
        return self.map_labels(table)

    def map_labels(self, table: np.ndarray) -> np.ndarray:
        """(H, W) `table[label_map]` of a semantic result; the last entry of the table is for pixels without a class."""
        assert self.label_map is not None
        mapped = np.empty(self.size, dtype=table.dtype)
        for rows in _bands(self.label_map):
            labels = np.minimum(self.label_map[rows].astype(np.uint64), len(table) - 1)
            np.take(table, labels.astype(np.int64), out=mapped[rows])
        return mapped

    def overlay(self, image: np.ndarray | None = None) -> PIL.Image.Image:
        """Draw the segments over the image; see `results.draw.overlay`."""
        from maskwright.results.draw import overlay

        return overlay(self, image)

    def to_json(self) -> dict:
        """Return plain values with RLE masks for `json.dumps`; see `results.coco.to_json`."""
        from maskwright.results.coco import to_json

        return to_json(self)

    def to_supervision(self) -> supervision.Detections:
        """Return the segments for the supervision library; see `results.to_supervision.to_supervision`."""
        from maskwright.results.to_supervision import to_supervision

        return to_supervision(self)

    def save(self, directory: str | Path, name: str | None = None) -> list[Path]:
        """Write overlay, label or id PNG, and JSON; return the files. See `results.save.save`."""
        from maskwright.results.save import save

        return save(self, Path(directory), name)


def _bands(map_: np.ndarray) -> Iterator[slice]:
    height = max(1, _BAND_PIXELS // max(1, map_.shape[1]))
    for start in range(0, len(map_), height):
        yield slice(start, start + height)


def _count(map_: np.ndarray, count: int) -> np.ndarray:
    """Count the pixels of each value 0..count-1; larger values, such as those of unlabeled pixels, are not counted."""
    total = np.zeros(count, dtype=np.int64)
    for rows in _bands(map_):
        total += np.bincount(map_[rows].ravel(), minlength=count)[:count]
    return total
