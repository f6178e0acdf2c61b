"""Ground truth painted over its image, in the look of `draw.overlay`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image

from maskwright.results.draw import overlay
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target, Task


def paint_target(
    target: Target, image: np.ndarray | PIL.Image.Image, categories: Sequence[Category], task: Task
) -> PIL.Image.Image:
    """The ground truth in the look of `overlay`; pixels without an object stay bare.

    Args:
        target: id maps of the image's size, on any device.
        image: as in `overlay`.
        categories: what the target's labels mean.
        task: "semantic" paints classes, "instance" the things, "panoptic" every segment.

    Raises:
        ValueError: the image's size is not the target's.
    """
    target, categories = target.to("cpu"), tuple(categories)
    height, width = target.id_maps.shape[-2:]
    if task == "semantic":
        # Bare pixels get a number that is nobody's label.
        bare = len(categories)
        label_map = target.label_map(ignore_index=bare).numpy()
        labels = np.unique(label_map[label_map != bare])
        truth = Segmentation(task, (height, width), categories, labels, label_map=label_map)
    elif task == "panoptic":
        segment_map = target.id_maps.amax(0).numpy()
        truth = Segmentation(task, (height, width), categories, target.labels.numpy(), segment_map=segment_map)
    else:
        is_thing = [categories[label].is_thing for label in target.labels.tolist()]
        target = target.select(target.is_crowd.new_tensor(is_thing))
        masks = target.masks.numpy()
        truth = Segmentation(task, (height, width), categories, target.labels.numpy(), instance_masks=masks)
    return overlay(truth, image)
