"""The `data` section of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from maskwright.config.schema.base import Byte, Strict


class CategoryConfig(Strict):
    """One class, as in `config/categories/*.yaml`."""

    section = "category"

    id: int = Field(description="value or id of the class in the annotations")
    name: str = Field(description="name of the class; if several classes share it, their ids are appended")
    is_thing: bool = Field(True, description="true for countable objects (things), false for stuff")
    color: tuple[Byte, Byte, Byte] | None = Field(
        None,
        description="RGB, 0..255; null picks a distinct color. Label images painted in colors are read by it",
    )
    group: str | None = Field(None, description="group of classes, such as Cityscapes' categories, scored as one")
    ignore: bool = Field(False, description="the id is declared, but is not a class: its pixels are ignored")


class SplitConfig(Strict):
    """The files of one split, relative to `data.root`. Formats of published datasets need none of these keys."""

    section = "split"

    images: str | None = Field(None, description="folder of the images, searched recursively")
    annotations: str | None = Field(
        None,
        description="COCO JSON file, or folder of the label images or masks; the same as images if the names of "
        "folders inside tell them apart, such as images and masks",
    )
    masks: str | None = Field(None, description="folder of the panoptic PNGs (coco_panoptic)")
    list: str | None = Field(
        None,
        description="text file or CSV of the images of this split (label_maps, instance_maps, mask_files): names of "
        "images or folders in the folder of images; without that, lines '<image> <label>' with paths relative to "
        "data.root",
    )
    subsets: tuple[str, ...] = Field(
        (), description="the published dataset's own names for the parts of this split, such as [train, train_extra]"
    )


GENERAL_FORMATS = ("label_maps", "instance_maps", "mask_files", "coco_instance", "coco_panoptic")


class DataConfig(Strict):
    """The dataset.

    The formats in the first row need `images` and `annotations` for each split. The others have a known layout: `root`
    is enough, and they have a train and a val split unless these are null.
    """

    section = "data"

    format: Literal[
        "label_maps", "instance_maps", "mask_files", "coco_instance", "coco_panoptic",
        "ade20k", "camvid", "cityscapes", "coco", "coco_stuff_10k", "mapillary", "voc", "yolo", "huggingface",
        "labelme", "via", "supervisely",
    ] = Field(description="annotation format; the first five need the files of each split")  # fmt: skip
    root: str = Field(
        description="folder or archive (.zip, .tar, .tar.gz) of the dataset, or a folder with its archives; 'sample' "
        "is the one in the package"
    )
    task: Literal["semantic", "instance", "panoptic"] = Field(
        description="objects to train on: semantic, one per class; instance, things only; panoptic, things and stuff"
    )

    # Classes
    categories: str | tuple[CategoryConfig, ...] | None = Field(
        None,
        description="classes: name of a built-in list, a YAML file, or the list itself; null is those of the dataset",
    )
    ignore_values: tuple[int, ...] = Field(
        (),
        description="values of label images whose pixels are ignored, also negative ones (label_maps, instance_maps)",
    )
    label_map: dict[int, int | Literal["ignore"]] = Field(
        {}, description="value of label images -> category id or ignore, for values that are not category ids"
    )

    crowds: Literal["ignore", "objects"] = Field(
        "ignore",
        description="annotations with iscrowd 1: ignore keeps them out of training; objects reads each as one object, "
        "for tools that mark all masks so, such as CVAT's brush",
    )
    version: str | None = Field(
        None, description="version of the annotations (mapillary: 1.2 or 2.0); null is the first that is there"
    )

    # Samples
    image_suffix: str = Field("", description="end of image file names, removed to match images with labels")
    label_suffix: str = Field("", description="end of label file names, removed to match images with labels")
    filter_empty: bool = Field(
        False,
        description="skip training images without a non-crowd object, as detectron2 does for instances; with label "
        "images, all of them are read first",
    )
    image_column: str | None = Field(
        None, description="column of the images (huggingface); null is the first image column"
    )
    label_column: str | None = Field(
        None, description="column of the labels (huggingface); null is the second image column"
    )

    # Splits
    train: SplitConfig | None = Field(None, description="files of the training split; not needed for published formats")
    val: SplitConfig | None = Field(None, description="files of the validation split; not needed for published formats")
    test: SplitConfig | None = Field(None, description="files of the test split; not needed for published formats")

    @model_validator(mode="before")
    @classmethod
    def _assume_splits(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("format") not in GENERAL_FORMATS:
            return {"train": {}, "val": {}} | values
        return values
