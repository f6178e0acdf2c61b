"""Published datasets are read as downloaded, from folders and archives, and equal the output of official tools.

References: cityscapesscripts for Cityscapes; for ADE20K the original's preparation steps, reimplemented with one mask
per object.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from maskwright.config.categories import load_categories
from maskwright.config.schema import DataConfig
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.images.label_images import read_panoptic_png
from maskwright.data.images.load import load_image
from maskwright.errors import DatasetError, MaskwrightError, RecipeError
from tests import datasets_on_disk
from tests.full_size import DATA, needs_full_size


def opened(root, form, task, split="train", **options):
    return open_annotations(DataConfig(format=form, root=str(root), task=task, **options), split)


def by_id(annotated):
    return {annotated.image_id(index): index for index in range(len(annotated))}


def assert_same(found, expected):
    """Assert that two readers return the same ids, images, objects and classes."""
    assert len(found) == len(expected) > 0
    assert [c.id for c in found.categories] == [c.id for c in expected.categories]
    for index in range(len(found)):
        (image, target), (expected_image, expected_target) = found.sample(index), expected.sample(index)
        np.testing.assert_array_equal(image, expected_image)
        assert target.image_id == expected_target.image_id == found.image_id(index)
        assert torch.equal(target.id_maps, expected_target.id_maps)
        assert torch.equal(target.labels, expected_target.labels)
        assert torch.equal(target.is_crowd, expected_target.is_crowd)


# Cityscapes


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    return datasets_on_disk.cityscapes(tmp_path_factory.mktemp("cityscapes"))


def official_panoptic(root, target):
    scripts = pytest.importorskip("cityscapesscripts.preparation.createPanopticImgs")
    target.mkdir()
    scripts.convert2panoptic(str(root / "gtFine"), str(target), False, ["train", "val"])
    return json.loads((target / "cityscapes_panoptic_train.json").read_text()), target / "cityscapes_panoptic_train"


def compare_with_panoptic(annotated, document, folder):
    """Assert that ids, classes, crowds and pixels equal those of a panoptic JSON; return its number of segments."""
    indices, ids = by_id(annotated), {category.id for category in annotated.categories}
    assert len(document["annotations"]) == len(indices)
    for entry in document["annotations"]:
        target = annotated.target(indices[entry["image_id"]])
        png = read_panoptic_png(folder / entry["file_name"])
        segments = [segment for segment in entry["segments_info"] if segment["category_id"] in ids]
        found = [annotated.categories[label].id for label in target.labels]
        assert found == [segment["category_id"] for segment in segments]
        assert target.is_crowd.tolist() == [bool(segment["iscrowd"]) for segment in segments]
        for mask, segment in zip(target.masks.numpy(), segments, strict=True):
            np.testing.assert_array_equal(mask, png == segment["id"])
    return sum(len(entry["segments_info"]) for entry in document["annotations"])


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_cityscapes_objects_equal_the_official_panoptic_files(street, tmp_path, task):
    document, folder = official_panoptic(street, tmp_path / "out")
    assert compare_with_panoptic(opened(street, "cityscapes", task), document, folder) > 50
    assert any(segment["iscrowd"] for entry in document["annotations"] for segment in entry["segments_info"])


@needs_full_size
@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_cityscapes_objects_of_real_annotations_equal_the_official_panoptic_files(tmp_path, task):
    root = DATA / "camvid_cityscapes_layout"
    document, folder = official_panoptic(root, tmp_path / "out")
    assert compare_with_panoptic(opened(root, "cityscapes", task), document, folder) > 100
    given = json.loads((root / "gtFine/cityscapes_panoptic_train.json").read_text())
    compare_with_panoptic(opened(root, "cityscapes", task), given, root / "gtFine/cityscapes_panoptic_train")


def test_cityscapes_classes_equal_the_official_train_ids(street):
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").id2label
    annotated = opened(street, "cityscapes", "semantic")
    assert [labels[c.id].trainId for c in annotated.categories] == list(range(19))
    for index in range(len(annotated)):
        city, name = annotated.image_id(index).partition("_")[0], annotated.image_id(index)
        raw = np.array(Image.open(street / f"gtFine/train/{city}/{name}_gtFine_labelIds.png"))
        expected = np.vectorize(lambda value: labels[value].trainId)(raw)
        np.testing.assert_array_equal(annotated.target(index).label_map(255).numpy(), expected)


@needs_full_size
@pytest.mark.parametrize("split", ["train", "val"])
def test_cityscapes_classes_of_real_annotations_equal_the_train_id_images(split):
    root = DATA / "camvid_cityscapes_layout"
    annotated = opened(root, "cityscapes", "semantic", split)
    for index in range(len(annotated)):
        name = Path(str(annotated.file(index))).name.replace("_leftImg8bit", "_gtFine_labelTrainIds")
        expected = np.array(Image.open(next((root / "gtFine" / split).glob(f"*/{name}"))))
        np.testing.assert_array_equal(annotated.target(index).label_map(255).numpy(), expected)


def test_cityscapes_coarse_annotations_and_extra_subset_are_read_on_request(tmp_path):
    datasets_on_disk.cityscapes(tmp_path, ("train", "val"))
    datasets_on_disk.cityscapes(tmp_path, ("train_extra", "val"), "gtCoarse", seed=1)
    both = opened(tmp_path, "cityscapes", "semantic", train={"subsets": ["train", "train_extra"]})
    assert len(both) == 8
    assert {"train", "train_extra"} == {Path(str(both.file(index))).parts[-3] for index in range(8)}
    coarse = opened(tmp_path, "cityscapes", "instance", "val", val={"annotations": "gtCoarse"})
    assert len(coarse.target(0)) > 0
    both.target(7)


def test_cityscapes_class_that_does_not_exist_is_named(tmp_path):
    datasets_on_disk.cityscapes(tmp_path)
    path = tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png"
    values = np.array(Image.open(path))
    values[0, 0] = 40007
    Image.fromarray(values).save(path)
    with pytest.raises(DatasetError, match=r"aachen_000000_000019_gtFine_instanceIds\.png: .* the value 40"):
        opened(tmp_path, "cityscapes", "panoptic").target(0)


# ADE20K


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return datasets_on_disk.ade20k(tmp_path_factory.mktemp("ade"))


THINGS = [category.id for category in load_categories("ade20k") if category.is_thing]


def prepared_ade20k(root, part, name):
    """Return (category id, mask) of the segments that prepare_ade20k_pan_seg.py makes: objects over stuff."""
    classes = np.array(Image.open(root / f"annotations/{part}/{name}.png"))
    colors = np.array(Image.open(root / f"annotations_instance/{part}/{name}.png"))
    covered = colors[..., 1] > 0
    stuff = [int(i) for i in np.unique(classes) if i and int(i) not in THINGS]
    segments = [(i, (classes == i) & ~covered) for i in stuff]
    for number in np.unique(colors[..., 1]):
        if number:
            mask = colors[..., 1] == number
            (kind,) = np.unique(colors[..., 0][mask])
            segments.append((THINGS[kind - 1], mask))
    return segments


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_ade20k_objects_equal_the_prepared_ones(rooms, task):
    annotated = opened(rooms, "ade20k", task)
    assert len(annotated) == 3
    for index in range(3):
        expected = prepared_ade20k(rooms, "training", annotated.image_id(index))
        expected = [(i, mask) for i, mask in expected if mask.any() and (task == "panoptic" or i in THINGS)]
        target = annotated.target(index)
        assert [annotated.categories[label].id for label in target.labels] == [i for i, _ in expected]
        for mask, (_, truth) in zip(target.masks.numpy(), expected, strict=True):
            np.testing.assert_array_equal(mask, truth)


def test_ade20k_labels_are_values_minus_one_and_0_is_ignored(rooms):
    annotated = opened(rooms, "ade20k", "semantic", "val")
    assert len(annotated) == 2
    raw = np.array(Image.open(rooms / f"annotations/validation/{annotated.image_id(0)}.png"))
    np.testing.assert_array_equal(annotated.target(0).label_map(255).numpy(), raw - np.uint8(1))


@needs_full_size
def test_ade20k_objects_of_real_annotations_equal_the_panoptic_json(tmp_path):
    root = DATA / "ade20k_sample"
    for path in (root / "annotations_instance/training").iterdir():  # there, red is the row of 150 classes, not of 100
        colors = np.array(Image.open(path))
        rows = np.zeros(256, dtype=np.uint8)
        rows[THINGS] = range(1, 101)
        colors[..., 0] = rows[colors[..., 0]]
        datasets_on_disk.save(tmp_path / "annotations_instance/training" / path.name, colors)
    for name in ("images", "annotations"):
        (tmp_path / name).symlink_to(root / name)
    annotated = opened(tmp_path, "ade20k", "panoptic")
    document = json.loads((root / "ade20k_panoptic_train.json").read_text())
    for entry in document["annotations"]:
        target = annotated.target(by_id(annotated)[entry["image_id"]])
        png = read_panoptic_png(root / "ade20k_panoptic_train" / entry["file_name"])
        expected = {(s["category_id"] + 1, (png == s["id"]).tobytes()) for s in entry["segments_info"]}
        found = {
            (annotated.categories[label].id, mask.tobytes())
            for label, mask in zip(target.labels, target.masks.numpy(), strict=True)
        }
        assert found == expected


@needs_full_size
@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_prepared_ade20k_files_are_read(task):
    annotated = opened(DATA / "ade20k_sample", "ade20k", task)
    assert [c.id for c in annotated.categories] == (THINGS if task == "instance" else list(range(1, 151)))
    assert sum(len(annotated.target(index)) for index in range(3)) == (79 if task == "panoptic" else 65)


@pytest.mark.parametrize(("red", "words"), [((120, 120), "has the class 120, expected 1..100"), ((5, 6), "5 and 6")])
def test_ade20k_object_of_a_wrong_class_is_named(tmp_path, red, words):
    datasets_on_disk.ade20k(tmp_path)
    path = tmp_path / "annotations_instance/training/ADE_train_00000001.png"
    colors = np.array(Image.open(path))
    colors[:, :, :2] = 0
    colors[0, :2, 0], colors[0, :2, 1] = red, 7
    Image.fromarray(colors).save(path)
    with pytest.raises(DatasetError, match=rf"ADE_train_00000001\.png: .*{words}"):
        opened(tmp_path, "ade20k", "instance").target(0)


# COCO, Mapillary, CamVid


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return datasets_on_disk.coco(tmp_path_factory.mktemp("coco"))


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_coco_needs_its_root_only(objects, task):
    kind = "instance" if task == "instance" else "panoptic"
    files = {"images": "val2017", "annotations": f"annotations/{kind}s_val2017.json".replace("cs_", "c_")}
    expected = opened(objects, f"coco_{kind}", task, val=files, categories=f"coco_{kind}", split="val")
    found = opened(objects, "coco", task, "val")
    assert_same(found, expected)
    assert len(found.categories) == (80 if task == "instance" else 133)


@needs_full_size
def test_real_coco_folder_needs_its_root_only():
    instances = opened(DATA / "coco_instance_100", "coco", "instance", "val")
    assert len(instances) == 42
    panoptic = opened(DATA / "coco_panoptic", "coco", "panoptic", "val")
    assert sum(len(panoptic.target(i)) for i in range(2)) == 24


def test_mapillary_classes_agree_between_labels_and_panoptic(tmp_path):
    root = datasets_on_disk.mapillary(tmp_path)
    semantic, panoptic = opened(root, "mapillary", "semantic"), opened(root, "mapillary", "panoptic")
    assert semantic.categories == panoptic.categories
    for index in range(2):
        expected = semantic.target(index)
        assert torch.equal(panoptic.target(index).label_map(255), expected.label_map(255))
        raw = np.array(Image.open(root / f"training/labels/{panoptic.image_id(index)}.png"))
        np.testing.assert_array_equal(expected.label_map(65).numpy(), raw)
    things = opened(root, "mapillary", "instance", "val")
    assert {things.categories[label].name for label in things.target(0).labels} <= {"Person", "Car"}


@needs_full_size
def test_camvid_needs_its_root_only():
    for split, count in (("train", 367), ("val", 101), ("test", 198)):
        annotated = opened(DATA / "camvid", "camvid", "semantic", split)
        assert len(annotated) == count
        raw = np.array(Image.open(DATA / f"camvid/{split}annot/{annotated.image_id(0)}.png"))
        np.testing.assert_array_equal(annotated.target(0).label_map(11).numpy(), raw)


# Pascal VOC


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return datasets_on_disk.voc(tmp_path_factory.mktemp("voc"))


def raw_voc(root, folder, name):
    return np.array(Image.open(root / f"VOCdevkit/VOC2012/{folder}/{name}.png"))


def test_voc_splits_come_from_lists_and_the_border_is_ignored(voc):
    assert [len(opened(voc, "voc", "semantic", split)) for split in ("train", "val")] == [3, 2]
    annotated = opened(voc, "voc", "semantic", train={"subsets": ["trainval"]})
    assert len(annotated) == 5
    for index in range(5):
        expected = raw_voc(voc, "SegmentationClass", annotated.image_id(index))
        np.testing.assert_array_equal(annotated.target(index).label_map(255).numpy(), expected)


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_voc_objects_have_the_class_of_their_pixels(voc, task):
    annotated = opened(voc, "voc", task)
    for index in range(3):
        name, target = annotated.image_id(index), annotated.target(index)
        numbers, classes = raw_voc(voc, "SegmentationObject", name), raw_voc(voc, "SegmentationClass", name)
        expected = [(int(classes[numbers == n][0]), numbers == n) for n in np.unique(numbers) if 0 < n < 255]
        if task == "panoptic":
            expected.append((0, numbers == 0))
        found = [annotated.categories[label].id for label in target.labels]
        assert sorted(found) == sorted(i for i, _ in expected)
        masks = {mask.tobytes() for mask in target.masks.numpy()}
        assert masks == {mask.tobytes() for _, mask in expected}


def test_voc_object_with_stray_pixels_has_the_class_of_the_majority(tmp_path):
    root = datasets_on_disk.voc(tmp_path)
    path = root / "VOCdevkit/VOC2012/SegmentationClass/2007_000000.png"
    numbers = raw_voc(root, "SegmentationObject", "2007_000000")
    first = np.flatnonzero(numbers == 1)[:3]
    image = Image.open(path)
    classes = np.array(image)
    classes.flat[first] = 3
    Image.fromarray(classes).save(path)
    annotated = opened(root, "voc", "instance")
    target = annotated.target(0)
    assert 3 not in [annotated.categories[label].id for label in target.labels]
    assert any((mask.numpy() == (numbers == 1)).all() for mask in target.masks)


def test_voc_classes_of_an_exporting_tool_are_read(tmp_path):
    root = datasets_on_disk.voc(tmp_path) / "VOCdevkit/VOC2012"
    names = ["background", *(f"thing {n}" for n in range(1, 16))]
    lines = "".join(f"{name}:{n},0,{n}::\n" for n, name in enumerate(names))
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + lines)
    annotated = opened(root, "voc", "semantic")
    assert [c.name for c in annotated.categories] == names
    assert (annotated.categories[0].is_thing, annotated.categories[2].color) == (False, (2, 0, 2))
    (root / "labelmap.txt").unlink()
    (root / "class_names.txt").write_text("\n".join(["__ignore__", "_background_", *names[1:]]))
    assert [c.id for c in opened(root, "voc", "semantic").categories] == list(range(16))


def test_missing_voc_list_is_named_with_the_existing_ones(voc):
    with pytest.raises(DatasetError, match=r"no list 'train_aug\.txt' in .*, only: train, trainval, val"):
        opened(voc, "voc", "semantic", train={"subsets": ["train_aug"]})


# COCO-Stuff 10k


def test_coco_stuff_10k_reads_matlab_files_by_its_lists(tmp_path):
    datasets_on_disk.coco_stuff_10k(tmp_path)
    names = [f"COCO_train2014_{number:012d}" for number in range(4)]
    maps = {name: scipy.io.loadmat(tmp_path / f"annotations/{name}.mat")["S"] for name in names}
    annotated = opened(tmp_path, "coco_stuff_10k", "semantic")
    assert (len(annotated), len(annotated.categories)) == (3, 171)
    assert len(opened(tmp_path, "coco_stuff_10k", "semantic", "val")) == 1
    ids = np.array([c.id for c in annotated.categories] + [0])
    for index, name in enumerate(names[:3]):
        labels = annotated.sample(index)[1].label_map(171).numpy()
        np.testing.assert_array_equal(ids[labels], maps[name])
    (tmp_path / f"annotations/{names[0]}.mat").write_bytes(b"MATLAB")
    with pytest.raises(DatasetError, match=r"000000000000\.mat: not a MATLAB file"):
        annotated.target(0)


# Archives


PACKERS = {
    "cityscapes": (
        datasets_on_disk.cityscapes,
        datasets_on_disk.packed_cityscapes,
        ("semantic", "instance", "panoptic"),
    ),
    "ade20k": (datasets_on_disk.ade20k, datasets_on_disk.packed_ade20k, ("semantic", "instance", "panoptic")),
    "coco": (datasets_on_disk.coco, datasets_on_disk.packed_coco, ("semantic", "instance", "panoptic")),
    "mapillary": (datasets_on_disk.mapillary, datasets_on_disk.packed, ("semantic", "panoptic")),
    "voc": (datasets_on_disk.voc, datasets_on_disk.tarred, ("semantic", "instance")),
}


@pytest.mark.parametrize("form", PACKERS)
def test_published_archives_give_the_same_as_their_folders(tmp_path, form):
    write, pack, tasks = PACKERS[form]
    folder = write(tmp_path / "folder")
    (tmp_path / "download").mkdir()
    root = pack(folder, tmp_path / "download")
    before = sorted(tmp_path.rglob("*"))
    for task in tasks:
        for split in ("train", "val"):
            assert_same(opened(root, form, task, split), opened(folder, form, task, split))
    assert sorted(tmp_path.rglob("*")) == before


def test_extracted_images_and_archived_annotations_are_one_data_set(street, tmp_path):
    (tmp_path / "leftImg8bit").symlink_to(street / "leftImg8bit")
    datasets_on_disk.pack(street, tmp_path / "gtFine_trainvaltest.zip", "zip", only=("gtFine",))
    assert_same(opened(tmp_path, "cityscapes", "panoptic"), opened(street, "cityscapes", "panoptic"))


@pytest.mark.parametrize("form", [*PACKERS, "camvid", "coco_stuff_10k", "yolo"])
def test_root_without_the_layout_is_an_error_in_one_line(tmp_path, form):
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(MaskwrightError, match=r"^data\.\w+.*; ") as error:
        opened(tmp_path, form, "semantic")
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_subsets_that_cannot_be_joined_are_refused(rooms):
    with pytest.raises(RecipeError, match=r"data\.train\.subsets: names 2 subsets"):
        opened(rooms, "ade20k", "semantic", train={"subsets": ["training", "validation"]})


def test_layouts_have_default_splits_which_can_be_disabled(rooms):
    config = DataConfig(format="ade20k", root=str(rooms), task="semantic", val=None)
    assert config.train is not None
    assert config.val is None
    with pytest.raises(RecipeError, match=r"no data\.val"):
        open_annotations(config, "val")
    with pytest.raises(RecipeError, match=r"no data\.train"):
        open_annotations(DataConfig(format="label_maps", root=str(rooms), task="semantic"), "train")


def test_filter_empty_reads_the_objects_of_a_layout(tmp_path):
    root = datasets_on_disk.cityscapes(tmp_path)
    path = root / "gtFine/train/aachen/aachen_000001_000019_gtFine_instanceIds.png"
    Image.fromarray(np.full(datasets_on_disk.SIZE, 26, dtype=np.uint16)).save(path)  # a group of cars, nothing else
    kept = opened(root, "cityscapes", "instance", filter_empty=True)
    assert len(kept) == 3
    assert "aachen_000001_000019" not in by_id(kept)
    assert load_image(kept.file(0)).shape == (*datasets_on_disk.SIZE, 3)
