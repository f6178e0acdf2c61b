"""Boundary AP against faster-coco-eval over all images at once, and the boundary of a mask against its definition."""

import copy
import json
import pickle
import sys
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from maskwright.config.schema import DataConfig, SplitConfig
from maskwright.data.formats.dispatch import open_annotations
from maskwright.errors import DatasetError, MaskwrightError
from maskwright.evaluation.metrics.boundary import BoundaryAP
from maskwright.results.rle import encode_masks
from tests.full_size import DATA, needs_full_size
from tests.test_metrics import (
    COCO_NAMES,
    categories,
    column,
    guessed,
    instances,
    scored,
    small_instances,
    target,
)

pytest.importorskip("faster_coco_eval")


def whole_scores(dataset, pairs, classes):
    """All images at once in faster-coco-eval: its twelve scores, and AP of each class."""
    from faster_coco_eval import COCO, COCOeval_faster

    rows = [
        {"image_id": truth.image_id, "category_id": classes[label].id, "score": float(score), "segmentation": rle}
        for result, truth in pairs
        for rle, label, score in zip(encode_masks(result.instance_masks), result.labels, result.scores, strict=True)
    ]
    with redirect_stdout(StringIO()):
        truth = COCO(copy.deepcopy(dataset))
        evaluator = COCOeval_faster(truth, truth.loadRes(rows), "boundary")
        evaluator.run()
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    per_class = [p[p > -1].mean() if (p > -1).any() else None for p in np.moveaxis(precision, 2, 0)]
    return [None if value < 0 else value for value in evaluator.stats[:12]], per_class


@pytest.mark.parametrize("seed", range(3))
def test_boundary_ap_image_by_image_equals_all_images_at_once(seed):
    pairs, dataset, classes = small_instances(seed, range(12))
    scores = scored(BoundaryAP(classes), pairs[::-1]).compute()
    stats, per_class = whole_scores(dataset, pairs, classes)
    assert [scores[f"boundary_{name}"] for name in COCO_NAMES] == pytest.approx(stats, abs=1e-9)
    assert column(scores, "boundary_AP") == pytest.approx(per_class, abs=1e-9)
    assert 0 < scores["boundary_AP"] < 1


@needs_full_size
def test_boundary_ap_of_a_read_data_set_equals_faster_coco_eval_on_its_json():
    files = SplitConfig(images="val2017", annotations="annotations/instances_val2017.json")
    config = DataConfig(format="coco_instance", root=str(DATA / "coco_instance_100"), task="instance", val=files)
    data, rng = open_annotations(config, "val"), np.random.default_rng(4)
    truths = [data.target(index) for index in range(0, len(data), 3)]
    pairs = [(guessed(rng, t.masks.numpy(), t.labels.numpy(), data.categories), t) for t in truths]
    document = json.loads((DATA / "coco_instance_100" / files.annotations).read_text())
    document["images"] = [row for row in document["images"] if row["id"] in {truth.image_id for truth in truths}]
    scores = scored(BoundaryAP(data.categories), pairs).compute()
    stats, per_class = whole_scores(document, pairs, data.categories)
    assert [scores[f"boundary_{name}"] for name in COCO_NAMES] == pytest.approx(stats, abs=1e-9)
    assert column(scores, "boundary_AP") == pytest.approx(per_class, abs=1e-9)
    assert 0 < scores["boundary_AP"] < 1


def test_shares_of_processes_merge_exactly():
    pairs, _, classes = small_instances(4, range(9))
    merged = BoundaryAP(classes)
    for i in (2, 0, 1):
        merged.merge(pickle.loads(pickle.dumps(scored(BoundaryAP(classes), pairs[i::3]))))
    assert merged.compute() == scored(BoundaryAP(classes), pairs).compute()


def test_iou_is_that_of_the_boundaries_where_it_is_the_lesser():
    """A square of 60 pixels and one of 56 inside it: mask IoU 0.87, but the bands share less."""
    masks = np.zeros((2, 100, 100), bool)
    masks[0, 20:80, 20:80], masks[1, 22:78, 22:78] = True, True
    width = round(0.02 * np.hypot(100, 100))
    bands = [mask & ~binary_erosion(mask, np.ones((3, 3)), width) for mask in masks]
    iou = (bands[0] & bands[1]).sum() / (bands[0] | bands[1]).sum()
    passed = (np.arange(0.5, 1.0, 0.05) <= iou).sum()
    classes = categories(1)
    scores = scored(BoundaryAP(classes), [(instances(masks[1:], [0], [1], classes), target(masks[0], [0]))]).compute()
    assert 0 < iou < 0.5
    assert scores["boundary_AP"] == pytest.approx(passed / 10)


def test_nothing_to_score_has_no_data_and_no_things_are_refused():
    scores = BoundaryAP(categories(2)).compute()
    assert scores.pop("images") == 0
    assert {value for row in scores.pop("per_class").values() for value in row.values()} == {None}
    assert set(scores.values()) == {None}
    with pytest.raises(DatasetError, match="every category is stuff"):
        BoundaryAP(categories(2, things=0))


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    with pytest.raises(MaskwrightError, match=r'not installed; pip install "maskwright\[boundary\]"'):
        BoundaryAP(categories(2))
