"""Annotated images as the model gets them: categories, targets and batches.

Dimension key, used in every shape comment of the project:
    B batch, Q queries, K classes (never counting "no object"), N objects of one image, C channels, L levels,
    P points, D layers of an id map, H W input pixels, h w cells at stride 4, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.structures.category import Category as Category
from maskwright.structures.category import Task as Task
from maskwright.structures.id_maps import look_up


@dataclass(slots=True)
class Target:
    """The annotated objects of one image, at the image's current size.

    Objects are stored in an id map, which is cropped and resized like an image; boolean masks are derived from it on
    demand. Objects that overlap, as COCO instances may, are on different layers of the map, so that no pixel is lost.
    Pixels without an object are background in an instance dataset, and void (ignored) in a semantic or panoptic one.

    Attributes:
        id_maps: (D, H, W) uint8 for at most 255 objects, else int32; always int32 in a batch. 0 is no object, n is the
            object with index n-1. D >= 1, usually 1.
        labels: (N,) int64, 0..K-1.
        is_crowd: (N,) bool; crowd regions are never training targets.
        image_id: as in the annotation file.
        original_size: (height, width) of the image file in pixels, after EXIF rotation.
        areas: (N,) float64, annotated areas in pixels of the original image; None if the format has none.
        boxes: (N, 4) float64, the annotated x0, y0, x1, y1 in pixels of the original image, or None.
        void: (H, W) bool, unannotated pixels, in formats where a pixel without an object may also belong to a class
            that the task does not use; None elsewhere. Evaluation only.
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
            raise ValueError(f"expected id_maps of shape (D, H, W), found {tuple(self.id_maps.shape)}")
        if self.labels.shape != self.is_crowd.shape:
            raise ValueError(f"{len(self.labels)} labels but {len(self.is_crowd)} crowd flags")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def masks(self) -> Tensor:
        """(N, H, W) bool; computed at each access."""
        ids = torch.arange(1, len(self) + 1, dtype=self.id_maps.dtype, device=self.id_maps.device)
        if len(self.id_maps) == 1:
            return self.id_maps == ids[:, None, None]
        return (self.id_maps[None] == ids[:, None, None, None]).any(1)

    def label_map(self, ignore_index: int = 255) -> Tensor:
        """Return the label of each pixel, (H, W) int64, crowds included; `ignore_index` where there is no object."""
        ids = self.id_maps.amax(0).long()
        return F.pad(self.labels, (1, 0), value=ignore_index)[ids]

    @property
    def labeled_pixels(self) -> int:
        """Number of pixels with a label in `label_map`."""
        return int(torch.count_nonzero(self.id_maps.amax(0)))

    def select(self, keep: Tensor) -> Target:
        """Return the target with the objects where `keep` (N,) bool is True; pixels of the others get no object."""
        kept = keep.cpu().numpy()
        table = np.concatenate([[0], np.where(kept, kept.cumsum(), 0)])
        return replace(
            self,
            id_maps=_map_ids(table, self.id_maps),
            labels=self.labels[keep],
            is_crowd=self.is_crowd[keep],
            areas=None if self.areas is None else self.areas[kept],
            boxes=None if self.boxes is None else self.boxes[kept],
        )

    def merge_classes(self) -> Target:
        """Return one object per class that occurs, in ascending order: the target of semantic segmentation.

        Crowd regions become part of their class.
        """
        classes, inverse = self.labels.unique(sorted=True, return_inverse=True)
        table = np.concatenate([[0], inverse.cpu().numpy() + 1])
        return replace(
            self,
            id_maps=_map_ids(table, self.id_maps).amax(0, keepdim=True),
            labels=classes,
            is_crowd=torch.zeros_like(classes, dtype=torch.bool),
            areas=None,
            boxes=None,
        )

    def to(self, device: torch.device | str) -> Target:
        """Return a copy with all tensors on `device`."""
        return replace(
            self,
            id_maps=to_device(self.id_maps, device),
            labels=to_device(self.labels, device),
            is_crowd=to_device(self.is_crowd, device),
        )


def _map_ids(table: np.ndarray, ids: Tensor) -> Tensor:
    values = ids.cpu().numpy()
    return torch.from_numpy(look_up(table.astype(values.dtype), values)).to(ids.device)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on `device`; the copy to CUDA is asynchronous."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # CUDA copies asynchronously only from pinned memory
    return tensor.to(device, non_blocking=True)


@dataclass(slots=True)
class Batch:
    """A batch of training samples.

    Attributes:
        images: (B, C, H, W) uint8 or float32, padded right and bottom; H and W are multiples of 32.
        padding: (B, H, W) bool, True where there is no image.
        targets: one per image, with id maps padded to (H, W).
        keys: (epoch, index) of each sample, which together with the run's seed determine its augmentation.
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
        """Return a copy with all tensors on `device`."""
        return replace(
            self,
            images=to_device(self.images, device),
            padding=to_device(self.padding, device),
            targets=[target.to(device) for target in self.targets],
        )


def pad_images(
    images: Sequence[Tensor], divisor: int = 32, size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Stack images (C, H, W) of different sizes, padded right and bottom with zeros.

    Returns:
        (B, C, H, W) with H and W multiples of `divisor`, or as given by `size`, and (B, H, W) bool, True where there
        is no image.
    """
    largest = (max(sides) for sides in zip(*(image.shape[1:] for image in images), strict=True))
    height, width = size or (-(-side // divisor) * divisor for side in largest)
    padded = images[0].new_zeros(len(images), len(images[0]), height, width)
    padding = torch.ones(len(images), height, width, dtype=torch.bool)
    for index, image in enumerate(images):
        padded[index, :, : image.shape[1], : image.shape[2]] = image
        padding[index, : image.shape[1], : image.shape[2]] = False
    return padded, padding
