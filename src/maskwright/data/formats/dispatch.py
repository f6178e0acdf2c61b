"""Annotation formats: whatever lies on disk becomes `Target`s with labels 0..K-1, and nowhere else.

One reader per format, each in its file; all give the same things, and `AnnotatedImages` puts the recipe's task on top:
semantic data sets train on one object per class, instance data sets on things only, panoptic ones on everything.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from maskwright.config.recipe import data_root
from maskwright.config.schema import GENERAL_FORMATS, DataConfig, SplitConfig
from maskwright.data.formats import published
from maskwright.data.formats.ade20k import open_ade20k
from maskwright.data.formats.base import AnnotatedImages, Format, Split, for_task
from maskwright.data.formats.cityscapes import open_cityscapes
from maskwright.data.formats.classes import classes_of
from maskwright.data.formats.coco import read_json
from maskwright.data.formats.coco_instance import CocoInstance
from maskwright.data.formats.coco_panoptic import CocoPanoptic
from maskwright.data.formats.coco_stuff import open_coco_stuff_10k
from maskwright.data.formats.huggingface import open_huggingface
from maskwright.data.formats.image_list import pair, read_list
from maskwright.data.formats.label_maps import LabelMaps
from maskwright.data.formats.voc import open_voc
from maskwright.data.formats.yolo import open_yolo
from maskwright.data.problems import ProblemHandler, RaiseFirst
from maskwright.data.storage.folders import Folder, Index, open_folder
from maskwright.errors import RecipeError

__all__ = ["AnnotatedImages", "Format", "for_task", "open_annotations"]

logger = logging.getLogger(__name__)


def open_annotations(
    config: DataConfig, split: str, problems: ProblemHandler | None = None, channels: int | None = None
) -> AnnotatedImages:
    """The images of one split ("train", "val" or "test").

    Args:
        config: the recipe's `data` section.
        split: which.
        problems: hears what is wrong with the annotations, now and when they are read; None raises the first error.
        channels: the recipe's `model.channels`: of the pictures, taken as they are stored; None reads all as RGB.

    Raises:
        DatasetError: a file or folder is missing (the message names the recipe's key), or the annotations are broken.
        RecipeError: the recipe has no such split, or its keys contradict each other or the data.
    """
    files: SplitConfig | None = getattr(config, split, None)
    if files is None and split == "test" and config.format not in GENERAL_FORMATS:
        files = SplitConfig()
    if files is None:
        raise RecipeError(f"the recipe has no data.{split}; add it, with images and annotations")
    opened = Split(config, split, files, _root(config), problems or RaiseFirst(), channels)
    annotated = replace(_open(opened), channels=channels)
    if split == "train" and config.filter_empty:
        _skip_empty(annotated, opened.key)
    return annotated


def _root(config: DataConfig) -> Folder:
    path = data_root(config.root)
    if config.format == "huggingface":  # may be on the Hub
        return Folder(path, Index(path))
    if config.format == "yolo" and path.suffix in (".yaml", ".yml") and path.is_file():
        return open_folder(path.parent)
    return open_folder(path)


def _open(split: Split) -> AnnotatedImages:
    match split.config.format:
        case "label_maps":
            return _open_label_maps(split)
        case "coco_instance" | "coco_panoptic":
            return _open_coco(split)
        case "ade20k":
            prepared = published.prepared_ade20k(split)
            return open_ade20k(split) if prepared is None else _open_coco(prepared)
        case "camvid":
            return _open_label_maps(published.camvid(split))
        case "cityscapes":
            return open_cityscapes(split)
        case "coco":
            return _open_coco(published.coco(split))
        case "coco_stuff_10k":
            return open_coco_stuff_10k(split)
        case "mapillary":
            described = published.mapillary(split)
            return _open_label_maps(described) if described.config.format == "label_maps" else _open_coco(described)
        case "voc":
            return open_voc(split)
        case "yolo":
            return open_yolo(split)
        case "huggingface":
            return open_huggingface(split)


def _skip_empty(annotated: AnnotatedImages, key: str) -> None:
    count, source = len(annotated), annotated.source
    kept = [index for index in range(count) if source.has_object(index)]
    source.images.keep(kept)
    dropped = count - len(kept)
    logger.info("%s: %d of %d images have no object to train on and are left out", key, dropped, count)


def _open_label_maps(split: Split) -> AnnotatedImages:
    config, files, key = split.config, split.files, split.key
    classes = classes_of(split)
    if files.list is not None:
        rows = read_list(split.root, split.root.file(files.list, f"{key}.list"), f"{key}.list", split.problems)
    else:
        if files.annotations is None:
            raise RecipeError(
                f"{key}.annotations is missing; name the folder of the label pictures, or give {key}.list"
            )
        images = split.root.folder(_named(files.images, f"{key}.images"), f"{key}.images")
        labels = split.root.folder(files.annotations, f"{key}.annotations")
        rows = pair(images, labels, key, split.problems, config.image_suffix, config.label_suffix)
    return AnnotatedImages(classes.kept, config.task, LabelMaps(rows, classes.meanings, split.problems))


def _open_coco(split: Split) -> AnnotatedImages:
    config, files, key = split.config, split.files, split.key
    json = split.root.file(_named(files.annotations, f"{key}.annotations"), f"{key}.annotations")
    document = read_json(json, f"{key}.annotations")
    classes = classes_of(split, None, document.get("categories"), str(json))
    images = split.root.folder(_named(files.images, f"{key}.images"), f"{key}.images")
    if config.format == "coco_instance":
        source = CocoInstance(document, json, images, key, classes.json_labels, split.problems)
    else:
        masks = split.root.folder(files.masks or _without_suffix(files.annotations), f"{key}.masks")
        labels, suffix = classes.json_labels, config.image_suffix
        source = CocoPanoptic(document, json, images, masks, key, labels, classes.stuff, suffix, split.problems)
    return AnnotatedImages(classes.kept, config.task, source)


def _named(value: str | None, key: str) -> str:
    if value is None:
        raise RecipeError(f"{key} is missing; name it")
    return value


def _without_suffix(json: str | None) -> str:
    return _named(json, "annotations").removesuffix(".json")
