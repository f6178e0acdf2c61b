"""Problems: raised at once in training, collected with their parts by the check."""

import json
import logging

import pytest
from PIL import Image

from maskwright.config.schema import DataConfig
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.problems import MAX_PER_KIND, ProblemCollector, RaiseFirst, problem_of
from maskwright.errors import DatasetError


def test_message_is_taken_apart_into_file_finding_and_remedy():
    problem = problem_of("error", "a/b.json: annotation 3 is odd; it is flat; mend it", ["annotation 3"])
    assert problem == ("error", "a/b.json", ("annotation 3",), "annotation 3 is odd; it is flat", "mend it")
    assert problem_of("warning", "data.train: no picture") == ("warning", "", (), "data.train: no picture", "")


def test_problems_that_differ_in_names_and_numbers_are_of_one_sort():
    first, second, other = (
        problem_of("error", text)
        for text in (
            "x/a.png: 60 pixels have the value 200 in 'a'; mend it",
            "x/b.png: 1,3 pixels have the value 7 in 'b b'; mend it",
            "x/b.png: all pixels have the value 7 in 'b b'; mend it",
        )
    )
    assert first.sort == second.sort != other.sort


def test_training_raises_errors_and_logs_warnings_that_are_alike_once(caplog):
    problems = RaiseFirst()
    with caplog.at_level(logging.WARNING):
        problems.warning("x/a.png: has 3 edges; mend it")
        problems.warning("x/b.png: has 4 edges; mend it")
        problems.warning("x/b.png: has no edge; mend it")
    assert [record.message[:10] for record in caplog.records] == ["x/a.png: h", "x/b.png: h"]
    with pytest.raises(DatasetError), problems.skipping("a"):
        raise DatasetError("x/a: broken")


def test_collecting_goes_on_behind_an_error_but_not_behind_a_mistake_of_ours():
    problems = ProblemCollector()
    with problems.skipping("annotation 1"):
        raise DatasetError("x/a.json: broken; mend it")
    assert problems.found[0].items == ("annotation 1",)
    with pytest.raises(ZeroDivisionError), problems.skipping("annotation 2"):
        _ = 1 / 0


def test_of_many_alike_some_are_kept_and_all_are_counted():
    problems = ProblemCollector()
    for number in range(MAX_PER_KIND + 5):
        problems.warning(f"x/{number}.png: odd")
    assert len(problems.found) == MAX_PER_KIND
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
    assert len(annotated) == 2
    assert len(annotated.target(0)) == 1
    named = [item for problem in problems.found for item in problem.items]
    assert named == [
        "image 1",
        "image 3",
        "image number 4",
        str(tmp_path / "gone.png"),
        "annotation 2",
        "annotation 3",
        "annotation 4",
        "annotation 5",
        "annotation number 5",
        "annotation number 6",
    ]
    assert all(problem.file and problem.remedy for problem in problems.found if "do not exist" not in problem.found)


def test_nan_in_a_json_is_named_with_its_entry(tmp_path):
    rows = '[{"id": 5, "bbox": [0, 1, NaN, 3]}]'
    (tmp_path / "a.json").write_text(f'{{"images": [], "annotations": {rows}}}')
    config = DataConfig(
        format="coco_instance", root=str(tmp_path), task="instance", train={"images": ".", "annotations": "a.json"}
    )
    with pytest.raises(DatasetError, match="entry with id 5 has in its 'bbox' a NaN"):
        open_annotations(config, "train")
