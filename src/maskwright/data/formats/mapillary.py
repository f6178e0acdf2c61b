"""Mapillary Vistas 1.2 as downloaded: training/{images,labels,panoptic} and validation/{images,labels,panoptic}."""

from __future__ import annotations

from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.coco_panoptic import open_coco_panoptic
from maskwright.data.formats.label_maps import open_label_maps
from maskwright.data.formats.layouts import (
    Detection,
    detected_tasks,
    search_file,
    search_folder,
    single_subset,
    with_defaults,
)
from maskwright.data.storage.folders import Folder

_SUBSETS = {"train": ("training",), "val": ("validation",), "test": ("testing",)}
_NUM_CLASSES = 65


def open_mapillary(split: Split) -> AnnotatedImages:
    """Open a split: classes from label images, the other tasks from the panoptic JSON, which counts classes from 1."""
    name = single_subset(split, _SUBSETS)
    if split.config.task == "semantic":
        files = {"images": f"{name}/images", "annotations": f"{name}/labels"}
        return open_label_maps(with_defaults(split, files, format="label_maps", categories="mapillary_vistas"))
    masks = f"{name}/panoptic"
    files = {"images": f"{name}/images", "annotations": f"{masks}/panoptic_2018.json", "masks": masks}
    label_map = {number + 1: number for number in range(_NUM_CLASSES)} | {_NUM_CLASSES + 1: "ignore"}
    return open_coco_panoptic(
        with_defaults(
            split,
            files,
            format="coco_panoptic",
            categories="mapillary_vistas",
            label_map=label_map | split.config.label_map,
        )
    )


def detect(root: Folder) -> Detection:
    """Detect the folders of each task, if the panoptic JSON or the data set's config.json is there."""
    panoptic, semantic = {}, {}
    for split, (name,) in _SUBSETS.items():
        if split != "test" and search_folder(root, f"{name}/images"):
            panoptic[split] = search_folder(root, f"{name}/panoptic")
            semantic[split] = search_folder(root, f"{name}/labels")
    if _has_file(root, "panoptic_2018.json"):
        return Detection(detected_tasks(root, "mapillary", panoptic=panoptic, semantic=semantic))
    if _has_file(root, "config.json"):
        return Detection(detected_tasks(root, "mapillary", semantic=semantic))
    return Detection()


def _has_file(root: Folder, name: str) -> bool:
    return any(search_file(root, path) for path in (name, f"training/panoptic/{name}"))
