"""The command that converts datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from maskwright.cli.terminal import ProgressBar


def convert_data(
    source: str,
    destination: Path,
    *overrides: str,
    to: Literal["panoptic", "instance", "semantic", "coco", "yolo"],
    add: str | None = None,
    copy: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a dataset in another layout, and list what that layout cannot store.

    Parameters
    ----------
    source
        Folder, archive or COCO JSON, whose format is detected; or name of a recipe or YAML file.
    destination
        Folder to write. It appears complete or not at all.
    overrides
        Values of the recipe to change, as section.key=value; for a folder, archive or JSON, values of data only.
    to
        panoptic: COCO JSON and PNGs. instance: COCO JSON. coco: both. semantic: label images. yolo: polygons.
    add
        Folder, archive or recipe with the same images and annotations of classes; its stuff fills the pixels without an
        object, for panoptic data from instance and semantic masks.
    copy
        Copy the images; otherwise they are hard links if the file system allows that.
    overwrite
        Replace the destination, if this command wrote it.
    """
    from maskwright.data.convert.convert import convert

    with ProgressBar("converting") as advance:
        done = convert(
            source,
            destination,
            to,
            overrides=overrides,
            add=add,
            copy_images=copy,
            overwrite=overwrite,
            on_image=advance,
        )
    counts = ", ".join(f"{count:,} {split}" for split, count in done.images.items())
    print(f"{destination}: {counts} images")
    print("\n".join(done.losses) if done.losses else "everything could be stored")
