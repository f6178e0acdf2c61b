"""Convert a dataset: read it with the reader of its format, and write it in another layout."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import PIL.Image

from maskwright.data.convert.report import ConversionReport
from maskwright.data.convert.source import Source, combine, open_source
from maskwright.data.convert.writers import CocoInstances, CocoPanoptic, LabelMaps, Layout, Yolo
from maskwright.data.images.find import is_image_name
from maskwright.data.storage.folders import File
from maskwright.errors import MaskwrightError
from maskwright.runtime.atomic_write import partial_path, remove, temporary_folder
from maskwright.structures.annotations import Target, Task

LayoutName = Literal["panoptic", "instance", "semantic", "coco", "yolo"]

LAYOUTS: dict[LayoutName, tuple[type[Layout], ...]] = {
    "panoptic": (CocoPanoptic,),
    "instance": (CocoInstances,),
    "semantic": (LabelMaps,),
    "coco": (CocoPanoptic, CocoInstances),
    "yolo": (Yolo,),
}
# Annotation tasks that each layout can be written from, best first.
_TASKS: dict[LayoutName, tuple[Task, ...]] = {
    "panoptic": ("panoptic", "instance"),
    "instance": ("instance", "panoptic"),
    "semantic": ("semantic", "panoptic", "instance"),
    "coco": ("panoptic", "instance"),
    "yolo": ("instance", "panoptic"),
}
RECORD = "conversion.txt"  # marks a folder as ours, and lists what could not be stored


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        images: number of images of each split.
        losses: sentences with counts; empty if everything could be stored.
    """

    images: dict[str, int]
    losses: list[str]


def convert(
    source: str,
    destination: Path,
    to: LayoutName,
    *,
    overrides: Sequence[str] = (),
    add: str | None = None,
    copy_images: bool = False,
    overwrite: bool = False,
    on_image: Callable[[int, int], object] | None = None,
) -> Conversion:
    """Write a dataset in another layout; the folder appears complete or not at all.

    Args:
        source: see `open_source`.
        destination: folder to write.
        to: see `LAYOUTS`.
        overrides: see `check`.
        add: a dataset of the same images with annotations of classes; its stuff goes below the objects of `source`.
        copy_images: copy images; otherwise they are hard links if the file system allows that.
        overwrite: replace a folder that this function wrote.
        on_image: called with (1, total images) after each image.

    Raises:
        DatasetError: the source cannot be read, or has no annotations that the layout is made from.
        MaskwrightError: the destination exists, or cannot be written.
        RecipeError: the recipe is wrong.
    """
    opened = open_source(source, overrides, ("instance", "panoptic") if add else _TASKS[to])
    if add:
        opened = combine(opened, open_source(add, (), ("semantic", "panoptic")))
    _check_destination(destination, opened.place, overwrite)
    with temporary_folder(destination) as partial:
        result = _write(opened, partial, to, copy_images, on_image)
        lines = [f"Written by maskwright convert-data --to {to}.", *result.losses]
        (partial / RECORD).write_text("\n".join(lines) + "\n", encoding="utf-8")
        _move(partial, destination)
    return result


def _check_destination(destination: Path, source: Path, overwrite: bool) -> None:
    """Raise MaskwrightError if the folder may not be written: nothing but an earlier conversion is ever replaced."""
    place, origin = destination.expanduser().resolve(), source.expanduser().resolve()
    if place == origin or place in origin.parents:
        raise MaskwrightError("holds the source", where=destination, remedy="choose another folder")
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not (destination / RECORD).is_file():
        raise MaskwrightError(
            "exists, and was not written by convert-data", where=destination, remedy="choose another folder"
        )
    if not overwrite:
        raise MaskwrightError("exists already", where=destination, remedy="choose another folder, or add --overwrite")


def _write(
    source: Source, root: Path, to: LayoutName, copy_images: bool, on_image: Callable[[int, int], object] | None
) -> Conversion:
    report = ConversionReport()
    total = sum(len(images) for images in source.splits.values())
    for split, images in source.splits.items():
        first, *others = LAYOUTS[to]
        layouts = [first(root, split, source.categories, report)]
        layouts += [layout(root, split, source.categories, ConversionReport()) for layout in others]  # counted once
        folder = root / layouts[0].images.format(split)
        folder.mkdir(parents=True, exist_ok=True)
        names = _file_names([images.file(index) for index in range(len(images))])
        ids = _image_ids([images.image_id(index) for index in range(len(images))])
        for index, (name, image_id) in enumerate(zip(names, ids, strict=True)):
            report.image = f"{split}/{name}"
            target = source.target(split, index, report)
            report.add(*_unlabeled(source.task, to, target))
            for layout in layouts:
                layout.add(name, image_id, target)
            _place_image(images.file(index), folder / name, copy_images)
            if on_image:
                on_image(1, total)
        for layout in layouts:
            layout.finish()
    return Conversion({split: len(images) for split, images in source.splits.items()}, report.lines())


def _unlabeled(task: Task, to: LayoutName, target: Target) -> tuple[str, int]:
    """Return what happens to pixels without an object, whose meaning depends on the layout, and their number."""
    count = int((target.id_maps.amax(0) == 0).sum())
    has_background = to in ("instance", "yolo")
    if has_background == (task == "instance"):
        return "", 0
    if has_background:
        return "pixels without a class become background", count
    return "background pixels become pixels without a class", count


def _file_names(files: Sequence[File]) -> list[str]:
    """Return a file name for each image in one folder: its own, or its path with dashes if two images share a stem.

    Raises:
        MaskwrightError: an image is listed twice.
    """
    paths = [_with_suffix(PurePosixPath(str(file).replace("\\", "/")), file) for file in files]
    stems = [path.stem.casefold() for path in paths]
    if len(set(stems)) == len(stems):
        return [path.name for path in paths]
    common = os.path.commonpath([path.parent for path in paths])
    names = ["-".join(path.relative_to(common).parts) for path in paths]
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        other = seen.setdefault(PurePosixPath(name).stem.casefold(), index)
        if other != index:
            raise MaskwrightError(
                f"its annotations would have the name of those of {files[other]}",
                where=str(files[index]),
                remedy="rename or remove one of them",
            )
    return names


def _with_suffix(path: PurePosixPath, file: File) -> PurePosixPath:
    """Add the suffix of the image's format to a path without one, as of an image in a Parquet file."""
    if is_image_name(path.name):
        return path
    with PIL.Image.open(io.BytesIO(file.read())) as image:
        return path.with_name(f"{path.name}.{str(image.format).lower()}")


def _image_ids(ids: Sequence[int | str]) -> list[int]:
    """Return the ids if they are numbers, else 1, 2, ..."""
    numbers = [value for value in ids if isinstance(value, int)]
    return numbers if len(numbers) == len(ids) else list(range(1, len(ids) + 1))


def _place_image(file: File, path: Path, copy: bool) -> None:
    if file.location is not None:
        path.write_bytes(file.read())
        return
    if not copy:
        try:
            os.link(Path(file.name).resolve(), path)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(file.name, path)


def _move(partial: Path, destination: Path) -> None:
    """Rename the finished folder; an earlier one is moved away first and then removed."""
    if not destination.exists():
        partial.rename(destination)
        return
    old = partial_path(destination)
    destination.rename(old)
    partial.rename(destination)
    remove(old)
