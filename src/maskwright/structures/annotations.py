"""The data that flows: from annotations through the model to results.

Dimension key, used in every shape comment of the project:
    B batch, Q queries, K classes (never counting "no object"), N objects of one image, C channels, L levels,
    P points, D depth of an id map, H W input pixels, h w cells at stride 4, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    pass

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
