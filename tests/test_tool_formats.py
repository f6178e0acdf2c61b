"""Files for annotation tools are read back to the same masks, by the tools' libraries or by their documented format."""

import base64
import io
import json
import sys
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import scipy.ndimage
import supervision
import yaml
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskwright.errors import MaskwrightError
from maskwright.results.formats.base import Run
from maskwright.results.formats.label_studio import encode_brush
from maskwright.results.formats.open import open_tool_files
from maskwright.results.outlines import Crop, crop_segments, split_parts, trace_polygons
from maskwright.results.rle import find_runs
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category
from tests import tiny
from tests.in_process import run_command

CATEGORIES = (
    Category(7, 'cat "A" <b>', True, (255, 0, 0)),
    Category(3, "dög", True, (0, 255, 0), "animal"),
    Category(12, "sky", False, (0, 0, 255)),
)
SIZE = (60, 80)
TASKS = ("semantic", "instance", "runs", "panoptic")


def blobs(seed, size=SIZE):
    """A mask with several parts, holes, and pixels that touch only at corners."""
    noise = np.random.default_rng(seed).normal(size=size)
    return scipy.ndimage.gaussian_filter(noise, 1.5) > 0.02


def result(task, seed=0, size=SIZE):
    masks = np.stack([blobs(seed, size), blobs(seed + 1, size), np.zeros(size, bool), np.ones(size, bool)])
    labels, scores = np.array([0, 1, 1, 2]), np.array([0.9, 0.80004, 0.3, 0.25], np.float32)
    if task == "instance":
        return Segmentation("instance", size, CATEGORIES, labels, scores, instance_masks=masks)
    if task == "runs":
        runs = [find_runs(mask, 0, 0, size[0]) for mask in masks]
        return Segmentation("instance", size, CATEGORIES, labels, scores, instance_runs=runs)
    if task == "panoptic":
        ids = np.select([masks[0], masks[1]], [1, 2], 0).astype(np.int32)
        return Segmentation("panoptic", size, CATEGORIES, labels, scores, segment_map=ids)
    label_map = np.select([masks[0], masks[1]], [0, 2], 1).astype(np.int64)
    return Segmentation("semantic", size, CATEGORIES, np.array([0, 1, 2]), label_map=label_map)


def write(folder, tool, *results):
    """Write the results of images/sub/a.png, b.png, ... below the folder; return the folder of the files."""
    out = folder / "out"
    (folder / "images/sub").mkdir(parents=True, exist_ok=True)
    run = Run(out, folder / "images", CATEGORIES, 'r50 "x"')
    with open_tool_files(tool, run) as files:
        for number, one in enumerate(results):
            name = "ab"[number]
            one.source = str(folder / "images/sub" / f"{name}.png")
            Image.new("RGB", one.size[::-1]).save(one.source)
            files.add(one, name)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    return out


def filled(mask):
    """The mask without holes; what touches the outside at a corner of a pixel is no hole."""
    return scipy.ndimage.binary_fill_holes(mask, np.ones((3, 3)))


def filled_parts(mask):
    parts, count = scipy.ndimage.label(mask)
    return [filled(parts == part) for part in range(1, count + 1)]


def read_brush(values):
    """Decode Label Studio's run lengths as its documentation describes them."""
    bits = "".join(f"{value:08b}" for value in values)
    position = 0

    def read(size):
        nonlocal position
        position += size
        return int(bits[position - size : position], 2)

    count, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    out = []
    while len(out) < count:
        repeated, length = read(1), read(sizes[read(2)]) + 1
        out += [read(word)] * length if repeated else [read(word) for _ in range(length)]
    return np.array(out, np.uint8)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("tool", "file"), [("coco", "coco.json"), ("fiftyone", "labels.json")])
def test_pycocotools_reads_the_same_masks_from_coco_files(tmp_path, task, tool, file):
    expected = result(task)
    dataset = COCO(write(tmp_path, tool, result("panoptic", 5), expected) / file)
    image = dataset.imgs[2]
    assert (image["height"], image["width"]) == SIZE
    name = "sub/b.png" if tool == "coco" else str(tmp_path / "images/sub/b.png")
    assert image["file_name"] == name
    found = [index for index, mask in enumerate(expected.masks) if mask.any()]
    annotations = dataset.loadAnns(dataset.getAnnIds(imgIds=2))
    assert len(annotations) == len(found) >= 2
    for index, annotation in zip(found, annotations, strict=True):
        np.testing.assert_array_equal(dataset.annToMask(annotation), expected.masks[index])
        assert annotation["category_id"] == CATEGORIES[expected.labels[index]].id
        assert annotation["area"] == expected.areas[index]
        x, y, width, height = annotation["bbox"]
        assert [x, y, x + width, y + height] == expected.boxes[index].tolist()
        if expected.scores is not None:
            assert annotation["score"] == pytest.approx(expected.scores[index], abs=1e-4)
    assert [category["name"] for category in dataset.cats.values()] == [category.name for category in CATEGORIES]


@pytest.mark.parametrize("task", TASKS)
def test_cvat_gets_one_annotation_per_connected_part_and_ids_from_1(tmp_path, task):
    expected = result(task)
    dataset = COCO(write(tmp_path, "cvat", expected) / "cvat.json")
    assert sorted(dataset.cats) == [1, 2, 3]
    assert sorted(dataset.anns) == list(range(1, len(dataset.anns) + 1))
    masks = np.zeros((len(CATEGORIES), *SIZE), bool)
    pixels = 0
    for annotation in dataset.anns.values():
        mask = dataset.annToMask(annotation)
        assert len(cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]) == 1
        pixels += annotation["area"]
        masks[annotation["category_id"] - 1] |= mask.astype(bool)
    assert pixels == expected.areas.sum()
    for label in range(len(CATEGORIES)):
        np.testing.assert_array_equal(masks[label], expected.masks[expected.labels == label].any(0))


@pytest.mark.parametrize("task", TASKS)
def test_label_studio_brushes_decode_to_the_same_masks(tmp_path, task):
    expected = result(task)
    out = write(tmp_path, "label-studio", expected)
    (entry,) = json.loads((out / "label_studio.json").read_text())
    assert entry["data"]["image"] == "/data/local-files/?d=sub/a.png"
    (prediction,) = entry["predictions"]
    assert prediction["model_version"] == 'maskwright r50 "x"'
    assert ("score" in prediction) == (expected.scores is not None)
    found = [index for index, mask in enumerate(expected.masks) if mask.any()]
    assert len({region["id"] for region in prediction["result"]}) == len(found)
    config = ElementTree.parse(out / "label_config.xml").getroot()
    names = {label.get("value") for label in config.find("BrushLabels")}
    for index, region in zip(found, prediction["result"], strict=True):
        mask = read_brush(region["value"]["rle"]).reshape(*SIZE, 4)[..., 3]
        np.testing.assert_array_equal(mask, 255 * expected.masks[index].astype(np.uint8))
        assert region["value"]["brushlabels"] == [expected.names[index]]
        assert region["from_name"] == config.find("BrushLabels").get("name")
        assert region["to_name"] == config.find("Image").get("name")
        assert set(region["value"]["brushlabels"]) <= names
        assert (region["original_height"], region["original_width"]) == SIZE


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 2), (1, 4), (3, 700), (260, 260)])
def test_runs_of_every_length_are_brushes(shape):
    for mask in (
        np.zeros(shape, bool),
        np.ones(shape, bool),
        blobs(3, shape),
        np.arange(shape[1]) % 2 > np.zeros(shape),
    ):
        np.testing.assert_array_equal(read_brush(encode_brush(mask)).reshape(*shape, 4)[..., 3] > 0, mask)


def test_label_studio_polygons_are_in_percent(tmp_path):
    expected = result("instance")
    out = write(tmp_path, "label-studio-polygons", expected)
    (entry,) = json.loads((out / "label_studio.json").read_text())
    regions = entry["predictions"][0]["result"]
    parts = [part for mask in expected.masks for part in filled_parts(mask)]
    for part, region in zip(parts, regions, strict=True):
        points = np.array(region["value"]["points"]) / 100 * SIZE[::-1]
        drawn = coco_mask.decode(coco_mask.frPyObjects([points.ravel().tolist()], *SIZE))[..., 0]
        np.testing.assert_array_equal(drawn, part)
        assert region["value"]["closed"]
        assert region["type"] == "polygonlabels"


def test_yolo_polygons_are_exact_for_coordinates_cut_to_pixels(tmp_path, caplog):
    expected = result("instance")
    out = write(tmp_path, "yolo", expected)
    assert yaml.safe_load((out / "data.yaml").read_text(encoding="utf-8")) == {
        "train": "images",
        "val": "images",
        "names": {0: CATEGORIES[0].name, 1: CATEGORIES[1].name, 2: CATEGORIES[2].name},
    }
    parts = [part for mask in expected.masks for part in filled_parts(mask)]
    lines = (out / "labels/sub/a.txt").read_text().splitlines()
    for part, line in zip(parts, lines, strict=True):
        points = np.array(line.split()[1:], float).reshape(-1, 2) * SIZE[::-1]
        drawn = cv2.fillPoly(np.zeros(SIZE, np.uint8), [points.astype(np.int32)], 1)
        np.testing.assert_array_equal(drawn, part)
    assert "2 segments have holes, which are filled" in caplog.text


def test_supervision_reads_yolo_polygons_up_to_a_pixel(tmp_path):
    """It rounds coordinates, so the right and lower sides move outwards by a pixel."""
    size = (480, 640)
    ids = np.zeros(size, np.int32)
    cv2.circle(ids, (200, 200), 120, 1, -1)
    cv2.rectangle(ids, (400, 50), (600, 450), 2, -1)
    expected = Segmentation("panoptic", size, CATEGORIES, np.array([1, 2]), np.ones(2, np.float32), segment_map=ids)
    out = write(tmp_path, "yolo", expected)
    data = supervision.DetectionDataset.from_yolo(
        str(tmp_path / "images/sub"), str(out / "labels/sub"), str(out / "data.yaml"), force_masks=True
    )
    ((_, _, found),) = list(data)
    assert found.class_id.tolist() == [1, 2]
    for mask, other in zip(found.mask, expected.masks, strict=True):
        assert (mask & other).sum() / (mask | other).sum() >= 0.98
        assert not (other & ~mask).any()


def test_labelme_files_lose_nothing(tmp_path):
    expected = result("instance")
    content = json.loads((write(tmp_path, "labelme", expected) / "a.json").read_text())
    assert content["imagePath"] == "../images/sub/a.png"
    assert (content["imageHeight"], content["imageWidth"]) == SIZE
    masks = {name: np.zeros(SIZE, bool) for name in expected.names}
    for shape in content["shapes"]:
        masks[shape["label"]] |= read_labelme_shape(shape)
    for index in (0, 1, 3):
        np.testing.assert_array_equal(masks[expected.names[index]], expected.masks[index])
    assert {shape["shape_type"] for shape in content["shapes"]} == {"mask", "polygon"}


def read_labelme_shape(shape):
    """A shape drawn as the files of labelme are documented: polygons by Pillow, masks pasted into their box."""
    if shape["shape_type"] == "polygon":
        drawing = Image.new("1", SIZE[::-1])
        points = [tuple(point) for point in shape["points"]]
        ImageDraw.Draw(drawing).polygon(points, outline=1, fill=1)
        return np.array(drawing)
    (left, top), (right, bottom) = shape["points"]
    mask = np.zeros(SIZE, bool)
    mask[top : bottom + 1, left : right + 1] = np.array(Image.open(io.BytesIO(base64.b64decode(shape["mask"]))))
    return mask


@pytest.mark.parametrize("seed", range(20))
def test_polygons_are_exact_for_pycocotools_opencv_and_pillow(seed):
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 30, 2)
    mask = random.random((height, width)) < random.uniform(0.1, 0.9)
    mask[0, 0] = True
    full = np.zeros((height + 4, width + 6), bool)
    full[2 : 2 + height, 3 : 3 + width] = mask
    parts, _ = scipy.ndimage.label(full)
    for number, (polygon, part) in enumerate(zip(trace_polygons(Crop(mask, 2, 3)), filled_parts(full), strict=True), 1):
        assert polygon.has_hole == (part != (parts == number)).any()
        drawn = coco_mask.decode(coco_mask.frPyObjects([polygon.points.ravel().tolist()], *full.shape))[..., 0]
        np.testing.assert_array_equal(drawn, part)
        drawn = cv2.fillPoly(np.zeros(full.shape, np.uint8), [polygon.points.astype(np.int32)], 1)
        np.testing.assert_array_equal(drawn, part)


def test_parts_together_are_the_segment():
    for index, crop in crop_segments(result("panoptic")):
        mask = np.zeros(SIZE, int)
        for part in split_parts(crop):
            height, width = part.mask.shape
            mask[part.top : part.top + height, part.left : part.left + width] += part.mask
        np.testing.assert_array_equal(mask, result("panoptic").masks[index])


@pytest.mark.parametrize("task", TASKS)
def test_supervision_gets_masks_classes_and_scores(task):
    expected = result(task)
    detections = expected.to_supervision()
    np.testing.assert_array_equal(detections.mask, expected.masks)
    assert detections.class_id.tolist() == expected.labels.tolist()
    assert detections.data["class_name"].tolist() == expected.names
    assert detections.data["segment_id"].tolist() == list(range(1, len(expected) + 1))
    assert (detections.confidence is None) == (task == "semantic")
    assert len(detections[detections.area > 0]) == sum(expected.areas > 0)


def test_a_result_without_segments_is_no_detection():
    empty = Segmentation(
        "panoptic", SIZE, CATEGORIES, np.zeros(0, int), np.zeros(0, np.float32), segment_map=np.zeros(SIZE, np.int32)
    )
    assert len(empty.to_supervision()) == 0
    assert list(crop_segments(empty)) == []


def test_supervision_is_named_if_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MaskwrightError, match="supervision is not installed; pip install supervision"):
        result("instance").to_supervision()


TOOLS = {
    "coco": ["coco.json"],
    "cvat": ["cvat.json"],
    "fiftyone": ["labels.json"],
    "label-studio": ["label_config.xml", "label_studio.json"],
    "label-studio-polygons": ["label_config.xml", "label_studio.json"],
    "labelme": ["a.json"],
    "yolo": ["data.yaml"],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_own_files_are_replaced_and_others_never(tmp_path, tool):
    out = write(tmp_path, tool, result("instance"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {path.name for path in before if path.suffix != ".txt"} == set(TOOLS[tool])
    if tool == "yolo":
        with pytest.raises(MaskwrightError, match="labels: exists, and labels are never replaced"):
            write(tmp_path, tool, result("instance"))
        (out / "labels").rename(out / "old")
    write(tmp_path, tool, result("panoptic"))
    for name in TOOLS[tool]:
        (out / name).write_text("mine")
        with pytest.raises(MaskwrightError, match="exists, and is not a result of maskwright"):
            write(tmp_path, tool, result("instance"))
        assert (out / name).read_text() == "mine"
        (out / name).unlink()


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "labelme"])
def test_a_run_that_fails_leaves_nothing(tmp_path, tool):
    run = Run(tmp_path / "out", tmp_path, CATEGORIES, "r50")
    one = result("instance")
    one.source = str(tmp_path / "a.png")
    files = open_tool_files(tool, run)
    files.__enter__()
    files.add(one, "a")
    assert any(path.name.startswith(".") for path in (tmp_path / "out").iterdir())
    files.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert list((tmp_path / "out").rglob("*")) == []


def predict(monkeypatch, capsys, *arguments):
    """`maskwright predict` with the trained model."""
    return run_command(monkeypatch, capsys, "predict", tiny.trained_model(), *arguments, "--device", "cpu")


@pytest.mark.parametrize("tool", TOOLS)
def test_predict_writes_the_files_of_a_tool_and_lists_bad_images(tmp_path, monkeypatch, capsys, tool):
    (tmp_path / "photos").mkdir()
    for name in "ab":
        Image.fromarray(tiny.scene_image(1)).save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos/bad.png").write_bytes(b"not an image")
    out = tmp_path / "out"
    status, output, complaints = predict(
        monkeypatch, capsys, tmp_path / "photos", "--task", "instance", "--output", out, "--format", tool
    )
    assert (status, "2 of 3 images" in output) == (1, True)
    assert "bad.png" in complaints
    names = {path.name for path in out.rglob("*") if path.is_file()}
    added = {"yolo": {"a.txt", "b.txt"}, "labelme": {"b.json"}}.get(tool, set())
    assert names == {*TOOLS[tool], *added}


def test_yolo_labels_of_two_images_with_one_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.fromarray(tiny.scene_image(1)).save(tmp_path / "photos" / name)
    arguments = (tmp_path / "photos", "--output", tmp_path / "out", "--format", "yolo")
    status, output, complaints = predict(monkeypatch, capsys, *arguments)
    assert (status, "1 of 2 images" in output) == (1, True)
    assert "its labels would have the name of those of" in complaints


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("--confidence",), "the format of coco has no confidence maps; leave --confidence out"),
        (("--submission", "coco"), "--submission and --format both choose the files to write; leave one of them out"),
    ],
)
def test_options_that_contradict_a_format(tmp_path, monkeypatch, capsys, other, message):
    Image.fromarray(tiny.scene_image(1)).save(tmp_path / "a.png")
    status, _, complaints = predict(monkeypatch, capsys, tmp_path / "a.png", "--format", "coco", *other)
    assert status != 0
    assert message in complaints
