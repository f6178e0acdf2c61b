"""CamVid as distributed with SegNet: folders train and trainannot, val and valannot, test and testannot."""

from __future__ import annotations

from maskwright.data.formats.base import AnnotatedImages, Split
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

_SUBSETS = {name: (name,) for name in ("train", "val", "test")}


def open_camvid(split: Split) -> AnnotatedImages:
    """Open a split of label images."""
    name = single_subset(split, _SUBSETS)
    files = {"images": name, "annotations": f"{name}annot"}
    return open_label_maps(with_defaults(split, files, format="label_maps", categories="camvid"))


def detect(root: Folder) -> Detection:
    """Detect folders like train and trainannot, without a list of other classes, as CVAT's export "CamVid" has."""
    if search_file(root, "label_colors.txt"):
        return Detection()
    present = {name: search_folder(root, name) and search_folder(root, f"{name}annot") for name in _SUBSETS}
    return Detection(detected_tasks(root, "camvid", semantic=present))
