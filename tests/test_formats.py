"""Annotations become targets with bit-exact masks and contiguous labels; damaged files are refused in one line.

The reference for masks is pycocotools.
"""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.config.schema import DataConfig
from maskwright.data.formats.base import for_task
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.formats.image_list import PackedList
from maskwright.errors import DatasetError, ImageError, MaskwrightError, RecipeError
from tests import hostile_files, tiny
from tests.full_size import find, full_size, needs_full_size


def opened(root, format, task, split, **options):
    config = DataConfig(format=format, root=str(root), task=task, train=split, **options)
    return open_annotations(config, "train")


def write_image(path, height=8, width=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(path)


def label(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def rectangle(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


@pytest.fixture
def coco(tmp_path):
    """A function that writes a COCO set of one image, and opens it."""
    write_image(tmp_path / "images/a.png", 20, 30)

    def write(annotations, task="instance", categories=({"id": 7, "name": "x"},), images=None, class_list=None):
        images = images or [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}]
        rows = [{"id": i, "image_id": 1, "category_id": 7, "iscrowd": 0} | row for i, row in enumerate(annotations, 1)]
        document = {"images": images, "annotations": rows, "categories": list(categories)}
        (tmp_path / "a.json").write_text(json.dumps(document))
        return opened(
            tmp_path, "coco_instance", task, {"images": "images", "annotations": "a.json"}, categories=class_list
        )

    return write


@pytest.mark.parametrize(
    ("root", "split", "count"),
    [
        ("sample", "train", 633),
        full_size("coco_instance_100", "train2017", 470),
        full_size("coco_instance_100", "val2017", 319),
    ],
)
def test_every_mask_of_real_annotations_equals_pycocotools_bit_for_bit(root, split, count):
    coco_api = pytest.importorskip("pycocotools.coco").COCO
    files = {"images": split, "annotations": f"annotations/instances_{split}.json"}
    annotated = opened(find(root), "coco_instance", "instance", files)
    reference = coco_api(str(find(root) / files["annotations"]))
    assert [category.id for category in annotated.categories] == sorted(reference.getCatIds())
    objects = 0
    for index in range(len(annotated)):
        target = annotated.target(index)
        expected = reference.loadAnns(reference.getAnnIds(annotated.image_id(index)))
        assert len(target) == len(expected)
        masks = target.masks.numpy()
        for mask, entry in zip(masks, expected, strict=True):
            np.testing.assert_array_equal(mask, reference.annToMask(entry).astype(bool))
        assert [annotated.categories[i].id for i in target.labels] == [entry["category_id"] for entry in expected]
        assert target.is_crowd.tolist() == [bool(entry["iscrowd"]) for entry in expected]
        np.testing.assert_array_equal(target.areas, [entry["area"] for entry in expected])
        boxes = np.array([entry["bbox"] for entry in expected]).reshape(-1, 4)
        np.testing.assert_allclose(target.boxes, np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]))
        objects += len(target)
    assert objects == count


@needs_full_size
def test_images_without_objects_are_kept():
    files = {"images": "train2017", "annotations": "annotations/instances_train2017.json"}
    annotated = opened(find("coco_instance_100"), "coco_instance", "instance", files)
    assert len(annotated) == 50
    index = [annotated.image_id(i) for i in range(50)].index(262284)
    image, target = annotated.sample(index)
    assert len(target) == 0
    assert target.id_maps.shape == (1, *image.shape[:2])
    assert target.masks.shape == (0, *image.shape[:2])


def test_overlapping_objects_keep_all_their_pixels(coco):
    boxes = [(2, 2, 12, 12), (8, 8, 20, 18), (10, 10, 14, 14), (22, 2, 28, 6)]
    target = coco([{"segmentation": rectangle(*box)} for box in boxes]).target(0)
    assert target.masks.flatten(1).sum(1).tolist() == [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes]
    assert target.id_maps.shape == (3, 20, 30)
    assert {int(number): depth for depth in range(3) for number in target.id_maps[depth].unique() if number} == {
        1: 0,
        2: 1,
        3: 2,
        4: 0,
    }


def test_missing_areas_and_boxes_come_from_the_mask(coco):
    target = coco([{"segmentation": rectangle(2, 3, 12, 8)}]).target(0)
    assert target.areas.tolist() == [50]
    assert target.boxes.tolist() == [[2, 3, 12, 8]]


def test_object_without_a_pixel_is_dropped_with_one_warning(coco, caplog):
    thin = {"segmentation": [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]]}
    annotated = coco([thin, {"segmentation": rectangle(2, 2, 4, 4)}, thin])
    with caplog.at_level(logging.WARNING):
        targets = [annotated.target(0), annotated.target(0)]
    assert [len(target) for target in targets] == [1, 1]
    assert targets[0].masks.sum() == 4
    assert caplog.text.count("covers no pixel") == 1


def test_instance_task_keeps_only_things_and_renumbers_them(coco):
    categories = [{"id": 3, "name": "sky", "isthing": 0}, {"id": 7, "name": "x"}, {"id": 9, "name": "y"}]
    rows = [{"segmentation": rectangle(0, 0, 9, 9), "category_id": c} for c in (3, 9, 7)]
    annotated = coco(rows, categories=categories)
    assert [category.name for category in annotated.categories] == ["x", "y"]
    assert annotated.target(0).labels.tolist() == [1, 0]
    assert coco(rows, task="panoptic", categories=categories).target(0).labels.tolist() == [0, 2, 1]


def test_semantic_task_has_one_object_per_class_in_ascending_order(coco):
    rows = [{"segmentation": rectangle(0, 0, 5, 5), "category_id": 9}, {"segmentation": rectangle(10, 0, 15, 5)}] * 2
    target = coco(rows, task="semantic", categories=[{"id": 7, "name": "x"}, {"id": 9, "name": "y"}]).target(0)
    assert target.labels.tolist() == [0, 1]
    assert target.masks.flatten(1).sum(1).tolist() == [25, 25]
    assert target.areas is None


def test_classes_with_other_names_in_recipe_and_json_cause_a_warning(coco, caplog):
    with caplog.at_level(logging.WARNING):
        annotated = coco([], class_list=[{"id": 7, "name": "cell"}])
    assert annotated.categories[0].name == "cell"
    assert "id 7 is 'cell' there and 'x' here" in caplog.text


def test_class_list_of_another_data_set_is_refused_but_another_spelling_is_not(coco):
    with pytest.raises(DatasetError, match=r"all 1 classes .* which has 80: .* 'bicycle' there and 'nucleus' here"):
        coco([], categories=[{"id": 2, "name": "nucleus"}], class_list="coco_instance")
    assert len(coco([], categories=[{"id": 2, "name": "Bi_cycle"}], class_list="coco_instance").categories) == 80


@pytest.mark.parametrize("entry", hostile_files.COCO, ids=lambda entry: entry.file)
def test_hostile_coco_file_is_read_or_refused(entry, hostile, caplog):
    files = {"images": "images", "annotations": entry.file}

    def read():
        annotated = opened(hostile, "coco_instance", "instance", files)
        return [annotated.sample(index) for index in range(len(annotated))]

    assert_handled(read, entry.expect, entry.file, caplog)


@pytest.mark.parametrize("entry", hostile_files.PANOPTIC, ids=lambda entry: entry.file)
def test_hostile_panoptic_file_is_read_or_refused(entry, hostile, caplog):
    files = {"images": "images", "annotations": entry.file, "masks": "panoptic/masks"}

    def read():
        annotated = opened(hostile, "coco_panoptic", "panoptic", files)
        return [annotated.sample(index) for index in range(len(annotated))]

    assert_handled(read, entry.expect, None, caplog)


@pytest.mark.parametrize("entry", hostile_files.LABELS, ids=lambda entry: entry.file)
def test_hostile_label_file_is_read_or_refused(entry, hostile, tmp_path, caplog):
    (tmp_path / "list.txt").write_text(f"images/plain.jpg {entry.file}\n")
    files = {"images": "images", "list": str(tmp_path / "list.txt")}

    def read():
        options = {"categories": "camvid", "ignore_values": (255,)}
        annotated = opened(hostile, "label_maps", "semantic", files, **options)
        return [annotated.sample(index) for index in range(len(annotated))]

    assert_handled(read, entry.expect, entry.name, caplog)


def assert_handled(read, expect, name, caplog):
    """Expect an error of one line with the file name for `reject`, a warning for `warn`, neither for `load`."""
    samples, message = [], None
    with caplog.at_level(logging.WARNING):
        try:
            samples = read()
        except DatasetError as error:
            message = str(error)
    assert (message is not None) == (expect == "reject") or expect == "load_or_reject", message
    if message is not None:
        assert "\n" not in message
        assert name is None or name in message or "plain.jpg" in message
        return
    assert len(samples) == 1
    warnings = [record for record in caplog.records if "no 'annotations'" not in record.message]
    assert bool(warnings) == (expect == "warn"), caplog.text


def test_valid_panoptic_files_have_their_segments_and_stuff_is_merged(hostile):
    split = {"images": "images", "masks": "panoptic/masks"}
    good = opened(hostile, "coco_panoptic", "panoptic", split | {"annotations": "panoptic/good.json"}).target(0)
    assert good.labels.tolist() == [1, 2, 0]
    assert good.masks.flatten(1).sum(1).tolist() == [7520, 8320, 800]
    name = "panoptic/two_stuff_segments_of_a_class.json"
    merged = opened(hostile, "coco_panoptic", "panoptic", split | {"annotations": name}).target(0)
    assert merged.labels.tolist() == [1, 0]
    assert merged.masks.flatten(1).sum(1).tolist() == [7520 + 8320, 800]
    crowd = opened(hostile, "coco_panoptic", "panoptic", split | {"annotations": "panoptic/crowd_segment.json"}).target(
        0
    )
    assert crowd.is_crowd.tolist() == [False, False, True]


def test_void_of_a_panoptic_image_is_no_object(tmp_path):
    folder = tiny.write_panoptic(tmp_path, 1)
    mask = np.array(Image.open(folder / "masks/00.png"))
    mask[:5] = 0
    Image.fromarray(mask).save(folder / "masks/00.png")
    for task in ("panoptic", "semantic"):
        target = open_annotations(tiny.recipe(folder, data__task=task).data, "train").target(0)
        assert not target.id_maps[:, :5].any()
        assert target.id_maps.amax(0)[5:].all()
        assert (target.label_map(255)[:5] == 255).all()
        assert target.labeled_pixels == 59 * 64
    things = open_annotations(tiny.recipe(folder, data__task="instance").data, "train").target(0)
    assert things.void[:5].all()
    assert not things.void[5:].any()


SETS = {
    "camvid": (
        "camvid",
        "label_maps",
        "semantic",
        "train",
        "trainannot",
        {"categories": "camvid", "ignore_values": (11,)},
    ),
    "sample": ("sample", "coco_instance", "instance", "train", "annotations/instances_train.json", {}),
    "sample panoptic": ("sample", "coco_panoptic", "panoptic", "train", "annotations/panoptic_train.json", {}),
    "nuclei": ("nuclei", "coco_instance", "instance", "train", "annotations/instances_train.json", {}),
    "nuclei panoptic": ("nuclei", "coco_panoptic", "panoptic", "train", "annotations/panoptic_train.json", {}),
    "coco panoptic": (
        "coco_panoptic",
        "coco_panoptic",
        "panoptic",
        "val2017",
        "annotations/panoptic_val2017.json",
        {"categories": "coco_panoptic"},
    ),
    "ade20k": (
        "ade20k_sample",
        "label_maps",
        "semantic",
        "images",
        "annotations",
        {"categories": "ade20k", "ignore_values": (0,)},
    ),
    "ade20k panoptic": (
        "ade20k_sample",
        "coco_panoptic",
        "panoptic",
        "images/training",
        "ade20k_panoptic_train.json",
        {},
    ),
    "cityscapes": (
        "camvid_cityscapes_layout",
        "label_maps",
        "semantic",
        "leftImg8bit/train",
        "gtFine/train",
        {
            "categories": "cityscapes",
            "ignore_values": (0,),
            "image_suffix": "_leftImg8bit",
            "label_suffix": "_gtFine_labelIds",
        },
    ),
    "cityscapes panoptic": (
        "camvid_cityscapes_layout",
        "coco_panoptic",
        "panoptic",
        "leftImg8bit/train",
        "gtFine/cityscapes_panoptic_train.json",
        {},
    ),
    "cityscapes instance": (
        "camvid_cityscapes_layout",
        "coco_panoptic",
        "instance",
        "leftImg8bit/train",
        "gtFine/cityscapes_panoptic_train.json",
        {"categories": "cityscapes"},
    ),
}
SIZES = {"camvid": (367, 11), "nuclei": (533, 1), "nuclei panoptic": (533, 2), "coco panoptic": (2, 133)}
SIZES |= {"sample": (24, 1), "sample panoptic": (24, 2), "ade20k": (6, 150), "ade20k panoptic": (3, 150)}
SIZES |= {"cityscapes": (14, 19), "cityscapes panoptic": (14, 19), "cityscapes instance": (14, 8)}


@pytest.mark.parametrize("name", [name if name.startswith("sample") else full_size(name) for name in SETS])
def test_real_data_sets_are_read(name):
    root, format, task, images, annotations, options = SETS[name]
    annotated = opened(find(root), format, task, {"images": images, "annotations": annotations}, **options)
    assert (len(annotated), len(annotated.categories)) == SIZES[name]
    for index in range(0, len(annotated), max(1, len(annotated) // 10)):
        image, target = annotated.sample(index)
        assert target.id_maps.shape[1:] == image.shape[:2]
        assert len(target) == 0 or int(target.labels.max()) < len(annotated.categories)
        assert len(target) == 0 or target.masks.flatten(1).any(1).all()


@pytest.mark.parametrize(("root", "split"), [("sample", "val"), full_size("coco_panoptic", "val2017")])
def test_panoptic_segments_have_the_areas_that_the_json_states(root, split):
    files = {"images": split, "annotations": f"annotations/panoptic_{split}.json"}
    annotated = opened(find(root), "coco_panoptic", "panoptic", files)
    document = json.loads((find(root) / files["annotations"]).read_text())
    areas = {entry["image_id"]: [s["area"] for s in entry["segments_info"]] for entry in document["annotations"]}
    for index in range(len(annotated)):
        found = annotated.target(index).masks.flatten(1).sum(1).tolist()
        assert found == areas[annotated.image_id(index)]


@pytest.fixture
def maps(tmp_path):
    """Two images with label images in separate folders, one of each in a subfolder."""
    write_image(tmp_path / "images/town/a_photo.jpg")
    write_image(tmp_path / "images/b_photo.png")
    label(tmp_path / "labels/town/a_ids.png", np.tile(np.arange(10, dtype=np.uint8) % 4, (8, 1)))
    label(tmp_path / "labels/b_ids.png", np.full((8, 10), 255, dtype=np.uint8))
    return tmp_path


CLASSES = [{"id": 1, "name": "one"}, {"id": 2, "name": "two", "is_thing": False}, {"id": 5, "name": "five"}]
SUFFIXES = {"image_suffix": "_photo", "label_suffix": "_ids"}
FOLDERS = {"images": "images", "annotations": "labels"}


def test_label_maps_are_paired_by_path_and_mapped_value_by_value(maps):
    options = {"categories": CLASSES, "ignore_values": (255,), "label_map": {0: "ignore", 3: 5}}
    annotated = opened(maps, "label_maps", "semantic", FOLDERS, **SUFFIXES, **options)
    assert [annotated.image_id(i) for i in range(2)] == ["b", "town/a"]
    empty, target = annotated.target(0), annotated.target(1)
    assert len(empty) == 0
    assert empty.id_maps.shape == (1, 8, 10)
    assert target.labels.tolist() == [0, 1, 2]
    expected = torch.tensor([255, 0, 1, 2] * 3)[:10].expand(8, 10)
    assert torch.equal(target.label_map(255), expected)


def test_values_of_stuff_become_background_for_the_instance_task(maps):
    options = {"categories": CLASSES, "ignore_values": (0, 255), "label_map": {3: 5}}
    annotated = opened(maps, "label_maps", "instance", FOLDERS, **SUFFIXES, **options)
    target = annotated.target(1)
    assert [category.name for category in annotated.categories] == ["one", "five"]
    assert target.labels.tolist() == [0, 1]
    assert target.masks.sum() == 8 * 3 + 8 * 2


def test_undeclared_value_names_file_value_count_and_remedy(maps):
    options = {"categories": CLASSES, "ignore_values": (0, 255)}
    annotated = opened(maps, "label_maps", "semantic", FOLDERS, **SUFFIXES, **options)
    with pytest.raises(DatasetError, match=r"a_ids\.png: 16 pixels have the value 3.*data\.ignore_values"):
        annotated.target(1)


def test_images_and_labels_may_share_a_folder(tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path / f"all/{name}.png")
        label(tmp_path / f"all/{name}_mask.png", np.ones((8, 10), dtype=np.uint8))
    files = {"images": "all", "annotations": "all"}
    annotated = opened(tmp_path, "label_maps", "semantic", files, categories=CLASSES, label_suffix="_mask")
    assert [annotated.image_id(i) for i in range(len(annotated))] == ["a", "b"]
    assert annotated.file(0).name.endswith("/a.png")


def test_list_file_pairs_files_of_any_name_and_needs_tabs_between_names_with_spaces(tmp_path):
    write_image(tmp_path / "x/one two.png")
    label(tmp_path / "y/three.png", np.ones((8, 10), dtype=np.uint8))
    (tmp_path / "list.txt").write_text("\nx/one two.png\ty/three.png\n")
    annotated = opened(tmp_path, "label_maps", "semantic", {"images": "x", "list": "list.txt"}, categories=CLASSES)
    assert (len(annotated), annotated.image_id(0)) == (1, "x/one two")
    assert annotated.sample(0)[1].labels.tolist() == [0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x/a.png", r"list\.txt, line 1: expected '<image> <label>'"),
        ("x/a.png y/none.png", r"1 of 2 files named in .*none\.png"),
        ("x/a.png ../../a.png", "points outside its folder"),
        ("/x/a.png y/a.png", "points outside its folder"),
        ("", "is empty"),
    ],
)
def test_bad_line_of_a_list_file_is_refused(tmp_path, line, words):
    write_image(tmp_path / "x/a.png")
    (tmp_path / "list.txt").write_text(line)
    with pytest.raises(DatasetError, match=words):
        opened(tmp_path, "label_maps", "semantic", {"images": "x", "list": "list.txt"}, categories=CLASSES)


@pytest.mark.parametrize(
    ("split", "options", "words"),
    [
        ({"images": "nowhere", "annotations": "labels"}, {}, r"data\.train\.images: no folder .*nowhere"),
        ({"images": "images", "annotations": "nowhere"}, {}, r"data\.train\.annotations: no folder .*nowhere"),
        (FOLDERS, {}, r"data\.train\.annotations: 2 of 2 images have no label.*b_photo\.png"),
        (FOLDERS, {"image_suffix": "_x"}, "ends in '_x'"),
        ({"images": "images"}, {}, r"data\.train\.annotations: is missing"),
        (FOLDERS, SUFFIXES | {"label_map": {3: 4}}, "3 is mapped to 4, which is not a category id"),
        (FOLDERS, SUFFIXES | {"categories": None}, r"set data\.categories"),
        (FOLDERS, SUFFIXES | {"categories": [CLASSES[1]], "task": "instance"}, r"no class .* is_thing: true"),
    ],
)
def test_wrong_key_of_label_maps_is_named(maps, split, options, words):
    options = {"categories": CLASSES, "task": "semantic"} | options
    with pytest.raises(MaskwrightError, match=words):
        opened(maps, "label_maps", options.pop("task"), split, **options)


def test_two_images_of_one_name_are_refused(maps):
    write_image(maps / "images/b_photo.jpg")
    with pytest.raises(DatasetError, match="both called 'b'"):
        opened(maps, "label_maps", "semantic", FOLDERS, categories=CLASSES, **SUFFIXES)


def test_missing_root_json_and_split_are_named(tmp_path):
    files = {"images": "images", "annotations": "a.json"}
    with pytest.raises(DatasetError, match=r"data\.root: no folder .*nowhere"):
        opened(tmp_path / "nowhere", "coco_instance", "instance", files)
    with pytest.raises(DatasetError, match=r"data\.train\.annotations: no file .*a\.json"):
        opened(tmp_path, "coco_instance", "instance", files)
    with pytest.raises(RecipeError, match=r"no data\.val"):
        open_annotations(DataConfig(format="label_maps", root=str(tmp_path), task="semantic"), "val")


def test_different_size_is_refused_and_a_rotated_one_is_recognized(coco):
    annotated = coco([], images=[{"id": 1, "file_name": "a.png", "height": 30, "width": 20}])
    with pytest.raises(DatasetError, match=r"20 x 30 pixels .* 30 x 20 \(rotated"):
        annotated.sample(0)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"segmentation": rectangle(0, 0, 5, 5), "category_id": "7"}, "'category_id', expected int"),
        ({"segmentation": [[0, 0, 5, 5, 9]]}, "expected polygons"),
        ({"segmentation": [[0, 0, 5, "5", 9, 9]]}, "expected polygons"),
        ({"segmentation": {"size": [20, 30], "counts": [1, 2]}}, "do not add up"),
        ({"segmentation": {"size": [20, 30], "counts": "garbage~~~"}}, "damaged run lengths"),
        ({"segmentation": rectangle(0, 0, 5, 5), "bbox": [1, 2, 3]}, "bbox"),
        ({"segmentation": rectangle(0, 0, 5, 5), "area": "big"}, "area"),
    ],
)
def test_malformed_annotation_is_refused_when_the_file_is_opened(coco, row, words):
    with pytest.raises(DatasetError, match=words):
        coco([row])


def test_each_kind_of_unusual_annotation_causes_one_warning(coco, caplog):
    with caplog.at_level(logging.WARNING):
        coco([{"segmentation": [[1, 1, 2, 2]]}, {"segmentation": []}, {"segmentation": rectangle(-9, 0, 5, 5)}])
    assert len(caplog.records) == 2
    assert "2 annotations have no polygon of three points" in caplog.text
    assert "1 annotations have polygons that extend outside" in caplog.text


def test_evaluation_task_can_be_narrower_than_that_of_the_data(coco):
    categories = [{"id": 3, "name": "sky", "isthing": 0}, {"id": 7, "name": "x"}]
    rows = [{"segmentation": rectangle(0, 0, 9, 9), "category_id": c} for c in (3, 7, 7)]
    annotated = coco(rows, task="panoptic", categories=categories)
    target = annotated.target(0)
    assert for_task(target, "instance", annotated.categories).labels.tolist() == [1, 1]
    assert for_task(target, "semantic", annotated.categories).labels.tolist() == [0, 1]
    assert for_task(target, "panoptic", annotated.categories) is target


def test_packed_list_returns_its_values():
    rows = [("a", [1.5, {"b": None}]), ("", []), (7, "x" * 1000)]
    packed = PackedList(rows)
    assert len(packed) == 3
    assert [packed[i] for i in range(3)] == rows


def test_filter_empty_drops_training_images_without_an_object_other_than_a_crowd(tmp_path, caplog):
    folder = tiny.write_instances(tmp_path, 5, empty=(1,), crowd_only=(3,))
    config = tiny.recipe(folder, "instance", data__filter_empty=True).data
    with caplog.at_level("INFO"):
        kept = open_annotations(config, "train")
    assert [kept.image_id(i) for i in range(len(kept))] == [10, 12, 14]
    assert kept.target(1).image_id == 12
    assert "data.train: 2 of 5 images have no object to train on and are dropped" in caplog.text
    assert len(open_annotations(config, "val")) == 5
    assert len(open_annotations(tiny.recipe(folder, "instance").data, "train")) == 5


def test_filter_empty_counts_only_panoptic_segments_of_trained_classes(tmp_path):
    folder = tiny.write_panoptic(tmp_path, 3)
    document = json.loads((folder / "panoptic.json").read_text())
    for segment in document["annotations"][1]["segments_info"]:
        segment["iscrowd"] = int(segment["category_id"] in (8, 20))
    (folder / "panoptic.json").write_text(json.dumps(document))
    for task, ids in {"panoptic": [10, 11, 12], "instance": [10, 12]}.items():
        kept = open_annotations(tiny.recipe(folder, data__filter_empty=True, data__task=task).data, "train")
        assert [kept.image_id(i) for i in range(len(kept))] == ids


def test_filter_empty_reads_label_images(tmp_path):
    folder = tiny.write_labels(tmp_path, 4, ignored=(1, 2))
    kept = open_annotations(tiny.recipe(folder, "semantic", data__filter_empty=True).data, "train")
    assert [kept.image_id(i) for i in range(len(kept))] == ["00", "03"]


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
@pytest.mark.parametrize("kind", ["zip", "nested zip", "tar", "folder of a zip"])
def test_archive_gives_the_same_as_its_folder(tmp_path, task, kind):
    writer = {"panoptic": tiny.write_panoptic, "instance": tiny.write_instances, "semantic": tiny.write_labels}[task]
    folder = writer(tmp_path / "set")
    base = tmp_path / "packed"
    root = shutil.make_archive(
        str(base),
        "tar" if kind == "tar" else "zip",
        tmp_path if kind == "nested zip" else folder,
        "set" if kind == "nested zip" else None,
    )
    if kind == "folder of a zip":
        (tmp_path / "archives").mkdir()
        shutil.move(root, tmp_path / "archives")
        root = tmp_path / "archives"
    expected = open_annotations(tiny.recipe(folder, task).data, "train")
    found = open_annotations(tiny.recipe(root, task).data, "train")
    assert len(found) == len(expected) == 4
    for index in range(4):
        (image, target), (expected_image, expected_target) = found.sample(index), expected.sample(index)
        np.testing.assert_array_equal(image, expected_image)
        assert torch.equal(target.id_maps, expected_target.id_maps)
        assert torch.equal(target.labels, expected_target.labels)
        assert (target.image_id, found.image_id(index)) == (expected_target.image_id, expected.image_id(index))
        assert "packed." in str(found.file(index))


def test_error_in_an_archive_names_archive_and_member(tmp_path):
    folder = tiny.write_labels(tmp_path / "set")
    (folder / "images/01.png").write_bytes(b"no image")
    (folder / "labels/02.png").write_bytes(b"no label")
    annotated = open_annotations(
        tiny.recipe(shutil.make_archive(str(tmp_path / "a"), "zip", folder), "semantic").data, "train"
    )
    with pytest.raises(ImageError, match=r"/a\.zip/images/01\.png: not an image: unknown content"):
        annotated.sample(1)
    with pytest.raises(DatasetError, match=r"/a\.zip/labels/02\.png: not an image: unknown content"):
        annotated.sample(2)
