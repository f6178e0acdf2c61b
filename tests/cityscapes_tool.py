"""Cityscapes' own evaluation, cityscapesscripts, on files; and small scenes and annotations in its form.

Two things keep the tool from running under numpy 2.4 as it is: it calls `np.in1d`, which is gone, and it writes
numpy integers as JSON into the current folder. Neither touches a score.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as instance_tool
from cityscapesscripts.evaluation import evalPanopticSemanticLabeling as panoptic_tool
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as pixel_tool
from cityscapesscripts.helpers.labels import id2label, name2label
from PIL import Image

from maskwright.config.categories import load_categories
from maskwright.structures.annotations import Target

CLASSES = tuple(replace(c, group=id2label[c.id].category) for c in load_categories("cityscapes"))
LABELS = {category.id: label for label, category in enumerate(CLASSES)}


@contextlib.contextmanager
def runnable() -> Iterator[None]:
    with (
        mock.patch.object(np, "in1d", np.isin, create=True),
        mock.patch.object(instance_tool, "writeDict2JSON"),
    ):
        yield


def pixel_scores(found: Path, truths: list[Path]) -> dict:
    """What the tool says of the label images below a folder; it looks for them by their names."""
    args = pixel_tool.args
    args.JSONOutput, args.quiet, args.predictionPath, args.predictionWalk = False, True, str(found), None
    with runnable():
        files = [pixel_tool.getPrediction(args, str(truth)) for truth in truths]
        return pixel_tool.evaluateImgLists(files, [str(truth) for truth in truths], args)


def instance_scores(found: Path, truths: list[Path]) -> dict:
    """What the tool says of the instance text files below a folder; it looks for them by their names."""
    args = instance_tool.args
    args.JSONOutput, args.quiet, args.predictionPath, args.predictionWalk = False, True, str(found), None
    args.gtInstancesFile = str(found / "not written.json")
    with runnable(), np.errstate(all="ignore"):
        files = [instance_tool.getPrediction(str(truth), args) for truth in truths]
        return instance_tool.evaluateImgLists(files, [str(truth) for truth in truths], args)["averages"]


def panoptic_counts(truth: Path, found: Path) -> tuple[dict, dict]:
    """What the tool's copy of the COCO panoptic API says of two jsons with their folders: averages, and per id."""
    import json

    documents = [json.loads(path.read_text()) for path in (truth, found)]
    categories = {entry["id"]: entry for entry in documents[0]["categories"]}
    by_image = {entry["image_id"]: entry for entry in documents[1]["annotations"]}
    pairs = [(entry, by_image[entry["image_id"]]) for entry in documents[0]["annotations"]]
    with contextlib.redirect_stdout(None):
        folders = (str(truth.with_suffix("")), str(found.with_suffix("")))
        counts = panoptic_tool.pq_compute_single_core(0, pairs, *folders, categories)
    return panoptic_tool.average_pq(counts, categories), counts.pq_per_cat


def no_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def check_pixel_scores(scores: dict, official: dict, approx) -> None:
    """Every class and category score of `CityscapesIoU` against the tool's."""
    totals = ("averageScoreClasses", "averageScoreInstClasses", "averageScoreCategories", "averageScoreInstCategories")
    ours = [scores[name] for name in ("mIoU", "iIoU", "category_IoU", "category_iIoU")]
    assert ours == approx([no_nan(official[name]) for name in totals])
    for name, row in scores["per_class"].items():
        assert row["IoU"] == approx(no_nan(official["classScores"][name])), name
        assert row["iIoU"] == approx(no_nan(official["classInstScores"][name])), name
    for name, row in scores["per_category"].items():
        assert row["IoU"] == approx(no_nan(official["categoryScores"][name])), name
        assert row["iIoU"] == approx(no_nan(official["categoryInstScores"][name])), name


def check_instance_scores(scores: dict, official: dict, approx) -> None:
    """Every class score of `CityscapesAP` against the tool's."""
    assert [scores["AP"], scores["AP50"]] == approx([no_nan(official["allAp"]), no_nan(official["allAp50%"])])
    for name, row in scores["per_class"].items():
        wanted = official["classes"].get(name, {"ap": math.nan, "ap50%": math.nan})
        assert [row["AP"], row["AP50"]] == approx([no_nan(wanted["ap"]), no_nan(wanted["ap50%"])]), name


def scene(rng: np.random.Generator, size=(90, 130)) -> np.ndarray:
    """(H, W) ids as in `instanceIds.png`: stuff, void, groups, tiny objects, instances of classes that do not count."""
    ids = np.full(size, 7, np.int32)
    ids[: size[0] // 2] = 23
    for number in range(24):
        name = rng.choice(
            ["car", "person", "rider", "bicycle", "bus", "building", "static", "caravan", "terrain", "dynamic"]
        )
        label = name2label[name]
        height, width = rng.integers(4, 34, 2)
        top, left = rng.integers(0, size[0] - 4), rng.integers(0, size[1] - 4)
        alone = label.hasInstances and rng.random() < 0.75
        ids[top : top + height, left : left + width] = label.id * 1000 + number if alone else label.id
    return ids


def label_ids(instance_ids: np.ndarray) -> np.ndarray:
    return np.where(instance_ids < 1000, instance_ids, instance_ids // 1000)


def write_truth(folder: Path, name: str, instance_ids: np.ndarray) -> None:
    """`instanceIds` and `labelIds` images of one image."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(instance_ids.astype(np.uint16)).save(folder / f"{name}_gtFine_instanceIds.png")
    Image.fromarray(label_ids(instance_ids).astype(np.uint8)).save(folder / f"{name}_gtFine_labelIds.png")


def target(instance_ids: np.ndarray, image_id: str) -> Target:
    """All annotated objects of the 19 classes, and where void is."""
    labels, crowd, ids = [], [], np.zeros(instance_ids.shape, np.int32)
    for value in np.unique(instance_ids):
        label = id2label[value if value < 1000 else value // 1000]
        if label.ignoreInEval:
            continue
        labels.append(LABELS[label.id])
        crowd.append(label.hasInstances and value < 1000)
        ids[instance_ids == value] = len(labels)
    void = np.isin(instance_ids, [label.id for label in id2label.values() if label.ignoreInEval])
    labels, crowd = torch.tensor(labels, dtype=torch.int64), torch.tensor(crowd, dtype=torch.bool)
    return Target(torch.from_numpy(ids)[None], labels, crowd, image_id, ids.shape, void=void)
