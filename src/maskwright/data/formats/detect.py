"""Detection of the format of a folder, an archive or an annotation file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from maskwright.config.recipe import data_root
from maskwright.config.schema import DataConfig
from maskwright.data.formats import (
    ade20k,
    camvid,
    cityscapes,
    coco_2017,
    coco_json,
    coco_stuff,
    detect_label_maps,
    huggingface,
    mapillary,
    mask_files,
    polygon_json,
    unread,
    voc,
    yolo,
)
from maskwright.data.formats.image_list import describe_files
from maskwright.data.formats.layouts import Detection
from maskwright.data.storage.archives import is_archive
from maskwright.data.storage.folders import open_folder
from maskwright.errors import DatasetError

# Published layouts before general ones, which they would match too.
_DETECTORS = (
    huggingface.detect,
    cityscapes.detect,
    ade20k.detect,
    coco_2017.detect,
    mapillary.detect,
    voc.detect,
    coco_stuff.detect,
    camvid.detect,
    yolo.detect,
    polygon_json.detect,
    coco_json.detect,
    unread.detect,
    detect_label_maps.detect,
    mask_files.detect,
)


def _detect_json(path: Path) -> Detection:
    detection = polygon_json.detect_file(path)
    return detection if any(detection) else coco_json.detect_file(path)


_FILE_DETECTORS = {
    ".json": _detect_json,
    ".yaml": yolo.detect_file,
    ".yml": yolo.detect_file,
    ".parquet": huggingface.detect_file,
}


def detect_format(path: str | Path) -> list[DataConfig]:
    """Return `data` sections of a recipe for the dataset at `path`.

    Args:
        path: a folder; an archive, or a folder of archives; a COCO JSON; data.yaml of a YOLO set; or a parquet file.

    Returns:
        One section per task that the dataset has its own annotations for, at least one. The one that uses most
        annotations is first. A task that needs no other files than one before it is omitted, e.g. instances where
        there are panoptic annotations of the same objects.

    Raises:
        DatasetError: there is nothing at `path`, or no format matches; the message has the reason for the formats
            that nearly match.
    """
    return list(detect_layout(path).configs)


def detect_layout(path: str | Path) -> Detection:
    """Return what `detect_format` returns, and what was guessed or is not used.

    Raises:
        DatasetError: see `detect_format`.
    """
    place = data_root(str(path))
    if not place.exists():
        raise DatasetError("no such file or folder", where=place, remedy="check the path")
    mismatches = []
    for detection in _detections(place):
        if detection.configs:
            return detection
        if detection.mismatch:
            mismatches.append(detection.mismatch)
    mismatches = list(dict.fromkeys(mismatches))
    if mismatches:
        found = f"the layout is not recognized: {' / '.join(mismatches[:3])}"
    else:
        found = (
            f"the layout is not recognized (found: {_describe(place)}); expected a COCO JSON, a published dataset, or "
            "folders like images and labels"
        )
    remedy = "correct the files, or describe the dataset in a recipe's data section"
    raise DatasetError(found, where=place, remedy=remedy)


def _detections(place: Path) -> Iterator[Detection]:
    if place.is_file() and place.suffix.lower() in _FILE_DETECTORS:
        yield _FILE_DETECTORS[place.suffix.lower()](place)
    elif place.is_dir() or is_archive(place):
        root = open_folder(place, str(place))
        yield from (detect(root) for detect in _DETECTORS)


def _describe(place: Path) -> str:
    if not place.is_dir() and not is_archive(place):
        return "a file that is neither a COCO JSON, a YOLO YAML, a parquet file, nor a .zip, .tar or .tar.gz"
    root = open_folder(place, str(place))
    found = ", ".join(filter(None, [*root.folders()[:8], describe_files(root.file_names())]))
    return f"{found or 'nothing'}{', all empty' if found and not root.names() else ''}"
