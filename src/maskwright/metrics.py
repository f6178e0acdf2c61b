"""How good results are: mean IoU, panoptic quality and average precision, on annotations of the original size.

Sources: mean IoU as OpenMMLab's mmseg averages it; panoptic quality of Kirillov et al., "Panoptic Segmentation"
(CVPR 2019), with the void and crowd rules of the COCO panoptic API; average precision of the COCO detection API.

What is unusual: every metric streams. It keeps counts or the outcome of matching, never a mask of an earlier image; it
can be pickled, and metrics of several processes merge into exactly the one that a single process would have had.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import hotcoco
import numpy as np
from rich.table import Table

from maskwright.errors import DatasetError
from maskwright.rle import areas, boxes, encode_segmentation, encode_target
from maskwright.structures import Category, Segmentation, Target, Task

# What a metric says, as plain values for JSON: name -> score in 0..1, the customary one first; "images" -> how many;
# "per_class" -> class name -> column -> score or count. None means that nothing in the data could be scored.
Scores = dict[str, Any]


class Metric(ABC):
    """A score that grows image by image. Picklable, so that processes can hand theirs to one that merges them."""

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(categories)
        self.image_ids: set[int | str] = set()

    def update(self, result: Segmentation, target: Target) -> None:
        """Add one image.

        Args:
            result: the prediction at the original size of the image.
            target: its annotations at the same size, crowds included.

        Raises:
            ValueError: sizes or categories differ, the result is of a task that this metric cannot score, or the image
                was added before.
        """
        size = tuple(target.id_maps.shape[-2:])
        if tuple(result.size) != size:
            raise ValueError(f"image {target.image_id}: the result is {result.size}, its annotations are {size}")
        if len(result.categories) != len(self.categories):
            found = f"{len(result.categories)} categories, the metric {len(self.categories)}"
            raise ValueError(f"image {target.image_id}: the result has {found}")
        self._refuse_repeated({target.image_id})
        self._add(result, target)
        self.image_ids.add(target.image_id)

    def merge(self, other: Metric) -> None:
        """Add all images of `other`, which must not share any with this metric.

        Raises:
            ValueError: an image is in both, or the two differ in kind or categories.
        """
        if type(self) is not type(other) or self.categories != other.categories:
            raise ValueError(f"cannot merge {type(other).__name__} into {type(self).__name__}: they score other things")
        self._refuse_repeated(other.image_ids)
        self._join(other)
        self.image_ids |= other.image_ids

    @abstractmethod
    def compute(self) -> Scores:
        """The scores of all images so far; more may be added afterwards."""

    @abstractmethod
    def _add(self, result: Segmentation, target: Target) -> None: ...

    @abstractmethod
    def _join(self, other) -> None: ...

    def _scores(self, summary: dict[str, float | None], columns: dict[str, list]) -> Scores:
        names = [category.name for category in self.categories]
        unique = [c.name if names.count(c.name) == 1 else f"{c.name} ({c.id})" for c in self.categories]
        rows = {name: {column: values[i] for column, values in columns.items()} for i, name in enumerate(unique)}
        return summary | {"images": len(self.image_ids), "per_class": rows}

    def _refuse_repeated(self, image_ids: set[int | str]) -> None:
        twice = self.image_ids & image_ids
        if twice:
            raise ValueError(f"image {min(map(str, twice))} is scored twice; give each image to one process, once")


def build_metric(task: Task, categories: Sequence[Category]) -> Metric:
    """The customary metric of a task: mean IoU, average precision or panoptic quality.

    Raises:
        DatasetError: average precision is asked for, and no category is a thing.
    """
    match task:
        case "semantic":
            return MeanIoU(categories)
        case "instance":
            return AveragePrecision(categories)
        case "panoptic":
            return PanopticQuality(categories)


class MeanIoU(Metric):
    """Overlap of the classes over all pixels of all images.

    Pixels without an object and crowd regions are not scored. Panoptic results are scored by the classes of their
    segments. A pixel that the result leaves without a class is a miss of the class that is there.

    Attributes:
        confusion: (K+1, K+1) int64, pixels by annotated (rows) and predicted (columns) class; the last row is ignored
            pixels, the last column pixels without a predicted class.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        super().__init__(categories)
        side = len(self.categories) + 1
        self.confusion = np.zeros((side, side), dtype=np.int64)

    def _add(self, result: Segmentation, target: Target) -> None:
        nothing = len(self.categories)
        truth = target.label_map(ignore_index=nothing).cpu().numpy()
        pairs = truth * (nothing + 1) + _predicted_classes(result, nothing)
        self.confusion += np.bincount(pairs.ravel(), minlength=self.confusion.size).reshape(self.confusion.shape)

    def _join(self, other: MeanIoU) -> None:
        self.confusion += other.confusion

    def compute(self) -> Scores:
        """Give mIoU and mAcc (means over classes), fwIoU (IoU weighted by annotated pixels) and aAcc (share of pixels).

        A class that occurs neither in annotations nor in results has no data and counts in no mean. A class that is
        only predicted has IoU 0 and counts in mIoU, as in mmseg; detectron2 leaves it out, so its mIoU can be higher
        on data where a class of the list is never annotated.
        """
        confusion = self.confusion[:-1].astype(np.float64)
        hits = confusion.diagonal()
        annotated, predicted = confusion.sum(1), confusion[:, :-1].sum(0)
        iou = _ratio(hits, annotated + predicted - hits)
        accuracy = _ratio(hits, annotated)
        summary = {
            "mIoU": _mean(iou),
            "mAcc": _mean(accuracy),
            "aAcc": _number(_ratio(hits.sum(), annotated.sum())),
            "fwIoU": _number(_ratio(np.nansum(annotated * iou), annotated.sum())),
        }
        per_class = {"IoU": _column(iou), "Acc": _column(accuracy), "pixels": annotated.astype(np.int64).tolist()}
        return self._scores(summary, per_class)


class PanopticQuality(Metric):
    """PQ, SQ and RQ with the rules of the COCO panoptic API.

    A predicted and an annotated segment of one class match where their IoU is above 0.5; annotated void inside the
    predicted segment does not count in the union. Crowd regions never match and are never missed. A predicted segment
    without a match is no false positive where more than half of it lies on void or on the crowd region of its class;
    of several crowd regions of a class the last one counts, as in the API. A segment of the result without
    a pixel does not count. Areas are counted from the maps, not read from the annotation file.

    hotcoco's `PanopticEval` is not used, as it wants all images at once and cannot be merged; a test holds both equal.

    Attributes:
        counts: (K, 3) int64, true positives, false positives, false negatives.
        iou_sums: IoU of each class's true positives in units of 2^-53. An IoU above 0.5 is a whole number of these, so
            the sums are exact and do not depend on the order of images or on how processes shared them.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        super().__init__(categories)
        self.counts = np.zeros((len(self.categories), 3), dtype=np.int64)
        self.iou_sums = [0] * len(self.categories)

    def _add(self, result: Segmentation, target: Target) -> None:
        if result.segment_map is None:
            raise ValueError(f"image {target.image_id}: panoptic quality needs a panoptic result, found {result.task}")
        if len(target.id_maps) > 1:
            raise DatasetError(
                f"image {target.image_id}: annotated objects overlap, but panoptic segments must not; "
                "use a panoptic data set, or evaluate.task=instance"
            )
        labels, crowd = target.labels.cpu().numpy(), target.is_crowd.cpu().numpy()
        overlap = _overlaps(target.id_maps[0].cpu().numpy(), result.segment_map, len(target), len(result))  # (N+1, M+1)
        pixels, void, inside = overlap.sum(0)[1:], overlap[0, 1:], overlap[1:, 1:]

        union = overlap.sum(1)[1:, None] + pixels - inside - void  # (N, M)
        iou = np.nan_to_num(_ratio(inside, union))
        match = (iou > 0.5) & (labels[:, None] == result.labels) & ~crowd[:, None]
        for label, value in zip(labels[np.nonzero(match)[0]].tolist(), iou[match].tolist(), strict=True):
            self.iou_sums[label] += int(value * 2**53)

        missed = ~match.any(1) & ~crowd
        excused = void + _crowd_pixels(inside, labels, crowd, result.labels) > pixels / 2
        false = ~match.any(0) & (pixels > 0) & ~excused
        for column, group in enumerate((result.labels[match.any(0)], result.labels[false], labels[missed])):
            self.counts[:, column] += np.bincount(group, minlength=len(self.categories))

    def _join(self, other: PanopticQuality) -> None:
        self.counts += other.counts
        self.iou_sums = [a + b for a, b in zip(self.iou_sums, other.iou_sums, strict=True)]

    def compute(self) -> Scores:
        """PQ, SQ and RQ over all classes, over things (`_th`) and over stuff (`_st`).

        Means are over the classes that have a segment in annotations or results. SQ of a class without a match is 0.
        """
        tp, fp, fn = self.counts.T
        iou_sums = np.array([total / 2**53 for total in self.iou_sums])
        seen = self.counts.sum(1) > 0
        rq = _ratio(tp, tp + fp / 2 + fn / 2)
        sq = np.where(seen, np.nan_to_num(_ratio(iou_sums, tp)), np.nan)
        quality = {"PQ": _ratio(iou_sums, tp + fp / 2 + fn / 2), "SQ": sq, "RQ": rq}

        thing = np.array([category.is_thing for category in self.categories], dtype=bool)
        groups = {"": np.ones_like(thing), "_th": thing, "_st": ~thing}
        summary = {
            name + end: _mean(values[group]) for end, group in groups.items() for name, values in quality.items()
        }
        per_class = {name: _column(values) for name, values in quality.items()}
        per_class |= {"TP": tp.tolist(), "FP": fp.tolist(), "FN": fn.tolist()}
        return self._scores(summary, per_class)


class AveragePrecision(Metric):
    """COCO average precision of instance masks, and of the boxes around them. Only things are scored.

    Crowd regions absorb predictions and are never missed. Where annotations state areas and boxes, those decide;
    otherwise they are measured on the masks. A predicted mask has its own pixel count as area and a predicted box its
    box area, as detectron2 scores them.

    Equal scores: within an image the earlier prediction comes first; between images, the one with the smaller id. Ids
    that are not whole numbers are ordered by a hash, so the order of `update` never matters. Object numbers start at 1
    in every image: pycocotools takes an annotation whose id is 0 for "no match" and calls its detection false.

    Args:
        max_detections: ascending; predictions of one class and image that count, best first. AP is at the last, while
            pycocotools summarises AP at 100 whatever its limits are, and has no data (-1) where 100 is not one of them.

    Raises:
        DatasetError: no category is a thing.
    """

    def __init__(self, categories: Sequence[Category], max_detections: tuple[int, ...] = (1, 10, 100)) -> None:
        super().__init__(categories)
        self.max_detections = tuple(max_detections)
        self.things = np.array([category.is_thing for category in self.categories], dtype=bool)
        if not self.things.any():
            raise DatasetError(
                "average precision scores things, but every category is stuff; "
                "mark the countable ones with is_thing: true, or use evaluate.task=semantic"
            )
        self.matchings = {kind: self._matching(kind) for kind in ("segm", "bbox")}

    def _matching(self, kind: str) -> hotcoco.StreamingEval:
        params = hotcoco.Params(kind)
        params.max_dets = list(self.max_detections)
        names = [{"id": label, "name": category.name} for label, category in enumerate(self.categories, 1)]
        kept = [name for name, thing in zip(names, self.things, strict=True) if thing]
        return hotcoco.StreamingEval(kept, kind, params=params)

    def _add(self, result: Segmentation, target: Target) -> None:
        if result.instance_masks is None or result.scores is None:
            raise ValueError(
                f"image {target.image_id}: average precision needs an instance result with scores, found {result.task}"
            )
        number = _image_number(target.image_id)
        images = [{"id": number, "height": result.size[0], "width": result.size[1]}]
        truth = self._annotations(target, number)
        rows = np.flatnonzero(self.things[result.labels])
        rles = encode_segmentation(result)
        masks = [
            {"image_id": number, "category_id": label, "score": score, "segmentation": rles[i]}
            for i, label, score in zip(
                rows, (result.labels[rows] + 1).tolist(), result.scores[rows].tolist(), strict=True
            )
        ]
        frames = [
            {"image_id": number, "category_id": mask["category_id"], "score": mask["score"], "bbox": box}
            for mask, box in zip(masks, boxes(rles)[rows].tolist(), strict=True)
        ]
        self.matchings["segm"].update(images, truth, masks)
        self.matchings["bbox"].update(images, truth, frames)

    def _annotations(self, target: Target, number: int) -> list[dict]:
        rles = encode_target(target)
        if target.boxes is None:
            frames = boxes(rles)
        else:
            frames = np.concatenate([target.boxes[:, :2], target.boxes[:, 2:] - target.boxes[:, :2]], 1)
        sizes = areas(rles) if target.areas is None else target.areas
        return [
            {
                "id": i + 1,
                "image_id": number,
                "category_id": label + 1,
                "iscrowd": int(crowd),
                "area": float(sizes[i]),
                "bbox": frames[i].tolist(),
                "segmentation": rles[i],
            }
            for i, (label, crowd) in enumerate(zip(target.labels.tolist(), target.is_crowd.tolist(), strict=True))
            if self.things[label]
        ]

    def _join(self, other: AveragePrecision) -> None:
        for kind, matching in self.matchings.items():
            self.matchings[kind] = hotcoco.StreamingEval.merge([matching, other.matchings[kind]])

    def compute(self) -> Scores:
        """AP, AP50, AP75, by size (APs, APm, APl) and AR of masks; the same of boxes with the prefix `box_`.

        Small is below 32 x 32 pixels of the original image, large is from 96 x 96 on.
        """
        summary, per_class = {}, {}
        for kind, prefix in (("segm", ""), ("bbox", "box_")):
            precision, recall = _curves(self.matchings[kind])
            summary |= {prefix + name: value for name, value in _coco_summary(precision, recall, self.max_detections)}
            for name, thresholds in (("AP", slice(None)), ("AP50", slice(0, 1))):
                per_class[prefix + name] = self._by_class(precision[thresholds, :, :, 0, -1])
        return self._scores(summary, per_class)

    def _by_class(self, precision: np.ndarray) -> list[float | None]:
        values: list[float | None] = [None] * len(self.categories)
        for position, label in enumerate(np.flatnonzero(self.things)):
            values[label] = _mean(precision[:, :, position])
        return values


def format_table(scores: Scores) -> Table:
    """The scores over all classes for people, in percent; "-" where there is no data."""
    table = Table("score", title=f"{scores['images']} images")
    table.add_column("%", justify="right")
    for name, value in scores.items():
        if name not in ("images", "per_class"):
            table.add_row(name, _percent(value))
    return table


def format_class_table(scores: Scores) -> Table:
    """The scores of each class for people, in percent, and its counts; "-" where there is no data."""
    table = Table("class", title=f"{scores['images']} images")
    for column in dict.fromkeys(column for row in scores["per_class"].values() for column in row):
        table.add_column(column, justify="right")
    for name, row in scores["per_class"].items():
        table.add_row(name, *map(_percent, row.values()))
    return table


def _predicted_classes(result: Segmentation, nothing: int) -> np.ndarray:
    if result.label_map is not None:
        return np.minimum(result.label_map.astype(np.uint64), nothing).astype(np.int64)
    if result.segment_map is not None:
        return np.concatenate([[nothing], result.labels]).astype(np.int64)[result.segment_map]
    raise ValueError("mean IoU needs a semantic or panoptic result, found an instance result")


def _overlaps(truth: np.ndarray, predicted: np.ndarray, objects: int, segments: int) -> np.ndarray:
    pairs = truth.astype(np.int64) * (segments + 1) + predicted
    return np.bincount(pairs.ravel(), minlength=(objects + 1) * (segments + 1)).reshape(objects + 1, segments + 1)


def _crowd_pixels(inside: np.ndarray, labels: np.ndarray, crowd: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    pixels = np.zeros(len(predicted), dtype=np.int64)
    for i in np.flatnonzero(crowd):
        same = predicted == labels[i]
        pixels[same] = inside[i, same]
    return pixels


def _image_number(image_id: int | str) -> int:
    if isinstance(image_id, (int, np.integer)) and 0 <= image_id < 2**62:
        return int(image_id)
    return 2**62 + int.from_bytes(hashlib.blake2b(str(image_id).encode(), digest_size=7).digest())


def _curves(matching: hotcoco.StreamingEval) -> tuple[np.ndarray, np.ndarray]:
    """Precision (IoU thresholds, recalls, things, areas, max_detections) and recall (the same without recalls)."""
    finished = hotcoco.StreamingEval.from_bytes(matching.to_bytes()).finalize()  # finalize consumes its evaluator
    finished.accumulate()
    curves = finished.eval
    assert curves is not None
    precision, recall = (np.where(curves[name] < 0, np.nan, curves[name]) for name in ("precision", "recall"))
    return precision, recall


def _coco_summary(precision: np.ndarray, recall: np.ndarray, max_detections: tuple[int, ...]):
    for i, name in ((slice(None), "AP"), (0, "AP50"), (5, "AP75")):
        yield name, _mean(precision[i, :, :, 0, -1])
    for area, size in enumerate("sml", 1):
        yield f"AP{size}", _mean(precision[:, :, :, area, -1])
    for position, limit in enumerate(max_detections):
        yield f"AR{limit}", _mean(recall[:, :, 0, position])
    for area, size in enumerate("sml", 1):
        yield f"AR{size}", _mean(recall[:, :, area, -1])


def _ratio(part, whole):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(whole, 0), np.nan, np.divide(part, whole))


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _number(value) -> float | None:
    return None if np.isnan(value) else float(value)


def _column(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values]


def _percent(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{100 * value:.2f}"
