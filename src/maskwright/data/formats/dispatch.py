"""Choice of the reader for `data.format`.

Every reader returns `Target`s with labels 0..K-1, and `AnnotatedImages` selects the objects of the recipe's task:
semantic datasets train on one object per class, instance datasets on things only, panoptic ones on everything.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from maskwright.config.recipe import data_root
from maskwright.config.schema import GENERAL_FORMATS, DataConfig, SplitConfig
from maskwright.data.formats.ade20k import open_ade20k
from maskwright.data.formats.base import AnnotatedImages, AnnotationReader, Split
from maskwright.data.formats.camvid import open_camvid
from maskwright.data.formats.cityscapes import open_cityscapes
from maskwright.data.formats.coco_2017 import open_coco_2017
from maskwright.data.formats.coco_instance import CocoInstanceReader, open_coco_instance
from maskwright.data.formats.coco_panoptic import CocoPanopticReader, open_coco_panoptic
from maskwright.data.formats.coco_stuff import open_coco_stuff_10k
from maskwright.data.formats.huggingface import open_huggingface
from maskwright.data.formats.instance_maps import open_instance_maps
from maskwright.data.formats.label_maps import open_label_maps
from maskwright.data.formats.mapillary import open_mapillary
from maskwright.data.formats.mask_files import MaskFilesReader, open_mask_files
from maskwright.data.formats.polygon_json import open_polygon_json
from maskwright.data.formats.voc import open_voc
from maskwright.data.formats.yolo import open_yolo
from maskwright.data.problems import ProblemHandler, RaiseFirst
from maskwright.data.storage.folders import ArchiveIndex, Folder, open_folder
from maskwright.errors import RecipeError

logger = logging.getLogger(__name__)


def open_annotations(
    config: DataConfig, split: str, problems: ProblemHandler | None = None, channels: int | None = None
) -> AnnotatedImages:
    """Open the images of one split with their annotations.

    Args:
        config: the recipe's `data` section.
        split: "train", "val" or "test".
        problems: receives problems of the annotations, now and when they are read; None raises the first error.
        channels: the recipe's `model.channels`; None reads every image as RGB.

    Raises:
        DatasetError: a file or folder is missing (the message names the recipe key), or the annotations are damaged.
        RecipeError: the recipe has no such split, or its keys contradict each other or the data.
    """
    files: SplitConfig | None = getattr(config, split, None)
    if files is None and split == "test" and config.format not in GENERAL_FORMATS:
        files = SplitConfig()
    if files is None:
        raise RecipeError(f"the recipe has no data.{split}", remedy="add it, with images and annotations")
    opened = Split(config, split, files, _open_root(config), problems or RaiseFirst(), channels)
    annotated = replace(_open_split(opened), channels=channels)
    if split == "train" and config.filter_empty:
        _drop_empty_images(annotated.reader, opened.key)
    return annotated


def _open_root(config: DataConfig) -> Folder:
    path = data_root(config.root)
    if config.format == "huggingface":  # may be on the Hub
        return Folder(path, ArchiveIndex(path))
    if config.format == "yolo" and path.suffix in (".yaml", ".yml") and path.is_file():
        return open_folder(path.parent)
    return open_folder(path)


def _open_split(split: Split) -> AnnotatedImages:
    match split.config.format:
        case "label_maps":
            return open_label_maps(split)
        case "instance_maps":
            return open_instance_maps(split)
        case "mask_files":
            return open_mask_files(split)
        case "coco_instance":
            return open_coco_instance(split)
        case "coco_panoptic":
            return open_coco_panoptic(split)
        case "ade20k":
            return open_ade20k(split)
        case "camvid":
            return open_camvid(split)
        case "cityscapes":
            return open_cityscapes(split)
        case "coco":
            return open_coco_2017(split)
        case "coco_stuff_10k":
            return open_coco_stuff_10k(split)
        case "mapillary":
            return open_mapillary(split)
        case "voc":
            return open_voc(split)
        case "yolo":
            return open_yolo(split)
        case "huggingface":
            return open_huggingface(split)
        case "labelme" | "via" | "supervisely":
            return open_polygon_json(split)


def _drop_empty_images(reader: AnnotationReader, key: str) -> None:
    count = len(reader.images)
    kept = [index for index in range(count) if _has_object(reader, index)]
    reader.images.keep(kept)
    logger.info("%s: %d of %d images have no object to train on and are dropped", key, count - len(kept), count)


def _has_object(reader: AnnotationReader, index: int) -> bool:
    """Return whether an image has an object other than a crowd."""
    if isinstance(reader, CocoInstanceReader | CocoPanopticReader | MaskFilesReader):
        return reader.has_object(index)
    return not bool(reader.target(index).is_crowd.all())
