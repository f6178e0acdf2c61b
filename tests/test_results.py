"""Result files, read back by Pillow, pycocotools and hotcoco's panoptic evaluator."""

import json
import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hotcoco.panoptic import PanopticEval
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskwright.errors import MaskwrightError
from maskwright.metrics import AveragePrecision, PanopticQuality
from maskwright.results import ResultWriter, label_image, panoptic_image, save, to_json, unique_names
from maskwright.rle import areas, boxes, encode_map, encode_masks, encode_target
from maskwright.structures import Category, Segmentation
from tests.test_metrics import blobs, instances, panoptic, renumbered, semantic, small_instances, target

CLASSES = (
    Category(3, "cat", True, (255, 0, 0)),
    Category(17, "dog", True, (0, 255, 0)),
    Category(90, "sky", False, (0, 0, 255)),
)


def example(task, seed=0, size=(50, 61)):
    rng = np.random.default_rng(seed)
    ids, labels = renumbered(blobs(rng, size, 9), rng.integers(0, 3, 9).tolist())
    match task:
        case "semantic":
            return semantic(np.concatenate([[2], labels])[ids], CLASSES)
        case "panoptic":
            result = panoptic(ids, labels, CLASSES)
        case "instance":
            masks = np.stack([np.roll(ids == n, 5 * n, 1) for n in range(1, len(labels) + 1)])
            result = instances(masks, np.minimum(labels, 1), np.ones(len(labels)), CLASSES)
    result.scores = rng.random(len(labels)).astype(np.float32)
    return result


def decode(rle):
    return coco_mask.decode(rle).astype(bool)


# --- run-length encoding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        np.zeros((4, 5), np.int32),
        np.ones((4, 5), np.int32),
        np.array([[3]]),
        np.array([[0, 2], [2, 1]], np.uint8),
        np.array([[7, 1, 7]]),  # 7 is no object here
        np.random.default_rng(0).integers(0, 6, (37, 23)),
        np.asfortranarray(np.random.default_rng(1).integers(0, 4, (3, 90)).astype(np.int32)),
    ],
    ids=["empty", "full", "one pixel", "bytes", "foreign", "random", "fortran"],
)
def test_objects_of_an_id_map_get_the_runs_of_pycocotools(ids):
    masks = ids[None] == np.arange(1, 6)[:, None, None]
    wanted = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    for rles in (encode_map(ids, 5), encode_masks(masks)):
        assert [rle["size"] for rle in rles] == [list(ids.shape)] * 5
        assert np.array_equal([decode(rle) for rle in rles], masks)
        assert areas(rles).tolist() == coco_mask.area(wanted).tolist()
        assert boxes(rles).tolist() == coco_mask.toBbox(wanted).tolist()


def test_no_masks_give_no_runs():
    assert encode_masks(np.zeros((0, 4, 5), bool)) == encode_map(np.zeros((4, 5), int), 0) == []
    assert areas([]).shape == (0,)
    assert boxes([]).shape == (0, 4)


def test_overlapping_objects_of_a_target_are_encoded_whole():
    layers = np.zeros((2, 6, 7), np.int32)
    layers[0, 1:4, 1:5], layers[0, 5], layers[1, 2:6, 3:6] = 1, 3, 2
    truth = target(layers, [0, 1, 1])
    assert np.array_equal([decode(rle) for rle in encode_target(truth)], truth.masks.numpy())


# --- one result -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_json_of_a_result_gives_back_its_masks_and_facts(task):
    result = example(task)
    document = json.loads(json.dumps(to_json(result)))
    assert document["size"] == [50, 61]
    assert document["task"] == task
    segments = document["segments"]
    assert np.array_equal([decode(segment["mask"]) for segment in segments], result.masks)
    assert [segment["name"] for segment in segments] == result.names
    assert [segment["category_id"] for segment in segments] == [CLASSES[label].id for label in result.labels]
    assert [segment["area"] for segment in segments] == result.areas.tolist()
    assert [segment["box"] for segment in segments] == result.boxes.tolist()
    assert [segment["score"] for segment in segments] == (
        [None] * len(result) if task == "semantic" else result.scores.tolist()
    )


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_results_without_segments_become_json_and_files(task, tmp_path):
    nothing = {"segment_map": np.zeros((5, 6), np.int32), "instance_masks": np.zeros((0, 5, 6), bool)}
    name = "instance_masks" if task == "instance" else "segment_map"
    result = Segmentation(
        task, (5, 6), CLASSES, np.zeros(0, np.int64), np.zeros(0, np.float32), **{name: nothing[name]}
    )
    assert to_json(result)["segments"] == []
    save(result, tmp_path, "none")
    document = json.loads((tmp_path / "none.json").read_text())
    assert document == [] if task == "instance" else document["segments_info"] == []


@pytest.mark.parametrize(
    ("ids", "mode", "nothing"), [((0, 254), "L", 255), ((7, 255), "I;16", 65535), ((9, 65534), "I;16", 65535)]
)
def test_label_picture_holds_category_ids_without_loss(ids, mode, nothing, tmp_path):
    classes = tuple(Category(number, str(number), False, (0, 0, 0)) for number in ids)
    label_map = np.random.default_rng(0).integers(0, 2, (20, 30))
    label_map[0, 0] = 255
    result = Segmentation("semantic", (20, 30), classes, np.array([0, 1]), label_map=label_map)
    (path,) = save(result, tmp_path, "map")
    assert path == tmp_path / "map_labels.png"
    with Image.open(path) as picture:
        assert picture.mode == mode
        pixels = np.asarray(picture)
    wanted = np.array(ids)[np.minimum(label_map, 1)]
    wanted[0, 0] = nothing
    assert np.array_equal(pixels, wanted)
    assert to_json(result)["segments"][0]["area"] == int((label_map == 0).sum())


def test_category_ids_that_fit_no_label_picture_are_refused(tmp_path):
    result = semantic(np.zeros((2, 2)), (Category(70000, "far", False, (0, 0, 0)),))
    with pytest.raises(MaskwrightError, match=r"category id 70000 does not fit a label picture, expected 0\.\.65534"):
        save(result, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_panoptic_files_give_back_the_segment_map(tmp_path):
    result = example("panoptic")
    result.source = "somewhere/street.jpg"
    paths = save(result, tmp_path)
    assert [path.name for path in paths] == ["street_panoptic.png", "street.json"]
    rgb = np.asarray(Image.open(paths[0])).astype(np.int64)
    assert np.array_equal(rgb @ [1, 256, 65536], result.segment_map)
    annotation = json.loads(paths[1].read_text())
    assert annotation["image_id"] == "street"
    assert annotation["file_name"] == "street_panoptic.png"
    for info, label, area, box, score in zip(
        annotation["segments_info"], result.labels, result.areas, result.boxes, result.scores, strict=True
    ):
        assert info["category_id"] == CLASSES[label].id
        assert info["isthing"] == int(CLASSES[label].is_thing)
        assert info["area"] == area
        assert info["bbox"] == [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        assert info["score"] == score


def test_segment_numbers_above_two_bytes_survive_the_picture():
    numbers = np.array([[0, 1, 255], [256, 65536, 16777215]], np.int32)
    result = Segmentation("panoptic", (2, 3), CLASSES, np.zeros(0, np.int64), segment_map=numbers)
    assert np.array_equal(np.asarray(panoptic_image(result)).astype(int) @ [1, 256, 65536], numbers)


def test_instance_file_is_a_coco_results_list(tmp_path):
    result = example("instance")
    (path,) = save(result, tmp_path / "new" / "folder", "cells")
    rows = json.loads(path.read_text())
    assert np.array_equal([decode(row["segmentation"]) for row in rows], result.masks)
    assert [row["score"] for row in rows] == result.scores.tolist()
    assert {row["image_id"] for row in rows} == {"cells"}
    x, y, width, height = rows[0]["bbox"]
    assert [x, y, x + width, y + height] == result.boxes[0].tolist()


def test_overlay_is_saved_where_the_image_is_known(tmp_path):
    result = example("panoptic")
    result.image = np.zeros((*result.size, 3), np.uint8)
    paths = result.save(tmp_path, "seen")
    assert [path.name for path in paths] == ["seen_overlay.png", "seen_panoptic.png", "seen.json"]
    assert Image.open(paths[0]).size == (61, 50)


@pytest.mark.parametrize("name", ["a/b", "../up"])
def test_names_with_folders_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="must be a file name without a folder"):
        save(example("semantic"), tmp_path, name)


def test_a_failing_write_leaves_earlier_results_as_they_were(tmp_path, monkeypatch):
    paths = save(example("panoptic", 0), tmp_path, "one")
    before = [path.read_bytes() for path in paths]
    write = Path.write_bytes

    def full_disk(path, content):
        if ".json" in path.name:
            write(path, content[:10])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(MaskwrightError, match=r"one\.json: result cannot be written: No space left") as caught:
        save(example("panoptic", 1), tmp_path, "one")
    assert "\n" not in str(caught.value)
    assert [path.read_bytes() for path in paths] == before
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in paths)


def test_a_file_in_place_of_the_folder_is_explained(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(MaskwrightError, match="cannot be written"):
        save(example("semantic"), tmp_path / "taken")


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_are_short_where_they_can_be_and_never_equal():
    files = ["/data/left/0001.png", "/data/right/0001.png", "/data/right/0002.png", "/data/right/0002.jpg"]
    assert unique_names(files) == ["left__0001", "right__0001", "right__0002_png", "right__0002_jpg"]
    assert unique_names(["a/x.png", "a/y.png"]) == ["x", "y"]
    assert unique_names(["a/x.png", "a/X.png", "a/x.png"]) == ["x_png", "X_png_2", "x_png_3"]
    assert unique_names([]) == []
    assert unique_names(["one.tif"]) == ["one"]


def test_names_stay_different_where_a_file_is_called_like_a_longer_name():
    names = unique_names(["left/1.png", "right/1.png", "left__1.png", "deep/er/left/1.png"])
    assert len({name.casefold() for name in names}) == 4
    assert all(Path(name).name == name for name in names)


# --- whole data sets --------------------------------------------------------------------------------------------------


def stats(truth_file, results, kind="segm"):
    with redirect_stdout(StringIO()):
        truth = COCO(truth_file)
        found = truth.loadRes(str(results))
        evaluator = COCOeval(truth, found, kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return found, evaluator.stats


def test_instance_results_load_in_pycocotools_and_score_as_our_metric(tmp_path):
    pairs, dataset, classes = small_instances(0, range(6))
    metric = AveragePrecision(classes)
    with ResultWriter(tmp_path / "out", "instance") as writer:
        for result, truth in pairs:
            writer.add(result, truth.image_id)
            metric.update(result, truth)
        assert not (tmp_path / "out").exists()  # nothing under its name before all is there
    (tmp_path / "truth.json").write_text(json.dumps(dataset))
    loaded, wanted = stats(tmp_path / "truth.json", tmp_path / "out" / "results.json")
    masks = [decode(annotation["segmentation"]) for annotation in loaded.dataset["annotations"]]
    assert np.array_equal(masks, np.concatenate([result.masks for result, _ in pairs]))
    scores = metric.compute()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert [scores[name] for name in names] == pytest.approx([None if v < 0 else v for v in wanted[:6]], abs=1e-9)


def test_panoptic_results_are_read_by_an_evaluator_and_score_as_our_metric(tmp_path):
    metric, rng = PanopticQuality(CLASSES), np.random.default_rng(3)
    with ResultWriter(tmp_path / "truth", "panoptic") as truths, ResultWriter(tmp_path / "found", "panoptic") as found:
        for image_id in (4, 12, 139):
            truth = example("panoptic", image_id)
            moved = renumbered(np.roll(truth.segment_map, rng.integers(-2, 3), 0), truth.labels.tolist())
            result = panoptic(*moved, CLASSES)
            truths.add(truth, image_id)
            found.add(result, image_id)
            metric.update(result, target(truth.segment_map, truth.labels, image_id=image_id))
    assert sorted(os.listdir(tmp_path / "found" / "panoptic")) == ["12.png", "139.png", "4.png"]
    evaluator = PanopticEval(str(tmp_path / "truth" / "panoptic.json"), str(tmp_path / "found" / "panoptic.json"))
    evaluator.evaluate()
    scores = metric.compute()
    assert scores["PQ"] > 0
    assert [scores[name] for name in ("PQ", "SQ", "RQ")] == pytest.approx(evaluator.stats[:3], abs=1e-9)


def test_semantic_results_become_one_picture_per_image(tmp_path):
    ids = ["left/1.png", "right/1.png", "left_1.jpg", "../../up.png"]
    with ResultWriter(tmp_path / "out", "semantic") as writer:
        for image_id in ids:
            writer.add(example("semantic"), image_id)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == [f"out/labels/{name}.png" for name in ("_up", "left_1", "left_1_2", "right_1")]
    assert np.array_equal(np.asarray(Image.open(tmp_path / files[0])), np.asarray(label_image(example("semantic"))))


def test_a_failed_block_leaves_no_json(tmp_path):
    def broken():
        with ResultWriter(tmp_path, "instance") as writer:
            writer.add(example("instance"), 1)
            raise KeyError("stop")

    with pytest.raises(KeyError):
        broken()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_refuses_what_does_not_belong(tmp_path):
    writer = ResultWriter(tmp_path, "instance")
    writer.add(example("instance"), 7)
    with pytest.raises(ValueError, match="image 7: added twice"):
        writer.add(example("instance"), 7)
    with pytest.raises(ValueError, match="expected instance results, found semantic"):
        writer.add(example("semantic"), 8)
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.add(example("instance"), 9)


@pytest.mark.parametrize(("task", "file"), [("instance", "results.json"), ("panoptic", "panoptic.json")])
def test_a_data_set_without_images_gives_a_valid_file(tmp_path, task, file):
    ResultWriter(tmp_path, task).close()
    document = json.loads((tmp_path / file).read_text())
    assert document == ([] if task == "instance" else {"images": [], "categories": [], "annotations": []})
