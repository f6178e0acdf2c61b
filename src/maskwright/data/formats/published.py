"""Where things lie in published data sets that are otherwise of a general format: CamVid, COCO 2017, Mapillary Vistas.

Each function turns a split that says little into one that says all, for the general reader.
"""

from __future__ import annotations

from collections.abc import Mapping

from maskwright.data.formats.base import Split
from maskwright.errors import RecipeError

_COCO = {"train": ("train2017",), "val": ("val2017",), "test": ("test2017",)}
_MAPILLARY = {"train": ("training",), "val": ("validation",), "test": ("testing",)}


def camvid(split: Split) -> Split:
    """CamVid as SegNet's authors gave it out: folders train and trainannot, val and valannot, test and testannot."""
    part = single_part(split, {name: (name,) for name in ("train", "val", "test")})
    files = {"images": part, "annotations": f"{part}annot"}
    return _described(split, files, format="label_maps", categories="camvid")


def coco(split: Split) -> Split:
    """COCO 2017: train2017, annotations/instances_train2017.json, and for the other tasks panoptic_train2017 in it."""
    part, task = single_part(split, _COCO), split.config.task
    if task == "instance":
        files = {"images": part, "annotations": f"annotations/instances_{part}.json"}
        return _described(split, files, format="coco_instance", categories="coco_instance")
    files = {"images": part, "annotations": f"annotations/panoptic_{part}.json", "masks": f"panoptic_{part}"}
    return _described(split, files, format="coco_panoptic", categories="coco_panoptic")


def mapillary(split: Split) -> Split:
    """Mapillary Vistas 1.2: training/{images,labels,panoptic}; the panoptic json counts classes from 1."""
    part = single_part(split, _MAPILLARY)
    files, images = {"images": f"{part}/images"}, f"{part}/images"
    if split.config.task == "semantic":
        files = {"images": images, "annotations": f"{part}/labels"}
        return _described(split, files, format="label_maps", categories="mapillary_vistas")
    panoptic = f"{part}/panoptic"
    files = {"images": images, "annotations": f"{panoptic}/panoptic_2018.json", "masks": panoptic}
    label_map = {number + 1: number for number in range(65)} | {66: "ignore"} | split.config.label_map
    return _described(split, files, format="coco_panoptic", categories="mapillary_vistas", label_map=label_map)


def prepared_ade20k(split: Split) -> Split | None:
    """ADE20K as the original's datasets/prepare_ade20k_pan_seg.py left it; None where it was not run, or need not be.

    Its json counts classes from 0.
    """
    name = f"ade20k_panoptic_{split.name}"
    if split.config.task == "semantic" or split.root.find_file(f"{name}.json") is None:
        return None
    part = single_part(split, {"train": ("training",), "val": ("validation",), "test": ("testing",)})
    files = {"images": f"images/{part}", "annotations": f"{name}.json", "masks": name}
    label_map = {number: number + 1 for number in range(150)} | split.config.label_map
    return _described(split, files, format="coco_panoptic", categories="ade20k", label_map=label_map)


def parts_of(split: Split, usual: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The data set's own names for what makes up a split: those that the recipe gives, or else the usual ones."""
    return split.files.subsets or usual[split.name]


def single_part(split: Split, usual: Mapping[str, tuple[str, ...]]) -> str:
    """As `parts_of`, for data sets whose parts cannot be joined."""
    parts = parts_of(split, usual)
    if len(parts) != 1:
        raise RecipeError(f"{split.key}.parts names {len(parts)} parts; data.format {split.config.format} takes one")
    return parts[0]


def _described(split: Split, files: dict[str, str], **config) -> Split:
    """The split with these values wherever the recipe has none of its own."""
    own = {name: value for name, value in split.files.model_dump().items() if value is not None and name in files}
    named = {"categories": split.config.categories} if split.config.categories is not None else {}
    return split._replace(
        files=split.files.model_copy(update=files | own), config=split.config.model_copy(update=config | named)
    )
