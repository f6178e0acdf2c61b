"""Data sets are recognised by their layout, and what is found can be opened as it is."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskwright.data.check.check import check
from maskwright.data.formats.detect import recognise
from maskwright.data.formats.dispatch import open_annotations
from maskwright.errors import DatasetError
from tests import datasets_on_disk, tiny

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"

SHARED = {
    "camvid": ("camvid", "semantic", {"train": 367, "val": 101, "test": 198}),
    "nuclei": ("coco_panoptic", "panoptic", {"train": 533, "val": 90}),
    "coco_instance_100": ("coco", "instance", {"train": 50, "val": 42}),
    "coco_panoptic": ("coco", "panoptic", {"val": 2}),
    "ade20k_sample": ("ade20k", "panoptic", {"train": 3}),
    "camvid_cityscapes_layout": ("cityscapes", "panoptic", {"train": 14, "val": 6}),
    "coco_instance_100/annotations/instances_val2017.json": ("coco_instance", "instance", {"val": 42}),
    "nuclei/annotations/panoptic_val.json": ("coco_panoptic", "panoptic", {"val": 90}),
    "hostile/panoptic/good.json": ("coco_panoptic", "panoptic", {"train": 1}),
}
LAYOUTS = {
    "cityscapes": (datasets_on_disk.cityscapes, datasets_on_disk.packed_cityscapes, "panoptic"),
    "ade20k": (datasets_on_disk.ade20k, datasets_on_disk.packed_ade20k, "panoptic"),
    "coco": (datasets_on_disk.coco, datasets_on_disk.packed_coco, "panoptic"),
    "mapillary": (datasets_on_disk.mapillary, datasets_on_disk.packed, "panoptic"),
    "voc": (datasets_on_disk.voc, datasets_on_disk.tarred, "panoptic"),
    "coco_stuff_10k": (datasets_on_disk.coco_stuff_10k, datasets_on_disk.packed, "semantic"),
    "yolo": (datasets_on_disk.yolo, datasets_on_disk.packed, "instance"),
}


def open_all(config):
    """How many images each split has; one of each is read."""
    sizes = {}
    for split in ("train", "val", "test"):
        if getattr(config, split) is not None:
            annotated = open_annotations(config, split)
            sizes[split] = len(annotated)
            annotated.sample(0)
    return sizes


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize("name", SHARED)
def test_shared_data_set_is_recognised_and_opens(name):
    config = recognise(DATA / name)
    assert (config.format, config.task, open_all(config)) == SHARED[name]


@pytest.mark.parametrize("form", LAYOUTS)
def test_published_layout_is_recognised_in_a_folder_and_in_archives(tmp_path, form):
    write, pack, task = LAYOUTS[form]
    folder = write(tmp_path / "folder")
    (tmp_path / "download").mkdir()
    sizes = []
    for root in (folder, pack(folder, tmp_path / "download")):
        config = recognise(root)
        assert (config.format, config.task) == (form, task)
        sizes.append(open_all(config))
    assert sizes[0] == sizes[1]
    assert set(sizes[0]) >= {"train", "val"}


def test_inside_the_package_is_a_panoptic_set():
    assert open_all(recognise("sample")) == {"train": 24, "val": 8}


def test_own_label_folders_get_the_values_that_occur_as_classes(tmp_path):
    tiny.write_labels(tmp_path, ignored=(1,))
    config = recognise(tmp_path)
    assert [entry.id for entry in config.categories] == [3, 7, 8, 20]
    assert config.ignore_values == (255,)
    assert len(open_annotations(config, "train").target(0)) == 4


def test_a_label_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    tiny.write_labels(tmp_path, ignored=(1,))
    first = min(path for path in tmp_path.rglob("*.png") if "label" in str(path.relative_to(tmp_path)))
    first.write_bytes(b"no picture")
    assert recognise(tmp_path).format == "label_maps"
    report = check(tmp_path, workers=1)
    assert report.images > 1
    assert [
        first.name in problem.file or first.name in problem.found
        for problem in report.problems
        if problem.severity == "error"
    ] == [True]


def test_splits_are_found_above_and_below_images_and_labels(tmp_path):
    for number, pattern in enumerate(("{}/{}", "{1}/{0}")):
        root = tmp_path / str(number)
        for split in ("train", "validation"):
            for kind in ("images", "masks"):
                folder = root / pattern.format(kind, split)
                folder.mkdir(parents=True)
                Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "a.png")
        assert open_all(recognise(root)) == {"train": 1, "val": 1}


@pytest.mark.parametrize("writer", [tiny.write_panoptic, tiny.write_instances])
def test_folder_with_a_json_of_any_name_is_coco(tmp_path, writer):
    assert open_all(recognise(writer(tmp_path / "set"))) == {"train": 4}
    assert open_all(recognise(datasets_on_disk.pack(tmp_path / "set", tmp_path / "set.zip", "zip"))) == {"train": 4}


def test_voc_folder_of_an_annotation_tool_has_one_list(tmp_path):
    root = datasets_on_disk.voc(tmp_path) / "VOCdevkit/VOC2012"
    lists = root / "ImageSets/Segmentation"
    (lists / "trainval.txt").rename(lists / "default.txt")
    (lists / "train.txt").unlink()
    (lists / "val.txt").unlink()
    assert open_all(recognise(root)) == {"train": 5}


def test_yaml_of_yolo_and_tables_are_recognised(tmp_path):
    datasets = pytest.importorskip("datasets")
    yolo = datasets_on_disk.yolo(tmp_path / "yolo")
    assert recognise(yolo / "data.yaml").format == "yolo"
    rows = {"image": [str(path) for path in sorted((yolo / "images/train").iterdir())]}
    table = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(str(tmp_path / "dict"))
    table.save_to_disk(str(tmp_path / "single"))
    (tmp_path / "hub/data").mkdir(parents=True)
    table.to_parquet(str(tmp_path / "hub/data/train-00000-of-00001.parquet"))
    for name, has_val in {"dict": True, "single": False, "hub": False}.items():
        config = recognise(tmp_path / name)
        assert (config.format, config.train is not None, config.val is not None) == ("huggingface", True, has_val)
    assert recognise(tmp_path / "hub/data/train-00000-of-00001.parquet").format == "huggingface"


def test_unknown_layout_and_missing_path_say_what_was_found(tmp_path):
    (tmp_path / "stuff").mkdir()
    with pytest.raises(DatasetError, match=r"not known \(found: stuff\)"):
        recognise(tmp_path)
    with pytest.raises(DatasetError, match="no such file"):
        recognise(tmp_path / "nowhere")
    (tmp_path / "a.yaml").write_text("x: 1")
    with pytest.raises(DatasetError, match="no 'names'"):
        recognise(tmp_path / "a.yaml")
