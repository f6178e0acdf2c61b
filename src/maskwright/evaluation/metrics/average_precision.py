"""Average precision and recall of instances, by the rules of the COCO detection API; matched by hotcoco."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import hotcoco
import hotcoco.mask
import numpy as np

from maskwright.errors import DatasetError
from maskwright.evaluation.metrics.base import Metric, Scores, mean
from maskwright.results.rle import Rle, encode_id_map, encode_segmentation
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target


class AveragePrecision(Metric):
    """COCO average precision of instance masks, and of the boxes around them. Only things are scored.

    Crowd regions absorb predictions and are never missed. Areas and boxes are those of the annotations if stated,
    otherwise they are measured on the masks. The area of a predicted mask is its pixel count, and that of a predicted
    box its box area, as in detectron2.

    Ties of scores: within an image, the earlier prediction comes first; between images, the one with the smaller id.
    Ids that are not integers are ordered by a hash, so the order of `update` never matters. Object ids start at 1 in
    each image: pycocotools treats an annotation with id 0 as "no match" and counts its detection as false.

    Args:
        max_detections: ascending limits of predictions per class and image, best first. AP is at the last limit;
            pycocotools always summarizes AP at 100, and has no data (-1) if 100 is not one of the limits.

    Raises:
        DatasetError: no category is a thing.
    """

    task = target_task = "instance"

    def __init__(self, categories: Sequence[Category], max_detections: tuple[int, ...] = (1, 10, 100)) -> None:
        super().__init__(categories)
        self.max_detections = tuple(max_detections)
        self.things = find_things(self.categories)
        self.matchings = {kind: self._matching(kind) for kind in ("segm", "bbox")}

    def _matching(self, kind: str) -> hotcoco.StreamingEval:
        params = hotcoco.Params(kind)
        params.max_dets = list(self.max_detections)
        return hotcoco.StreamingEval(coco_categories(self.categories), kind, params=params)

    def _add(self, result: Segmentation, target: Target) -> None:
        image = integer_image_id(target.image_id)
        images = [{"id": image, "height": result.size[0], "width": result.size[1]}]
        truth = coco_annotations(target, self.things, image)
        masks = coco_results(result, target, self.things, image)
        mask_boxes = boxes([entry["segmentation"] for entry in masks]).tolist()
        box_results = [
            {key: entry[key] for key in ("image_id", "category_id", "score")} | {"bbox": box}
            for entry, box in zip(masks, mask_boxes, strict=True)
        ]
        self.matchings["segm"].update(images, truth, masks)
        self.matchings["bbox"].update(images, truth, box_results)

    def _merge(self, other: AveragePrecision) -> None:
        for kind, matching in self.matchings.items():
            self.matchings[kind] = hotcoco.StreamingEval.merge([matching, other.matchings[kind]])

    def compute(self) -> Scores:
        """Return AP, AP50, AP75, AP by size (APs, APm, APl) and AR of masks; for boxes, the same with prefix `box_`.

        Small is below 32 x 32 pixels of the original image, large is at least 96 x 96.
        """
        summary, columns = {}, {}
        for kind, prefix in (("segm", ""), ("bbox", "box_")):
            precision, recall = _curves(self.matchings[kind])
            summary |= coco_summary(precision, recall, self.max_detections, prefix)
            columns |= coco_columns(precision, self.things, prefix)
        return self._scores(summary, columns)


def find_things(categories: Sequence[Category]) -> np.ndarray:
    """Return which classes are things, (K,) bool.

    Raises:
        DatasetError: no class is a thing.
    """
    things = np.array([category.is_thing for category in categories], dtype=bool)
    if not things.any():
        raise DatasetError(
            "average precision is for things, but every category is stuff",
            where="data.categories",
            remedy="mark countable classes with is_thing: true, or set evaluate.task=semantic",
        )
    return things


def coco_categories(categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Return the things as COCO categories; ids are label + 1."""
    return [{"id": label, "name": category.name} for label, category in enumerate(categories, 1) if category.is_thing]


def encode_target(target: Target) -> list[Rle]:
    """Encode the annotated objects, at the target's current size."""
    layers = [encode_id_map(layer, len(target)) for layer in target.id_maps.cpu().numpy()]
    if len(layers) == 1:
        return layers[0]
    merged = (hotcoco.mask.merge(list(parts)) for parts in zip(*layers, strict=True))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in merged]


def areas(rles: list[Rle]) -> np.ndarray:
    """Return the number of pixels of each mask, (N,) float64."""
    return np.asarray(hotcoco.mask.area(rles), dtype=np.float64)


def boxes(rles: list[Rle]) -> np.ndarray:
    """Return COCO boxes, (N, 4) float64 x, y, width, height in pixels; zeros for an empty mask."""
    return np.asarray(hotcoco.mask.to_bbox(rles), dtype=np.float64).reshape(-1, 4)


def coco_annotations(target: Target, things: np.ndarray, image: int) -> list[dict[str, Any]]:
    """Return the annotated things as COCO annotations; ids start at 1."""
    rles = encode_target(target)
    if target.boxes is None:
        xywh = boxes(rles)
    else:
        xywh = np.concatenate([target.boxes[:, :2], target.boxes[:, 2:] - target.boxes[:, :2]], 1)
    sizes = areas(rles) if target.areas is None else target.areas
    return [
        {
            "id": i + 1,
            "image_id": image,
            "category_id": label + 1,
            "iscrowd": int(crowd),
            "area": float(sizes[i]),
            "bbox": xywh[i].tolist(),
            "segmentation": rles[i],
        }
        for i, (label, crowd) in enumerate(zip(target.labels.tolist(), target.is_crowd.tolist(), strict=True))
        if things[label]
    ]


def coco_results(result: Segmentation, target: Target, things: np.ndarray, image: int) -> list[dict[str, Any]]:
    """Return the predicted things as COCO results without boxes.

    Raises:
        ValueError: the result is not an instance result with scores.
    """
    if result.task != "instance" or result.scores is None:
        raise ValueError(
            f"image {target.image_id}: average precision needs an instance result with scores, found {result.task}"
        )
    rles: list[Rle] = encode_segmentation(result)
    return [
        {"image_id": image, "category_id": label + 1, "score": score, "segmentation": rle}
        for label, score, rle in zip(result.labels.tolist(), result.scores.tolist(), rles, strict=True)
        if things[label]
    ]


def integer_image_id(image_id: int | str) -> int:
    """Return an integer for an image id: itself if it is one, otherwise a hash."""
    if isinstance(image_id, (int, np.integer)) and 0 <= image_id < 2**62:
        return int(image_id)
    return 2**62 + int.from_bytes(hashlib.blake2b(str(image_id).encode(), digest_size=7).digest())


def coco_summary(
    precision: np.ndarray, recall: np.ndarray, max_detections: tuple[int, ...], prefix: str
) -> dict[str, float | None]:
    """Return the twelve COCO scores.

    Args:
        precision: (IoU thresholds, recalls, things, areas, max_detections), NaN if there is no data.
        recall: the same shape without recalls.
        max_detections: see `AveragePrecision`.
        prefix: prefix of the names.
    """
    scores = {name: mean(precision[i, :, :, 0, -1]) for name, i in (("AP", slice(None)), ("AP50", 0), ("AP75", 5))}
    scores |= {f"AP{size}": mean(precision[:, :, :, area, -1]) for area, size in enumerate("sml", 1)}
    scores |= {f"AR{limit}": mean(recall[:, :, 0, position]) for position, limit in enumerate(max_detections)}
    scores |= {f"AR{size}": mean(recall[:, :, area, -1]) for area, size in enumerate("sml", 1)}
    return {prefix + name: value for name, value in scores.items()}


def coco_columns(precision: np.ndarray, things: np.ndarray, prefix: str) -> dict[str, list[float | None]]:
    """Return AP and AP50 of each class, None for stuff; `precision` as in `coco_summary`."""
    columns: dict[str, list[float | None]] = {}
    for name, thresholds in (("AP", slice(None)), ("AP50", slice(0, 1))):
        values: list[float | None] = [None] * len(things)
        for position, label in enumerate(np.flatnonzero(things)):
            values[label] = mean(precision[thresholds, :, position, 0, -1])
        columns[prefix + name] = values
    return columns


def _curves(matching: hotcoco.StreamingEval) -> tuple[np.ndarray, np.ndarray]:
    """Return precision and recall for `coco_summary`."""
    finished = hotcoco.StreamingEval.from_bytes(matching.to_bytes()).finalize()  # a copy, because finalize consumes it
    finished.accumulate()
    curves = finished.eval
    assert curves is not None
    precision, recall = (np.where(curves[name] < 0, np.nan, curves[name]) for name in ("precision", "recall"))
    return precision, recall
