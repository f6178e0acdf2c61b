"""Annotations as other tools write them: classes in another order, odd values, and names of other systems."""

import json

import hotcoco.mask
import numpy as np
import pytest
from PIL import Image

from maskwright.config.schema import CategoryConfig, DataConfig
from maskwright.data.formats.detect import detect_format
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.problems import ProblemCollector
from maskwright.errors import DatasetError, RecipeError

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


def test_annotations_that_are_all_crowds_are_refused_and_can_be_read_as_objects(tmp_path):
    root = write_coco(tmp_path, [annotation(1, iscrowd=1), annotation(2, iscrowd=1)])
    with pytest.raises(DatasetError, match="all 2 annotations are crowd regions") as caught:
        open_coco(root)
    assert "data.crowds=objects" in caught.value.remedy
    assert open_coco(root, crowds="objects").target(0).is_crowd.tolist() == [False, False]
    assert len(open_coco(root, task="semantic").target(0)) == 1


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
    with pytest.raises(DatasetError, match=r"all 2 annotations have all coordinates in 0\.\.1"):
        open_coco(write_coco(tmp_path / "all", [annotation(1, polygon=fractions), annotation(2, polygon=fractions)]))
    problems = ProblemCollector()
    open_coco(write_coco(tmp_path / "one", [annotation(1, polygon=fractions), annotation(2)]), problems)
    assert "1 annotations have all coordinates in 0..1" in texts(problems)


@pytest.mark.parametrize(
    ("box", "fits"), [([2, 2, 10, 10], True), ([3, 3, 9, 9], True), ([2, 2, 16, 16], False), ([8, 8, 10, 8], False)]
)
def test_box_that_does_not_fit_its_mask_is_reported(tmp_path, box, fits):
    problems = ProblemCollector()
    open_coco(write_coco(tmp_path, [annotation(1, bbox=box)]), problems).target(0)
    assert ("bbox" not in texts(problems)) == fits


# Names of files


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
