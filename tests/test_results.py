"""Result files, read back by Pillow, pycocotools and hotcoco's panoptic evaluator."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from maskwright.errors import MaskwrightError
from maskwright.evaluation.metrics.average_precision import encode_target
from maskwright.results.coco import panoptic_image, to_json
from maskwright.results.rle import encode_id_map, encode_masks, id_map_runs, mask_runs, runs_box
from maskwright.results.save import save, unique_names
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category
from tests.test_metrics import blobs, instances, panoptic, renumbered, semantic, target

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
    corners = coco_mask.toBbox(wanted)
    corners[:, 2:] += corners[:, :2]
    for rles in (encode_id_map(ids, 5), encode_masks(masks)):
        assert [rle["size"] for rle in rles] == [list(ids.shape)] * 5
        assert np.array_equal([decode(rle) for rle in rles], masks)
    for every in (id_map_runs(ids, 5), mask_runs(masks)):
        assert [(runs[:, 1] - runs[:, 0]).sum() for runs in every] == coco_mask.area(wanted).tolist()
        assert [runs_box(runs, len(ids)) for runs in every] == [(y0, x0, y1, x1) for x0, y0, x1, y1 in corners]


@given(st.integers(0, 3), st.integers(1, 20), st.integers(1, 20), st.floats(0, 1), st.integers(0, 99))
def test_masks_of_any_size_and_memory_order_get_the_runs_of_pycocotools(count, height, width, share, seed):
    masks = np.random.default_rng(seed).random((count, height, width)) < share
    wanted = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode() for mask in masks]
    for order in (masks, np.asfortranarray(masks), np.repeat(masks, 2, 2)[..., ::2]):
        assert [rle["counts"] for rle in encode_masks(order)] == wanted
    for mask, counts in zip(masks, wanted, strict=True):
        assert encode_id_map(mask, 1)[0]["counts"] == counts


def test_no_masks_give_no_runs():
    assert encode_masks(np.zeros((0, 4, 5), bool)) == encode_id_map(np.zeros((4, 5), int), 0) == []
    assert id_map_runs(np.zeros((4, 5), int), 0) == mask_runs(np.zeros((0, 4, 5), bool)) == []


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
def test_label_png_holds_category_ids_without_loss(ids, mode, nothing, tmp_path):
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


def test_category_ids_that_fit_no_label_png_are_refused(tmp_path):
    result = semantic(np.zeros((2, 2)), (Category(70000, "far", False, (0, 0, 0)),))
    with pytest.raises(MaskwrightError, match=r"category id 70000 does not fit into a label PNG, expected 0\.\.65534"):
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


def test_segment_numbers_above_two_bytes_survive_the_png():
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
    with pytest.raises(MaskwrightError, match=r"one\.json: cannot be written: No space left") as caught:
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


def test_areas_leave_out_pixels_without_a_class():
    categories = (Category(1, "a", False, (0, 0, 0)), Category(2, "b", False, (0, 0, 9)))
    label_map = np.array([[0, 1, 1, 255]], dtype=np.uint8)
    result = Segmentation("semantic", (1, 4), categories, np.array([0, 1]), label_map=label_map)
    assert result.areas.tolist() == [1, 2]
