"""Folders of annotation tools that write polygons as JSON: Labelme, VIA (VGG Image Annotator) and Supervisely.

Images are those beside the JSON, or in `img` beside `ann` (Supervisely). An image belongs to the split that one of its
folders is called like, else to the training split. Classes are the names that occur, in alphabetical order and
numbered from 1, or those in Supervisely's meta.json. Masks are drawn as pycocotools draws polygons; points and lines
have no area and are dropped.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import posixpath
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import hotcoco.mask
import numpy as np

from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import resolve_classes
from maskwright.data.formats.coco_instance import Annotation, draw_target
from maskwright.data.formats.image_list import ImageList
from maskwright.data.formats.layouts import SPLIT_NAMES, Detection, detected, folders_below
from maskwright.data.images.find import is_image_name
from maskwright.data.images.multichannel import read_image_size
from maskwright.data.images.safe_pillow import MAX_PIXELS, open_with_pillow
from maskwright.data.storage.folders import File, Folder, open_folder
from maskwright.data.storage.similar_names import SimilarNames, points_outside
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError, printable
from maskwright.structures.annotations import Target

_CIRCLE_CORNERS = 64
_CLASS_KEYS = ("class", "label", "name", "type", "category", "object")  # attributes of VIA that name a class
_ONLY_CLASS = "object"  # of VIA regions without an attribute
_DETECTION_DEPTH, _DETECTION_FILES = 2, 3

Polygon = list[float]  # x, y, x, y, ... in pixels


class Bitmap(NamedTuple):
    """A mask as a PNG that covers part of an image.

    Attributes:
        left: column of its first pixel.
        top: row of its first pixel.
        png: the file.
    """

    left: int
    top: int
    png: bytes


class Shape(NamedTuple):
    """An annotated object.

    Attributes:
        name: name of its class.
        polygons: areas of the object.
        holes: areas that do not belong to it.
        bitmaps: areas of the object.
    """

    name: str
    polygons: tuple[Polygon, ...] = ()
    holes: tuple[Polygon, ...] = ()
    bitmaps: tuple[Bitmap, ...] = ()


class AnnotatedImage(NamedTuple):
    """The annotations of one image.

    Attributes:
        path: of the JSON, below the root.
        image_name: of the image, below the root, as the JSON gives it.
        shapes: objects with an area.
        dropped: number of shapes of each kind that has no area, such as "point".
        embedded: the image itself, if the JSON has it.
    """

    path: str
    image_name: str
    shapes: list[Shape]
    dropped: Counter[str]
    embedded: bytes | None = None


class PolygonReader:
    """Reader of drawn shapes."""

    def __init__(self, entries: Iterable[tuple[str, File, list[Shape]]], labels: dict[str, int | None], split: Split):
        """Each entry is (image id, image, objects); `labels` maps class names to labels."""
        self.images, self._labels = ImageList(entries), labels
        self._problems, self._channels = split.problems, split.channels

    def target(self, index: int) -> Target:
        """Return all objects; those that cover no pixel are dropped with a warning.

        Raises:
            DatasetError: a bitmap is damaged.
            ImageError: the size of the image cannot be read.
        """
        image_id, image, shapes = self.images.entries[index]
        height, width = read_image_size(image, self._channels)
        objects = []
        for number, shape in enumerate(shapes, 1):
            label = self._labels[shape.name]
            if label is not None:
                mask = _draw(shape, height, width, str(image))
                objects.append(Annotation(f"object {number}", label, False, None, None, mask))
        target, dropped, _ = draw_target(objects, (height, width), image_id)
        for name in dropped:
            self._problems.warning(
                f"{name} covers no pixel and is dropped", where=str(image), remedy="remove it", items=[str(name)]
            )
        return target


def _draw(shape: Shape, height: int, width: int, where: str) -> dict:
    """Return the mask of a shape as a compressed run-length dictionary."""
    if not shape.holes and not shape.bitmaps:
        return hotcoco.mask.merge(hotcoco.mask.frPyObjects(list(shape.polygons), height, width))
    mask = np.zeros((height, width), dtype=bool)
    for polygons, value in ((shape.polygons, True), (shape.holes, False)):
        if polygons:
            drawn = hotcoco.mask.merge(hotcoco.mask.frPyObjects(list(polygons), height, width))
            mask[hotcoco.mask.decode(drawn).astype(bool)] = value
    for left, top, png in shape.bitmaps:
        pixels = _read_bitmap(png, where)[max(-top, 0) :, max(-left, 0) :]
        window = mask[max(top, 0) :, max(left, 0) :][: pixels.shape[0], : pixels.shape[1]]
        window |= pixels[: window.shape[0], : window.shape[1]]
    return hotcoco.mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def _read_bitmap(png: bytes, where: str) -> np.ndarray:
    """Return which pixels of a bitmap are set, (h, w) bool: by their alpha, if there is one."""
    with open_with_pillow(png, f"a bitmap of {where}", MAX_PIXELS, DatasetError) as image:
        pixels = np.array(image.convert("RGBA") if image.has_transparency_data else image.convert("L"))
    return (pixels[..., 3] if pixels.ndim == 3 else pixels) > 0


# Labelme


def _read_labelme(path: str, document: Any) -> Iterator[AnnotatedImage]:
    if not isinstance(document, dict) or not isinstance(document.get("shapes"), list):
        return
    by_object: dict[tuple, Shape] = {}
    dropped: Counter[str] = Counter()
    for number, entry in enumerate(document["shapes"]):
        kind = entry.get("shape_type") or "polygon"
        shape = _labelme_shape(entry, kind)
        if shape is None:
            dropped[kind] += 1
            continue
        group = entry.get("group_id")
        key = (shape.name, "number", number) if group is None else (shape.name, "group", group)
        by_object[key] = _joined(by_object.get(key), shape)
    embedded = document.get("imageData")
    name = str(document.get("imagePath") or PurePosixPath(path).with_suffix(".jpg").name).replace("\\", "/")
    image = base64.b64decode(embedded) if embedded else None
    yield AnnotatedImage(path, posixpath.join(posixpath.dirname(path), name), list(by_object.values()), dropped, image)


def _labelme_shape(entry: dict, kind: str) -> Shape | None:
    """Return a shape, None if it has no area."""
    name = str(entry["label"])
    points = [(float(x), float(y)) for x, y in entry["points"]]
    if kind == "mask":
        left, top = (round(value) for value in points[0])
        return Shape(name, bitmaps=(Bitmap(left, top, base64.b64decode(entry["mask"])),))
    if kind == "rectangle" and len(points) == 2:
        return Shape(name, (_rectangle(*points[0], *points[1]),))
    if kind == "circle" and len(points) == 2:
        radius = math.dist(*points)
        return Shape(name, (_ellipse(*points[0], radius, radius),))
    if kind in ("polygon", "rectangle", "oriented_rectangle") and len(points) >= 3:
        return Shape(name, (_flat(points),))
    return None


def _joined(first: Shape | None, second: Shape) -> Shape:
    if first is None:
        return second
    return Shape(
        first.name, first.polygons + second.polygons, first.holes + second.holes, first.bitmaps + second.bitmaps
    )


# VIA


def _read_via(path: str, document: Any) -> Iterator[AnnotatedImage]:
    images = document.get("_via_img_metadata", document) if isinstance(document, dict) else {}
    images = [image for image in images.values() if isinstance(image, dict) and "regions" in image]
    attributes = Counter(key for image in images for region in _regions(image) for key in region["region_attributes"])
    key = _class_key(attributes, path)
    for image in images:
        shapes, dropped = [], Counter()
        for region in _regions(image):
            shape = _via_shape(region, key)
            if shape is None:
                dropped[str(region["shape_attributes"].get("name"))] += 1
            else:
                shapes.append(shape)
        name = posixpath.join(posixpath.dirname(path), str(image["filename"]).replace("\\", "/"))
        yield AnnotatedImage(path, name, shapes, dropped)


def _regions(image: dict) -> list[dict]:
    regions = image["regions"]
    return list(regions.values()) if isinstance(regions, dict) else regions  # a mapping in version 1


def _class_key(attributes: Counter[str], path: str) -> str | None:
    """Return the attribute that names the class of a region; None if regions have no attribute."""
    if len(attributes) <= 1:
        return next(iter(attributes), None)
    known = [key for key in _CLASS_KEYS for found in attributes if found.casefold() == key]
    if not known:
        raise DatasetError(
            f"regions have the attributes {', '.join(attributes)}, and it is not clear which one is the class",
            where=path,
            remedy="rename one to 'class'",
        )
    return next(found for found in attributes if found.casefold() == known[0])


def _via_shape(region: dict, key: str | None) -> Shape | None:
    value = region["region_attributes"].get(key, _ONLY_CLASS) if key else _ONLY_CLASS
    if isinstance(value, dict):  # a checkbox
        value = next((name for name, is_set in value.items() if is_set), _ONLY_CLASS)
    name, shape = str(value), region["shape_attributes"]
    match shape.get("name"):
        case "polygon" | "polyline" if len(shape["all_points_x"]) >= 3:
            points = zip(shape["all_points_x"], shape["all_points_y"], strict=True)
            return Shape(name, (_flat(points),)) if shape["name"] == "polygon" else None
        case "rect":
            x, y, width, height = (float(shape[part]) for part in ("x", "y", "width", "height"))
            return Shape(name, (_rectangle(x, y, x + width, y + height),))
        case "circle":
            return Shape(name, (_ellipse(shape["cx"], shape["cy"], shape["r"], shape["r"]),))
        case "ellipse":
            return Shape(
                name, (_ellipse(shape["cx"], shape["cy"], shape["rx"], shape["ry"], shape.get("theta") or 0.0),)
            )
    return None


# Supervisely


def _read_supervisely(path: str, document: Any) -> Iterator[AnnotatedImage]:
    folder, name = posixpath.split(path)
    if posixpath.basename(folder) != "ann" or not isinstance(document, dict):
        return
    shapes, dropped = [], Counter()
    for entry in document["objects"]:
        shape = _supervisely_shape(entry)
        if shape is None:
            dropped[str(entry.get("geometryType"))] += 1
        else:
            shapes.append(shape)
    image = posixpath.join(posixpath.dirname(folder), "img", name.removesuffix(".json"))
    yield AnnotatedImage(path, image, shapes, dropped)


def _supervisely_shape(entry: dict) -> Shape | None:
    name = str(entry["classTitle"])
    match entry.get("geometryType"):
        case "polygon" if len(entry["points"]["exterior"]) >= 3:
            holes = tuple(_flat(points) for points in entry["points"]["interior"] if len(points) >= 3)
            return Shape(name, (_flat(entry["points"]["exterior"]),), holes)
        case "rectangle":
            return Shape(
                name, (_rectangle(*map(float, (*entry["points"]["exterior"][0], *entry["points"]["exterior"][1]))),)
            )
        case "bitmap":
            left, top = entry["bitmap"]["origin"]
            packed = zlib.decompressobj().decompress(base64.b64decode(entry["bitmap"]["data"]), MAX_PIXELS)
            return Shape(name, bitmaps=(Bitmap(int(left), int(top), packed),))
    return None


def _supervisely_classes(root: Folder) -> tuple[CategoryConfig, ...]:
    """Return the classes in meta.json; empty if there is none."""
    file = root.find_file("meta.json")
    if file is None:
        return ()
    try:
        listed = json.loads(read_text(file))["classes"]
        return tuple(CategoryConfig(id=number, name=entry["title"]) for number, entry in enumerate(listed, 1))
    except (ValueError, TypeError, KeyError):
        raise DatasetError("has no 'classes' with titles", where=file.name, remedy="export the project again") from None


# Shapes


def _flat(points: Iterable) -> Polygon:
    polygon = [float(value) for x, y in points for value in (x, y)]
    if not all(map(math.isfinite, polygon)):
        raise ValueError("a coordinate is not finite")
    return polygon


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    return _flat([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _ellipse(x: float, y: float, radius_x: float, radius_y: float, angle: float = 0.0) -> Polygon:
    turns = np.linspace(0, 2 * np.pi, _CIRCLE_CORNERS, endpoint=False)
    across, along = radius_x * np.cos(turns), radius_y * np.sin(turns)
    columns = x + across * np.cos(angle) - along * np.sin(angle)
    rows = y + across * np.sin(angle) + along * np.cos(angle)
    return _flat(zip(columns.tolist(), rows.tolist(), strict=True))


# The dataset

_READERS: dict[str, Callable[[str, Any], Iterator[AnnotatedImage]]] = {
    "labelme": _read_labelme,
    "via": _read_via,
    "supervisely": _read_supervisely,
}


def open_polygon_json(split: Split) -> AnnotatedImages:
    """Open the images of a split that have annotations."""
    root, format = split.root, split.config.format
    if format == "supervisely":
        root = root.folder_containing("meta.json", "data.root")
    annotated = list(_read_all(root, format, split))
    names = sorted({shape.name for image in annotated for shape in image.shapes})
    own = [image for image in annotated if _belongs(image.path, split)]
    if not own:
        raise DatasetError(
            f"no image of '{split.name}' is annotated in {root}",
            where=split.key,
            remedy=f"name its folder with {split.key}.images, or set {split.key}=null",
        )
    found = _supervisely_classes(root) if format == "supervisely" else ()
    found = found or tuple(CategoryConfig(id=number, name=name) for number, name in enumerate(names, 1))
    classes = resolve_classes(split, None, found, str(root))
    ids = {entry.name: entry.id for entry in found}
    labels = {}
    for name in names:
        if ids.get(name) not in classes.json_labels:
            raise DatasetError(
                f"the class '{printable(name)}' is not in the class list", where=str(root), remedy="add it"
            )
        labels[name] = classes.json_labels[ids[name]]
    _warn_of_dropped(own, split)
    return AnnotatedImages(
        classes.categories, split.config.task, PolygonReader(_with_files(own, root, split), labels, split)
    )


def _read_all(root: Folder, format: str, split: Split) -> Iterator[AnnotatedImage]:
    """Yield the annotations of all images of all splits."""
    names = [name for name in root.names() if name.endswith(".json")]
    for name, file in zip(names, root.files(names), strict=True):
        if file is not None:
            with split.problems.skipping(name):
                try:
                    yield from list(_READERS[format](name, json.loads(read_text(file))))
                except (
                    ValueError,
                    TypeError,
                    KeyError,
                    AttributeError,
                    RecursionError,
                    zlib.error,
                    binascii.Error,
                ) as error:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise DatasetError(
                        f"not an annotation of {format} ({printable(reason)})",
                        where=file.name,
                        remedy="export it again",
                    ) from None


def _belongs(path: str, split: Split) -> bool:
    if split.files.images is not None:
        return path.startswith(f"{posixpath.normpath(split.files.images)}/")
    return _split_of(path) == split.name


def _split_of(path: str) -> str:
    folders = path.lower().split("/")[:-1][::-1]
    return next((split for folder in folders for split, names in SPLIT_NAMES.items() if folder in names), "train")


def _with_files(annotated: list[AnnotatedImage], root: Folder, split: Split) -> Iterator[tuple[str, File, list[Shape]]]:
    """Yield (image id, image, objects); images that do not exist are reported and skipped."""
    images = [name for name in root.names() if is_image_name(name)]
    known, similar = set(images), SimilarNames(images)
    by_stem = {posixpath.splitext(name)[0]: name for name in images}
    for image in annotated:
        name = posixpath.normpath(image.image_name)
        if points_outside(image.image_name) or name not in known:
            name = by_stem.get(posixpath.splitext(image.path)[0]) or similar.find(image.image_name) or ""
        with split.problems.skipping(image.path):
            file = root.find_file(name) if name else None
            if file is None and image.embedded is not None:
                file = File(f"{root}/{image.path} (imageData)", image.embedded)
            if file is None:
                raise DatasetError(
                    f"its image {printable(image.image_name)} does not exist",
                    where=f"{root}/{image.path}",
                    remedy="add the image",
                )
            yield PurePosixPath(name or image.path).with_suffix("").as_posix(), file, image.shapes


def _warn_of_dropped(annotated: list[AnnotatedImage], split: Split) -> None:
    dropped = sum((image.dropped for image in annotated), Counter())
    if dropped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in dropped.most_common())
        split.problems.warning(
            f"{dropped.total()} shapes have no area and are dropped ({printable(kinds)})",
            where=split.key,
            remedy="draw objects as polygons",
            items=[image.path for image in annotated if image.dropped],
        )


def detect(root: Folder) -> Detection:
    """Detect JSON files of one of the tools, at the top or up to two folders down."""
    for folder in folders_below(root, _DETECTION_DEPTH):
        names = [name for name in folder.file_names() if name.endswith(".json")]
        for name in names[:_DETECTION_FILES]:
            format = _format_of(folder.file(name, ""))
            if format:
                found = {_split_of(path) for path in root.names() if path.endswith(".json")}
                splits = {split: {} if split in found else None for split in SPLIT_NAMES}
                return Detection((detected(root.root, format, "instance", splits),))
    return Detection()


def detect_file(path: Path) -> Detection:
    """Detect a single JSON: that of VIA is the annotation of its folder, others are those of one image."""
    format = _format_of(File(str(path)))
    if format == "via":
        return detect(open_folder(path.parent))
    if format:
        return Detection(mismatch=f"{path.name} has the annotations of one image by {format}; name its folder instead")
    return Detection()


def _format_of(file: File) -> str:
    """Return the format of a JSON, "" if it is of none of the tools."""
    try:
        document = json.loads(read_text(file))
    except (ValueError, RecursionError, DatasetError):
        return ""
    if not isinstance(document, dict):
        return ""
    if isinstance(document.get("shapes"), list) and "imagePath" in document:
        return "labelme"
    first = next(iter(document.values()), None)
    if "_via_img_metadata" in document or (isinstance(first, dict) and {"filename", "regions"} <= first.keys()):
        return "via"
    classes = document.get("classes")
    is_meta = isinstance(classes, list) and classes and isinstance(classes[0], dict) and "title" in classes[0]
    return "supervisely" if is_meta and PurePosixPath(file.name).name == "meta.json" else ""
