"""`check` reports every problem, counts correctly, and is stopped by none."""

import json
import os
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from maskwright.data.build import open_dataset
from maskwright.data.check.check import check, check_before_training
from maskwright.data.check.duplicates import find_duplicates
from maskwright.data.check.examine import examine_image
from maskwright.data.check.html_report import SHOWN_PER_KIND, render_html
from maskwright.data.check.report import split_table
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.images.load import load_image
from maskwright.data.problems import Problem
from maskwright.errors import DatasetError
from maskwright.runtime.process_pool import map_unordered
from tests import datasets_on_disk, hostile_files, tiny
from tests.in_process import run_command


def write_recipe(folder, task="semantic", **changes):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny.values(folder, task, **changes)))
    return path


def assert_as_expected(report, expect, name):
    text = "\n".join(str(problem) for problem in report.problems)
    match expect:
        case "reject":
            assert report.errors, text
        case "warn":
            assert report.warnings, text
            assert not report.errors, text
        case "load":
            assert not report.errors, text
    if expect in ("reject", "warn"):
        assert name in text
        assert all(problem.remedy for problem in report.problems), text
    if name.startswith("good."):
        assert not report.problems


@pytest.mark.parametrize("entry", hostile_files.COCO + hostile_files.PANOPTIC, ids=lambda entry: entry.file)
def test_each_hostile_json_is_reported(entry, hostile):
    report = check(hostile / entry.file, workers=1, previews=0)
    named = {"wrong_image_size.json": "plain.jpg", "grayscale_png.json": "plain_gray.png"}
    assert_as_expected(report, entry.expect, named.get(entry.name, entry.name))


@pytest.mark.parametrize("entry", hostile_files.LABELS, ids=lambda entry: entry.file)
def test_each_hostile_label_is_reported(entry, hostile, tmp_path):
    label = hostile / entry.file
    for folder, file, name in (("images", "plain.jpg", "a.jpg"), ("labels", label.name, f"a{label.suffix}")):
        (tmp_path / folder).mkdir()
        shutil.copy(hostile / folder / file, tmp_path / folder / name)
    categories = [{"id": i, "name": f"class {i}", "is_thing": False} for i in range(11)]
    recipe = write_recipe(tmp_path, val=False, data__categories=categories)
    report = check(recipe, workers=1, previews=0)
    assert_as_expected(report, entry.expect, "a.")


def test_all_damaged_images_are_reported_and_the_others_read(hostile, tmp_path):
    names = {entry.name: entry for entry in hostile_files.IMAGES}
    images = [
        {
            "id": number,
            "file_name": name,
            "width": (entry.size or [160])[0],
            "height": (entry.size or [0, 104])[1],
        }
        for number, (name, entry) in enumerate(names.items(), 1)
    ]
    document = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    (tmp_path / "images").symlink_to(hostile / "images")
    report = check(tmp_path / "a.json", workers=2)
    assert report.images == len(images)
    wrong = {Path(problem.where).name for problem in report.problems if problem.severity == "error"}
    assert wrong - {"float_nan.tiff"} == {name for name, entry in names.items() if entry.expect == "reject"}
    assert "exif_corrupt.jpg" in {Path(problem.where).name for problem in report.problems}
    shown = {Path(preview.path).name: preview for preview in report.previews}
    assert shown["plain.jpg"].jpeg
    unreadable = sum(not preview.jpeg for preview in report.previews)
    assert render_html(report).count("cannot be read</span>") == unreadable > 0


def test_statistics_are_those_of_the_images_and_annotations(tmp_path):
    report = check(write_recipe(tiny.write_panoptic(tmp_path, crowds=(1,)), "panoptic"), workers=1)
    split = report.splits["train"]
    pixels, objects = Counter(), Counter()
    for number in range(4):
        ids, categories = tiny.scene(number)
        for i, category in enumerate(categories, 1):
            pixels[category] += int((ids == i).sum())
            objects[category] += not (number == 1 and i == len(categories))
    by_id = {category.id: count for category, count in zip(report.categories, split.classes, strict=True)}
    assert {number: count.pixels for number, count in by_id.items()} == dict(pixels)
    assert {number: count.objects for number, count in by_id.items()} == dict(objects)
    assert (split.images, split.read, split.crowds, split.empty, split.void_share) == (4, 4, 1, [], 0)
    assert split.objects == sum(objects.values())
    stack = np.stack([tiny.scene_image(number) for number in range(4)]).reshape(-1, 3).astype(np.float64)
    assert split.pixel_statistics.mean == pytest.approx(stack.mean(0), abs=1e-3)
    assert split.pixel_statistics.std == pytest.approx(stack.std(0), abs=1e-3)
    lines = yaml.safe_load(report.recipe_lines())
    tiny.recipe(tmp_path, "panoptic", model__pixel_mean=lines["model"]["pixel_mean"])
    assert json.loads(json.dumps(report.to_json()))["splits"]["val"]["classes"]["sky"]["images"] == 4


def test_void_and_empty_images_are_counted(tmp_path):
    report = check(write_recipe(tiny.write_labels(tmp_path, ignored=(2,)), val=False), workers=1)
    split = report.splits["train"]
    assert split.void_share == 0.25
    assert [Path(path).name for path in split.empty] == ["02.png"]
    assert split.objects_per_image[2] == 0


def test_several_processes_give_the_same_as_one(tmp_path):
    recipe = write_recipe(tiny.write_instances(tmp_path, count=40, size=(20, 20)), "instance")
    Image.new("L", (3, 3)).save(tmp_path / "images/07.png")
    (tmp_path / "images/11.png").write_bytes(b"nothing")
    one, several = (check(recipe, workers=workers, previews=2) for workers in (1, 3))
    assert several.workers == 3
    assert several.splits["train"].to_json(several.categories) == one.splits["train"].to_json(one.categories)
    assert sorted(several.problems) == sorted(one.problems)
    assert Counter(example.path for example in several.previews) == Counter(example.path for example in one.previews)


def kill_process_at_13(item):
    if item == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_item_that_kills_its_process_is_reported_and_the_others_are_completed():
    results = list(map_unordered(kill_process_at_13, list(range(60)), 2, lambda item: -item))
    assert sorted(results) == sorted([-13, *(item for item in range(60) if item != 13)])


def test_bug_in_a_reader_becomes_a_problem(tmp_path):
    class Odd:
        categories, task = (), "semantic"

        def file(self, index):
            return "a.png"

        def image_id(self, index):
            return "a"

        def image(self, index):
            raise ZeroDivisionError("division by zero")

        def target(self, index):
            raise DatasetError("is odd", where="a.png", remedy="correct it")

    found = examine_image(Odd(), 0)
    assert [problem.severity for problem in found.problems] == ["error", "error"]
    assert "ZeroDivisionError" in found.problems[0].found


@pytest.fixture
def splits(tmp_path):
    """A recipe with two splits of three different images each."""
    for name in ("train", "val"):
        tiny.write_labels(tmp_path / name, count=3)
    for number in range(3):
        other = np.random.default_rng(number).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(other).resize((64, 64)).save(tmp_path / f"val/images/{number:02d}.png")
    values = tiny.values(tmp_path, "semantic")
    for name in ("train", "val"):
        values["data"][name] = {"images": f"{name}/images", "annotations": f"{name}/labels"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def test_duplicates_in_one_or_two_splits_are_found_under_any_name(splits):
    assert not check(splits / "recipe.yaml", workers=1).problems
    shutil.copy(splits / "train/images/01.png", splits / "val/images/02.png")
    Image.open(splits / "train/images/00.png").save(splits / "train/images/02.png", compress_level=1)
    problems = check(splits / "recipe.yaml", workers=1).problems
    assert {(problem.severity, Path(problem.where).name, Path(problem.items[0]).name) for problem in problems} == {
        ("warning", "02.png", "00.png"),
        ("warning", "02.png", "01.png"),
    }


def test_compressed_and_scaled_copy_is_a_near_duplicate(splits):
    y, x = np.mgrid[:200, :200]
    image = Image.fromarray((127 + 100 * np.sin(x / 23) * np.cos(y / 31 + x / 50)).astype(np.uint8)).convert("RGB")
    image.save(splits / "train/images/01.png")
    image.resize((150, 150)).save(splits / "val/images/02.jpg", quality=50)
    (splits / "val/images/02.png").unlink()
    for name, size in (("train/labels/01.png", 200), ("val/labels/02.png", 150)):
        Image.fromarray(np.full((size, size), 7, np.uint8)).save(splits / name)
    (problem,) = [p for p in check(splits / "recipe.yaml", workers=1).problems if p.where]
    assert "01.png of train (correlation" in problem.found
    assert Path(problem.items[0]).name == "01.png"


def test_no_images_have_no_duplicates():
    assert not list(find_duplicates({"train": {}, "val": {}}))


def test_more_objects_than_queries_and_missing_classes_are_reported(tmp_path):
    recipe = write_recipe(tiny.write_panoptic(tmp_path), "panoptic", model__num_queries=3)
    text = "\n".join(problem.found for problem in check(recipe, workers=1).problems)
    assert "4 of 4 images have more objects than the model has queries (3)" in text
    categories = [*({"id": c["id"], "name": c["name"], "is_thing": True} for c in tiny.CATEGORIES)]
    recipe = write_recipe(tmp_path, "panoptic", data__categories=[*categories, {"id": 99, "name": "unicorn"}])
    text = "\n".join(problem.found for problem in check(recipe, workers=1).problems)
    assert "1 of 5 classes never occur (unicorn)" in text


def test_html_has_every_kind_needs_no_other_file_and_escapes_file_names(tmp_path):
    tiny.write_labels(tmp_path, count=6)
    for number in range(3):
        Image.fromarray(np.full((64, 64), 200 + number, np.uint8)).save(tmp_path / f"labels/0{number}.png")
    shutil.move(tmp_path / "images/05.png", tmp_path / "images/<b>&5.png")
    shutil.move(tmp_path / "labels/05.png", tmp_path / "labels/<b>&5.png")
    report = check(write_recipe(tmp_path, val=False), workers=1)
    (group,) = [group for group in report.problem_groups if group.severity == "error"]
    assert group.count == 3
    html = render_html(report)
    assert not re.search(r"https?://|src=\"(?!data:)|<link", html)
    assert html.count("<details") == len(report.problem_groups)
    assert "&lt;b&gt;&amp;5.png<" in html
    assert "<b>&5" not in html
    assert html.count('class="tile') == len(report.previews) == 6 + 3  # and the three readable ones with augmentation
    assert html.count('class="tile error"') == 3


def test_html_of_thousands_of_problems_shows_some_of_each_kind_and_their_number():
    problems = [
        Problem("error", f"x/{number}.png", (), f"{number} pixels are odd", "correct it") for number in range(5000)
    ]
    report = check_nothing()
    report.add(problems)
    assert report.errors == 5000
    html = render_html(report)
    assert html.count("<li>") == SHOWN_PER_KIND
    assert f"and {5000 - SHOWN_PER_KIND} more" in html
    assert "5000×" in html


def check_nothing():
    from maskwright.data.check.report import Report

    return Report("nothing")


@pytest.mark.parametrize(("value", "status"), [(7, 0), (77, 1)])
def test_exit_status_and_json(tmp_path, monkeypatch, capsys, value, status):
    tiny.write_labels(tmp_path)
    Image.fromarray(np.full((64, 64), value, np.uint8)).save(tmp_path / "labels/00.png")
    recipe = write_recipe(tmp_path)
    arguments = ("check", recipe, "--json", "-o", tmp_path / "check.html", "--workers", "1")
    ended, out, _ = run_command(monkeypatch, capsys, *arguments)
    assert ended == status
    found = json.loads(out)
    assert found["errors"] == 2 * status
    assert (tmp_path / "check.html").is_file()
    if status:
        problem = found["problems"][0]
        assert problem.keys() == {"severity", "file", "items", "found", "remedy"}
        assert problem["file"].endswith("00.png")
        assert "4096 pixels have the value 77" in problem["found"]


def refused(folder, task="semantic", **changes):
    recipe = tiny.recipe(folder, task, **changes)
    opened = {name: open_dataset(recipe, name) for name in ("train", "val")}
    with pytest.raises(DatasetError) as error:
        check_before_training(recipe, opened)
    assert "train.check_data=false" in str(error.value)
    return str(error.value)


def test_training_is_refused_for_unknown_label_values_other_sizes_and_no_objects(tmp_path):
    labels = tiny.write_labels(tmp_path / "a")
    check_before_training(
        tiny.recipe(labels, "semantic"), {"train": open_dataset(tiny.recipe(labels, "semantic"), "train")}
    )
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(labels / "labels/03.png")
    assert "03.png: 4096 pixels have the value 77" in refused(labels)
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(labels / "labels/03.png")
    assert "64 x 64 pixels (height x width), its annotation 32 x 32" in refused(labels)
    empty = tiny.write_instances(tmp_path / "b", empty=(0, 1, 2, 3))
    assert "none of the 4 images that were examined has an object" in refused(empty, "instance")


def test_missing_source_and_unknown_layout_are_reported(tmp_path, monkeypatch, capsys):
    status, _, error = run_command(monkeypatch, capsys, "check", tmp_path / "nowhere")
    assert status == 1
    assert error.startswith("error: no recipe")
    (tmp_path / "a.txt").write_text("hello")
    report = check(tmp_path)
    assert report.errors == 1
    assert "layout" in report.problems[0].found


def test_tables_on_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(tiny.write_labels(tmp_path) / "labels/00.png")
    _, out, _ = run_command(monkeypatch, capsys, "check", write_recipe(tmp_path), "-o", tmp_path / "check.html")
    for words in ("64x64", "grass", "4096 pixels have the value 77", "data.ignore_values", "pixel_mean: [", "2 errors"):
        assert words in out


@pytest.mark.parametrize(
    ("write", "tasks"),
    [
        (datasets_on_disk.cityscapes, ["panoptic", "semantic"]),
        (datasets_on_disk.ade20k, ["panoptic", "semantic"]),
        (datasets_on_disk.coco, ["panoptic", "instance"]),
        (datasets_on_disk.mapillary, ["panoptic", "semantic"]),
        (datasets_on_disk.voc, ["panoptic", "semantic"]),
        (datasets_on_disk.yolo, ["instance"]),
    ],
)
def test_folder_is_checked_for_all_its_tasks_and_images_are_read_once(tmp_path, monkeypatch, write, tasks):
    root, read = write(tmp_path), []
    monkeypatch.setattr(
        AnnotatedImages, "image", lambda self, index: read.append(index) or load_image(self.file(index))
    )
    report = check(root, workers=1, previews=0)
    assert [part.task for part in report.tasks] == tasks
    assert len(read) == report.images == sum(split.read for split in report.splits.values())
    assert all(split.objects for part in report.tasks for split in part.splits.values())
    assert set(report.to_json()["other_tasks"]) == set(tasks[1:])


def test_problem_of_one_task_is_found_in_a_folder_without_a_recipe(tmp_path):
    root = datasets_on_disk.cityscapes(tmp_path)
    broken = next(root.rglob("*_labelIds.png"))
    broken.write_bytes(b"no image")
    report = check(root, workers=1)
    assert report.errors == 1
    assert report.problems[0].where.endswith(broken.name) or broken.name in report.problems[0].found
    assert "train, semantic" in [row[0] for row in split_table(report)[1]]
    assert "Classes, semantic" in render_html(report)


def test_splits_of_only_one_task_are_checked(tmp_path):
    root = datasets_on_disk.ade20k(tmp_path)
    shutil.rmtree(root / "annotations_instance/validation")
    report = check(root, workers=1)
    assert set(report.splits) == {"train"}
    assert set(report.tasks[1].splits) == {"train", "val"}
    assert report.images == sum(split.read for split in report.tasks[1].splits.values())
