"""Files of annotation tools that are not read, so that a message can name the export that is."""

from __future__ import annotations

import json
import re

from maskwright.data.formats.layouts import Detection, folders_below
from maskwright.data.storage.folders import Folder
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError

_DEPTH = 1
_MAX_FILES = 50  # of a folder, to be opened
_FULL_ADE20K = re.compile(r"(.*/)?ADE_[^/]*_seg\.png")


_FULL_ADE20K_REASON = (
    "the full ADE20K dataset stores thousands of classes in the colors of *_seg.png; use the SceneParsing benchmark "
    "(ADEChallengeData2016)"
)


def detect(root: Folder) -> Detection:
    """Return the reason why nothing is read, if there is a file of a known tool."""
    for folder in folders_below(root, _DEPTH):
        names = [name.lower() for name in folder.file_names()]
        if "annotations.xml" in names:
            return Detection(mismatch="annotations.xml is CVAT's own format; export COCO 1.0 or Segmentation mask 1.1")
        if any(map(_is_xml, names)) and _has_slide_regions(folder):
            place = folder.path or "the folder"
            return Detection(
                mismatch=f"{place} has XML files of ImageScope (as MoNuSeg); draw the regions as one binary mask per "
                "object (masks/IMAGE/1.png)"
            )
        if names and folder.path.rpartition("/")[2].lower() == "annotations" and all(map(_is_xml, names)):
            return Detection(
                mismatch=f"{folder.path} has XML files of boxes (Pascal VOC); masks need SegmentationClass"
            )
        for name in folder.file_names()[:_MAX_FILES]:
            if name.lower().endswith(".json") and _is_label_studio(folder, name):
                return Detection(mismatch=f"{name} is Label Studio's own format; export COCO with images, or YOLO")
    if any(map(_FULL_ADE20K.fullmatch, root.names())):
        return Detection(mismatch=_FULL_ADE20K_REASON)
    return Detection()


def _is_xml(name: str) -> bool:
    return name.endswith(".xml")


def _has_slide_regions(folder: Folder) -> bool:
    """Return whether the first XML file has outlines as ImageScope writes them."""
    name = next(name for name in folder.file_names() if _is_xml(name.lower()))
    try:
        return "<Vertices>" in read_text(folder.file(name, ""))
    except DatasetError:
        return False


def _is_label_studio(folder: Folder, name: str) -> bool:
    try:
        document = json.loads(read_text(folder.file(name, "")))
    except (ValueError, RecursionError, DatasetError):
        return False
    first = document[0] if isinstance(document, list) and document else None
    return isinstance(first, dict) and "data" in first and bool({"annotations", "completions", "id"} & first.keys())
