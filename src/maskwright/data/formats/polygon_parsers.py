"""Parse the JSON of annotation tools that store polygons: Labelme, VIA (VGG Image Annotator) and Supervisely."""

from __future__ import annotations

import base64
import json
import math
import posixpath
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from maskwright.config.schema import CategoryConfig
from maskwright.data.images.safe_pillow import MAX_PIXELS
from maskwright.data.storage.folders import File, Folder
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError

_CIRCLE_CORNERS = 64
_CLASS_KEYS = ("class", "label", "name", "type", "category", "object")  # attributes of VIA that name a class
ONLY_CLASS = "object"  # of VIA regions without an attribute, and of shapes without a name
_LABELME_AREAS = ("polygon", "rectangle", "oriented_rectangle", "rotation", "quadrilateral")  # some of X-AnyLabeling

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
        size: height and width of the image when it was annotated, if the JSON has them.
        embedded: the image itself, if the JSON has it.
    """

    path: str
    image_name: str
    shapes: list[Shape]
    dropped: Counter[str]
    size: tuple[int, int] | None = None
    embedded: bytes | None = None


def format_of(file: File) -> str:
    """Return the name of the tool that wrote a JSON; "" if it is none of these."""
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


def _parse_labelme(path: str, document: Any) -> Iterator[AnnotatedImage]:
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
    size = _stated_size(document.get("imageHeight"), document.get("imageWidth"))
    shapes = list(by_object.values())
    yield AnnotatedImage(path, posixpath.join(posixpath.dirname(path), name), shapes, dropped, size, image)


def _stated_size(height: object, width: object) -> tuple[int, int] | None:
    """Return the size of an image that a JSON states, None if it states none."""
    if not isinstance(height, int) or not isinstance(width, int) or min(height, width) < 1:
        return None
    return (height, width) if height * width <= MAX_PIXELS else None


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
    if kind in _LABELME_AREAS and len(points) >= 3:
        return Shape(name, (_flat(points),))
    return None


def _joined(first: Shape | None, second: Shape) -> Shape:
    if first is None:
        return second
    return Shape(
        first.name, first.polygons + second.polygons, first.holes + second.holes, first.bitmaps + second.bitmaps
    )


def _parse_via(path: str, document: Any) -> Iterator[AnnotatedImage]:
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
    value = region["region_attributes"].get(key, "") if key else ONLY_CLASS
    if isinstance(value, dict):  # a checkbox
        value = next((name for name, is_set in value.items() if is_set), "")
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


def _parse_supervisely(path: str, document: Any) -> Iterator[AnnotatedImage]:
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
    size = document.get("size") or {}
    yield AnnotatedImage(path, image, shapes, dropped, _stated_size(size.get("height"), size.get("width")))


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
        case "bitmap" | "alpha_mask":
            left, top = entry["bitmap"]["origin"]
            packed = zlib.decompressobj().decompress(base64.b64decode(entry["bitmap"]["data"]), MAX_PIXELS)
            return Shape(name, bitmaps=(Bitmap(int(left), int(top), packed),))
    return None


def supervisely_classes(root: Folder) -> tuple[CategoryConfig, ...]:
    """Return the classes in meta.json; empty if there is none."""
    file = root.find_file("meta.json")
    if file is None:
        return ()
    try:
        listed = json.loads(read_text(file))["classes"]
        return tuple(CategoryConfig(id=number, name=entry["title"]) for number, entry in enumerate(listed, 1))
    except (ValueError, TypeError, KeyError):
        raise DatasetError("has no 'classes' with titles", where=file.name, remedy="export the project again") from None


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


PARSERS: dict[str, Callable[[str, Any], Iterator[AnnotatedImage]]] = {
    "labelme": _parse_labelme,
    "via": _parse_via,
    "supervisely": _parse_supervisely,
}
