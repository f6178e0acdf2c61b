"""Problems of a dataset are raised at once in training, and collected with their fields by the check."""

import json
import logging

import pytest
from PIL import Image

from maskwright.config.schema import DataConfig
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.problems import MAX_PER_KIND, ProblemCollector, RaiseFirst
from maskwright.errors import DatasetError


def collected(*errors):
    problems = ProblemCollector()
    for error in errors:
        problems.error(error)
    return problems.problems


def test_problem_has_the_fields_of_its_error():
    problems = ProblemCollector()
    error = DatasetError("annotation 3 is flat", where="a/b.json", remedy="draw it again")
    problems.error(error, ["annotation 3"])
    problems.warning("no image", where="data.train", remedy="add one")
    assert problems.problems == [
        ("error", "a/b.json", ("annotation 3",), "annotation 3 is flat", "draw it again"),
        ("warning", "data.train", (), "no image", "add one"),
    ]
    assert [str(problem) for problem in problems.problems] == ["a/b.json: annotation 3 is flat", "data.train: no image"]


def test_problems_that_differ_in_names_and_numbers_are_of_one_kind():
    first, second, other = collected(
        DatasetError("60 pixels have the value 200 in 'a'", where="x/a.png"),
        DatasetError("1,3 pixels have the value 7 in 'b b'", where="x/b.png"),
        DatasetError("all pixels have the value 7 in 'b b'", where="x/b.png"),
    )
    assert first.kind == second.kind != other.kind


def test_training_raises_errors_and_logs_one_warning_of_each_kind(caplog):
    problems = RaiseFirst()
    with caplog.at_level(logging.WARNING):
        problems.warning("has 3 edges", where="x/a.png", remedy="correct it")
        problems.warning("has 4 edges", where="x/b.png", remedy="correct it")
        problems.warning("has no edge", where="x/b.png")
    assert [record.message for record in caplog.records] == ["x/a.png: has 3 edges; correct it", "x/b.png: has no edge"]
    with pytest.raises(DatasetError), problems.skipping("a"):
        raise DatasetError("damaged", where="x/a")


def test_collecting_continues_after_an_error_of_the_user_but_not_after_ours():
    problems = ProblemCollector()
    with problems.skipping("annotation 1"):
        raise DatasetError("damaged", where="x/a.json", remedy="export it again")
    assert problems.problems[0].items == ("annotation 1",)
    with pytest.raises(ZeroDivisionError), problems.skipping("annotation 2"):
        _ = 1 / 0


def test_of_many_problems_of_a_kind_some_are_kept_and_all_are_counted():
    problems = ProblemCollector()
    for number in range(MAX_PER_KIND + 5):
        problems.warning("odd", where=f"x/{number}.png")
    assert len(problems.problems) == MAX_PER_KIND
    assert list(problems.counts.values()) == [MAX_PER_KIND + 5]


def test_every_broken_entry_of_a_json_is_named_and_the_others_are_read(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    images = [
        {"id": 1, "file_name": "a.png", "height": 6, "width": 8},
        {"id": 1, "file_name": "a.png", "height": 6, "width": 8},
        {"id": 3, "file_name": "../a.png", "height": 6, "width": 8},
        {"id": 4, "file_name": "gone.png", "height": 6, "width": 8},
        "nonsense",
    ]
    square = [[1, 1, 4, 1, 4, 4, 1, 4]]
    rows = [
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": square},
        {"id": 2, "image_id": 1, "category_id": 9, "segmentation": square},
        {"id": 3, "image_id": 9, "category_id": 1, "segmentation": square},
        {"id": 4, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 2]]},
        {"id": 5, "image_id": 1, "category_id": 1},
        {"image_id": 1, "category_id": 1},
        7,
    ]
    document = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    config = DataConfig(
        format="coco_instance", root=str(tmp_path), task="instance", train={"images": ".", "annotations": "a.json"}
    )
    problems = ProblemCollector()
    annotated = open_annotations(config, "train", problems)
    assert len(annotated) == 3  # the images whose files are missing, too
    assert len(annotated.target(0)) == 1
    named = [item for problem in problems.problems for item in problem.items]
    assert named == [
        "image 1",
        "image number 4",
        "../a.png",
        str(tmp_path / "gone.png"),
        "annotation 2",
        "annotation 3",
        "annotation 4",
        "annotation 5",
        "annotation number 5",
        "annotation number 6",
    ]
    assert all(problem.where and problem.remedy for problem in problems.problems if "do not exist" not in problem.found)


def test_nan_in_a_json_is_named_with_its_entry(tmp_path):
    rows = '[{"id": 5, "bbox": [0, 1, NaN, 3]}]'
    (tmp_path / "a.json").write_text(f'{{"images": [], "annotations": {rows}}}')
    config = DataConfig(
        format="coco_instance", root=str(tmp_path), task="instance", train={"images": ".", "annotations": "a.json"}
    )
    with pytest.raises(DatasetError, match="entry with id 5 has in its 'bbox' a NaN"):
        open_annotations(config, "train")
