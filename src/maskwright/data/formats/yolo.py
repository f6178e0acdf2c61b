"""YOLO segmentation: data.yaml with class names, and one text file of polygons per image.

A line is "class x y x y ...", in fractions of width and height, as COCO polygons are converted for YOLO; masks are
drawn as pycocotools draws such polygons. An image without a text file has no object. Text files are stored beside the
images, with `labels` in place of `images` in the path.
"""

from __future__ import annotations

import math
import posixpath
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import resolve_classes
from maskwright.data.formats.coco_instance import Annotation, draw_target
from maskwright.data.formats.image_list import ImageList, find_all
from maskwright.data.formats.layouts import Detection, detected, search_file
from maskwright.data.images.load import is_image_name
from maskwright.data.images.multichannel import read_image_size
from maskwright.data.storage.folders import File, Folder, open_folder
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Target

_SPLIT_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_OUTSIDE_TOLERANCE = 0.01  # of a side; some tools round beyond the border


class YoloReader:
    """Reader of YOLO polygons."""

    def __init__(self, entries: list[tuple[str, File, File | None]], labels: dict[int, int | None], split: Split):
        """Each entry is (image id, image, text file if there is one); `labels` maps class numbers to labels."""
        self.images, self._labels = ImageList(entries), labels
        self._problems, self._channels = split.problems, split.channels

    def target(self, index: int) -> Target:
        """Return all objects; those that cover no pixel are dropped with a warning.

        Raises:
            DatasetError: a line is not a polygon, or has a class that does not exist.
            ImageError: the size of the image cannot be read.
        """
        image_id, image, file = self.images.entries[index]
        height, width = read_image_size(image, self._channels)
        objects = [] if file is None else self._read_objects(file, height, width)
        target, dropped = draw_target(objects, (height, width), image_id)
        for line in dropped:
            self._problems.warning(
                f"the polygon of {line} covers no pixel and is dropped",
                where=str(file),
                remedy="remove it",
                items=[str(line)],
            )
        return target

    def _read_objects(self, file: File, height: int, width: int) -> list[Annotation]:
        try:
            lines = file.read().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise DatasetError(
                "not a text file, expected lines of 'class x y x y ...'", where=file.name, remedy="export it again"
            ) from None
        objects = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            category, fractions = _parse_line(line, f"{file}, line {number}")
            if category not in self._labels:
                raise DatasetError(
                    f"class {category}, but data.yaml has {len(self._labels)} names, numbered from 0",
                    where=f"{file}, line {number}",
                    remedy="correct one of them",
                )
            label = self._labels[category]
            if label is not None:
                polygon = [fraction * (height if i % 2 else width) for i, fraction in enumerate(fractions)]
                objects.append(Annotation(f"line {number}", label, False, None, None, [polygon]))
        return objects


def _parse_line(line: str, where: str) -> tuple[int, list[float]]:
    """Return (class number, polygon)."""
    try:
        category, *fractions = (float(part) for part in line.split())
    except ValueError:
        raise DatasetError(
            f"'{line[:60]}' is not 'class x y x y ...' in numbers", where=where, remedy="correct the line"
        ) from None
    if len(fractions) == 4:
        raise DatasetError(
            "a box (4 values after the class), but masks need polygons", where=where, remedy="export segmentation"
        )
    if len(fractions) < 6 or len(fractions) % 2 or category != int(category):
        raise DatasetError(
            f"{len(fractions)} values after the class {category:g}, expected x and y of at least three points",
            where=where,
            remedy="correct the line",
        )
    if not all(map(math.isfinite, fractions)):
        raise DatasetError("has NaN or infinite values", where=where, remedy="correct the line")
    if min(fractions) < -_OUTSIDE_TOLERANCE or max(fractions) > 1 + _OUTSIDE_TOLERANCE:
        farthest = max(fractions, key=lambda fraction: abs(fraction - 0.5))
        raise DatasetError(
            f"{farthest:g} is outside 0..1",
            where=where,
            remedy="divide x by the width and y by the height of the image",
        )
    return int(category), [min(max(fraction, 0.0), 1.0) for fraction in fractions]


def open_yolo(split: Split) -> AnnotatedImages:
    """Open the images that the recipe or data.yaml names for the split."""
    path = PurePosixPath(split.config.root)
    name = path.name if path.suffix in (".yaml", ".yml") else "data.yaml"
    home = split.root.folder_containing(name, "data.root")
    file = home.file(name, "data.root")
    description = _read_description(file)
    base = _base_folder(description, home)
    names = _image_names(split, description, file, base)
    texts = base.files([_text_name(name, split.files.annotations) for name in names])
    ids = [PurePosixPath(name).with_suffix("").as_posix() for name in names]
    images = find_all(base, names, f"{split.key}.images", file, split.problems)
    if not any(texts):
        raise DatasetError(
            f"none of {len(names)} images in {base} has a text file",
            where=f"{split.key}.annotations",
            remedy=f"they are expected like {_text_name(names[0], split.files.annotations)}",
        )
    if split.config.categories is None:
        config = split.config.model_copy(update={"categories": _classes(description, file)})
        split = split._replace(config=config)
    classes = resolve_classes(split)
    entries = list(zip(ids, images, texts, strict=True))
    return AnnotatedImages(classes.categories, split.config.task, YoloReader(entries, classes.labels, split))


def _read_description(file: File) -> dict[str, Any]:
    """Read data.yaml.

    Raises:
        DatasetError: it is not valid YAML, or has no names of classes.
    """
    try:
        document = yaml.safe_load(file.read().decode("utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise DatasetError(f"not valid YAML{line} ({reason})", where=file.name, remedy="correct the file") from None
    if not isinstance(document, dict) or not isinstance(document.get("names"), list | dict) or not document["names"]:
        raise DatasetError("has no 'names' of classes", where=file.name, remedy="add them")
    return document


def _base_folder(description: dict[str, Any], home: Folder) -> Folder:
    """Return the folder that paths in data.yaml are relative to: its `path`, if that exists, else its own."""
    path = str(description.get("path") or ".")
    return home.find_folder(path) or home.find_folder(posixpath.basename(path)) or home


def _classes(description: dict[str, Any], file: File) -> tuple[CategoryConfig, ...]:
    names = description["names"]
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    try:
        return tuple(CategoryConfig(id=int(number), name=str(name)) for number, name in pairs)
    except (TypeError, ValueError):
        raise DatasetError(
            "'names' is neither a list nor a mapping from numbers to names", where=file.name, remedy="correct the file"
        ) from None


def _image_names(split: Split, description: dict[str, Any], file: File, base: Folder) -> list[str]:
    """Return the names of the split's images, relative to the base folder."""
    keys = _SPLIT_KEYS[split.name]
    named = split.files.images or next((description[key] for key in keys if description.get(key)), None)
    if named is None:
        raise DatasetError(f"has no '{split.name}'", where=file.name, remedy="name the folder of the split there")
    entries = named if isinstance(named, list) else [named]
    names = [name for entry in entries for name in _expand(str(entry), base, f"{split.key}.images")]
    if not names:
        raise DatasetError(
            f"no image in '{named}', which it names for '{split.name}'", where=file.name, remedy="correct the path"
        )
    return sorted(dict.fromkeys(names))


def _expand(entry: str, base: Folder, key: str) -> list[str]:
    """Return the names of the images in a folder, or in a text file that lists them.

    Some tools write "../train/images" for a folder beside data.yaml, and Ultralytics reads it as such.
    """
    for name in dict.fromkeys((posixpath.normpath(entry), posixpath.normpath(entry.lstrip("./")))):
        if name.startswith(("/", "..")):
            continue
        if name.endswith(".txt") and (list_file := base.find_file(name)):
            lines = [line.strip() for line in list_file.read().decode("utf-8-sig").split("\n")]
            return [posixpath.normpath(posixpath.join(posixpath.dirname(name), line)) for line in lines if line]
        if (folder := base.find_folder(name)) is not None:
            return [f"{name}/{file}" for file in folder.names() if is_image_name(file)]
    raise DatasetError(f"no folder or list '{entry}' in {base}", where=key, remedy="correct data.yaml")


def _text_name(image_name: str, labels: str | None) -> str:
    """Return the text file of an image: in the folder that the recipe names, or with `labels` in place of `images`."""
    parts = PurePosixPath(image_name).with_suffix(".txt").parts
    if labels:
        return posixpath.join(labels, parts[-1])
    if "images" not in parts:
        return "/".join(parts)
    position = len(parts) - 1 - parts[::-1].index("images")
    return "/".join((*parts[:position], "labels", *parts[position + 1 :]))


def detect(root: Folder) -> Detection:
    """Detect data.yaml."""
    file = search_file(root, "data.yaml")
    return Detection() if file is None else _detect_description(file, root.root)


def detect_file(path: Path) -> Detection:
    """Detect a YAML file of any name."""
    home = open_folder(path.parent)
    return _detect_description(home.file(path.name, ""), path)


def _detect_description(file: File, root: Path) -> Detection:
    try:
        description = _read_description(file)
    except DatasetError as error:
        return Detection(mismatch=f"{PurePosixPath(file.name).name}: {error.found}")
    splits = {split: {} if any(map(description.get, keys)) else None for split, keys in _SPLIT_KEYS.items()}
    return Detection((detected(root, "yolo", "instance", splits),))
