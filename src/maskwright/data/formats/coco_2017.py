"""COCO 2017 as downloaded: train2017, annotations/instances_train2017.json, and annotations/panoptic_train2017.*."""

from __future__ import annotations

from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.coco_instance import open_coco_instance
from maskwright.data.formats.coco_panoptic import open_coco_panoptic
from maskwright.data.formats.layouts import (
    Detection,
    detected_tasks,
    search_file,
    search_folder,
    single_subset,
    with_defaults,
)
from maskwright.data.storage.folders import Folder

_SUBSETS = {"train": ("train2017",), "val": ("val2017",), "test": ("test2017",)}


def open_coco_2017(split: Split) -> AnnotatedImages:
    """Open a split: instances from their own JSON, the other tasks from the panoptic one."""
    name = single_subset(split, _SUBSETS)
    if split.config.task == "instance":
        files = {"images": name, "annotations": f"annotations/instances_{name}.json"}
        return open_coco_instance(with_defaults(split, files, format="coco_instance"), "coco_instance")
    files = {"images": name, "annotations": f"annotations/panoptic_{name}.json", "masks": f"panoptic_{name}"}
    return open_coco_panoptic(with_defaults(split, files, format="coco_panoptic"), "coco_panoptic")


def detect(root: Folder) -> Detection:
    """Detect the annotations of each task beside their images."""
    panoptic, instance = {}, {}
    for split in ("train", "val"):
        name = f"{split}2017"
        if search_folder(root, name):
            instance[split] = search_file(root, f"annotations/instances_{name}.json")
            has_masks = search_folder(root, f"panoptic_{name}")
            panoptic[split] = has_masks and search_file(root, f"annotations/panoptic_{name}.json")
    return Detection(detected_tasks(root, "coco", panoptic=panoptic, instance=instance))
