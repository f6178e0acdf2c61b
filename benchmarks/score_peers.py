"""References of our metrics, each with `add` (one image) and `finish` (the scores).

pycocotools and cityscapesscripts are run as they are. panopticapi and mmsegmentation's mIoU are not installable
packages, so their protocols are written here with numpy, step by step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from unittest import mock

import numpy as np

from benchmarks.scenes import Scene
from maskwright.errors import MaskwrightError
from maskwright.structures.annotations import Category, Target

COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_OFFSET = 256**3


class Side(Protocol):
    """One side of a comparison."""

    def add(self, scene: Scene) -> None:
        """Add one image."""
        ...

    def finish(self) -> dict[str, float | None]:
        """Return the scores of all images."""
        ...


class Pycocotools:
    """COCO AP as in the original's evaluator: masks are encoded as RLE, then masks and boxes are scored by pycocotools.

    Args:
        categories: classes of the instances.
        annotations: the annotations of all images, see `coco_annotations`; users have them as a file.

    Raises:
        MaskwrightError: pycocotools is not installed.
    """

    def __init__(self, categories: Sequence[Category], annotations: dict[str, Any]) -> None:
        self._tool = _pycocotools()
        self._annotations = annotations
        self._masks: list[dict[str, Any]] = []
        self._boxes: list[dict[str, Any]] = []

    def add(self, scene: Scene) -> None:
        """Encode the masks of one image, one by one."""
        encode, to_box = self._tool.mask.encode, self._tool.mask.toBbox
        found = scene.found
        assert found.instance_masks is not None
        assert found.scores is not None
        for mask, label, score in zip(found.instance_masks, found.labels.tolist(), found.scores.tolist(), strict=True):
            rle = encode(np.array(mask[:, :, None], order="F", dtype="uint8"))[0]
            row = {"image_id": scene.image_id, "category_id": label + 1, "score": score}
            self._boxes.append(row | {"bbox": to_box(rle).tolist()})
            self._masks.append(row | {"segmentation": rle | {"counts": rle["counts"].decode("ascii")}})

    def finish(self) -> dict[str, float | None]:
        """Match and summarize both kinds."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        scores: dict[str, float | None] = {}
        with contextlib.redirect_stdout(None):
            truth = COCO()
            truth.dataset = self._annotations
            truth.createIndex()
            for kind, prefix, results in (("segm", "", self._masks), ("bbox", "box_", self._boxes)):
                evaluation = COCOeval(truth, truth.loadRes(results), kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                values = [None if value < 0 else float(value) for value in evaluation.stats]
                scores |= {prefix + name: value for name, value in zip(COCO_NAMES, values, strict=True)}
        return scores


def coco_annotations(categories: Sequence[Category], targets: Iterable[Target]) -> dict[str, Any]:
    """Return targets with integer image ids as a COCO annotation file with compressed RLE."""
    coding = _pycocotools().mask
    images, annotations = [], []
    for target in targets:
        height, width = target.id_maps.shape[1:]
        images.append({"id": target.image_id, "height": height, "width": width})
        for mask, label, crowd in zip(
            target.masks.numpy(), target.labels.tolist(), target.is_crowd.tolist(), strict=True
        ):
            rle = coding.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": target.image_id,
                    "category_id": label + 1,
                    "iscrowd": int(crowd),
                    "area": float(coding.area(rle)),
                    "bbox": coding.toBbox(rle).tolist(),
                    "segmentation": rle | {"counts": rle["counts"].decode("ascii")},
                }
            )
    kinds = [{"id": label, "name": category.name} for label, category in enumerate(categories, 1)]
    return {"images": images, "annotations": annotations, "categories": kinds}


def _pycocotools() -> ModuleType:
    try:
        import pycocotools.mask
    except ImportError:
        raise MaskwrightError(
            "the benchmark needs pycocotools, which is not installed", remedy="pip install pycocotools"
        ) from None
    return pycocotools


class PanopticReference:
    """The protocol of panopticapi's `pq_compute_single_core`, from ids to PQ; its PNGs are taken as read.

    Of each image it takes the distinct values of three maps of all pixels, and walks over pairs in Python.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        self._things = [category.is_thing for category in categories]
        self._counts = [[0.0, 0, 0, 0] for _ in categories]  # IoU, true and false positives, false negatives

    def add(self, scene: Scene) -> None:
        """Match the segments of one image."""
        found_map = np.asarray(scene.found_segments.segment_map).astype(np.uint32)
        truth_map = scene.segments.id_maps[0].numpy().astype(np.uint32)
        numbers = range(1, len(scene.segments) + 1)
        truth = {i: {"label": int(scene.segments.labels[i - 1])} for i in numbers}
        crowd = {i for i in numbers if scene.segments.is_crowd[i - 1]}
        found = {i: {"label": label} for i, label in enumerate(scene.found_segments.labels.tolist(), 1)}
        for segments, pixels in ((truth, truth_map), (found, found_map)):
            for number, area in zip(*np.unique(pixels, return_counts=True), strict=True):
                if number:
                    segments[int(number)]["area"] = int(area)
        shared: dict[tuple[int, int], int] = {}
        pairs = truth_map.astype(np.uint64) * _OFFSET + found_map.astype(np.uint64)
        for pair, pixels in zip(*np.unique(pairs, return_counts=True), strict=True):
            shared[int(pair // _OFFSET), int(pair % _OFFSET)] = int(pixels)
        self._match(truth, found, crowd, shared)

    def _match(self, truth: dict, found: dict, crowd: set[int], shared: dict[tuple[int, int], int]) -> None:
        matched_truth, matched_found = set(), set()
        for (i, j), pixels in shared.items():
            if i not in truth or j not in found or i in crowd or truth[i]["label"] != found[j]["label"]:
                continue
            union = found[j]["area"] + truth[i]["area"] - pixels - shared.get((0, j), 0)
            if pixels / union > 0.5:
                counts = self._counts[truth[i]["label"]]
                counts[0] += pixels / union
                counts[1] += 1
                matched_truth.add(i)
                matched_found.add(j)
        crowd_of = {truth[i]["label"]: i for i in truth if i in crowd}
        for i in truth:
            if i not in matched_truth and i not in crowd:
                self._counts[truth[i]["label"]][3] += 1
        for j in found:
            if j in matched_found:
                continue
            ignored = shared.get((0, j), 0)
            if found[j]["label"] in crowd_of:
                ignored += shared.get((crowd_of[found[j]["label"]], j), 0)
            if ignored / found[j]["area"] <= 0.5:
                self._counts[found[j]["label"]][2] += 1

    def finish(self) -> dict[str, float | None]:
        """PQ, SQ and RQ over all classes, things and stuff."""
        scores: dict[str, float | None] = {}
        for end, kinds in (("", (True, False)), ("_th", (True,)), ("_st", (False,))):
            rows = [
                row for row, thing in zip(self._counts, self._things, strict=True) if thing in kinds and sum(row[1:])
            ]
            iou, tp, fp, fn = np.array(rows).T
            ideal = tp + (fp + fn) / 2
            for name, values in (("PQ", iou / ideal), ("SQ", iou / tp.clip(1)), ("RQ", tp / ideal)):
                scores[name + end] = float(values.mean())
        return scores


class Histograms:
    """mIoU as mmsegmentation's `IoUMetric` counts it: three histograms of the annotated pixels of each image."""

    def __init__(self, categories: Sequence[Category]) -> None:
        self._totals = np.zeros((3, len(categories)))

    def add(self, scene: Scene) -> None:
        """Count one image."""
        import torch

        label, guess = torch.from_numpy(scene.label_map), torch.from_numpy(np.asarray(scene.found_classes.label_map))
        kept = label != 255
        label, guess = label[kept], guess[kept]
        count = self._totals.shape[1]
        parts = (guess[guess == label], label, guess)
        self._totals += [torch.histc(part.float(), bins=count, min=0, max=count - 1).numpy() for part in parts]

    def finish(self) -> dict[str, float | None]:
        """Return mIoU, mAcc and aAcc."""
        hits, annotated, predicted = self._totals
        with np.errstate(invalid="ignore"):
            iou, accuracy = hits / (annotated + predicted - hits), hits / annotated
        return {
            "mIoU": float(np.nanmean(iou)),
            "mAcc": float(np.nanmean(accuracy)),
            "aAcc": float(hits.sum() / annotated.sum()),
        }


def cityscapes_tool_scores(found: Path, truths: Sequence[Path]) -> dict[str, float | None]:
    """Return AP and AP50 by cityscapesscripts of the instance files in a folder.

    Args:
        found: folder of a submission.
        truths: `instanceIds` images.

    Raises:
        MaskwrightError: cityscapesscripts is not installed.
    """
    tool = _cityscapes_tool()
    args = tool.args
    args.JSONOutput, args.quiet, args.predictionPath, args.predictionWalk = False, True, str(found), None
    args.gtInstancesFile = str(found / "not written.json")
    with (
        mock.patch.object(np, "in1d", np.isin, create=True),  # used by the tool, removed in numpy 2.4
        mock.patch.object(tool, "writeDict2JSON"),  # would fail on numpy integers
        np.errstate(all="ignore"),
    ):
        files = [tool.getPrediction(str(truth), args) for truth in truths]
        averages = tool.evaluateImgLists(files, [str(truth) for truth in truths], args)["averages"]
    return {"AP": float(averages["allAp"]), "AP50": float(averages["allAp50%"])}


def _cityscapes_tool() -> Any:
    try:
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as tool
    except ImportError:
        raise MaskwrightError(
            "the benchmark needs cityscapesscripts, which is not installed", remedy="pip install cityscapesscripts"
        ) from None
    return tool
