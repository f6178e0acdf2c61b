"""`maskwright evaluate` end to end: its scores are those that reference tools find in the files of `predict`."""

import gc
import json
import weakref

import numpy as np
import pytest
import yaml
from PIL import Image

import maskwright.evaluation.evaluate as evaluate_module
from maskwright.checkpoints.load import load_model
from maskwright.evaluation.evaluate import check_classes, evaluate, headline
from maskwright.evaluation.metrics.base import combine_scores
from maskwright.inference.predictor import Predictor
from maskwright.results.segmentation import Segmentation
from maskwright.results.submission import open_submission
from maskwright.structures.annotations import Category
from tests import tiny
from tests.in_process import run_command
from tests.test_metrics import COCO_NAMES, check_against_plain, pycocotools_scores, target

COUNT = 5


@pytest.fixture(scope="module")
def model():
    return load_model(tiny.trained_model(), "cpu")


@pytest.fixture
def folder(tmp_path):
    """Panoptic data in which one image has a crowd region."""
    return tiny.write_panoptic(tmp_path / "data", COUNT, crowds=(3,))


def thresholds(model):
    """The checkpoint's own, so that `predict` and `evaluate` decide alike."""
    settings = model.evaluate_config
    return {f"evaluate__{name}": getattr(settings, name) for name in ("object_threshold", "overlap_threshold")}


def written(recipe_values, path):
    path.write_text(yaml.safe_dump(recipe_values))
    return str(path)


def scores_of(monkeypatch, capsys, folder, tmp_path, model, task, *arguments):
    file = written(tiny.values(folder, **thresholds(model)), tmp_path / "tiny.yaml")
    command = ("evaluate", tiny.trained_model(), file, "--task", task, "--device", "cpu", "--json", *arguments)
    status, output, complaints = run_command(monkeypatch, capsys, *command)
    assert status == 0, complaints
    return json.loads(output)


def predicted(monkeypatch, capsys, folder, tmp_path, task):
    """What `maskwright predict` writes for the images of a folder."""
    output = tmp_path / task
    command = ("predict", tiny.trained_model(), folder / "images", "--task", task, "--output", output)
    status, _, complaints = run_command(monkeypatch, capsys, *command, "--device", "cpu")
    assert status == 0, complaints
    return output


def truths(folder):
    """For each image the map of segment ids and the entries of the json."""
    document = json.loads((folder / "panoptic.json").read_text())
    for number, annotation in enumerate(document["annotations"]):
        ids = np.asarray(Image.open(folder / "masks" / annotation["file_name"]))[..., 0].astype(np.int32)
        yield number, annotation["image_id"], ids, annotation["segments_info"]


LABELS = {category["id"]: label for label, category in enumerate(tiny.CATEGORIES)}


def test_panoptic_quality_is_that_of_the_written_pngs(model, folder, tmp_path, monkeypatch, capsys):
    scores = scores_of(monkeypatch, capsys, folder, tmp_path, model, "panoptic")
    output = predicted(monkeypatch, capsys, folder, tmp_path, "panoptic")
    pairs = []
    for number, image_id, ids, segments in truths(folder):
        colors = np.asarray(Image.open(output / f"{number:02d}_panoptic.png")).astype(np.int32)
        found = colors @ np.array([1, 256, 65536], dtype=np.int32)
        entries = json.loads((output / f"{number:02d}.json").read_text())["segments_info"]
        labels = np.array([LABELS[entry["category_id"]] for entry in entries], dtype=np.int64)
        result = np.searchsorted([0, *(entry["id"] for entry in entries)], found).astype(np.int32)
        crowd = [bool(segment["iscrowd"]) for segment in segments]
        truth = target(ids, [LABELS[segment["category_id"]] for segment in segments], crowd, image_id)
        size, ones = ids.shape, np.ones(len(labels), np.float32)
        pairs.append((Segmentation("panoptic", size, model.categories, labels, ones, segment_map=result), truth))
    check_against_plain(scores, pairs, model.categories)
    assert scores["images"] == COUNT
    assert scores["PQ"] > 0.3, "nothing is proven by a model that finds nothing"


def test_mean_iou_is_that_of_the_written_labels(model, folder, tmp_path, monkeypatch, capsys):
    scores = scores_of(monkeypatch, capsys, folder, tmp_path, model, "semantic")
    output = predicted(monkeypatch, capsys, folder, tmp_path, "semantic")
    confusion = np.zeros((256, 256), dtype=np.int64)
    for number, _, ids, segments in truths(folder):
        table = np.array([255, *(segment["category_id"] for segment in segments)])  # a crowd is pixels of its class
        found = np.asarray(Image.open(output / f"{number:02d}_labels.png"))
        np.add.at(confusion, (table[ids], found), 1)
    confusion = confusion[[c["id"] for c in tiny.CATEGORIES]]
    for row, category in enumerate(tiny.CATEGORIES):
        hits = confusion[row, category["id"]]
        iou = hits / (confusion[row].sum() + confusion[:, category["id"]].sum() - hits)
        assert scores["per_class"][category["name"]]["IoU"] == pytest.approx(iou, abs=1e-9)
    mean = np.mean([scores["per_class"][c["name"]]["IoU"] for c in tiny.CATEGORIES])
    assert scores["mIoU"] == pytest.approx(mean, abs=1e-9)
    assert scores["mIoU"] > 0.4


def test_average_precision_is_what_pycocotools_finds_in_the_written_results(
    model, folder, tmp_path, monkeypatch, capsys
):
    scores = scores_of(monkeypatch, capsys, folder, tmp_path, model, "instance")
    predictor = Predictor(model, device="cpu")
    annotations = []
    with open_submission("coco", "instance", tmp_path / "found") as writer:
        for number, image_id, ids, segments in truths(folder):
            writer.add(predictor(folder / f"images/{number:02d}.png", task="instance"), image_id)
            for segment in segments:
                if segment["category_id"] in (8, 20):
                    mask = ids == segment["id"]
                    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                    box = (columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0])
                    entry = {key: segment[key] for key in ("category_id", "iscrowd")}
                    entry |= {"id": len(annotations) + 1, "image_id": image_id, "area": int(mask.sum())}
                    entry |= {"bbox": [int(side) for side in box]}
                    entry |= {"segmentation": {"size": [64, 64], "counts": tiny.rle_counts(mask)}}
                    annotations.append(entry)
    document = json.loads((folder / "panoptic.json").read_text())
    things = [{"id": c["id"], "name": c["name"]} for c in tiny.CATEGORIES if c["isthing"]]
    dataset = {"images": document["images"], "annotations": annotations, "categories": things}
    expand = {"info": {}, **dataset}
    for annotation in expand["annotations"]:
        annotation["segmentation"] = compressed(annotation["segmentation"])
    wanted, per_class = pycocotools_scores(expand, json.loads((tmp_path / "found/found_segm.json").read_text()), "segm")
    assert [scores[name] for name in COCO_NAMES] == pytest.approx(wanted, abs=1e-9)
    assert [scores["per_class"][name]["AP"] for name in ("box", "card")] == pytest.approx(per_class, abs=1e-9)
    assert scores["per_class"]["sky"]["AP"] is None
    assert scores["AP50"] > 0.1


def compressed(rle):
    from pycocotools import mask

    return mask.frPyObjects(rle, *rle["size"])


def test_split_task_and_overrides_choose_what_is_scored(model, folder, tmp_path, monkeypatch, capsys):
    values = tiny.values(folder, **thresholds(model))
    tiny.write_panoptic(tmp_path / "other", 2)
    values["data"]["val"] = {key: f"../other/{name}" for key, name in values["data"]["train"].items()}
    file = written(values, tmp_path / "tiny.yaml")

    def images(*arguments):
        command = ("evaluate", tiny.trained_model(), file, *arguments, "--device", "cpu", "--json")
        status, output, complaints = run_command(monkeypatch, capsys, *command)
        assert status == 0, complaints
        return json.loads(output)

    assert images()["images"] == 2
    assert images("--split", "train")["images"] == COUNT
    assert images("evaluate.max_images=1")["images"] == 1
    assert "mIoU" in images("evaluate.task=semantic", "--split", "val")


def test_split_that_the_recipe_lacks_is_named_in_one_line(model, folder, tmp_path, monkeypatch, capsys):
    file = written(tiny.values(folder), tmp_path / "tiny.yaml")
    command = ("evaluate", tiny.trained_model(), file, "--split", "test", "--device", "cpu")
    status, _, complaints = run_command(monkeypatch, capsys, *command)
    assert status == 1
    assert complaints.splitlines()[-1].startswith("error: the recipe has no data.test")


def test_tables_are_printed_for_people(model, folder, tmp_path, monkeypatch, capsys):
    file = written(tiny.values(folder), tmp_path / "tiny.yaml")
    status, output, _ = run_command(monkeypatch, capsys, "evaluate", tiny.trained_model(), file, "--device", "cpu")
    assert status == 0
    assert "PQ" in output
    assert "grass" in output


def test_other_number_of_classes_than_the_data_has_is_refused_with_both(model, tmp_path, monkeypatch, capsys):
    folder = tiny.write_instances(tmp_path / "data")
    file = written(tiny.values(folder, "instance"), tmp_path / "tiny.yaml")
    status, _, complaints = run_command(monkeypatch, capsys, "evaluate", tiny.trained_model(), file, "--device", "cpu")
    assert status == 1
    (line,) = [line for line in complaints.splitlines() if line.startswith("error:")]
    assert "the checkpoint has 4 classes (sky, grass, box, card)" in line
    assert "data.val of recipe 'tiny' has 2 classes (box, card)" in line


def classes(*names):
    return [Category(i, name, True, (0, 0, 0)) for i, name in enumerate(names)]


def test_other_names_of_classes_are_refused_with_the_first_that_differs():
    with pytest.raises(evaluate_module.CheckpointError, match=r"label 1 is 'b', but in data\.val it is 'x'"):
        check_classes(classes("a", "b", "c"), classes("a", "x", "y"), "data.val")


def test_numbered_names_of_foreign_checkpoints_fit_any_data_of_as_many_classes():
    check_classes(classes("class 0", "class 1"), classes("a", "b"), "data.val")
    with pytest.raises(evaluate_module.CheckpointError, match="has 1 class "):
        check_classes(classes("class 0"), classes("a", "b"), "data.val")


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_results_are_let_go_as_soon_as_they_are_scored(model, folder, monkeypatch, task):
    seen, most = [], 0
    real = evaluate_module.Pipeline.segment

    def segment(*arguments):
        nonlocal most
        for result, beside in real(*arguments):
            gc.collect()
            most = max(most, sum(reference() is not None for reference in seen))
            arrays = (result.label_map, result.segment_map, result.instance_masks)
            seen.extend(weakref.ref(array) for array in arrays if array is not None)
            del arrays
            yield result, beside

    monkeypatch.setattr(evaluate_module.Pipeline, "segment", segment)
    evaluate(model, tiny.recipe(folder, evaluate__task=task))
    assert len(seen) == COUNT
    assert most <= 1


def test_examples_are_spread_over_the_split_and_only_as_many_as_asked_for(model, folder):
    evaluation = evaluate(model, tiny.recipe(folder), examples=2)
    assert [title for title, *_ in evaluation.examples] == ["10", "12"]
    assert all(picture.size == (64, 64) for _, *pictures in evaluation.examples for picture in pictures)


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_shares_of_two_processes_merge_to_the_scores_of_one(model, folder, task):
    recipe = tiny.recipe(folder, evaluate__task=task)
    metrics = []

    def keep(share):
        metrics.append(share)
        return [share]

    evaluate(model, recipe, rank=1, world=2, gather=keep)
    together = evaluate(model, recipe, rank=0, world=2, gather=lambda share: [share, metrics[0]])
    assert together.scores == evaluate(model, recipe).scores
    assert together.scores["images"] == COUNT


def test_batches_of_equal_images_score_as_single_ones(model, folder):
    single = evaluate(model, tiny.recipe(folder)).scores
    batched = evaluate(model, tiny.recipe(folder, evaluate__batch_size=3)).scores
    assert batched["PQ"] == pytest.approx(single["PQ"], abs=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(model, folder, training):
    model.train(training)
    evaluate(model, tiny.recipe(folder, evaluate__max_images=1))
    assert model.training is training
    model.eval()


def test_headline_without_data_has_no_value():
    assert headline({"AP": None, "AP50": 1.0}) == ("AP", None)
    assert headline({"PQ": 0.25, "AP": 0.5}) == ("PQ", 0.25)


def test_several_metrics_share_one_run_of_the_network(model, folder):
    forward, calls = model.forward, []
    model.forward = lambda *arguments: calls.append(1) or forward(*arguments)
    try:
        scores = evaluate(model, tiny.recipe(folder, evaluate__metrics=["pq", "ap", "mean_iou"])).scores
    finally:
        del model.forward
    assert len(calls) == COUNT
    alone = [
        evaluate(model, tiny.recipe(folder, evaluate__task=task)).scores
        for task in ("panoptic", "instance", "semantic")
    ]
    assert scores == combine_scores(alone)
    assert headline(scores)[0] == "PQ"
    assert scores["images"] == COUNT
    assert set(scores["per_class"]["box"]) >= {"PQ", "AP", "IoU"}


def test_of_several_metrics_a_task_chooses_its_own(model, folder):
    metrics = ["pq", "boundary_ap", "ap"]

    def names(task):
        return set(evaluate(model, tiny.recipe(folder, evaluate__task=task, evaluate__metrics=metrics)).scores)

    assert {"PQ", "AP", "boundary_AP"} <= names("panoptic")
    assert {"AP", "boundary_AP"} <= names("instance")
    assert "PQ" not in names("instance")
    assert names("semantic") == {"mIoU", "mAcc", "aAcc", "fwIoU", "images", "per_class"}  # the customary one
