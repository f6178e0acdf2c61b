"""Writers of the layouts: each class adds the images of one split, and writes shared files at the end."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from maskwright.data.convert.report import ConversionReport
from maskwright.errors import DatasetError
from maskwright.results.formats.yolo import label_line
from maskwright.results.outlines import Crop, crop_ids, trace_polygons
from maskwright.results.rle import Rle, encode_id_map, encode_masks
from maskwright.structures.annotations import Category, Target
from maskwright.structures.id_maps import present_values

VOID = 255  # of label maps: pixels without a class
_HIDDEN = "pixels of objects are hidden by objects listed after them"


class Layout(ABC):
    """Writes the annotations of one split.

    Args:
        root: folder of the new dataset.
        split: "train", "val" or "test".
        categories: the classes of the labels.
        report: counts what cannot be stored.
    """

    images: str  # folder of the images below the root; {} is the split

    def __init__(self, root: Path, split: str, categories: Sequence[Category], report: ConversionReport) -> None:
        self.root, self.split, self.categories, self.report = root, split, tuple(categories), report
        self.is_thing = np.array([category.is_thing for category in categories], dtype=bool)

    @abstractmethod
    def add(self, file_name: str, image_id: int, target: Target) -> None:
        """Add the objects of an image, whose file has this name in the folder of images."""

    @abstractmethod
    def finish(self) -> None:
        """Write the files that all images share."""

    def _folder(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _visible(self, target: Target) -> np.ndarray:
        """Return the number of the object at each pixel, (H, W), 0 for none; where objects overlap, the last wins."""
        layers = target.id_maps.numpy()
        visible = layers.max(0)
        self.report.add(_HIDDEN, int(np.count_nonzero(layers) - np.count_nonzero(visible)))
        shown = int(np.count_nonzero(present_values(visible)))
        self.report.add("objects without a visible pixel are dropped", len(target) - shown)
        return visible


class _CocoJson(Layout):
    """Base of the two COCO layouts."""

    images = "{}"
    kind: str

    def __init__(self, root: Path, split: str, categories: Sequence[Category], report: ConversionReport) -> None:
        super().__init__(root, split, categories, report)
        self._images: list[dict] = []
        self._annotations: list[dict] = []

    def add(self, file_name: str, image_id: int, target: Target) -> None:
        """See `Layout`."""
        height, width = target.original_size
        self._images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        self._add_objects(file_name, image_id, target)

    @abstractmethod
    def _add_objects(self, file_name: str, image_id: int, target: Target) -> None: ...

    def finish(self) -> None:
        """See `Layout`."""
        document = {"images": self._images, "annotations": self._annotations, "categories": self._classes()}
        file = self._folder("annotations") / f"{self.kind}_{self.split}.json"
        file.write_text(json.dumps(document), encoding="utf-8")

    def _classes(self) -> list[dict]:
        return [
            {
                "id": category.id,
                "name": category.name,
                "supercategory": category.group or category.name,
                "isthing": int(category.is_thing),
                "color": list(category.color),
            }
            for category in self.categories
        ]


class CocoPanoptic(_CocoJson):
    """annotations/panoptic_SPLIT.json, and a PNG for each image whose color R + 256 G + 65536 B is the segment's id."""

    kind = "panoptic"

    def _add_objects(self, file_name: str, image_id: int, target: Target) -> None:
        visible = self._visible(target)
        segments = [
            {
                "id": number,
                "category_id": self.categories[label].id,
                "iscrowd": int(crowd),
                "area": int(crop.mask.sum()),
                "bbox": _box(crop),
            }
            for number, (label, crowd, crop) in enumerate(
                zip(target.labels.tolist(), target.is_crowd.tolist(), crop_ids(visible, len(target)), strict=True), 1
            )
            if crop is not None
        ]
        png = Path(file_name).with_suffix(".png").name
        ids = visible.astype(np.int32)
        colors = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
        Image.fromarray(colors).save(self._folder(f"annotations/panoptic_{self.split}") / png)
        self._annotations.append({"image_id": image_id, "file_name": png, "segments_info": segments})


class CocoInstances(_CocoJson):
    """annotations/instances_SPLIT.json, with every mask as compressed RLE, which stores holes and parts exactly."""

    kind = "instances"

    def __init__(self, root: Path, split: str, categories: Sequence[Category], report: ConversionReport) -> None:
        super().__init__(root, split, categories, report)
        self._next_id = 1

    def _add_objects(self, file_name: str, image_id: int, target: Target) -> None:
        things = _things(target, self.is_thing, self.report)
        columns = (things.labels.tolist(), things.is_crowd.tolist(), _crops(things), _rles(things))
        for label, crowd, crop, rle in zip(*columns, strict=True):
            annotation = {"id": self._next_id, "image_id": image_id, "category_id": self.categories[label].id}
            area, box = (int(crop.mask.sum()), _box(crop)) if crop else (0, [0, 0, 0, 0])
            annotation |= {"iscrowd": int(crowd), "area": area, "bbox": box, "segmentation": rle}
            self._annotations.append(annotation)
            self._next_id += 1

    def _classes(self) -> list[dict]:
        return [entry for entry in super()._classes() if entry["isthing"]]


class LabelMaps(Layout):
    """labels/SPLIT/NAME.png, whose values are class ids and 255 for pixels without a class; _classes.csv names them."""

    images = "images/{}"

    def __init__(self, root: Path, split: str, categories: Sequence[Category], report: ConversionReport) -> None:
        super().__init__(root, split, categories, report)
        ids = [category.id for category in categories]
        if len(ids) > VOID:
            raise DatasetError(f"{len(ids)} classes, but label maps have room for {VOID}", where=str(root))
        self.values = ids if all(0 <= value < VOID for value in ids) else list(range(len(ids)))
        self.table = np.array([VOID, *self.values], dtype=np.uint8)

    def add(self, file_name: str, image_id: int, target: Target) -> None:
        """See `Layout`."""
        visible = self._visible(target)
        labels = target.labels.numpy()
        things = np.bincount(labels[self.is_thing[labels]], minlength=len(self.categories))
        self.report.add("objects are merged with others of their class", int(things[things > 1].sum()))
        self.report.add("crowd regions become pixels of their class", int(target.is_crowd.sum()))
        numbers = np.concatenate([[0], labels + 1])
        png = Path(file_name).with_suffix(".png").name
        Image.fromarray(self.table[numbers[visible]]).save(self._folder(f"labels/{self.split}") / png)

    def finish(self) -> None:
        """See `Layout`."""
        rows = [f"{value}, {category.name}\n" for value, category in zip(self.values, self.categories, strict=True)]
        text = "Pixel Value, Class\n" + "".join(rows)
        (self._folder(f"labels/{self.split}") / "_classes.csv").write_text(text, encoding="utf-8")


class Yolo(Layout):
    """labels/SPLIT/NAME.txt with a polygon per line, and data.yaml."""

    images = "images/{}"

    def add(self, file_name: str, image_id: int, target: Target) -> None:
        """See `Layout`."""
        things = _things(target, self.is_thing, self.report)
        self.report.add("crowd regions are dropped", int(things.is_crowd.sum()))
        things = things.select(~things.is_crowd)
        classes = np.cumsum(self.is_thing) - 1
        lines, with_holes, in_parts = [], 0, 0
        for crop, label in zip(_crops(things), things.labels.tolist(), strict=True):
            polygons = trace_polygons(crop) if crop is not None else []
            lines += [label_line(int(classes[label]), polygon, target.original_size) for polygon in polygons]
            with_holes += any(polygon.has_hole for polygon in polygons)
            in_parts += len(polygons) > 1
        self.report.add("objects have holes, which are filled", with_holes)
        self.report.add("objects of several parts become one object for each part", in_parts)
        text = Path(file_name).with_suffix(".txt").name
        (self._folder(f"labels/{self.split}") / text).write_text("".join(lines), encoding="utf-8")

    def finish(self) -> None:
        """See `Layout`; data.yaml names the splits so far."""
        file = self.root / "data.yaml"
        document = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
        names = [category.name for category in self.categories if category.is_thing]
        document |= {self.split: self.images.format(self.split), "names": dict(enumerate(names))}
        file.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _things(target: Target, is_thing: np.ndarray, report: ConversionReport) -> Target:
    """Return the things, and count the dropped stuff."""
    kept = is_thing[target.labels.numpy()]
    report.add("stuff segments are dropped", int((~kept).sum()))
    return target if kept.all() else target.select(target.labels.new_tensor(kept.tolist()).bool())


def _crops(target: Target) -> list[Crop | None]:
    """Return the mask of each object; None for one without a pixel."""
    layers = [list(crop_ids(layer, len(target))) for layer in target.id_maps.numpy()]
    found = []
    for crops in zip(*layers, strict=True):
        parts = [crop for crop in crops if crop is not None]
        found.append(parts[0] if len(parts) == 1 else _merge(parts) if parts else None)
    return found


def _merge(parts: list[Crop]) -> Crop:
    """Return one mask for the parts of an object on several layers."""
    top, left = min(part.top for part in parts), min(part.left for part in parts)
    bottom = max(part.top + part.mask.shape[0] for part in parts)
    right = max(part.left + part.mask.shape[1] for part in parts)
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    for part in parts:
        rows = slice(part.top - top, part.top - top + part.mask.shape[0])
        columns = slice(part.left - left, part.left - left + part.mask.shape[1])
        mask[rows, columns] |= part.mask
    return Crop(mask, top, left)


def _rles(target: Target) -> list[Rle]:
    """Return the mask of each object."""
    layers = target.id_maps.numpy()
    if len(layers) == 1:
        return encode_id_map(layers[0], len(target))
    return [encode_masks((layers == number).any(0)[None])[0] for number in range(1, len(target) + 1)]


def _box(crop: Crop) -> list[int]:
    """Return x, y, width, height of a mask cut to its bounding box."""
    height, width = crop.mask.shape
    return [crop.left, crop.top, width, height]
