"""Files of annotation tools that are not read, so that a message can name the export that is."""

from __future__ import annotations

import json
import posixpath
import re

from maskwright.data.formats.layouts import Detection, folders_below
from maskwright.data.storage.folders import Folder
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError

_DEPTH = 1
_MAX_FILES = 50  # of a folder, to be opened
_FULL_ADE20K = re.compile(r"(.*/)?ADE_[^/]*_seg\.png")
_BRUSH_PNG = re.compile(r"task-\d+-annotation-.*\.png")
_LABEL_STUDIO = "is Label Studio's own format; export COCO with images, or YOLO"
# (whether a JSON is a list, keys of it or of its first entry, what it is)
_TOOLS = (
    (True, {"data", "annotations"}, _LABEL_STUDIO),
    (True, {"data", "completions"}, _LABEL_STUDIO),
    (True, {"data", "id"}, _LABEL_STUDIO),
    (True, {"image_id", "category_id"}, "is a COCO results file, a list without images; use the file of annotations"),
    (True, {"labelIdx", "points"}, "is EISeg's own format; export COCO"),
    (False, {"items", "categories"}, "is Datumaro's own format; export COCO"),
    (False, {"item", "annotations"}, "is V7 Darwin's own format; export COCO"),
    (False, {"instances", "metadata"}, "is SuperAnnotate's own format; export COCO"),
    (False, {"data_row"}, "is Labelbox's own format; convert it to COCO"),
    (False, {"project", "file", "view"}, "is a project of VIA 3; annotate with VIA 2, or export COCO"),
    (False, {"info", "objects"}, "is ISAT's own format; export COCO"),
    (False, {"type", "features"}, "is GeoJSON (as of QuPath); export label images or masks"),
)
_CSV_COLUMNS = (
    ("encodedpixels", "has run lengths in a table (as on Kaggle); write masks as PNG, or a COCO JSON"),
    ("region_shape_attributes", "is a table of VIA; export the annotations as JSON"),
)
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
            if reason := _reason(folder, name):
                return Detection(mismatch=f"{name} {reason}")
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


def _reason(folder: Folder, name: str) -> str:
    """Return what a file is, and which export is read instead, as the end of a sentence; "" if it is not known."""
    suffix = posixpath.splitext(name)[1].lower()
    if _BRUSH_PNG.match(name):
        return "is a mask of Label Studio without its image; export COCO with images, or YOLO"
    if suffix not in (".csv", ".geojson", ".json", ".ndjson"):
        return ""
    try:
        text = read_text(folder.file(name, ""))
        first_line = text.partition("\n")[0]
        if suffix == ".csv":
            return next((reason for word, reason in _CSV_COLUMNS if word in first_line.lower()), "")
        document = json.loads(first_line if suffix == ".ndjson" else text)
    except (ValueError, RecursionError, DatasetError):
        return ""
    is_list = isinstance(document, list)
    entry = document[0] if isinstance(document, list) and document else document
    if not isinstance(entry, dict):
        return ""
    return next((reason for of_list, keys, reason in _TOOLS if of_list == is_list and keys <= entry.keys()), "")
