"""YOLO text files give the objects of the same dataset in COCO format."""

import json

import numpy as np
import pytest
import torch

from maskwright.config.schema import DataConfig
from maskwright.data.formats.dispatch import open_annotations
from maskwright.errors import DatasetError
from tests import datasets_on_disk

SIZE = datasets_on_disk.SIZE


def opened(root, form, task, split="train", **options):
    return open_annotations(DataConfig(format=form, root=str(root), task=task, **options), split)


@pytest.fixture
def pair_of_sets(tmp_path):
    """A COCO set of polygons, and the same in YOLO format: (COCO folder, YOLO folder)."""
    coco = datasets_on_disk.coco(tmp_path / "coco")
    yolo = tmp_path / "yolo"
    for part in ("train", "val"):
        document = json.loads((coco / f"annotations/instances_{part}2017.json").read_text())
        for image in document["images"]:
            source = coco / f"{part}2017/{image['file_name']}"
            target = yolo / f"images/{part}/{source.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
        for entry in document["annotations"]:
            numbers = np.array(entry["segmentation"][0]).reshape(-1, 2) / [SIZE[1], SIZE[0]]
            text = yolo / f"labels/{part}/{entry['image_id']:012d}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            with open(text, "a") as file:
                file.write(" ".join(map(str, [{1: 0, 3: 1}[entry["category_id"]], *numbers.ravel()])) + "\n")
    (yolo / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: {0: person, 1: car}\n")
    return coco, yolo


def assert_same_objects(found, expected):
    assert len(found) == len(expected) == 3
    names = [c.name for c in found.categories], [c.name for c in expected.categories]
    for index in range(3):
        (image, target), (expected_image, expected_target) = found.sample(index), expected.sample(index)
        np.testing.assert_array_equal(image, expected_image)
        assert torch.equal(target.masks, expected_target.masks)
        assert [names[0][label] for label in target.labels] == [names[1][label] for label in expected_target.labels]


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_yolo_polygons_give_the_masks_of_the_same_coco_polygons(pair_of_sets, task):
    coco, yolo = pair_of_sets
    files = {"images": "train2017", "annotations": "annotations/instances_train2017.json"}
    assert_same_objects(opened(yolo, "yolo", task), opened(coco, "coco_instance", task, train=files))


def roboflow(yolo):
    """train/images beside train/labels, and paths in data.yaml that point outside its folder."""
    for part in ("train", "val"):
        (yolo / part).mkdir()
        (yolo / f"images/{part}").rename(yolo / f"{part}/images")
        (yolo / f"labels/{part}").rename(yolo / f"{part}/labels")
    (yolo / "data.yaml").write_text("train: ../train/images\nval: ../val/images\nnc: 2\nnames: ['person', 'car']\n")
    return yolo


def listed(yolo):
    """Text files of image names in place of folders."""
    for part in ("train", "val"):
        names = sorted(path.name for path in (yolo / f"images/{part}").iterdir())
        (yolo / f"{part}.txt").write_text("".join(f"./images/{part}/{name}\n" for name in names))
    (yolo / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: [person, car]\n")
    return yolo


def separate_yaml(yolo):
    """A YAML file of another name beside the folder of the data."""
    moved = yolo.parent / "sets/mine"
    moved.parent.mkdir()
    yolo.rename(moved)
    (moved / "data.yaml").unlink()
    text = f"path: {moved}\ntrain: [images/train]\nval: images/val\nnames: [person, car]\n"
    (yolo.parent / "mine.yaml").write_text(text)
    return yolo.parent / "mine.yaml"


def zipped(yolo):
    return datasets_on_disk.pack(yolo, yolo.parent / "yolo.zip", "zip", top="some set")


@pytest.mark.parametrize("arrange", [roboflow, listed, separate_yaml, zipped])
def test_yolo_layouts_of_other_tools_are_read(pair_of_sets, arrange):
    coco, yolo = pair_of_sets
    root = arrange(yolo)
    for part in ("train", "val"):
        files = {"images": f"{part}2017", "annotations": f"annotations/instances_{part}2017.json"}
        expected = opened(coco, "coco_instance", "instance", part, **{part: files})
        assert_same_objects(opened(root, "yolo", "instance", part), expected)


def test_yolo_image_without_a_text_file_has_no_object(pair_of_sets):
    yolo = pair_of_sets[1]
    (yolo / "labels/train/000000000002.txt").unlink()
    (yolo / "labels/train/000000000003.txt").write_text("\n")
    annotated = opened(yolo, "yolo", "instance")
    assert [len(annotated.target(index)) for index in range(3)] == [2, 0, 0]
    kept = opened(yolo, "yolo", "instance", filter_empty=True)
    assert len(kept) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.5 0.5 0.2 0.2", "a box"),
        ("7 0 0 1 0 1 1", "class 7, but data.yaml has 2 names"),
        ("0 0 0 1 0 1", "5 values after the class 0"),
        ("0 0 0 1 0", "a box"),
        ("0 0 0 64 0 64 48", "64 is outside 0..1"),
        ("0 0 0 nan 0 1 1", "NaN"),
        ("person 0 0 1 0 1 1", "is not 'class x y x y ...' in numbers"),
    ],
)
def test_yolo_line_that_is_not_a_polygon_is_named(pair_of_sets, line, words):
    yolo = pair_of_sets[1]
    (yolo / "labels/train/000000000001.txt").write_text(f"0 0 0 1 0 1 1\n{line}\n")
    with pytest.raises(DatasetError, match=r"labels/train/000000000001\.txt, line 2: ") as error:
        opened(yolo, "yolo", "instance").target(0)
    assert words in str(error.value)


def test_yolo_polygon_without_a_pixel_is_dropped_with_a_warning(pair_of_sets, caplog):
    yolo = pair_of_sets[1]
    (yolo / "labels/train/000000000001.txt").write_text("0 0.1 0.1 0.1 0.1 0.1 0.1\n1 0 0 1 0 1 1\n")
    assert opened(yolo, "yolo", "instance").target(0).labels.tolist() == [1]
    assert "the polygon of line 1 covers no pixel" in caplog.text


def test_yolo_description_without_names_or_split_is_refused(pair_of_sets):
    yolo = pair_of_sets[1]
    (yolo / "data.yaml").write_text("train: images/train\nnames: [a, b]\n")
    with pytest.raises(DatasetError, match=r"data\.yaml: has no 'val'"):
        opened(yolo, "yolo", "instance", "val")
    (yolo / "data.yaml").write_text("train: images/other\nnames: [a, b]\n")
    with pytest.raises(DatasetError, match=r"data\.train\.images: no folder or list 'images/other'"):
        opened(yolo, "yolo", "instance")
    (yolo / "data.yaml").write_text("train: images/train\n")
    with pytest.raises(DatasetError, match="no 'names'"):
        opened(yolo, "yolo", "instance")
