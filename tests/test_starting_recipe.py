"""`maskwright check PLACE --recipe FILE` writes a recipe that trains, with the reasons of its values."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from maskwright.config.recipe import load_recipe, parse_recipe
from maskwright.config.safe_yaml import load_yaml
from maskwright.config.schema import DataConfig
from maskwright.data.check.check import check
from maskwright.data.check.report import TaskStatistics
from maskwright.data.check.starting_recipe import starting_recipe, write_starting_recipe
from maskwright.data.check.statistics import ClassCount, SplitStatistics
from maskwright.errors import DatasetError, MaskwrightError
from maskwright.structures.annotations import Category
from tests import datasets_on_disk, tiny
from tests.in_process import run_command

WRITERS = {
    "panoptic": tiny.write_panoptic,
    "instance": tiny.write_instances,
    "label maps": tiny.write_labels,
    "yolo": datasets_on_disk.yolo,
}
CATEGORIES = (Category(1, "cell", True, (255, 0, 0)), Category(2, "background", False, (0, 0, 0)))


def statistics(task="instance", *, images=24, size=(256, 320), objects=(40,), areas=(40, 0, 0), in_images=(24, 24)):
    """Statistics of a training split with a thing and a stuff class."""
    split = SplitStatistics(images, images, objects_per_image=list(objects), areas=list(areas))
    split.sizes[size] = images
    split.classes = [ClassCount(sum(objects), in_images[0], 1), ClassCount(0, in_images[1], 1)]
    split.channel_sums = np.array([[10.0], [50.0], [300.0]])
    return TaskStatistics(task, CATEGORIES, {"train": split})


def text_for(found: TaskStatistics, *, channels=None, **data):
    values = {
        "format": "coco_instance",
        "root": "data",
        "task": found.task,
        "train": {"images": "i", "annotations": "a"},
    }
    config = DataConfig.model_validate(values | data)
    return starting_recipe("mine", config, found, channels=channels, precision="fp32", num_workers=1)


def recipe_for(found: TaskStatistics, **options):
    return parse_recipe(load_yaml(text_for(found, **options)), "mine.yaml")


# From a folder to a training


@pytest.mark.parametrize("kind", WRITERS)
def test_the_recipe_of_each_format_trains(kind, tmp_path, monkeypatch, capsys):
    folder, recipe = WRITERS[kind](tmp_path / "data"), tmp_path / "mine.yaml"
    monkeypatch.chdir(tmp_path)
    status, out, _ = run_command(monkeypatch, capsys, "check", folder, "--recipe", recipe, "--workers", 1)
    assert (status, out.splitlines()[-1]) == (0, f"Recipe: {recipe}")
    smaller = ("train.steps=2", "train.batch_size=2", "train.num_workers=0", "train.probe_memory=false")
    status, _, err = run_command(monkeypatch, capsys, "train", recipe, *smaller, "evaluate.max_images=1")
    assert status == 0, err
    assert (tmp_path / "runs/mine/last.safetensors").is_file()


def test_the_most_detailed_task_is_chosen_unless_another_is_named(tmp_path):
    tiny.write_panoptic(tmp_path)
    tiny.write_instances(tmp_path)
    for task, expected in ((None, "panoptic"), ("instance", "instance"), ("semantic", "semantic")):
        path = tmp_path / f"{expected}.yaml"
        write_starting_recipe(check(tmp_path, task=task, workers=1), path)
        recipe = load_recipe(path)
        assert (recipe.data.task, recipe.evaluate.task, recipe.name) == (expected, expected, expected)
    assert load_recipe(tmp_path / "semantic.yaml").data.format == "coco_panoptic"


def test_a_task_without_annotations_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no annotations for the task panoptic; choose --task instance"):
        check(tiny.write_instances(tmp_path), task="panoptic")


def test_channels_and_their_statistics_are_those_of_the_images(tmp_path):
    tiny.write_labels(tmp_path / "data")
    for number in range(4):
        (tmp_path / f"data/images/{number:02d}.png").unlink()
        image = np.random.default_rng(number).integers(100, 900, (64, 64, 5)).astype(np.uint16)
        tifffile.imwrite(
            tmp_path / f"data/images/{number:02d}.tif", image, planarconfig="contig", photometric="minisblack"
        )
    report = check(tmp_path / "data", workers=1)
    write_starting_recipe(report, tmp_path / "mine.yaml")
    model = load_recipe(tmp_path / "mine.yaml").model
    assert model.channels == 5
    assert model.pixel_mean == report.splits["train"].pixel_statistics.mean
    assert not load_recipe(tmp_path / "mine.yaml").train.augment.color_jitter


# What is refused


def one_line(monkeypatch, capsys, *arguments) -> str:
    status, out, err = run_command(monkeypatch, capsys, *arguments)
    assert (status, out) == (1, "")
    return err.strip().removeprefix("error: ")


def test_an_existing_file_is_kept_and_nothing_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("mine")
    found = one_line(monkeypatch, capsys, "check", tiny.write_labels(tmp_path / "data"), "--recipe", "mine.yaml")
    assert found == "mine.yaml: exists, and is not replaced; choose another name for the recipe"
    assert Path("mine.yaml").read_text() == "mine"
    assert not Path("check.html").exists()
    with pytest.raises(MaskwrightError, match="exists"):
        write_starting_recipe(check("data", workers=1), Path("mine.yaml"))


def test_a_recipe_as_the_source_and_a_name_that_is_no_recipe_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no recipe; name the dataset itself" in one_line(monkeypatch, capsys, "check", "demo", "--recipe", "a.yaml")
    data = tiny.write_labels(tmp_path / "data")
    assert "ends with .yaml" in one_line(monkeypatch, capsys, "check", data, "--recipe", "mine")
    assert "set data.task=semantic" in one_line(monkeypatch, capsys, "check", "demo", "--task", "semantic")
    assert "exists" in one_line(monkeypatch, capsys, "check", data, "--recipe", data)


def test_it_is_not_written_until_the_errors_are_fixed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = tiny.write_labels(tmp_path / "data")
    (data / "images/01.png").write_bytes(b"nothing")
    status, _, err = run_command(monkeypatch, capsys, "check", data, "--recipe", "mine.yaml", "--workers", 1)
    assert (status, err.strip()) == (1, "mine.yaml is not written until the errors are fixed")
    assert not Path("mine.yaml").exists()


def test_a_dataset_without_training_images_is_refused(tmp_path):
    tiny.write_instances(tmp_path)
    (tmp_path / "instances.json").rename(tmp_path / "instances_val.json")
    with pytest.raises(DatasetError, match=r"no annotated training images \(splits: val\); name a split train"):
        write_starting_recipe(check(tmp_path, workers=1), tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


# Derived values


def test_mostly_small_objects_get_enlarged_crops_and_tiles():
    recipe = recipe_for(statistics(areas=(30, 10, 0)))
    assert recipe.train.augment.scale_range == (1.2, 2.4)
    assert recipe.train.augment.crop_size == (160, 160)
    assert (recipe.evaluate.short_side, recipe.evaluate.tile_size, recipe.evaluate.tile_overlap) == (160, 96, 32)
    larger = recipe_for(statistics(areas=(30, 9, 1)))
    assert larger.train.augment.crop_size == (256, 256)
    assert (larger.evaluate.short_side, larger.evaluate.tile_size, larger.evaluate.tile_overlap) == (256, 160, 48)
    assert recipe_for(statistics(size=(900, 1200))).train.augment.crop_size == (256, 256)


def test_small_images_of_small_objects_are_enlarged_whole():
    recipe = recipe_for(statistics(size=(64, 64)))
    assert (recipe.train.augment.crop_size, recipe.evaluate.short_side, recipe.evaluate.tile_size) == (
        (96, 96),
        96,
        None,
    )


@pytest.mark.parametrize(
    ("size", "crop", "scales", "short_side"),
    [
        ((360, 480), 256, (0.7, 1.6), None),
        ((1024, 2048), 512, (0.7, 1.6), None),
        ((3000, 4000), 512, (0.24, 0.55), 1024),
        ((40, 30), 32, (0.7, 1.6), None),
    ],
)
@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_other_objects_get_crops_of_three_quarters_of_the_short_side(size, crop, scales, short_side, task):
    areas = (40, 0, 0) if task == "semantic" else (20, 10, 10)  # areas of classes are no sizes of objects
    recipe = recipe_for(statistics(task, size=size, areas=areas))
    assert recipe.train.augment.crop_size == (crop, crop)
    assert recipe.train.augment.scale_range == scales
    assert (recipe.evaluate.short_side, recipe.evaluate.tile_size) == (short_side, None)


def test_stuff_does_not_count_as_large_objects():
    found = statistics("panoptic", areas=(30, 10, 24))
    found.splits["train"].classes[1].objects = 24
    assert recipe_for(found).evaluate.tile_size == 96
    assert "30 of 40 objects" in text_for(found)


@pytest.mark.parametrize(
    ("task", "most", "queries"),
    [("semantic", 11, 50), ("semantic", 60, 80), ("instance", 65, 100), ("panoptic", 90, 120), ("instance", 241, 300)],
)
def test_queries_are_a_quarter_more_than_the_objects_of_an_image(task, most, queries):
    assert recipe_for(statistics(task, objects=(3, most))).model.num_queries == queries


def test_too_many_objects_for_queries_are_named_with_a_remedy():
    large = text_for(statistics(objects=(400,), areas=(0, 400, 0)))
    assert "num_queries: 300  # up to 400 objects in one image are too many" in large
    assert "set evaluate.tile_size: 192" in large
    assert "top_k: 300" in large
    assert "tiles and crops have fewer" in text_for(statistics(objects=(400,)))


@pytest.mark.parametrize(
    ("images", "steps", "every"), [(4, 300, 50), (24, 300, 50), (200, 1500, 300), (10_000, 5000, 1000)]
)
def test_steps_are_sixty_epochs_within_limits(images, steps, every):
    recipe = recipe_for(statistics(images=images), val={"images": "i", "annotations": "a"})
    assert (recipe.train.steps, recipe.train.evaluate_every) == (steps, every)
    assert recipe.train.checkpoint_every == min(250, every)


@pytest.mark.parametrize("format", ["coco_instance", "yolo", "voc"])
def test_without_a_validation_split_it_says_how_to_hold_out_images(format):
    text = text_for(statistics(), format=format, val=None)
    recipe = parse_recipe(load_yaml(text), "mine.yaml")
    assert recipe.data.val is None
    assert recipe.train.evaluate_every is None
    assert "# No validation split was found" in text


def test_a_rare_class_is_named_with_the_setting_that_draws_it_more_often():
    assert "# 'cell' is in 1 of 24 images" in text_for(statistics(in_images=(1, 24)))
    assert "repeat_threshold" not in text_for(statistics(in_images=(2, 24)))


def test_names_of_classes_cannot_break_the_yaml():
    categories = [{"id": 1, "name": "a: #b\n'{"}, {"id": 2, "name": "ünï 🙂"}]
    found = statistics("semantic", in_images=(1, 24))
    found.categories = tuple(Category(entry["id"], entry["name"], False, (0, 0, 0)) for entry in categories)
    recipe = recipe_for(found, format="label_maps", categories=categories, label_map={7: 1, 9: "ignore"})
    assert [entry.name for entry in recipe.data.categories] == ["a: #b\n'{", "ünï 🙂"]
    assert recipe.data.label_map == {7: 1, 9: "ignore"}
