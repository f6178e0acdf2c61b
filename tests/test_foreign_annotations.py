"""Annotations as other tools write them: classes in another order, odd values, and names of other systems."""

import base64
import io
import json
import zlib

import hotcoco.mask
import numpy as np
import pytest
from PIL import Image

from maskwright.config.recipe import load_recipe
from maskwright.config.schema import CategoryConfig, DataConfig
from maskwright.data.check.check import check
from maskwright.data.check.starting_recipe import write_starting_recipe
from maskwright.data.formats.detect import detect_format
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.problems import ProblemCollector
from maskwright.errors import DatasetError, RecipeError
from tests import tiny

SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]
APPLE_PEAR = [{"id": 1, "name": "apple"}, {"id": 2, "name": "pear"}]


def write_image(path, height=16, width=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(path)


def annotation(number, category=1, polygon=SQUARE, **changes):
    return {"id": number, "image_id": 0, "category_id": category, "segmentation": [polygon], **changes}


def write_coco(root, annotations, categories=APPLE_PEAR, name="a.png", stated=None, **image):
    write_image(root / "images" / name)
    entry = {"id": 0, "file_name": stated or name, "height": 16, "width": 20, **image}
    document = {"images": [entry], "annotations": annotations, "categories": categories}
    (root / "a.json").write_text(json.dumps(document))
    return root


def open_coco(root, problems=None, task="instance", **options):
    files = {"images": "images", "annotations": "a.json"}
    config = DataConfig(format="coco_instance", root=str(root), task=task, train=files, **options)
    return open_annotations(config, "train", problems)


def names_of_objects(annotated):
    return [annotated.categories[label].name for label in annotated.target(0).labels]


def texts(problems, severity="warning"):
    return " | ".join(problem.found for problem in problems.problems if problem.severity == severity)


# Classes


@pytest.mark.parametrize("ids", [{"pear": 1, "apple": 2}, {"Pear": 7, "apple": 1}, {"pear": 0, "apple": 1}])
def test_classes_are_matched_by_name_whatever_their_ids(tmp_path, ids):
    file_list = [{"id": number, "name": name} for name, number in ids.items()]
    objects = [annotation(number, category) for number, category in enumerate(ids.values(), 1)]
    problems = ProblemCollector()
    listed = [CategoryConfig(id=1, name="apple"), CategoryConfig(id=2, name="pear")]
    annotated = open_coco(write_coco(tmp_path, objects, file_list), problems, categories=listed)
    assert names_of_objects(annotated) == ["pear", "apple"]
    assert "matched by name" in texts(problems)


def test_class_whose_id_belongs_to_another_name_is_refused(tmp_path):
    listed = [CategoryConfig(id=1, name="pear")]
    root = write_coco(tmp_path, [annotation(1, 1), annotation(2, 2)])
    with pytest.raises(DatasetError, match=r"category 1 is 'apple' here and 'pear' in data\.categories"):
        open_coco(root, categories=listed)
    annotated = open_coco(root, categories=listed, label_map={1: "ignore"})  # as the message says
    assert names_of_objects(annotated) == ["pear"]


def test_label_map_to_an_unknown_class_is_refused_everywhere(tmp_path):
    root = write_coco(tmp_path, [annotation(1)])
    with pytest.raises(RecipeError, match="1 is mapped to 9, which is not a category id"):
        open_coco(root, label_map={1: 9})
    write_yolo(tmp_path / "yolo", {"a": "0 0.1 0.1 0.5 0.1 0.5 0.5"})
    with pytest.raises(RecipeError, match="0 is mapped to 9"):
        open_yolo(tmp_path / "yolo", label_map={0: 9})


def test_null_takes_the_classes_of_the_file_in_the_layout_of_coco(tmp_path):
    write_image(tmp_path / "train2017/a.png")
    entry = {"id": 0, "file_name": "a.png", "height": 16, "width": 20}
    document = {"images": [entry], "annotations": [annotation(1), annotation(2, 2)], "categories": APPLE_PEAR}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(document))
    config = DataConfig(format="coco", root=str(tmp_path), task="instance", val=None)
    assert names_of_objects(open_annotations(config, "train")) == ["apple", "pear"]


@pytest.mark.parametrize("color", [[300, 0, 0], [-1, 0, 0], "red", [1, 2]])
def test_impossible_color_of_a_category_is_refused_at_opening(tmp_path, color):
    root = write_coco(tmp_path, [annotation(1)], [{"id": 1, "name": "apple", "color": color}])
    with pytest.raises(DatasetError, match=r"category 1 \('apple'\) has the color"):
        open_coco(root)


def test_color_as_hexadecimal_text_is_read(tmp_path):
    root = write_coco(tmp_path, [annotation(1)], [{"id": 1, "name": "apple", "color": "#0102ff"}])
    assert open_coco(root).categories[0].color == (1, 2, 255)


def write_panoptic(root, categories, is_crowd=0):
    write_image(root / "images/a.png")
    (root / "masks").mkdir()
    ids = np.zeros((16, 20, 3), dtype=np.uint8)
    ids[:8, :, 0], ids[8:, :, 0] = 1, 2
    Image.fromarray(ids).save(root / "masks/a.png")
    segments = [{"id": number, "category_id": number, "iscrowd": is_crowd} for number in (1, 2)]
    document = {
        "images": [{"id": 0, "file_name": "a.png", "height": 16, "width": 20}],
        "annotations": [{"image_id": 0, "file_name": "a.png", "segments_info": segments}],
        "categories": categories,
    }
    (root / "a.json").write_text(json.dumps(document))


def open_panoptic(root, problems=None, **options):
    files = {"images": "images", "annotations": "a.json", "masks": "masks"}
    config = DataConfig(format="coco_panoptic", root=str(root), task="panoptic", train=files, **options)
    return open_annotations(config, "train", problems)


def test_panoptic_categories_without_isthing_are_reported(tmp_path):
    write_panoptic(tmp_path, APPLE_PEAR)
    problems = ProblemCollector()
    assert all(category.is_thing for category in open_panoptic(tmp_path, problems).categories)
    assert "2 of 2 categories have no 'isthing'" in texts(problems)


@pytest.mark.parametrize(("stuff", "thing"), [("0", "1"), ("false", "True"), (False, True), (0.0, 1.0), ("no", "yes")])
def test_isthing_as_text_is_read(tmp_path, stuff, thing):
    write_panoptic(tmp_path, [dict(APPLE_PEAR[0], isthing=stuff), dict(APPLE_PEAR[1], isthing=thing)])
    assert [category.is_thing for category in open_panoptic(tmp_path).categories] == [False, True]


def test_isthing_of_another_meaning_is_refused(tmp_path):
    write_panoptic(tmp_path, [dict(APPLE_PEAR[0], isthing="perhaps"), APPLE_PEAR[1]])
    with pytest.raises(DatasetError, match="0 or 1 as 'isthing'"):
        open_panoptic(tmp_path)


# Crowds


@pytest.mark.parametrize(
    ("flag", "expected"), [("0", False), ("1", True), (None, False), (1.0, True), ("false", False)]
)
def test_iscrowd_as_text_is_read(tmp_path, flag, expected):
    root = write_coco(tmp_path, [annotation(1, iscrowd=flag), annotation(2)])
    assert open_coco(root).target(0).is_crowd.tolist() == [expected, False]


def test_iscrowd_of_another_meaning_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="annotation 1 has 'maybe' as 'iscrowd'"):
        open_coco(write_coco(tmp_path, [annotation(1, iscrowd="maybe")]))


def test_many_crowds_among_the_annotations_are_reported(tmp_path):
    problems = ProblemCollector()
    open_coco(write_coco(tmp_path, [annotation(1), annotation(2, iscrowd=1)]), problems)
    assert "1 annotations are crowd regions (iscrowd 1), which are not trained on; CVAT writes" in texts(problems)


def test_annotations_that_are_all_crowds_are_refused_and_can_be_read_as_objects(tmp_path):
    root = write_coco(tmp_path, [annotation(1, iscrowd=1), annotation(2, iscrowd=1)])
    with pytest.raises(DatasetError, match="all 2 annotations are crowd regions") as caught:
        open_coco(root)
    assert "data.crowds=objects" in caught.value.remedy
    assert open_coco(root, crowds="objects").target(0).is_crowd.tolist() == [False, False]
    assert len(open_coco(root, task="semantic").target(0)) == 1


def test_advice_for_a_folder_can_be_followed_without_a_recipe(tmp_path):
    root = write_coco(tmp_path / "crowds", [annotation(1, iscrowd=1)])
    problems = check(root, workers=1).problems
    assert "data.crowds=objects" in problems[0].remedy
    assert not any("annotate them" in problem.remedy for problem in problems)
    report = check(root, ["data.crowds=objects"], workers=1)
    assert not report.errors
    write_starting_recipe(report, tmp_path / "mine.yaml")
    assert load_recipe(tmp_path / "mine.yaml").data.crowds == "objects"
    root = write_coco(tmp_path / "splits", [annotation(1)])
    (root / "a.json").rename(root / "train.json")
    swapped = json.loads((root / "train.json").read_text())
    for entry in swapped["categories"]:
        entry["id"] = 3 - entry["id"]
    (root / "val.json").write_text(json.dumps(swapped))
    assert "use one list of classes, data.categories" in check(root, workers=1).problems[0].remedy
    report = check(root, ["data.categories=[{id: 1, name: apple}, {id: 2, name: pear}]"], workers=1)
    assert not report.errors
    annotated = open_annotations(report.configs[0], "val", ProblemCollector())
    assert names_of_objects(annotated) == ["pear"]
    with pytest.raises(RecipeError, match="'train' cannot be set for a dataset without a recipe"):
        check(root, ["train.steps=3"], workers=1)
    with pytest.raises(RecipeError, match="unknown key 'crowd'"):
        check(root, ["data.crowd=objects"], workers=1)


def test_segments_that_are_all_crowds_are_refused(tmp_path):
    write_panoptic(tmp_path, [dict(entry, isthing=1) for entry in APPLE_PEAR], is_crowd="1")
    with pytest.raises(DatasetError, match="all 2 segments are crowd regions"):
        open_panoptic(tmp_path)
    assert len(open_panoptic(tmp_path, crowds="objects").target(0)) == 2


# Shapes


def rle_text(height=16, width=20):
    mask = np.zeros((height, width), dtype=np.uint8, order="F")
    mask[2:7, 3:9] = 1
    mask[9:12, 4:15] = 1
    return mask, hotcoco.mask.encode(mask)["counts"].decode()


def test_run_lengths_as_text_must_add_up(tmp_path):
    mask, counts = rle_text()
    good = {"size": [16, 20], "counts": counts}
    annotated = open_coco(write_coco(tmp_path / "good", [annotation(1) | {"segmentation": good}]))
    assert np.array_equal(annotated.target(0).masks[0].numpy(), mask == 1)
    smaller = {"size": [16, 20], "counts": rle_text(13, 16)[1]}
    with pytest.raises(DatasetError, match="run lengths that do not add up"):
        open_coco(write_coco(tmp_path / "bad", [annotation(1) | {"segmentation": smaller}]))


def test_run_lengths_as_whole_floats_are_read_and_others_refused(tmp_path):
    whole = {"size": [16, 20], "counts": [100.0, 20.0, 200.0]}
    annotated = open_coco(write_coco(tmp_path / "whole", [annotation(1) | {"segmentation": whole}]))
    assert annotated.target(0).masks.sum() == 20
    broken = {"size": [16, 20], "counts": [100.5, 19.5, 200.0]}
    with pytest.raises(DatasetError, match="not whole numbers"):
        open_coco(write_coco(tmp_path / "broken", [annotation(1) | {"segmentation": broken}]))


HUGE = 10**399


@pytest.mark.parametrize(
    "changes",
    [
        {"segmentation": [[HUGE, 1, 2, 3, 4, 5]]},
        {"bbox": [HUGE, 1, 2, 3]},
        {"area": HUGE},
        {"segmentation": {"size": [16, 20], "counts": [HUGE, 0]}},
        {"segmentation": {"size": [16, 20], "counts": [-1, 321]}},
        {"segmentation": {"size": [16, 20], "counts": 5}},
        {"segmentation": {"size": [16, 20], "counts": ""}},
    ],
)
def test_impossible_numbers_are_refused_at_opening(tmp_path, changes):
    with pytest.raises(DatasetError, match="annotation 1 has"):
        open_coco(write_coco(tmp_path, [annotation(1) | changes]))


@pytest.mark.parametrize("size", [(HUGE, 20), (2**20, 2**20), (0, 20), (1.5, 20), ("16", 20)])
def test_impossible_sizes_of_images_are_refused_at_opening(tmp_path, size):
    with pytest.raises(DatasetError):
        open_coco(write_coco(tmp_path, [annotation(1)], height=size[0], width=size[1]))


def test_sizes_as_whole_floats_are_read(tmp_path):
    assert open_coco(write_coco(tmp_path, [annotation(1)], height=16.0)).target(0).original_size == (16, 20)


def test_coordinates_as_fractions_are_refused(tmp_path):
    fractions = [value / 20 for value in SQUARE]
    with pytest.raises(DatasetError, match=r"2 of 2 annotations have all coordinates in 0\.\.1"):
        open_coco(write_coco(tmp_path / "all", [annotation(1, polygon=fractions), annotation(2, polygon=fractions)]))
    problems = ProblemCollector()
    open_coco(write_coco(tmp_path / "one", [annotation(1, polygon=fractions), annotation(2)]), problems)
    assert "1 annotations have all coordinates in 0..1" in texts(problems)


def test_coordinates_as_rounded_fractions_are_refused_even_if_some_are_pixels(tmp_path):
    fractions = [-0.004, 0.1, 1.01, 0.1, 0.9, 0.9]
    objects = [annotation(1, polygon=fractions), annotation(2, polygon=fractions), annotation(3)]
    with pytest.raises(DatasetError, match=r"2 of 3 annotations have all coordinates in 0\.\.1"):
        open_coco(write_coco(tmp_path, objects))


def test_segmentation_of_points_is_refused(tmp_path):
    points = [[2, 2], [12, 2], [12, 12]]
    with pytest.raises(DatasetError, match=r"annotation 1 has a segmentation of points \[\[x, y\], \.\.\.\]"):
        open_coco(write_coco(tmp_path, [annotation(1, segmentation=points)]))


def test_polygon_inside_another_one_is_reported_as_filled(tmp_path):
    inner, beside = [4, 4, 6, 4, 6, 6, 4, 6], [15, 2, 18, 2, 18, 6]
    problems = ProblemCollector()
    annotated = open_coco(write_coco(tmp_path / "hole", [annotation(1) | {"segmentation": [SQUARE, inner]}]), problems)
    assert annotated.target(0).masks.sum() == 100
    assert "1 annotations have a polygon inside another one, which is part of the object, not a hole" in texts(problems)
    problems = ProblemCollector()
    open_coco(write_coco(tmp_path / "parts", [annotation(1) | {"segmentation": [SQUARE, beside]}]), problems)
    assert not texts(problems)


def test_annotations_that_all_lack_a_mask_are_refused(tmp_path):
    boxes = [annotation(number, segmentation=[], bbox=[2, 2, 10, 10]) for number in (1, 2)]
    with pytest.raises(DatasetError, match=r"2 of 2 annotations have no mask \(a file of boxes\?\)"):
        open_coco(write_coco(tmp_path / "all", boxes))
    problems = ProblemCollector()
    assert len(open_coco(write_coco(tmp_path / "one", [annotation(1), boxes[1]]), problems).target(0)) == 1
    assert "no polygon of three points" in texts(problems)


def test_ids_and_flags_as_whole_floats_are_read(tmp_path):
    objects = [annotation(1.0, 2.0, image_id=0.0, iscrowd=0.0)]
    root = write_coco(tmp_path, objects, categories=[{"id": 2.0, "name": "pear"}], id=0.0, height=16.0)
    assert names_of_objects(open_coco(root)) == ["pear"]


@pytest.mark.parametrize(
    ("box", "fits"),
    [
        ([2, 2, 12, 12], False),
        ([2, 2, 10, 10], True),
        ([3, 3, 9, 9], True),
        ([2, 2, 16, 16], False),
        ([8, 8, 10, 8], False),
    ],
)
def test_box_that_does_not_fit_its_mask_is_reported(tmp_path, box, fits):
    problems = ProblemCollector()
    open_coco(write_coco(tmp_path, [annotation(1, bbox=box)]), problems).target(0)
    assert ("bbox" not in texts(problems)) == fits


# Names of files


@pytest.mark.parametrize("name", ["img_u\u0308.png", "IMG_%C3%BC.png"])
def test_label_images_are_matched_with_images_of_similar_names(tmp_path, name):
    write_image(tmp_path / "images/IMG_\u00fc.JPG")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.eye(16, 20, dtype=np.uint8)).save(tmp_path / "masks" / name)
    report = check(tmp_path, workers=1)
    assert report.tasks[0].splits["train"].images == 1
    assert any("1 labels are matched with images of similar names" in problem.found for problem in report.problems)


@pytest.mark.parametrize(
    "stated",
    [
        "images\\Ä photo.png",
        "..\\..\\media\\upload\\4\\Ä photo.png",
        "/data/upload/4/Ä photo.png",
        "C:\\Users\\me\\Ä photo.png",
        "%C3%84%20photo.png",
        "A\u0308 photo.png",
        "ä PHOTO.PNG",
        "0a1b2c3d-Ä photo.png",
        "./Ä photo.png",
        "https://example.org/set/Ä photo.png?signature=a/b",
        "Ä photo.png ",
    ],
)
def test_names_of_other_systems_are_found_and_reported(tmp_path, stated):
    problems = ProblemCollector()
    root = write_coco(tmp_path, [annotation(1)], name="Ä photo.png", stated=stated)
    annotated = open_coco(root, problems)
    assert annotated.file(0).read()
    assert len(annotated) == 1
    assert ("similar" in texts(problems)) == (not stated.startswith("./"))


@pytest.mark.parametrize("stated", ["../../../../etc/passwd", "/etc/passwd", "..\\..\\etc\\passwd", "C:\\etc\\passwd"])
def test_names_outside_the_folder_are_never_read(tmp_path, stated):
    root = write_coco(tmp_path, [annotation(1)], stated=stated)
    with pytest.raises(DatasetError, match="points outside its folder"):
        open_coco(root)
    annotated = open_coco(root, ProblemCollector())
    assert all(str(annotated.file(i)).startswith(str(tmp_path)) for i in range(len(annotated)))
    assert ".." not in str(annotated.file(0))


def test_similar_name_of_two_files_is_not_guessed(tmp_path):
    root = write_coco(tmp_path, [annotation(1)], name="x/a.png", stated="y\\a.png")
    write_image(root / "images/z/a.png")
    with pytest.raises(DatasetError, match="do not exist"):
        open_coco(root)


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_json_and_yaml_in_other_encodings_are_read(tmp_path, encoding):
    root = write_coco(tmp_path / "coco", [annotation(1)], [{"id": 1, "name": "bäume"}])
    text = json.dumps(json.loads((root / "a.json").read_text()), ensure_ascii=False)
    (root / "a.json").write_bytes(text.encode(encoding))
    assert open_coco(root).categories[0].name == "bäume"
    write_yolo(tmp_path / "yolo", {"a": "0 0.1 0.1 0.5 0.1 0.5 0.5"})
    (tmp_path / "yolo/data.yaml").write_bytes("names: [bäume]\ntrain: images/train\n".encode(encoding))
    assert open_yolo(tmp_path / "yolo").categories[0].name == "bäume"


# YOLO


def write_yolo(root, lines, names=("cat", "dog"), images=None, yaml=None):
    for stem in images or lines:
        write_image(root / f"images/train/{stem}.jpg")
    (root / "labels/train").mkdir(parents=True, exist_ok=True)
    for stem, text in lines.items():
        (root / f"labels/train/{stem}.txt").write_text(text)
    (root / "data.yaml").write_text(yaml or f"names: [{', '.join(names)}]\ntrain: images/train\n")


def open_yolo(root, problems=None, **options):
    config = DataConfig(format="yolo", root=str(root), task="instance", val=None, **options)
    return open_annotations(config, "train", problems)


LINE = "0 0.1 0.1 0.5 0.1 0.5 0.6 0.1 0.6"


def test_images_without_text_and_texts_without_image_are_named(tmp_path):
    write_yolo(tmp_path, {"a": LINE, "c": LINE}, images=["a", "b"])
    problems = ProblemCollector()
    open_yolo(tmp_path, problems)
    assert "1 of 2 images have no text file" in texts(problems)
    assert "1 text files have no image and are not used: labels/train/c.txt" in texts(problems)


def test_texts_of_images_of_another_split_are_not_called_unused(tmp_path):
    write_yolo(tmp_path, {"a": LINE, "b": LINE}, yaml="names: [cat]\ntrain: train.txt\n")
    (tmp_path / "train.txt").write_text("images\\train\\a.jpg\n")
    problems = ProblemCollector()
    annotated = open_yolo(tmp_path, problems)
    assert len(annotated) == 1
    assert len(annotated.target(0)) == 1
    assert "not used" not in texts(problems)


def test_text_of_another_case_or_beside_the_image_is_used_and_reported(tmp_path):
    write_yolo(tmp_path, {"P1": LINE, "q": LINE}, images=["p1", "q", "r"])
    (tmp_path / "images/train/r.txt").write_text(LINE)
    problems = ProblemCollector()
    annotated = open_yolo(tmp_path, problems)
    assert [len(annotated.target(i)) for i in range(3)] == [1, 1, 1]
    assert "text files are matched with images of similar names" in texts(problems)
    assert "beside them" in texts(problems)


def test_box_in_front_of_the_polygon_is_dropped_and_reported(tmp_path):
    polygon = "0.1 0.1 0.5 0.1 0.5 0.6 0.1 0.6"
    write_yolo(tmp_path / "plain", {"a": f"0 {polygon}"})
    write_yolo(tmp_path / "boxes", {"a": f"0 0.3 0.35 0.4 0.5 {polygon}"})
    problems = ProblemCollector()
    found = open_yolo(tmp_path / "boxes", problems).target(0)
    assert found.masks.equal(open_yolo(tmp_path / "plain").target(0).masks)
    assert "box of the polygon" in texts(problems)


@pytest.mark.parametrize("box", ["0.3 0.35 0.4 0.5", "0.1 0.1 0.5 0.6"])
def test_exact_box_in_front_of_some_polygons_is_dropped(tmp_path, box):
    polygon = "0.1 0.1 0.5 0.1 0.5 0.6 0.1 0.6"
    write_yolo(tmp_path / "plain", {"a": f"0 {polygon}\n{LINE}"})
    write_yolo(tmp_path / "boxes", {"a": f"0 {box} {polygon}\n{LINE}"})
    problems = ProblemCollector()
    found = open_yolo(tmp_path / "boxes", problems).target(0)
    assert found.masks.equal(open_yolo(tmp_path / "plain").target(0).masks)
    assert "first four values of 1 of 2 lines are the box" in texts(problems)


def test_text_files_in_upper_case_are_found(tmp_path):
    write_yolo(tmp_path, {"a": LINE})
    (tmp_path / "labels/train/a.txt").rename(tmp_path / "labels/train/a.TXT")
    problems = ProblemCollector()
    assert len(open_yolo(tmp_path, problems).target(0)) == 1
    assert "text files are matched" in texts(problems)


def test_names_as_one_text_are_refused_and_keys_may_have_any_case(tmp_path):
    write_yolo(tmp_path, {"a": LINE}, yaml="names: cat, dog\ntrain: images/train\n")
    with pytest.raises(DatasetError, match="has 'cat, dog' as 'names'"):
        open_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("NAMES: [cat]\nTRAIN: images/train\n")
    assert len(open_yolo(tmp_path)) == 1


def test_names_of_data_yaml_stay_as_they_are_written(tmp_path):
    write_yolo(tmp_path, {"a": LINE}, yaml="names: [no, 010, 1.50]\ntrain: images/train\nval: ~\n")
    assert [category.name for category in open_yolo(tmp_path).categories] == ["no", "010", "1.50"]
    assert [config.val for config in detect_format(tmp_path)] == [None]


@pytest.mark.parametrize("part", ["", "/train"])
def test_classes_txt_stands_for_data_yaml_beside_images_and_labels(tmp_path, part):
    write_yolo(tmp_path, {"a": LINE.replace("0 ", "1 ", 1)})
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "notes.json").write_text('{"categories": [{"id": 0, "name": "cat"}]}')
    if not part:
        for kind in ("images", "labels"):
            for path in (tmp_path / kind / "train").iterdir():
                path.rename(tmp_path / kind / path.name)
            (tmp_path / kind / "train").rmdir()
    annotated = opened_tool(tmp_path)
    assert names_of_objects(annotated) == ["dog"]
    assert annotated.image_id(0) == f"images{part}/a"


def test_folders_of_images_and_labels_may_be_in_upper_case(tmp_path):
    write_yolo(tmp_path, {"a": LINE}, yaml="names: [cat]\ntrain: Images/train\n")
    (tmp_path / "images").rename(tmp_path / "Images")
    (tmp_path / "labels").rename(tmp_path / "LABELS")
    assert len(open_yolo(tmp_path).target(0)) == 1


def test_images_with_the_same_text_file_are_refused(tmp_path):
    write_yolo(tmp_path, {"a": LINE})
    write_image(tmp_path / "images/train/a.bmp")
    with pytest.raises(DatasetError, match=r"a\.bmp and images/train/a\.\w+ have the same text file"):
        open_yolo(tmp_path)


def test_classes_of_data_yaml_are_matched_by_name(tmp_path):
    write_yolo(tmp_path, {"a": LINE})
    listed = [CategoryConfig(id=0, name="dog"), CategoryConfig(id=1, name="cat")]
    annotated = open_yolo(tmp_path, categories=listed)
    assert names_of_objects(annotated) == ["cat"]


@pytest.mark.parametrize("path", ["{root}/images/train", "/content/data/images/train", "D:\\set\\images\\train"])
def test_absolute_paths_of_data_yaml_are_found(tmp_path, path):
    yaml = f"path: ''\nnames: [cat, dog]\ntrain: '{path.format(root=tmp_path)}'\n"
    write_yolo(tmp_path, {"a": LINE, "b": LINE}, yaml=yaml)
    annotated = open_yolo(tmp_path)
    assert [len(annotated.target(i)) for i in range(2)] == [1, 1]


def test_splits_of_data_yaml_are_found_in_any_case(tmp_path):
    write_yolo(tmp_path, {"a": LINE}, yaml="names: [cat]\nTrain: images/train\nValidation: images/train\n")
    (config,) = detect_format(tmp_path)
    assert config.val is not None
    assert config.test is None
    assert len(open_annotations(config, "val")) == 1


def test_data_yaml_without_splits_or_damaged_is_named(tmp_path):
    write_yolo(tmp_path, {"a": LINE}, yaml="names: [cat]\nother: images/train\n")
    with pytest.raises(DatasetError, match=r"no train, val or test \(found: names, other\)"):
        detect_format(tmp_path)
    (tmp_path / "data.yaml").write_text('names: [cat]\ntrain: "C:\\Users\\me"\n')
    with pytest.raises(DatasetError, match="not valid YAML, line 2"):
        detect_format(tmp_path)


# Label images


def write_masks(root, *masks, names="abcdef", suffix=".png"):
    for name, mask in zip(names, masks, strict=False):
        write_image(root / f"images/{name}.png", *mask.shape[:2])
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / f"masks/{name}{suffix}")


def painted(*colors, height=16, width=20):
    """Return vertical stripes of the colors."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for i, color in enumerate(colors):
        pixels[:, i * width // len(colors) :] = color
    return pixels


def open_masks(root, problems=None, task="semantic", **options):
    files = {"images": "images", "annotations": "masks"}
    config = DataConfig(format="label_maps", root=str(root), task=task, train=files, **options)
    return open_annotations(config, "train", problems)


RED_BLUE = [
    CategoryConfig(id=3, name="red", is_thing=False, color=(255, 0, 0)),
    CategoryConfig(id=7, name="blue", is_thing=False, color=(0, 0, 255)),
    CategoryConfig(id=9, name="unsure", color=(0, 0, 0), ignore=True),
]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_painted_label_images_are_read_by_the_colors_of_the_classes(tmp_path, suffix):
    write_masks(tmp_path, painted((0, 0, 255), (255, 0, 0), (0, 0, 0), (0, 0, 255)), suffix=suffix)
    target = open_masks(tmp_path, categories=RED_BLUE).target(0)
    assert target.label_map(255)[0, ::5].tolist() == [1, 0, 255, 1]


def test_color_without_a_class_is_named(tmp_path):
    write_masks(tmp_path, painted((0, 0, 255), (1, 2, 3)))
    with pytest.raises(DatasetError, match=r"1 have no class \(\[1, 2, 3\]"):
        open_masks(tmp_path, categories=RED_BLUE).target(0)
    plain = [CategoryConfig(id=0, name="x")]
    with pytest.raises(DatasetError, match="no class has a color") as caught:
        open_masks(tmp_path, categories=plain).target(0)
    assert "color: [128, 64, 128]" in caught.value.remedy


def test_gray_values_in_three_or_four_channels_are_values(tmp_path):
    values = np.repeat(np.array([[0, 1]], dtype=np.uint8), 4, 0)
    opaque = np.full((4, 2, 1), 255, dtype=np.uint8)
    rgb = np.repeat(values[..., None], 3, 2)
    write_masks(tmp_path, rgb, np.concatenate([rgb, opaque], 2))
    annotated = open_masks(tmp_path, categories=[CategoryConfig(id=i, name=str(i), is_thing=False) for i in (0, 1)])
    assert [annotated.target(i).label_map()[0].tolist() for i in (0, 1)] == [[0, 1], [0, 1]]
    (config,) = detect_format(tmp_path)
    assert [category.name for category in config.categories] == ["class 0", "class 1"]


def detected_names(root):
    (config,) = detect_format(root)
    annotated = open_annotations(config, "train")
    return [annotated.categories[label].name for label in annotated.target(0).labels]


def test_colors_are_named_by_a_published_palette_that_alone_has_them(tmp_path):
    write_masks(tmp_path / "ade", painted((120, 120, 120), (180, 120, 120), (6, 230, 230)))
    assert detected_names(tmp_path / "ade") == ["wall", "building", "sky"]
    write_masks(tmp_path / "isaid", painted((0, 0, 0), (0, 0, 63), (0, 100, 155)))
    assert detected_names(tmp_path / "isaid") == ["background", "ship", "harbor"]
    write_masks(tmp_path / "potsdam", painted((255, 255, 255), (255, 0, 0), (0, 0, 255)))
    assert detected_names(tmp_path / "potsdam") == ["impervious surface", "building", "clutter"]
    write_masks(tmp_path / "either", painted((255, 255, 255), (0, 255, 0), (0, 0, 255)))  # also of DeepGlobe
    assert detected_names(tmp_path / "either") == [f"color {c}" for c in ((0, 0, 255), (0, 255, 0), (255, 255, 255))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labelmap.txt", "# label:color_rgb:parts:actions\nred:255,0,0::\nblue:0,0,255::\n"),
        ("class_dict.csv", "name,r,g,b\nred,255,0,0\nblue, 0, 0, 255\n"),
        ("label_colors.txt", "255 0 0\tred\n0 0 255\tblue\n"),
    ],
)
def test_colors_are_named_by_a_table_beside_the_folders(tmp_path, name, text):
    write_masks(tmp_path, painted((0, 0, 255), (255, 0, 0)))
    (tmp_path / name).write_text(text)
    assert detected_names(tmp_path) == ["red", "blue"]


def circles():
    y, x = np.mgrid[:120, :160]
    mask = np.zeros((120, 160), dtype=np.uint8)
    for row, column, radius, value in ((40, 50, 25, 255), (80, 110, 30, 120), (30, 130, 15, 255)):
        mask[(y - row) ** 2 + (x - column) ** 2 < radius**2] = value
    return mask


def enlarged(mask, method):
    return np.array(Image.fromarray(mask).resize((213, 160), method))


def recompressed(mask, path):
    Image.fromarray(mask).save(path, quality=80)
    return np.array(Image.open(path))


@pytest.mark.parametrize("method", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
def test_masks_resized_with_interpolation_are_refused_with_the_reason(tmp_path, method):
    write_masks(tmp_path / "gray", enlarged(circles(), method))
    with pytest.raises(DatasetError, match="values that are only on edges between others"):
        detect_format(tmp_path / "gray")
    colors = np.stack([circles(), 255 - circles(), circles() // 2], -1)
    write_masks(tmp_path / "painted", enlarged(colors, method))
    with pytest.raises(DatasetError, match="colors that are only on edges between others"):
        detect_format(tmp_path / "painted")
    two = [CategoryConfig(id=value, name=str(value), is_thing=False) for value in (0, 120, 255)]
    with pytest.raises(DatasetError, match="mostly on edges, as after resizing"):
        open_masks(tmp_path / "gray", categories=two).target(0)


def test_masks_that_were_jpeg_are_refused_and_others_are_not(tmp_path):
    write_masks(tmp_path / "jpeg", recompressed(circles(), tmp_path / "x.jpg"))
    with pytest.raises(DatasetError, match="lossy compression"):
        detect_format(tmp_path / "jpeg")
    write_masks(tmp_path / "nearest", enlarged(circles(), Image.Resampling.NEAREST))
    assert detect_format(tmp_path / "nearest")
    noise = np.random.default_rng(0).integers(0, 20, (40, 40)).astype(np.uint8)
    write_masks(tmp_path / "noise", noise)
    assert detect_format(tmp_path / "noise")


def test_negative_values_can_be_ignored(tmp_path):
    values = np.array([[-9999, 1, 2]] * 3, dtype=np.int32)
    write_masks(tmp_path, values, suffix=".tif")
    classes = [CategoryConfig(id=value, name=str(value), is_thing=False) for value in (1, 2)]
    target = open_masks(tmp_path, categories=classes, ignore_values=[-9999]).target(0)
    assert target.label_map()[0].tolist() == [255, 0, 1]
    with pytest.raises(DatasetError, match="-9999") as caught:
        open_masks(tmp_path, categories=classes).target(0)
    assert "data.ignore_values" in caught.value.remedy
    (config,) = detect_format(tmp_path)
    assert config.ignore_values == (255, -9999)


def test_joined_objects_of_label_images_are_reported_where_objects_are_wanted(tmp_path):
    write_masks(tmp_path, np.ones((4, 4), dtype=np.uint8))
    for task, expected in (("instance", True), ("panoptic", True), ("semantic", False)):
        problems = ProblemCollector()
        open_masks(tmp_path, problems, task, categories=[CategoryConfig(id=1, name="x")])
        assert ("do not tell objects apart" in texts(problems)) == expected


@pytest.mark.parametrize(
    ("images", "masks"), [("Images", "Masks"), ("img_dir/train", "ann_dir/train"), ("Train/IMAGES", "Train/Labels")]
)
def test_folders_of_usual_names_are_found_in_any_case_and_one_folder_down(tmp_path, images, masks):
    write_image(tmp_path / "set" / images / "1_sat.png")
    (tmp_path / "set" / masks).mkdir(parents=True)
    Image.fromarray(np.ones((16, 20), dtype=np.uint8)).save(tmp_path / "set" / masks / "1_mask.png")
    (config,) = detect_format(tmp_path)
    assert len(open_annotations(config, "train").target(0)) == 1


# The layout of Pascal VOC


def write_voc(root, classes, objects=None, names=("my photo 1", "b"), lists=True):
    for name in names:
        write_image(root / f"JPEGImages/{name}.jpg")
        for folder, pixels in (("SegmentationClass", classes), ("SegmentationObject", objects)):
            if pixels is not None:
                (root / folder).mkdir(exist_ok=True)
                Image.fromarray(pixels).save(root / folder / f"{name}.png")
    if lists:
        (root / "ImageSets/Segmentation").mkdir(parents=True)
        (root / "ImageSets/Segmentation/default.txt").write_text("".join(f"{name}\n" for name in names))


def test_colors_of_labelmap_become_classes_and_objects(tmp_path):
    cat, dog, border = (48, 112, 32), (176, 112, 32), (224, 224, 192)
    classes = painted(cat, (0, 0, 0), dog, border)
    write_voc(tmp_path, classes, painted((128, 0, 0), (0, 0, 0), (0, 128, 0), border))
    (tmp_path / "labelmap.txt").write_text("Cat:48,112,32::\nDog:176,112,32::\nbackground:0,0,0::\n")
    panoptic, semantic = detect_format(tmp_path)
    for config in (panoptic, semantic):
        annotated = open_annotations(config, "train")
        assert [category.name for category in annotated.categories] == ["Cat", "Dog", "background"]
        labels = annotated.target(0).label_map()[0, ::5].tolist()
        assert labels == [0, 2, 1, 255]
    assert len(annotated) == 2  # one of them with spaces in its name


def test_export_of_labelme2voc_has_no_lists(tmp_path):
    classes = np.array([[0, 1, 2]] * 3, dtype=np.uint8)
    write_voc(tmp_path, classes, lists=False)
    (tmp_path / "class_names.txt").write_text("__ignore__\n_background_\ncat\ndog\n")
    (tmp_path / "SegmentationClassPNG").mkdir()
    for file in (tmp_path / "SegmentationClass").iterdir():
        file.rename(tmp_path / "SegmentationClassPNG" / file.name)
    np.save(tmp_path / "SegmentationClass/b.npy", classes.astype(np.int32) - 1)
    (config,) = detect_format(tmp_path)
    annotated = open_annotations(config, "train")
    assert len(annotated) == 2
    assert [category.name for category in annotated.categories] == ["_background_", "cat", "dog"]
    assert annotated.target(0).labels.tolist() == [0, 1, 2]


# COCO in other folders


@pytest.mark.parametrize("top", ["", "my-export/"])
def test_json_in_each_folder_of_images_is_a_split(tmp_path, top):
    for folder in ("train", "valid", "test"):
        write_image(tmp_path / top / folder / "a.png")
        entry = {"id": 0, "file_name": "a.png", "height": 16, "width": 20}
        document = {"images": [entry], "annotations": [annotation(1)], "categories": APPLE_PEAR}
        (tmp_path / top / folder / "_annotations.coco.json").write_text(json.dumps(document))
    (config,) = detect_format(tmp_path)
    for folder, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        assert str(open_annotations(config, split).file(0)) == str(tmp_path / top / folder / "a.png")
    (config,) = detect_format(tmp_path / top / "valid/_annotations.coco.json")
    assert config.train is None
    assert config.val is not None


def test_panoptic_json_beside_its_folders_of_images_and_masks_is_a_split(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "set" / split).mkdir(parents=True)
        write_panoptic(tmp_path / "set" / split, [dict(entry, isthing=1) for entry in APPLE_PEAR])
        (tmp_path / "set" / split / "a.json").rename(tmp_path / "set" / split / "panoptic_annotations.json")
    (config,) = detect_format(tmp_path)
    for split in ("train", "val"):
        annotated = open_annotations(config, split)
        assert str(annotated.file(0)) == str(tmp_path / "set" / split / "images/a.png")
        assert len(annotated.target(0)) == 2


# Checking


def test_check_without_an_image_fails(tmp_path):
    write_yolo(tmp_path, {"a": LINE}, yaml="names: [cat]\n")
    assert check(tmp_path).errors
    recipe = tiny.values(tmp_path, val=False)
    recipe["data"] = {"format": "yolo", "root": str(tmp_path), "task": "instance", "train": None, "val": None}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    report = check(tmp_path / "recipe.yaml")
    assert report.errors == 1
    assert "no image was read" in report.problems[0].found


def test_check_survives_errors_of_any_kind(tmp_path, monkeypatch):
    write_coco(tmp_path, [annotation(1)])
    monkeypatch.setattr("maskwright.data.formats.coco_instance.draw_target", lambda *_: 1 / 0)
    report = check(tmp_path)
    assert "ZeroDivisionError" in report.problems[0].found
    monkeypatch.setattr("maskwright.data.formats.coco_instance.read_images", lambda *_: 1 / 0)
    assert check(tmp_path).errors


# Folders of Labelme, VIA and Supervisely


def png_bytes(mask):
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


def labelme(shapes, image="a.png", **changes):
    document = {"version": "5.5.0", "shapes": shapes, "imagePath": image, "imageData": None}
    return json.dumps(document | changes)


def shape(label, points, kind="polygon", **changes):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None} | changes


POINTS = [[2, 2], [12, 2], [12, 12], [2, 12]]


def opened_tool(root, problems=None, split="train", **options):
    (config,) = detect_format(root)
    return open_annotations(config.model_copy(update=options), split, problems)


def test_folder_of_labelme_is_read(tmp_path):
    write_image(tmp_path / "a.png")
    mask = np.zeros((3, 4), dtype=np.uint8)
    mask[1] = 255
    drawn = {"mask": base64.b64encode(png_bytes(mask)).decode()}
    shapes = [
        shape("dog", POINTS, group_id=1),
        shape("dog", [[14, 2], [18, 2], [18, 8]], group_id=1),
        shape("cat", [[1, 1], [5, 4]], "rectangle"),
        shape("cat", [[10, 8], [10, 11]], "circle"),
        shape("cat", [[15, 10], [18, 12]], "mask", **drawn),
        shape("cat", [[3, 3]], "point"),
    ]
    (tmp_path / "a.json").write_text(labelme(shapes, "..\\pictures\\a.png"))
    problems = ProblemCollector()
    annotated = opened_tool(tmp_path, problems)
    target = annotated.target(0)
    assert [category.name for category in annotated.categories] == ["cat", "dog"]
    assert names_of_objects(annotated) == ["dog", "cat", "cat", "cat"]
    assert target.masks[3].nonzero().tolist() == [[11, column] for column in range(15, 19)]
    assert target.masks[2].sum() in range(25, 33)  # pi * 3 ** 2
    assert target.masks[1].sum() == 12
    assert "1 shapes have no area and are dropped (1 point)" in texts(problems)


def test_shapes_for_an_image_of_another_size_are_refused(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(labelme([shape("x", POINTS)], imageHeight=32, imageWidth=40))
    with pytest.raises(DatasetError, match=r"16 x 20 pixels \(height x width\), its annotation 32 x 40"):
        opened_tool(tmp_path).sample(0)


def test_shapes_of_x_anylabeling_and_without_a_class_are_read(tmp_path):
    write_image(tmp_path / "a.png")
    shapes = [shape("x", POINTS, "rotation", direction=0.1), shape("", POINTS), shape("x", POINTS[:2], "line")]
    (tmp_path / "a.json").write_text(labelme(shapes))
    problems = ProblemCollector()
    assert names_of_objects(opened_tool(tmp_path, problems)) == ["x", "object"]
    assert "1 shapes have no class and are read as 'object'" in texts(problems)
    (tmp_path / "a.json").write_text(labelme(shapes[2:]))
    with pytest.raises(DatasetError, match=r"none of 1 shapes has an area \(1 line\)"):
        opened_tool(tmp_path)


def test_splits_and_embedded_images_of_labelme_are_read(tmp_path):
    for folder, label in (("train", "dog"), ("val", "cat")):
        (tmp_path / folder).mkdir()
        data = base64.b64encode(png_bytes(np.zeros((16, 20, 3), dtype=np.uint8))).decode()
        (tmp_path / folder / "a.json").write_text(labelme([shape(label, POINTS)], imageData=data))
    for split, label in (("train", 1), ("val", 0)):
        annotated = opened_tool(tmp_path, split=split)
        image, target = annotated.sample(0)
        assert image.shape == (16, 20, 3)
        assert target.labels.tolist() == [label]


def test_single_json_of_labelme_names_the_format(tmp_path):
    (tmp_path / "a.json").write_text(labelme([]))
    with pytest.raises(DatasetError, match="one image by labelme; name its folder instead"):
        detect_format(tmp_path / "a.json")


def test_labelme_without_its_image_or_damaged_is_named(tmp_path):
    (tmp_path / "a.json").write_text(labelme([shape("x", POINTS)]))
    with pytest.raises(DatasetError, match=r"a\.json: its image a\.png does not exist"):
        opened_tool(tmp_path)
    write_image(tmp_path / "a.png")
    (tmp_path / "b.json").write_text(labelme([shape("x", [[1, "?"]])]))
    with pytest.raises(DatasetError, match=r"b\.json: not an annotation of labelme"):
        opened_tool(tmp_path)


def via(regions, **outer):
    images = {"a.png123": {"filename": "a.png", "size": 123, "regions": regions, "file_attributes": {}}}
    return json.dumps({"_via_img_metadata": images, **outer} if outer else images)


def region(shape, **attributes):
    return {"shape_attributes": shape, "region_attributes": attributes}


def test_json_of_via_is_read(tmp_path):
    write_image(tmp_path / "train/a.png")
    x, y = zip(*POINTS, strict=True)
    regions = [
        region({"name": "polygon", "all_points_x": x, "all_points_y": y}, type="cat", note="?"),
        region({"name": "rect", "x": 1, "y": 1, "width": 3, "height": 2}, type={"dog": True, "cat": False}),
        region({"name": "circle", "cx": 8, "cy": 8, "r": 3}, type="cat"),
        region({"name": "ellipse", "cx": 8, "cy": 8, "rx": 3, "ry": 2}, type="cat"),
        region({"name": "point", "cx": 8, "cy": 8}, type="cat"),
    ]
    for document in (via(regions), via(dict(enumerate(regions))), via(regions, _via_settings={})):
        (tmp_path / "train/via_region_data.json").write_text(document)
        annotated = opened_tool(tmp_path)
        assert names_of_objects(annotated) == ["cat", "dog", "cat", "cat"]
    assert len(detect_format(tmp_path / "train/via_region_data.json")) == 1
    (tmp_path / "train/via_region_data.json").write_text(via([region(regions[0]["shape_attributes"])]))
    assert names_of_objects(opened_tool(tmp_path)) == ["object"]


def test_project_of_supervisely_is_read(tmp_path):
    project = tmp_path / "project"
    for name, kind in (("train", "bitmap"), ("val", "alpha_mask")):
        write_image(project / name / "img/a.png")
        (project / name / "ann").mkdir()
        mask = np.zeros((2, 3, 4), dtype=np.uint8)
        mask[0] = 255
        packed = base64.b64encode(zlib.compress(png_bytes(mask))).decode()
        polygon = {"exterior": POINTS, "interior": [[[4, 4], [8, 4], [8, 8], [4, 8]]]}
        objects = [
            {"classTitle": "dog", "geometryType": "polygon", "points": polygon},
            {"classTitle": "cat", "geometryType": kind, "bitmap": {"data": packed, "origin": [16, 14]}},
        ]
        document = {"size": {"height": 16, "width": 20}, "objects": objects}
        (project / name / "ann/a.png.json").write_text(json.dumps(document))
    (project / "meta.json").write_text(json.dumps({"classes": [{"title": "dog"}, {"title": "cat"}]}))
    annotated = opened_tool(tmp_path, split="val")
    assert [category.name for category in annotated.categories] == ["dog", "cat"]
    masks = annotated.target(0).masks
    assert masks.sum((1, 2)).tolist() == [100 - 16, 3]
    assert masks[1].nonzero().tolist() == [[14, 16], [14, 17], [14, 18]]


def test_classes_of_other_tools_are_matched_by_name(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(labelme([shape("pear", POINTS), shape("apple", POINTS)]))
    listed = (CategoryConfig(id=1, name="pear"), CategoryConfig(id=2, name="apple"))
    assert names_of_objects(opened_tool(tmp_path, categories=listed)) == ["pear", "apple"]
