"""What is written for benchmarks is read by their own tools, and scores there as it does here."""

import json
import os
import sys
import zipfile
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskwright.checkpoints.checkpoint import make_checkpoint, save_checkpoint
from maskwright.checkpoints.load import load_model
from maskwright.cli import main
from maskwright.config.categories import load_categories
from maskwright.errors import MaskwrightError
from maskwright.evaluation.metrics.average_precision import AveragePrecision
from maskwright.evaluation.metrics.cityscapes_ap import CityscapesAP
from maskwright.evaluation.metrics.cityscapes_iou import CityscapesIoU
from maskwright.evaluation.metrics.mean_iou import MeanIoU
from maskwright.evaluation.metrics.panoptic_quality import PanopticQuality
from maskwright.results.segmentation import Segmentation
from maskwright.results.submission import open_submission
from maskwright.structures.annotations import Category
from tests import cityscapes_tool as tool
from tests import tiny
from tests.full_size import DATA, needs_full_size
from tests.test_cityscapes_scores import approx, frames, guessed_instances, guessed_labels
from tests.test_metrics import (
    COCO_NAMES,
    blobs,
    categories,
    disturbed,
    instances,
    panoptic,
    renumbered,
    scored,
    semantic,
    small_instances,
    target,
    write_panoptic,
)

ADE20K = load_categories("ade20k")


def submit(folder, benchmark, named_results):
    """Write results; the folder is called so that files with all results are `all`."""
    named_results = list(named_results)
    with open_submission(benchmark, named_results[0][1].task, folder / "all") as files:
        for name, result in named_results:
            files.add(result, name)
    return folder / "all"


# --- COCO -------------------------------------------------------------------------------------------------------------


def coco_stats(truth_file, results, kind):
    with redirect_stdout(StringIO()):
        truth = COCO(truth_file)
        evaluator = COCOeval(truth, truth.loadRes(str(results)), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [None if value < 0 else value for value in evaluator.stats]


def test_coco_instances_score_the_same_in_pycocotools_as_masks_and_as_boxes(tmp_path):
    pairs, dataset, classes = small_instances(0, range(6))
    folder = submit(tmp_path, "coco", ((truth.image_id, result) for result, truth in pairs))
    assert sorted(os.listdir(folder)) == ["all_bbox.json", "all_segm.json"]
    (tmp_path / "truth.json").write_text(json.dumps(dataset))
    scores = scored(AveragePrecision(classes), pairs).compute()
    for kind, prefix in (("segm", ""), ("bbox", "box_")):
        wanted = coco_stats(tmp_path / "truth.json", folder / f"all_{kind}.json", kind)
        assert [scores[prefix + name] for name in COCO_NAMES] == approx(wanted)


def panoptic_example(classes, seed, image_ids):
    rng = np.random.default_rng(seed)
    for image_id in image_ids:
        ids, labels = renumbered(blobs(rng, (50, 61), 9), rng.integers(0, len(classes), 9).tolist())
        yield disturbed(rng, ids, labels, classes), target(ids, labels, rng.random(len(labels)) < 0.2, image_id)


def check_panoptic(scores, classes, pairs, found, folder):
    truth = [(t.id_maps[0].numpy(), t.labels.tolist(), t.is_crowd.tolist()) for _, t in pairs]
    truth_file = write_panoptic(folder, "truth", truth, classes)
    document = json.loads(truth_file.read_text())
    for entry, (_, annotated) in zip(document["annotations"], pairs, strict=True):
        entry["image_id"] = annotated.image_id
    truth_file.write_text(json.dumps(document))
    averages, _ = tool.panoptic_counts(truth_file, found)
    for end, group in (("", "All"), ("_th", "Things"), ("_st", "Stuff")):
        wanted = [averages[group][name] for name in ("pq", "sq", "rq")]
        assert [scores[name + end] for name in ("PQ", "SQ", "RQ")] == approx(wanted)
    assert 0 < scores["PQ"] < 1


def test_coco_panoptic_zip_scores_the_same_in_the_panoptic_api(tmp_path):
    classes = categories(6, things=3)
    pairs = list(panoptic_example(classes, 3, (4, 12, 139)))
    folder = submit(tmp_path, "coco", ((truth.image_id, result) for result, truth in pairs))
    assert os.listdir(folder) == ["all.zip"]
    with zipfile.ZipFile(folder / "all.zip") as archive:
        names = ["all/000000000004.png", "all/000000000012.png", "all/000000000139.png", "all.json"]
        assert archive.namelist() == names
        archive.extractall(tmp_path / "unpacked")
    scores = scored(PanopticQuality(classes), pairs).compute()
    check_panoptic(scores, classes, pairs, tmp_path / "unpacked" / "all.json", tmp_path)


# --- Cityscapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guess", "kind", "metric", "official", "compare"),
    [
        (guessed_labels, "labelIds", CityscapesIoU, tool.pixel_scores, tool.check_pixel_scores),
        (guessed_instances, "instanceIds", CityscapesAP, tool.instance_scores, tool.check_instance_scores),
    ],
    ids=["labels", "instances"],
)
def test_cityscapes_files_score_the_same_in_the_official_tool(tmp_path, guess, kind, metric, official, compare):
    rng, pairs, truths = np.random.default_rng(5), [], []
    for name, ids in frames(5):
        tool.write_truth(tmp_path / "truth", name, ids)
        truths.append(tmp_path / "truth" / f"{name}_gtFine_{kind}.png")
        pairs.append((guess(rng, ids), tool.target(ids, f"nowhere/{name}")))
    scores = scored(metric(tool.CLASSES), pairs).compute()
    nameless = [replace(c, id=label) for label, c in enumerate(tool.CLASSES)]  # ids that are not those of the pictures
    files = ((truth.image_id, replace(result, categories=tuple(nameless))) for result, truth in pairs)
    compare(scores, official(submit(tmp_path, "cityscapes", files), truths), approx)


def test_cityscapes_panoptic_scores_the_same_in_the_official_tool(tmp_path):
    names = [f"berlin_000000_0000{number}" for number in (10, 11, 42)]
    pairs = list(panoptic_example(tool.CLASSES, 4, names))
    folder = submit(tmp_path, "cityscapes", ((f"{t.image_id}_leftImg8bit", result) for result, t in pairs))
    assert sorted(os.listdir(folder)) == ["all", "all.json"]
    assert sorted(os.listdir(folder / "all")) == [f"{name}.png" for name in names]
    scores = scored(PanopticQuality(tool.CLASSES), pairs).compute()
    check_panoptic(scores, tool.CLASSES, pairs, folder / "all.json", tmp_path)


def test_pixels_without_a_class_are_unlabeled_in_cityscapes(tmp_path):
    result = semantic([[0, 18, 255]], tool.CLASSES)
    folder = submit(tmp_path, "cityscapes", [("bonn_000000_000001_leftImg8bit", result)])
    assert np.asarray(Image.open(folder / "bonn_000000_000001_pred.png")).tolist() == [[7, 33, 0]]


# --- ADE20K -----------------------------------------------------------------------------------------------------------


def ade20k_iou(found, truths):
    """The benchmark's `intersectionAndUnion`: pixels annotated 0 do not count, and are not predicted."""
    inside, annotated, predicted = np.zeros((3, 151))
    for path in truths:
        truth, result = (np.asarray(Image.open(folder / path.name)).astype(int) for folder in (path.parent, found))
        result = result * (truth > 0)
        inside += np.bincount(result[result == truth], minlength=151)
        annotated += np.bincount(truth.ravel(), minlength=151)
        predicted += np.bincount(result.ravel(), minlength=151)
    with np.errstate(invalid="ignore"):
        return (inside / (annotated + predicted - inside))[1:], inside[1:].sum() / annotated[1:].sum()


def check_ade20k(tmp_path, truths):
    rng, pairs = np.random.default_rng(0), []
    for path in truths:
        values = np.asarray(Image.open(path)).astype(np.int64)
        found = np.roll(values - 1, rng.integers(-5, 6, 2), (0, 1))
        found[found < 0] = rng.integers(0, 150)
        labels = np.unique(values[values > 0]) - 1
        ids = np.searchsorted(np.concatenate([[0], labels + 1]), values)
        pairs.append((semantic(found, ADE20K), target(ids, labels, image_id=path.stem)))
    scores = scored(MeanIoU(ADE20K), pairs).compute()
    folder = submit(tmp_path, "ade20k", ((truth.image_id, result) for result, truth in pairs))
    iou, accuracy = ade20k_iou(folder, truths)
    assert [row["IoU"] for row in scores["per_class"].values()] == approx([tool.no_nan(value) for value in iou])
    assert [scores["mIoU"], scores["aAcc"]] == approx([np.nanmean(iou), accuracy])
    assert 0.1 < scores["mIoU"] < 1


def test_ade20k_pngs_score_the_same_by_the_benchmarks_formula(tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "truth").mkdir()
    for number in range(3):
        picture = (blobs(rng, (60, 70), 30) * 5).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "truth" / f"ADE_val_{number:08d}.png")
    check_ade20k(tmp_path, sorted((tmp_path / "truth").iterdir()))


@needs_full_size
def test_ade20k_pngs_of_real_labels_score_the_same_by_the_benchmarks_formula(tmp_path):
    check_ade20k(tmp_path, sorted((DATA / "ade20k_sample/annotations").glob("*/*.png")))


# --- what all have in common ------------------------------------------------------------------------------------------


def nothing(task, classes):
    size, labels, scores = (5, 6), np.zeros(0, np.int64), np.zeros(0, np.float32)
    empty = {"segment_map": np.zeros(size, np.int32), "instance_masks": np.zeros((0, *size), bool)}
    key = "instance_masks" if task == "instance" else "segment_map"
    return Segmentation(task, size, classes, labels, scores, **{key: empty[key]})


@pytest.mark.parametrize("images", [0, 2])
def test_images_without_results_and_sets_without_images_give_valid_files(tmp_path, images):
    def files(benchmark, task):
        with open_submission(benchmark, task, tmp_path / f"{benchmark}_{task}") as submission:
            for number in range(images):
                submission.add(
                    nothing(task, tool.CLASSES), f"a_000000_00000{number}" if benchmark[1] == "i" else number
                )
        return tmp_path / f"{benchmark}_{task}"

    assert [json.loads(path.read_text()) for path in files("coco", "instance").iterdir()] == [[], []]
    with zipfile.ZipFile(files("coco", "panoptic") / "coco_panoptic.zip") as archive:
        document = json.loads(archive.read("coco_panoptic.json"))
        assert len(archive.namelist()) == 1 + images
    assert [entry["segments_info"] for entry in document["annotations"]] == [[]] * images
    folder = files("cityscapes", "instance")
    assert [path.read_text() for path in folder.glob("*.txt")] == [""] * images


def test_what_a_benchmark_does_not_take_is_refused_in_one_line(tmp_path):
    for wrong in (("coco", "semantic", "instance or panoptic"), ("ade20k", "instance", "semantic")):
        with pytest.raises(MaskwrightError, match=f"{wrong[0]} submissions are {wrong[2]}.*, not {wrong[1]}"):
            open_submission(*wrong[:2], tmp_path / "out")
    small = semantic([[0]], categories(2))
    with pytest.raises(MaskwrightError, match="150 classes, but the results have 2"):
        open_submission("ade20k", "semantic", tmp_path / "out").add(small, "ADE_val_1")
    with pytest.raises(MaskwrightError, match="'class 0' is not a class of Cityscapes"):
        open_submission("cityscapes", "semantic", tmp_path / "out").add(small, "bonn_000000_000001")
    with pytest.raises(MaskwrightError, match="'street': expected a Cityscapes name"):
        open_submission("cityscapes", "semantic", tmp_path / "out").add(small, "street")
    with pytest.raises(MaskwrightError, match="'street': the image id is not a number"):
        open_submission("coco", "instance", tmp_path / "out").add(nothing("instance", categories(1)), "street")
    assert not (tmp_path / "out").exists()


def test_a_submission_holds_nothing_else(tmp_path):
    (tmp_path / "old.png").touch()
    with pytest.raises(MaskwrightError, match="the folder is not empty, and a submission must hold nothing else"):
        open_submission("coco", "instance", tmp_path)
    files = open_submission("coco", "instance", tmp_path / "new")
    files.add(nothing("instance", categories(1)), 7)
    with pytest.raises(ValueError, match="image 000007: added twice"):
        files.add(nothing("instance", categories(1)), "000007")
    with pytest.raises(ValueError, match="expected instance results, found panoptic"):
        files.add(nothing("panoptic", categories(1)), 8)
    files.close()
    files.close()
    with pytest.raises(ValueError, match="the submission is closed"):
        files.add(nothing("instance", categories(1)), 9)


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_a_failed_block_leaves_no_file(tmp_path, task):
    classes = categories(1)
    result = {
        "instance": instances(np.ones((1, 4, 4)), [0], [1], classes),
        "panoptic": panoptic(np.ones((4, 4)), [0], classes),
    }[task]

    def broken():
        with open_submission("coco", task, tmp_path / "out") as files:
            files.add(result, 1)
            raise KeyError("stop")

    with pytest.raises(KeyError):
        broken()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path, monkeypatch):
    result = panoptic(np.ones((4, 4)), [0], categories(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    def write():
        with open_submission("coco", "panoptic", tmp_path / "out") as files:
            files.add(result, 1)
            monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
            files.add(result, 2)

    with pytest.raises(MaskwrightError, match=r"out\.zip: cannot be written: No space left on device") as caught:
        write()
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


# --- from a network ---------------------------------------------------------------------------------------------------

CITY_IDS = {3: 23, 7: 22, 8: 26, 20: 24}  # the scenes' sky, grass, box and card as sky, terrain, car and person
COUNT = 4


def write_city(folder):
    """The scenes in Cityscapes' layout, with a group, void and a caravan; the tool's ground truth images."""
    truths = []
    pictures = folder / "leftImg8bit/val/tiny"
    pictures.mkdir(parents=True)
    for number in range(COUNT):
        name = f"tiny_000000_{number:06d}"
        Image.fromarray(tiny.scene_image(number)).save(pictures / f"{name}_leftImg8bit.png")
        ids, kinds = tiny.scene(number)
        codes = np.array([0, *(CITY_IDS[kind] * (1000 if kind in (8, 20) else 1) for kind in kinds)])
        codes[1:] += np.where(codes[1:] > 1000, np.arange(len(kinds)), 0)
        if number == 2:
            codes[-1] //= 1000
        found = codes[ids]
        found[:6, :6], found[:6, 58:] = 0, 29000
        tool.write_truth(folder / "gtFine/val/tiny", name, found)
        truths.append(folder / "gtFine/val/tiny" / name)
    return truths


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """Scenes, a recipe for them, and a model that knows them by the names of Cityscapes."""
    folder = tmp_path_factory.mktemp("city")
    truths = write_city(folder)
    model = load_model(tiny.trained_model(), "cpu")
    by_id = {category.id: category for category in tool.CLASSES}
    model.categories = tuple(by_id[CITY_IDS[category["id"]]] for category in tiny.CATEGORIES)
    settings = model.evaluate_config
    values = tiny.values(
        folder,
        evaluate__object_threshold=settings.object_threshold,
        evaluate__overlap_threshold=settings.overlap_threshold,
        evaluate__metrics=["pq", "cityscapes_ap", "cityscapes_iou"],
    )
    fields = ("id", "name", "is_thing", "group")
    classes = [{field: getattr(c, field) for field in fields} for c in model.categories]
    common = {"format": "cityscapes", "root": str(folder), "categories": classes, "ignore_values": [0, 29]}
    for task in ("semantic", "panoptic"):
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(values | {"data": common | {"task": task}}))
    torch.manual_seed(0)
    save_checkpoint(folder / "city.safetensors", make_checkpoint(model, tiny.recipe(folder), {}))
    return folder, truths


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["maskwright", *map(str, arguments), "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        main()
    output = capsys.readouterr()
    return end.value.code or 0, output.out, output.err


@pytest.mark.parametrize(
    ("task", "trained"), [("semantic", "semantic"), ("semantic", "panoptic"), ("instance", "panoptic")]
)
def test_scores_of_a_network_are_those_of_its_submission_in_the_official_tool(
    city, tmp_path, monkeypatch, capsys, task, trained
):
    """`trained`: the recipe's data.task; of a semantic one the objects are read for the iIoU only."""
    folder, truths = city
    names = ("evaluate", folder / "city.safetensors", folder / f"{trained}.yaml", "--task", task, "--json")
    status, output, complaints = run(
        monkeypatch, capsys, *names, "--submission", "cityscapes", "--output", tmp_path / "val"
    )
    assert status == 0, complaints
    scores = json.loads(output)
    kind = {"semantic": "labelIds", "instance": "instanceIds"}[task]
    files = [truth.with_name(f"{truth.name}_gtFine_{kind}.png") for truth in truths]
    if task == "semantic":
        official = tool.pixel_scores(tmp_path / "val", files)
        tool.check_pixel_scores(scores, official, approx)
        assert scores["iIoU"] > 0.2
    else:
        tool.check_instance_scores(scores, tool.instance_scores(tmp_path / "val", files), approx)
        assert scores["AP50"] > 0.1

    pictures = (folder / "city.safetensors", folder / "leftImg8bit", "--task", task)
    status, output, complaints = run(
        monkeypatch, capsys, "predict", *pictures, "--submission", "cityscapes", "--output", tmp_path / "test"
    )
    assert status == 0, complaints
    written = {path.relative_to(tmp_path / "test"): path.read_bytes() for path in (tmp_path / "test").rglob("*.*")}
    assert written
    assert written == {
        path.relative_to(tmp_path / "val"): path.read_bytes() for path in (tmp_path / "val").rglob("*.*")
    }


def test_tables_show_the_scores_of_cityscapes(city, monkeypatch, capsys):
    folder, _ = city
    status, output, complaints = run(
        monkeypatch, capsys, "evaluate", folder / "city.safetensors", folder / "panoptic.yaml"
    )
    assert status == 0, complaints
    for word in ("PQ", "AP50", "iIoU", "category_iIoU", "vehicle", "terrain", "aAcc"):
        assert word in output


def test_a_submission_that_cannot_be_is_one_line(city, monkeypatch, capsys, tmp_path):
    folder, _ = city
    names = ("predict", folder / "city.safetensors", folder / "leftImg8bit", "--submission", "ade20k")
    status, _, complaints = run(monkeypatch, capsys, *names, "--task", "panoptic", "--output", tmp_path / "out")
    assert status == 1
    assert complaints.splitlines()[-1].startswith("error: --submission: ade20k submissions are semantic, not panoptic")


def test_categories_keep_their_colors_and_kinds(tmp_path):
    classes = (Category(3, "cat", True, (255, 0, 0)), Category(90, "sky", False, (0, 0, 255)))
    with open_submission("coco", "panoptic", tmp_path / "out") as files:
        files.add(panoptic([[1, 2]], [0, 1], classes), 5)
    with zipfile.ZipFile(tmp_path / "out" / "out.zip") as archive:
        document = json.loads(archive.read("out.json"))
    assert document["categories"] == [{"id": 3, "name": "cat", "isthing": 1}, {"id": 90, "name": "sky", "isthing": 0}]
    assert [row["category_id"] for row in document["annotations"][0]["segments_info"]] == [3, 90]
    assert document["images"] == [{"id": 5, "height": 1, "width": 2}]
