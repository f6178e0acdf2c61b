"""Expected calibration error: by hand, against pycocotools' matching, over several processes, and in `evaluate`."""

import contextlib
import io
import pickle
from itertools import pairwise

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskwright.checkpoints.load import load_model
from maskwright.config.schema import EvaluateConfig
from maskwright.data.build import open_dataset
from maskwright.errors import RecipeError
from maskwright.evaluation.evaluate import check_evaluation, evaluate
from maskwright.evaluation.metrics.average_precision import coco_annotations, coco_categories, coco_results
from maskwright.evaluation.metrics.build import build_metrics
from maskwright.evaluation.metrics.calibration import (
    BINS,
    InstanceCalibration,
    PanopticCalibration,
    PixelCalibration,
)
from maskwright.evaluation.metrics.panoptic_quality import PanopticQuality
from tests import tiny
from tests.test_metrics import (
    categories,
    example_pairs,
    instances,
    panoptic,
    scored,
    semantic,
    small_instances,
    target,
)


def table(scores, name):
    return [row[name] for row in scores["per_confidence"].values()]


def with_confidence(pairs, seed=0):
    """Give semantic results a confidence map, and panoptic ones scores."""
    rng = np.random.default_rng(seed)
    for result, _ in pairs:
        if result.task == "semantic":
            result.confidence = rng.random(result.size, dtype=np.float32)
        elif result.task == "panoptic":
            result.scores = rng.random(len(result), dtype=np.float32)
    return pairs


def plain_ece(confidence, right):
    """The formula of the paper, with bins that include their upper edge."""
    total, edges = 0.0, np.linspace(0, 1, BINS + 1)
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_pixels_by_hand():
    result = semantic([[0, 0, 1, 1]], categories(2))
    result.confidence = np.array([[0.9, 0.9, 0.6, 0.1]], np.float32)
    metric = scored(PixelCalibration(categories(2)), [(result, target([[1, 2, 2, 0]], [0, 1]))])
    scores = metric.compute()
    assert scores["ECE"] == pytest.approx((abs(1 - 1.8) + abs(1 - 0.6)) / 3, abs=1e-6)  # the last pixel is ignored
    assert sum(table(scores, "pixels")) == 3
    row = scores["per_confidence"]["87-93 %"]
    assert (row["pixels"], row["accuracy"]) == (2, 0.5)
    assert row["confidence"] == pytest.approx(0.9)
    assert scores["per_confidence"]["0-7 %"] == {"confidence": None, "accuracy": None, "pixels": 0}


def test_pixels_equal_the_formula_of_the_paper():
    pairs, classes = example_pairs("semantic")
    with_confidence(pairs)
    metric = scored(PixelCalibration(classes), pairs)
    confidence = np.concatenate([result.confidence.ravel() for result, _ in pairs])
    truth = np.concatenate([one.label_map(-1).numpy().ravel() for _, one in pairs])
    right = np.concatenate([result.label_map.ravel() for result, _ in pairs]) == truth
    counted = truth >= 0
    assert metric.compute()["ECE"] == pytest.approx(plain_ece(confidence[counted], right[counted]), abs=1e-6)


def test_a_calibrated_model_has_no_error_however_bad_it_is():
    rng = np.random.default_rng(0)
    result, truth = semantic(np.zeros((400, 400)), categories(2)), rng.random((400, 400)) < 0.3
    result.confidence = np.full((400, 400), 0.3, np.float32)
    metric = scored(PixelCalibration(categories(2)), [(result, target(np.where(truth, 1, 2), [0, 1]))])
    assert metric.compute()["ECE"] < 0.01


def test_a_confidence_of_exactly_zero_or_one_is_in_the_outer_bins():
    result = semantic([[0, 0]], categories(1))
    result.confidence = np.array([[0, 1]], np.float32)
    metric = scored(PixelCalibration(categories(1)), [(result, target([[1, 1]], [0]))])
    assert metric.counts.nonzero()[0].tolist() == [0, BINS - 1]


def test_panoptic_segments_are_right_where_pq_has_a_true_positive():
    pairs, classes = example_pairs("panoptic")
    with_confidence(pairs)
    ours, quality = scored(PanopticCalibration(classes), pairs), scored(PanopticQuality(classes), pairs)
    true, false, _ = quality.counts.sum(0)
    assert (ours.right.sum(), ours.counts.sum()) == (true, true + false)
    result = panoptic([[1, 1, 2, 3]], [0, 1, 0], classes)
    result.scores = np.array([0.8, 0.6, 0.7], np.float32)
    metric = scored(PanopticCalibration(classes), [(result, target([[1, 1, 2, 0]], [0, 0]))])
    assert metric.compute()["ECE"] == pytest.approx((0.2 + 0.6) / 2, abs=1e-6), "the segment on void is not counted"


def test_instances_by_hand():
    masks = np.zeros((4, 1, 8), bool)
    masks[0, 0, :4] = masks[1, 0, :4] = masks[2, 0, 4:6] = masks[3, 0, 6:] = True
    result = instances(masks, [0, 0, 0, 0], [0.9, 0.8, 0.7, 0.6], categories(1))
    truth = target([[1, 1, 1, 1, 0, 0, 2, 2]], [0, 0], crowd=[False, True])
    metric = scored(InstanceCalibration(categories(1)), [(result, truth)])
    scores = metric.compute()
    assert sum(table(scores, "segments")) == 3, "the one on a crowd region is not counted"
    assert scores["ECE"] == pytest.approx((abs(1 - 0.9) + 0.8 + 0.7) / 3, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_instances_are_matched_as_pycocotools_does(seed):
    pairs, _, classes = small_instances(seed, range(6))
    things = np.array([category.is_thing for category in classes])
    right = counted = 0
    for result, truth in pairs:
        annotations, found = coco_annotations(truth, things, 1), coco_results(result, truth, things, 1)
        if not found:
            continue
        images = [{"id": 1, "height": result.size[0], "width": result.size[1]}]
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = {"images": images, "annotations": annotations, "categories": coco_categories(classes)}
            coco.createIndex()
            evaluation = COCOeval(coco, coco.loadRes(found), "segm")
            evaluation.params.iouThrs, evaluation.params.maxDets = np.array([0.5]), [1000]
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
            evaluation.evaluate()
        for entry in filter(None, evaluation.evalImgs):
            ignored = entry["dtIgnore"][0].astype(bool)
            right += int(((entry["dtMatches"][0] > 0) & ~ignored).sum())
            counted += int((~ignored).sum())
    metric = scored(InstanceCalibration(classes), pairs)
    assert (metric.right.sum(), metric.counts.sum()) == (right, counted)
    assert 0 < right < counted


@pytest.mark.parametrize("kind", [PixelCalibration, InstanceCalibration, PanopticCalibration])
def test_merged_processes_equal_one_exactly_in_any_order(kind):
    pairs, classes = example_pairs(kind.task)
    with_confidence(pairs)
    whole, merged = scored(kind(classes), pairs), kind(classes)
    for part in (2, 0, 1):
        merged.merge(pickle.loads(pickle.dumps(scored(kind(classes), pairs[part::3]))))
    assert merged.compute() == whole.compute()
    assert merged.compute()["images"] == len(pairs)
    assert kind(classes).compute()["ECE"] is None


def test_results_without_confidence_are_refused():
    result, truth = semantic([[0]], categories(1)), target([[1]], [0])
    with pytest.raises(ValueError, match="ECE needs a semantic result with a confidence map"):
        PixelCalibration(categories(1)).update(result, truth)
    with pytest.raises(ValueError, match="ECE needs a panoptic result, found semantic"):
        PanopticCalibration(categories(1)).update(result, truth)


def test_it_is_built_only_if_asked_for_and_never_first():
    def kinds(task, metrics):
        return [type(metric).__name__ for metric in build_metrics(EvaluateConfig(task=task, metrics=metrics), classes)]

    classes = categories(2)
    assert kinds("semantic", ["ece"]) == ["MeanIoU", "PixelCalibration"]
    assert kinds("instance", ["ece", "ap"]) == ["AveragePrecision", "InstanceCalibration"]
    assert kinds("panoptic", ["pq", "ece", "mean_iou"]) == ["PanopticQuality", "MeanIoU", "PanopticCalibration"]
    assert kinds("semantic", None) == ["MeanIoU"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_panoptic(tmp_path_factory.mktemp("calibration"))


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_evaluate_reports_it_and_changes_nothing_else(folder, task):
    model = load_model(tiny.trained_model())
    default = evaluate(model, tiny.recipe(folder, evaluate__task=task)).scores
    scores = evaluate(model, tiny.recipe(folder, evaluate__task=task, evaluate__metrics=["ece"])).scores
    assert 0 <= scores.pop("ECE") <= 1
    assert sum(next(iter(reversed(row.values()))) for row in scores.pop("per_confidence").values()) > 0
    assert scores == default
    assert next(iter(scores)) != "ECE"


def test_a_model_cannot_be_chosen_by_the_lower_the_better(folder):
    recipe = tiny.recipe(folder, evaluate__metrics=["pq", "ece"])
    check_evaluation(recipe, "val", open_dataset(recipe, "val"), "PQ")
    with pytest.raises(RecipeError, match=r"train.best_metric is 'ECE', but evaluate.metrics gives the scores PQ, SQ"):
        check_evaluation(recipe, "val", open_dataset(recipe, "val"), "ECE")
