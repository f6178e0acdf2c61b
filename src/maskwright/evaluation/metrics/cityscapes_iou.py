"""The IoU scores of Cityscapes: of classes and of groups of classes, plain and weighted by instance.

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding" (CVPR 2016), section 4.1; original:
cityscapesscripts/evaluation/evalPixelLevelSemanticLabeling.py. The instance-level IoU (iIoU) weights each pixel of an
annotated object by the average size of its class divided by the size of the object, so that large objects do not
dominate. Unusual: one count of pixels by annotated object and predicted class gives all four scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from maskwright.errors import DatasetError
from maskwright.evaluation.metrics.base import Metric, Scores, as_table, check_no_overlap, json_scores, mean, ratio
from maskwright.evaluation.metrics.mean_iou import add_pixels, class_pixels, pixel_scores
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target

CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)

# Classes with instances: average number of pixels of an object in the training set.
AVERAGE_PIXELS = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}


class CityscapesIoU(Metric):
    """Class and category IoU and iIoU by the rules of Cityscapes' own tool, and the other scores of `MeanIoU`.

    Annotated objects count for the iIoU if they are no crowd and their class has instances in Cityscapes; crowd regions
    (groups without an instance id) only count as pixels of their class. Pixels without an object are ignored.

    Attributes:
        confusion: see `MeanIoU`.
        objects: per image (N, 4) int64: label, pixels, correctly classified pixels, pixels classified as its group.

    Raises:
        DatasetError: a category is not one of the classes that Cityscapes evaluates, or has no group.
    """

    task, target_task = "semantic", "panoptic"

    def __init__(self, categories: Sequence[Category]) -> None:
        super().__init__(categories)
        check_cityscapes_classes(self.categories)
        ungrouped = [category.name for category in self.categories if category.group is None]
        if ungrouped:
            raise DatasetError(
                f"'{ungrouped[0]}' has no group, but Cityscapes IoU also scores groups of classes",
                where="data.categories",
                remedy="use the list 'cityscapes', or add the group",
            )
        side = len(self.categories) + 1
        self.confusion = np.zeros((side, side), dtype=np.int64)
        self.objects: list[np.ndarray] = []
        names = [category.name for category in self.categories]
        self.weights = np.array([AVERAGE_PIXELS.get(name, 0.0) for name in names])
        groups = [category.group for category in self.categories]
        self.group_names = tuple(dict.fromkeys(group for group in groups if group))
        self.groups = np.array([[group == name for group in groups] for name in self.group_names])  # (groups, K)

    def _add(self, result: Segmentation, target: Target) -> None:
        check_no_overlap(target, "Cityscapes IoU")
        pixels, labels = class_pixels(result, target), target.labels.numpy()
        add_pixels(self.confusion, labels, pixels)
        counted = np.flatnonzero(~target.is_crowd.numpy() & (self.weights[labels] > 0) & (pixels[1:].sum(1) > 0))
        labels, pixels = labels[counted], pixels[1 + counted]
        in_group = (pixels[:, :-1] * self.groups[self.groups.argmax(0)[labels]]).sum(1)
        correct = pixels[np.arange(len(labels)), labels]
        self.objects.append(np.stack([labels, pixels.sum(1), correct, in_group], 1))

    def _merge(self, other: CityscapesIoU) -> None:
        self.confusion += other.confusion
        self.objects += other.objects

    def compute(self) -> Scores:
        """Return mIoU, iIoU, category_IoU and category_iIoU, then mAcc, aAcc and fwIoU; per class and per category.

        Cityscapes calls groups of classes (`Category.group`) categories, e.g. "vehicle".

        The iIoU of a class without an annotated object is 0 if it is predicted and has no data otherwise, as in the
        official tool; classes and categories without instances in Cityscapes have no iIoU.
        """
        summary, columns = pixel_scores(self.confusion)
        hits = self.confusion[:-1, :-1]
        instance_iou = self._instance_iou(2, np.eye(len(self.categories), dtype=bool), hits)
        group_iou = self._group_iou(hits)
        group_instance_iou = self._instance_iou(3, self.groups, hits)
        official = {
            "mIoU": summary.pop("mIoU"),
            "iIoU": mean(instance_iou),
            "category_IoU": mean(group_iou),
            "category_iIoU": mean(group_instance_iou),
        }
        columns = {"IoU": columns.pop("IoU"), "iIoU": json_scores(instance_iou)} | columns
        groups = {"IoU": json_scores(group_iou), "iIoU": json_scores(group_instance_iou)}
        return self._scores(official | summary, columns) | {"per_category": as_table(self.group_names, groups)}

    def _group_iou(self, hits: np.ndarray) -> np.ndarray:
        members = self.groups.astype(np.int64)
        inside = np.einsum("gi,ij,gj->g", members, hits, members)
        annotated = members @ self.confusion[:-1].sum(1)
        return ratio(inside, annotated + members @ hits.sum(0) - inside)

    def _instance_iou(self, column: int, groups: np.ndarray, hits: np.ndarray) -> np.ndarray:
        """Return the iIoU of each group; `column` of `objects` has the correct pixels."""
        objects = np.concatenate([np.zeros((0, 4), dtype=np.int64), *self.objects])
        scores = np.full(len(groups), np.nan)
        for position, members in enumerate(groups):
            if not members.any() or not self.weights[members].all():
                continue
            own = objects[members[objects[:, 0]]]
            weight = self.weights[own[:, 0]] / own[:, 1]
            right, wrong = (math.fsum(weight * pixels) for pixels in (own[:, column], own[:, 1] - own[:, column]))
            false = hits[~members][:, members].sum()
            scores[position] = ratio(right, right + wrong + false)
        return scores


def check_cityscapes_classes(categories: Sequence[Category]) -> None:
    """Raise DatasetError if a category is not one of the classes that Cityscapes evaluates."""
    unknown = [category.name for category in categories if category.name not in CLASSES]
    if unknown:
        raise DatasetError(
            f"Cityscapes scores are for its {len(CLASSES)} classes, but '{unknown[0]}' is not one of them",
            where="data.categories",
            remedy="correct it, or use mean_iou or ap in evaluate.metrics",
        )
