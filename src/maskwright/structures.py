"""The data that flows: from annotations through the model to results.

Dimension key, used in every shape comment of the project:
    B batch, Q queries, K classes (never counting "no object"), N objects of one image, C channels, L levels,
    P points, D depth of an id map, H W input pixels, h w cells at stride 4, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import PIL.Image

Task = Literal["semantic", "instance", "panoptic"]


@dataclass(frozen=True, slots=True)
class Category:
    """One class of a data set. Its position in the list of categories is its label 0..K-1.

    Attributes:
        id: the number that the annotation files use; need not be contiguous.
        name: for people.
        is_thing: True for countable objects, False for stuff (regions without instances).
        color: RGB, 0..255, for drawing.
        group: the larger class that it belongs to ("vehicle" of a car), where the data set has such.
    """

    id: int
    name: str
    is_thing: bool
    color: tuple[int, int, int]
    group: str | None = None


def id_type(count: int) -> type[np.uint8] | type[np.int32]:
    """What an id map of that many objects is made of."""
    return np.uint8 if count < 256 else np.int32


def look_up(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """`table[ids]` for a map of uint8 or int32 numbers, in the map's type; bytes take a faster way."""
    if ids.dtype != np.uint8:
        return table.astype(ids.dtype).take(ids)
    bytes_of = np.zeros(256, dtype=np.uint8)
    bytes_of[: len(table)] = table[:256]
    found = bytearray(np.ascontiguousarray(ids)).translate(bytes_of.tobytes())
    return np.frombuffer(found, dtype=np.uint8).reshape(ids.shape)


@dataclass(slots=True)
class Target:
    """The annotated objects of one image, at the image's current size.

    Objects live in an id map, which is cropped and resized as one picture; boolean masks are made from it only when
    they are needed. Objects that overlap (COCO instances may) lie on different layers of the map, so no pixel is lost.
    Pixels without an object are background in an instance data set, and void (ignored) in a semantic or panoptic one.

    Attributes:
        id_maps: (D, H, W) int32, or uint8 where there are at most 255 objects, as readers and transforms have them; in
            a batch int32. 0 is no object, n is object number n-1. D >= 1, mostly 1.
        labels: (N,) int64, 0..K-1.
        is_crowd: (N,) bool; crowd regions are never training targets.
        image_id: as the annotation file names the image.
        original_size: (height, width) of the image file in pixels, after EXIF rotation.
        areas: (N,) float64, the annotated area in pixels of the original image, where the format states one.
        boxes: (N, 4) float64, annotated x0, y0, x1, y1 in pixels of the original image, where the format states them.
        void: (H, W) bool, what annotators left out, where pixels without an object may also be of classes that the task
            leaves out; None where there is nothing to tell apart. Evaluation only.
    """

    id_maps: Tensor
    labels: Tensor
    is_crowd: Tensor
    image_id: int | str
    original_size: tuple[int, int]
    areas: np.ndarray | None = None
    boxes: np.ndarray | None = None
    void: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.id_maps.ndim != 3:
            raise ValueError(f"id_maps must be (D, H, W), found shape {tuple(self.id_maps.shape)}")
        if self.labels.shape != self.is_crowd.shape:
            raise ValueError(f"{len(self.labels)} labels but {len(self.is_crowd)} crowd flags")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def masks(self) -> Tensor:
        """(N, H, W) bool, made anew at each call."""
        numbers = torch.arange(1, len(self) + 1, dtype=self.id_maps.dtype, device=self.id_maps.device)
        if len(self.id_maps) == 1:
            return self.id_maps == numbers[:, None, None]
        return (self.id_maps[None] == numbers[:, None, None, None]).any(1)

    def label_map(self, ignore_index: int = 255) -> Tensor:
        """(H, W) int64: the class of each pixel, crowd regions included; `ignore_index` where there is no object."""
        ids = self.id_maps.amax(0).long()
        return F.pad(self.labels, (1, 0), value=ignore_index)[ids]

    @property
    def labelled_pixels(self) -> int:
        """How many pixels `label_map` gives a class."""
        return int(torch.count_nonzero(self.id_maps.amax(0)))

    def select(self, keep: Tensor) -> Target:
        """The objects where `keep` (N,) bool is true, renumbered; the others become pixels without an object."""
        chosen = keep.cpu().numpy()
        table = np.concatenate([[0], np.where(chosen, chosen.cumsum(), 0)])
        return replace(
            self,
            id_maps=_mapped(table, self.id_maps),
            labels=self.labels[keep],
            is_crowd=self.is_crowd[keep],
            areas=None if self.areas is None else self.areas[chosen],
            boxes=None if self.boxes is None else self.boxes[chosen],
        )

    def merge_classes(self) -> Target:
        """One object per class that occurs, as semantic segmentation trains on; crowds count as their class's pixels.

        Classes come in ascending order, as in the original's semantic mapper.
        """
        classes, inverse = self.labels.unique(sorted=True, return_inverse=True)
        table = np.concatenate([[0], inverse.cpu().numpy() + 1])
        return replace(
            self,
            id_maps=_mapped(table, self.id_maps).amax(0, keepdim=True),
            labels=classes,
            is_crowd=torch.zeros_like(classes, dtype=torch.bool),
            areas=None,
            boxes=None,
        )

    def to(self, device: torch.device | str) -> Target:
        """The same target with its tensors on `device`."""
        return replace(
            self,
            id_maps=send(self.id_maps, device),
            labels=send(self.labels, device),
            is_crowd=send(self.is_crowd, device),
        )


def _mapped(table: np.ndarray, ids: Tensor) -> Tensor:
    return torch.from_numpy(look_up(table, ids.cpu().numpy())).to(ids.device)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`, without waiting for it: CUDA copies beside its other work only from pinned memory."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(slots=True)
class Batch:
    """What the loader hands to training.

    Attributes:
        images: (B, C, H, W) uint8 or float32, padded right and bottom; H and W are multiples of 32.
        padding: (B, H, W) bool, True where there is no image.
        targets: one per image, their id maps padded to (H, W).
        keys: (epoch, index) of each sample; with the run's seed they determine everything random about it.
        paths: the image files.
    """

    images: Tensor
    padding: Tensor
    targets: list[Target]
    keys: list[tuple[int, int]]
    paths: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            images=send(self.images, device),
            padding=send(self.padding, device),
            targets=[target.to(device) for target in self.targets],
        )


def pad_images(images: Sequence[Tensor], divisor: int = 32) -> tuple[Tensor, Tensor]:
    """Images (C, H, W) of any sizes in one tensor, padded right and bottom with zeros.

    Returns:
        (B, C, H, W) with H and W multiples of `divisor`, and (B, H, W) bool, True where there is no image.
    """
    height, width = (-(-max(sides) // divisor) * divisor for sides in zip(*(i.shape[1:] for i in images), strict=True))
    padded = images[0].new_zeros(len(images), len(images[0]), height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for index, image in enumerate(images):
        padded[index, :, : image.shape[1], : image.shape[2]] = image
        padding[index, : image.shape[1], : image.shape[2]] = False
    return padded, padding


@dataclass(slots=True)
class MaskPrediction:
    """One decoder layer's prediction. Masks are products; ask for the ones that are needed.

    Attributes:
        class_logits: (B, Q, K+1); the last class is "no object".
        mask_embeddings: (B, Q, C).
        mask_features: (B, C, h, w), shared by all layers of one forward pass.
    """

    class_logits: Tensor
    mask_embeddings: Tensor
    mask_features: Tensor

    def mask_logits(self) -> Tensor:
        """(B, Q, h, w): the masks of all queries at stride 4."""
        return torch.einsum("bqc,bchw->bqhw", self.mask_embeddings, self.mask_features)

    def image(self, index: int) -> MaskPrediction:
        """The prediction for one image of the batch, with B = 1."""
        part = slice(index, index + 1)
        return MaskPrediction(self.class_logits[part], self.mask_embeddings[part], self.mask_features[part])


@dataclass(slots=True)
class PixelPrediction:
    """What a per-pixel decoder predicts: no masks, a class for every pixel.

    Attributes:
        class_logits: (B, K, h, w), before the softmax over K.
    """

    class_logits: Tensor

    def image(self, index: int) -> PixelPrediction:
        """The prediction for one image of the batch, with B = 1."""
        return PixelPrediction(self.class_logits[index : index + 1])


@dataclass(slots=True)
class ModelOutput:
    """All that a forward pass gives.

    Attributes:
        final: the last decoder layer's prediction, or that of a per-pixel decoder.
        intermediate: the predictions before it, from the learned queries on; empty where they were not asked for, and
            for a per-pixel decoder.
        semantic_maps: class logits of each semantic layer, (B, K, H/stride, W/stride), fine to coarse; empty for a
            model without such layers.
        semantic_logits: those maps as one, (B, K, h, w) at stride 4 or (B, K, H, W), as the model's decoder has it;
            None where `semantic_maps` is empty or intermediate predictions were not asked for.
    """

    final: MaskPrediction | PixelPrediction
    intermediate: list[MaskPrediction] = field(default_factory=list)
    semantic_maps: tuple[Tensor, ...] = ()
    semantic_logits: Tensor | None = None


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
            from maskwright.runs import paint_runs

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
            from maskwright.runs import bounds

            found = [bounds(runs, self.size[0]) for runs in self.instance_runs]
            return np.array(found, dtype=np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]
        from maskwright.rle import boxes, encode_segmentation

        corners = boxes(encode_segmentation(self)).astype(np.float32)
        corners[:, 2:] += corners[:, :2]
        return corners

    @property
    def names(self) -> list[str]:
        """The class name of each segment."""
        return [self.categories[label].name for label in self.labels]

    def overlay(self, image: np.ndarray | None = None) -> PIL.Image.Image:
        """The segments painted over the image; see `draw.overlay`."""
        from maskwright.draw import overlay

        return overlay(self, image)

    def to_json(self) -> dict:
        """A description with RLE masks that `json.dumps` takes; see `results.to_json`."""
        from maskwright.results import to_json

        return to_json(self)

    def save(self, directory: str | Path, name: str | None = None) -> list[Path]:
        """Write overlay, label or id PNG and json; returns the files. See `results.save`."""
        from maskwright.results import save

        return save(self, Path(directory), name)


def _count(numbers: np.ndarray, count: int) -> np.ndarray:
    """How often each of 0..count-1 occurs in a map; a few rows at a time, as `bincount` makes 8 bytes of each pixel."""
    rows = max(1, 2**22 // max(1, numbers.shape[1]))
    return sum(
        (np.bincount(numbers[start : start + rows].ravel(), minlength=count) for start in range(0, len(numbers), rows)),
        np.zeros(count, dtype=np.int64),
    )
