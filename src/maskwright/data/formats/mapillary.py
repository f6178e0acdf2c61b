"""Mapillary Vistas as downloaded: {training,validation}/images, and annotations of the versions 1.2 and 2.0.

Annotations are {labels,panoptic} beside the images (as 1.2 was first published), or in v1.2 and v2.0 there. 1.2 is the
version of the published models and the default; its classes are built in. Those of 2.0, and those of other data in this
layout, are read from config_v2.0.json, or the like, and from the panoptic JSON.
"""

from __future__ import annotations

import json
from typing import Any

from maskwright.config.categories import annotated_categories, category_entries
from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.coco_json import read_json
from maskwright.data.formats.coco_panoptic import open_coco_panoptic
from maskwright.data.formats.label_maps import open_label_maps
from maskwright.data.formats.layouts import (
    Detection,
    detected_tasks,
    known_targets,
    search_file,
    search_folder,
    single_subset,
    with_defaults,
)
from maskwright.data.storage.folders import File, Folder
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError, RecipeError

_SUBSETS = {"train": ("training",), "val": ("validation",), "test": ("testing",)}
_NUM_CLASSES = 65
_BUILT_IN = "mapillary_vistas"
_VERSIONS = {"1.2": ("", "/v1.2"), "2.0": ("/v2.0",)}  # version -> folders below that of the subset
_CONFIGS = {"": "config.json", "/v1.2": "config_v1.2.json", "/v2.0": "config_v2.0.json"}
_PANOPTIC = {"": "panoptic_2018.json", "/v1.2": "panoptic_2018.json", "/v2.0": "panoptic_2020.json"}


def open_mapillary(split: Split) -> AnnotatedImages:
    """Open a split: classes from label images, the other tasks from the panoptic JSON, which counts classes from 1."""
    name = single_subset(split, _SUBSETS)
    task = split.config.task
    version = _version_folder(split.root, name, "labels" if task == "semantic" else "panoptic", split.config.version)
    if version is None:
        version = _VERSIONS[split.config.version or "1.2"][-1]  # its missing folder is named in the error
    listed = _listed_classes(split.root, _CONFIGS[version])
    if task == "semantic":
        files = {"images": f"{name}/images", "annotations": f"{name}{version}/labels"}
        categories = listed if listed and not _are_built_in(listed) else _BUILT_IN
        return open_label_maps(with_defaults(split, files, format="label_maps", categories=categories))
    masks = f"{name}{version}/panoptic"
    files = {"images": f"{name}/images", "annotations": f"{masks}/{_PANOPTIC[version]}", "masks": masks}
    split = with_defaults(split, files, format="coco_panoptic")
    json_file = split.root.file(split.files.annotations or "", f"{split.key}.annotations")
    document = read_json(json_file, f"{split.key}.annotations")
    categories = tuple(annotated_categories(document.get("categories") or (), json_file.name))
    if categories and not _are_built_in(categories):
        return open_coco_panoptic(with_defaults(split, {}, categories=_with_ignored(categories, listed)))
    label_map = {number + 1: number for number in range(_NUM_CLASSES)} | {_NUM_CLASSES + 1: "ignore"}
    label_map = known_targets(label_map, split) | split.config.label_map
    return open_coco_panoptic(with_defaults(split, {}, categories=_BUILT_IN, label_map=label_map))


def _version_folder(root: Folder, subset: str, kind: str, version: str | None) -> str | None:
    """Return the folder of the wanted version, or of the first that is there, below that of the subset."""
    if version is not None and version not in _VERSIONS:
        raise RecipeError(
            f"is '{version}', but Mapillary Vistas has {' and '.join(_VERSIONS)}",
            where="data.version",
            remedy="name one",
        )
    folders = _VERSIONS[version] if version is not None else [folder for each in _VERSIONS.values() for folder in each]
    return next((folder for folder in folders if search_folder(root, f"{subset}{folder}/{kind}")), None)


def _listed_classes(root: Folder, config_name: str) -> tuple[CategoryConfig, ...]:
    """Return the classes of a config.json, by the values of label images; empty if there is no such file."""
    file = search_file(root, config_name)
    if file is None:
        return ()
    try:
        return tuple(_parsed_label(value, label) for value, label in enumerate(json.loads(read_text(file))["labels"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DatasetError(
            "not a config of Mapillary Vistas with a list of 'labels'", where=file.name, remedy="download it again"
        ) from None


def _parsed_label(value: int, label: dict[str, Any]) -> CategoryConfig:
    return CategoryConfig(
        id=value,
        name=label.get("readable") or label["name"],
        is_thing=bool(label.get("instances")),
        color=label.get("color"),
        group=str(label["name"]).partition("--")[0],
        ignore=not label.get("evaluate", True),
    )


def _are_built_in(found: tuple[CategoryConfig, ...]) -> bool:
    """Return whether these are the classes of 1.2, named like "Bird" or "animal--bird"."""
    built_in = {_last_part(entry.name) for entry in category_entries(_BUILT_IN)}
    known = sum(_last_part(entry.name) in built_in for entry in found)
    return _NUM_CLASSES <= len(found) <= _NUM_CLASSES + 1 and 2 * known > len(found)


def _last_part(name: str) -> str:
    return "".join(letter for letter in name.rpartition("--")[2].casefold() if letter.isalnum())


def _with_ignored(
    categories: tuple[CategoryConfig, ...], listed: tuple[CategoryConfig, ...]
) -> tuple[CategoryConfig, ...]:
    """Return categories, with those ignored that the config does not evaluate."""
    ignored = {_last_part(entry.name) for entry in listed if entry.ignore}
    return tuple(entry.model_copy(update={"ignore": _last_part(entry.name) in ignored}) for entry in categories)


def detect(root: Folder) -> Detection:
    """Detect the folders of each task, if a panoptic JSON or the dataset's config.json is there."""
    panoptic, semantic = {}, {}
    for split, (name,) in _SUBSETS.items():
        if split != "test" and search_folder(root, f"{name}/images"):
            panoptic[split] = _panoptic_json(root, name)
            semantic[split] = _version_folder(root, name, "labels", None) is not None
    has_config = any(search_file(root, config) for config in _CONFIGS.values())
    if any(panoptic.values()):
        return Detection(detected_tasks(root, "mapillary", panoptic=panoptic, semantic=semantic))
    return Detection(detected_tasks(root, "mapillary", semantic=semantic)) if has_config else Detection()


def _panoptic_json(root: Folder, subset: str) -> File | None:
    version = _version_folder(root, subset, "panoptic", None)
    return None if version is None else search_file(root, f"{subset}{version}/panoptic/{_PANOPTIC[version]}")
