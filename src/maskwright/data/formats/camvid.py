"""CamVid as distributed with SegNet: folders train and trainannot, val and valannot, test and testannot."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

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

_PUBLISHED_NAME = re.compile(r"(0001TP|0006R0|0016E5|Seq05VD)_")
_SUBSETS = {name: (name,) for name in ("train", "val", "test")}


def open_camvid(split: Split) -> AnnotatedImages:
    """Open a split of label images."""
    name = single_subset(split, _SUBSETS)
    files = {"images": name, "annotations": f"{name}annot"}
    return open_label_maps(with_defaults(split, files, format="label_maps", categories="camvid"))


def detect(root: Folder) -> Detection:
    """Detect folders like train and trainannot with the published names of images, without a list of other classes."""
    if search_file(root, "label_colors.txt"):
        return Detection()
    present = {name: search_folder(root, name) and search_folder(root, f"{name}annot") for name in _SUBSETS}
    folders = [folder for name, has_labels in present.items() if has_labels and (folder := search_folder(root, name))]
    if not any(_PUBLISHED_NAME.match(PurePosixPath(name).name) for folder in folders for name in folder.names()):
        return Detection()
    return Detection(detected_tasks(root, "camvid", semantic=present))
