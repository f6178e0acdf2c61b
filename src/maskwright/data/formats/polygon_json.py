"""Folders of annotation tools that write polygons as JSON: Labelme, VIA (VGG Image Annotator) and Supervisely.

Images are next to the JSON, or in `img` next to `ann` (Supervisely). An image belongs to the split that one of its
folders is named after, else to the training split. Classes are the names that occur, in alphabetical order and numbered
from 1, or the classes in Supervisely's meta.json. Masks are drawn as pycocotools draws polygons; points and lines have
no area and are dropped.
"""

from __future__ import annotations

import json
import posixpath
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import hotcoco.mask
import numpy as np

from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import resolve_classes
from maskwright.data.formats.coco_instance import Annotation, draw_target
from maskwright.data.formats.image_list import ImageList
from maskwright.data.formats.layouts import SPLIT_NAMES, Detection, detected, folders_below, split_of_folder
from maskwright.data.formats.polygon_parsers import (
    ONLY_CLASS,
    PARSERS,
    AnnotatedImage,
    Shape,
    format_of,
    supervisely_classes,
)
from maskwright.data.images.find import is_image_name
from maskwright.data.images.multichannel import read_image_size
from maskwright.data.images.safe_pillow import MAX_PIXELS, open_with_pillow
from maskwright.data.storage.folders import File, Folder, open_folder
from maskwright.data.storage.similar_names import SimilarNames, points_outside
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError, one_line, printable
from maskwright.structures.annotations import Target

_DETECTION_DEPTH, _DETECTION_FILES = 2, 3
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error)


class PolygonReader:
    """Reader of drawn shapes."""

    def __init__(
        self, entries: Iterable[tuple[str, File, AnnotatedImage]], labels: dict[str, int | None], split: Split
    ):
        """Each entry is (image id, image, annotations); `labels` maps class names to labels."""
        self.images, self._labels = ImageList(entries), labels
        self._problems, self._channels = split.problems, split.channels

    def target(self, index: int) -> Target:
        """Return all objects; those that cover no pixel are dropped with a warning.

        Raises:
            DatasetError: a bitmap is damaged.
            ImageError: the size of the image cannot be read.
        """
        image_id, image, annotated = self.images.entries[index]
        height, width = annotated.size or read_image_size(image, self._channels)
        objects = []
        for number, shape in enumerate(annotated.shapes, 1):
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


def open_polygon_json(split: Split) -> AnnotatedImages:
    """Open the images of a split that have annotations."""
    root, format = split.root, split.config.format
    if format == "supervisely":
        root = root.folder_containing("meta.json", "data.root")
    annotated = [_with_names(image, split) for image in _read_all(root, format, split)]
    names = sorted({shape.name for image in annotated for shape in image.shapes})
    own = [image for image in annotated if _belongs(image.path, split)]
    if not own:
        raise DatasetError(
            f"no image of '{split.name}' is annotated in {root}",
            where=split.key,
            remedy=f"name its folder with {split.key}.images, or set {split.key}=null",
        )
    _report_dropped(own, split)
    found = supervisely_classes(root) if format == "supervisely" else ()
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
    return AnnotatedImages(
        classes.categories, split.config.task, PolygonReader(_with_files(own, root, split), labels, split)
    )


def _with_names(image: AnnotatedImage, split: Split) -> AnnotatedImage:
    """Return the annotations with a name for objects that have none."""
    if unnamed := sum(not shape.name for shape in image.shapes):
        split.problems.warning(
            f"{unnamed} shapes have no class and are read as '{ONLY_CLASS}'",
            where=image.path,
            remedy="name their class",
        )
    return image._replace(shapes=[shape if shape.name else shape._replace(name=ONLY_CLASS) for shape in image.shapes])


def _read_all(root: Folder, format: str, split: Split) -> Iterator[AnnotatedImage]:
    """Yield the annotations of all images of all splits."""
    names = _jsons(root.names())
    for name, file in zip(names, root.files(names), strict=True):
        if file is not None:
            with split.problems.skipping(name):
                try:
                    yield from list(PARSERS[format](name, json.loads(read_text(file))))
                except _MALFORMED as error:
                    raise DatasetError(
                        f"not an annotation of {format} ({printable(one_line(error))})",
                        where=file.name,
                        remedy="export it again",
                    ) from None


def _belongs(path: str, split: Split) -> bool:
    if split.files.images is not None:
        return path.startswith(f"{posixpath.normpath(split.files.images)}/")
    return _split_of(path) == split.name


def _split_of(path: str) -> str:
    folders = path.split("/")[:-1]
    return next(filter(None, map(split_of_folder, reversed(folders))), "train")


def _with_files(
    annotated: list[AnnotatedImage], root: Folder, split: Split
) -> Iterator[tuple[str, File, AnnotatedImage]]:
    """Yield (image id, image, annotations); images that do not exist are reported and skipped."""
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
            yield PurePosixPath(name or image.path).with_suffix("").as_posix(), file, image


def _report_dropped(annotated: list[AnnotatedImage], split: Split) -> None:
    """Report shapes without an area: as a warning, or an error if there are no others.

    Raises:
        DatasetError: no shape has an area.
    """
    dropped = sum((image.dropped for image in annotated), Counter())
    if dropped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in dropped.most_common())
        if not any(image.shapes for image in annotated):
            raise DatasetError(
                f"none of {dropped.total()} shapes has an area ({printable(kinds)})",
                where=split.key,
                remedy="draw objects as polygons",
            )
        split.problems.warning(
            f"{dropped.total()} shapes have no area and are dropped ({printable(kinds)})",
            where=split.key,
            remedy="draw objects as polygons",
            items=[image.path for image in annotated if image.dropped],
        )


def _jsons(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.lower().endswith(".json")]


def detect(root: Folder) -> Detection:
    """Detect JSON files of one of the tools, at the top or up to two folders down."""
    for folder in folders_below(root, _DETECTION_DEPTH):
        names = _jsons(folder.file_names())
        for name in names[:_DETECTION_FILES]:
            format = format_of(folder.file(name, ""))
            if format:
                found = {_split_of(path) for path in _jsons(root.names())}
                splits = {split: {} if split in found else None for split in SPLIT_NAMES}
                return Detection((detected(root.root, format, "instance", splits),))
    return Detection()


def detect_file(path: Path) -> Detection:
    """Detect a single JSON: that of VIA is the annotation of its folder, others are those of one image."""
    format = format_of(File(str(path)))
    if format == "via":
        return detect(open_folder(path.parent))
    if format:
        return Detection(mismatch=f"{path.name} has the annotations of one image by {format}; name its folder instead")
    return Detection()
