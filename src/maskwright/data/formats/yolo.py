"""YOLO segmentation: data.yaml with class names, and one text file of polygons per picture.

A line is "class x y x y ...", in shares of width and height, as polygons of COCO are written for YOLO; masks are drawn
as pycocotools draws such polygons. A picture without a text file has no object. Text files lie where pictures do, with
`labels` in place of `images`.
"""

from __future__ import annotations

import math
import posixpath
from pathlib import PurePosixPath

import yaml

from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import classes_of
from maskwright.data.formats.coco import find_all
from maskwright.data.formats.coco_instance import Annotation, drawn_target
from maskwright.data.formats.image_list import ImageList
from maskwright.data.images.load import is_image_name
from maskwright.data.images.multichannel import picture_size
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError
from maskwright.structures.annotations import Target

_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_OUTSIDE_TOLERANCE = 0.01  # of a side; some tools round over the rim


class YoloPolygons:
    """Reader of YOLO polygons."""

    def __init__(self, rows: list[tuple[str, File, File | None]], labels: dict[int, int | None], split: Split):
        """Of (image id, picture, text file if there is one); `labels` are class number -> label."""
        self.images, self._labels = ImageList(rows), labels
        self._problems, self._channels = split.problems, split.channels

    def target(self, index: int) -> Target:
        """All objects; those that cover no pixel are dropped with a warning.

        Raises:
            DatasetError: a line is no polygon, or has a class that does not exist.
            ImageError: the size of the picture cannot be read.
        """
        image_id, picture, file = self.images.rows[index]
        height, width = picture_size(picture, self._channels)
        objects = []
        for number, line in enumerate(self._lines(file), 1):
            if not line.strip() or file is None:
                continue
            category, shares = _parsed(line, f"{file}, line {number}")
            if category not in self._labels:
                raise DatasetError(
                    f"{file}, line {number}: class {category}, but data.yaml has {len(self._labels)} names, numbered "
                    "from 0; correct one of them"
                )
            label = self._labels[category]
            if label is not None:
                polygon = [share * (height if i % 2 else width) for i, share in enumerate(shares)]
                objects.append(Annotation(f"line {number}", label, False, None, None, [polygon]))
        target, dropped = drawn_target(objects, (height, width), image_id)
        for line in dropped:
            self._problems.warning(
                f"{file}: the polygon of {line} covers no pixel and is dropped; remove it", [str(line)]
            )
        return target

    def has_object(self, index: int) -> bool:
        """Whether there is something to train on."""
        return len(self.target(index)) > 0

    def _lines(self, file: File | None) -> list[str]:
        if file is None:
            return []
        try:
            return file.read().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise DatasetError(f"{file}: is no text; expected lines of 'class x y x y ...'") from None


def _parsed(line: str, where: str) -> tuple[int, list[float]]:
    """(Class number, polygon)."""
    try:
        category, *shares = (float(part) for part in line.split())
    except ValueError:
        raise DatasetError(f"{where}: '{line[:60]}' is not 'class x y x y ...' in numbers; mend the line") from None
    if len(shares) == 4:
        raise DatasetError(f"{where}: a box (4 numbers behind the class), but masks need polygons; export segmentation")
    if len(shares) < 6 or len(shares) % 2 or category != int(category):
        raise DatasetError(
            f"{where}: {len(shares)} numbers behind the class {category:g}, expected x and y of three points or more; "
            "mend the line"
        )
    if not all(map(math.isfinite, shares)):
        raise DatasetError(f"{where}: has NaN or infinite numbers; mend the line")
    if min(shares) < -_OUTSIDE_TOLERANCE or max(shares) > 1 + _OUTSIDE_TOLERANCE:
        far = max(shares, key=lambda share: abs(share - 0.5))
        raise DatasetError(
            f"{where}: {far:g} is outside 0..1; divide x by the width and y by the height of the picture"
        )
    return int(category), [min(max(share, 0.0), 1.0) for share in shares]


def open_yolo(split: Split) -> AnnotatedImages:
    """The images that data.yaml names for the split, or that the recipe names."""
    description, file, base = _description(split)
    names = _pictures(split, description, file, base)
    texts = base.files([_text_of(name, split.files.annotations) for name in names])
    ids = [PurePosixPath(name).with_suffix("").as_posix() for name in names]
    pictures = find_all(base, names, f"{split.key}.images", file, split.problems)
    if not any(texts):
        raise DatasetError(
            f"{split.key}.annotations: none of {len(names)} pictures in {base} has a text file; they are looked for "
            f"like {_text_of(names[0], split.files.annotations)}"
        )
    if split.config.categories is None:
        config = split.config.model_copy(update={"categories": _classes(description, file)})
        split = split._replace(config=config)
    classes = classes_of(split)
    rows = list(zip(ids, pictures, texts, strict=True))
    return AnnotatedImages(classes.kept, split.config.task, YoloPolygons(rows, classes.labels, split))


def _description(split: Split) -> tuple[dict, File, Folder]:
    """What data.yaml says, its file, and the folder that its paths are relative to."""
    path = PurePosixPath(split.config.root)
    name = path.name if path.suffix in (".yaml", ".yml") else "data.yaml"
    home = split.root.holding(name, "data.root")
    file = home.file(name, "data.root")
    try:
        document = yaml.safe_load(file.read().decode("utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: not readable as YAML ({' '.join(str(error).split())}); mend the file") from None
    if not isinstance(document, dict) or not isinstance(document.get("names"), list | dict) or not document["names"]:
        raise DatasetError(f"{file}: has no 'names' of classes; add them")
    base = str(document.get("path") or ".")
    return document, file, home.find_folder(base) or home.find_folder(posixpath.basename(base)) or home


def _classes(description: dict, file: File) -> tuple[CategoryConfig, ...]:
    names = description["names"]
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    try:
        return tuple(CategoryConfig(id=int(number), name=str(name)) for number, name in pairs)
    except (TypeError, ValueError):
        raise DatasetError(f"{file}: 'names' is no list, nor a table from numbers to names; mend the file") from None


def _pictures(split: Split, description: dict, file: File, base: Folder) -> list[str]:
    """Names of the split's pictures, relative to the base."""
    named = split.files.images or next((description[key] for key in _KEYS[split.name] if description.get(key)), None)
    if named is None:
        raise DatasetError(f"{file}: has no '{split.name}'; name the folder of the split there")
    entries = named if isinstance(named, list) else [named]
    names = [name for entry in entries for name in _names_of(str(entry), base, f"{split.key}.images")]
    if not names:
        raise DatasetError(f"{file}: no picture in '{named}', which it names for '{split.name}'; correct the path")
    return sorted(dict.fromkeys(names))


def _names_of(entry: str, base: Folder, key: str) -> list[str]:
    """Names of the pictures in a folder, or in a text file that lists them.

    Some tools write "../train/images" for a folder beside data.yaml, and Ultralytics reads that so.
    """
    for name in dict.fromkeys((posixpath.normpath(entry), posixpath.normpath(entry.lstrip("./")))):
        if name.startswith(("/", "..")):
            continue
        if name.endswith(".txt") and (listed := base.find_file(name)):
            lines = listed.read().decode("utf-8-sig").split("\n")
            return [
                posixpath.normpath(posixpath.join(posixpath.dirname(name), line.strip()))
                for line in lines
                if line.strip()
            ]
        if (folder := base.find_folder(name)) is not None:
            return [f"{name}/{file}" for file in folder.names() if is_image_name(file)]
    raise DatasetError(f"{key}: no folder or list '{entry}' in {base}; correct data.yaml")


def _text_of(name: str, labels: str | None) -> str:
    """The text file of a picture: in the folder that the recipe names, or with `labels` in place of `images`."""
    parts = PurePosixPath(name).with_suffix(".txt").parts
    if labels:
        return posixpath.join(labels, parts[-1])
    if "images" not in parts:
        return "/".join(parts)
    place = len(parts) - 1 - parts[::-1].index("images")
    return "/".join((*parts[:place], "labels", *parts[place + 1 :]))
