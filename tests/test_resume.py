"""Runs that are resumed with other settings or data, twice at once, or whose folder disappears."""

import json
import logging
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

import maskwright.training.train as train_module
from maskwright.config.recipe import parse_recipe
from maskwright.data.build import open_dataset
from maskwright.data.fingerprint import fingerprint
from maskwright.errors import DatasetError, MaskwrightError, RecipeError
from maskwright.training.losses.criterion import count_normalizers
from maskwright.training.run_lock import LOCK_NAME, RunLock
from maskwright.training.train import train
from maskwright.training.training_checkpoint import read_training_checkpoint
from tests import tiny
from tests.in_process import skip_reports, train_until
from tests.processes import start, start_ranks, start_training, wait, wait_until
from tests.run_files import assert_same_run, losses, rows, steps_kept

pytestmark = pytest.mark.usefixtures("quick_report")


@pytest.fixture
def folder(tmp_path):
    return tiny.write_panoptic(tmp_path / "data")


# Other settings


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"evaluate__batch_size": 2}, "evaluate.batch_size=2 (was 1)"),
        ({"evaluate__max_images": 2}, "evaluate.max_images=2 (was None)"),
        ({"evaluate__object_threshold": 0.5}, "evaluate.object_threshold=0.5 (was 0.8)"),
        ({"train__best_metric": "SQ"}, "train.best_metric=SQ (was None)"),
    ],
)
def test_settings_that_train_nothing_may_change_with_a_log_line(folder, tmp_path, monkeypatch, caplog, change, line):
    run = tmp_path / "run"
    train_until(2, tiny.recipe(folder), run, monkeypatch)
    with caplog.at_level(logging.INFO):
        train(tiny.recipe(folder, **change), run)
    assert f"resuming with {line}" in caplog.text
    assert "resuming from step 2/6" in caplog.text
    assert f"changed after step 2: {line}" in rows(run)[0]["start"]


def test_data_that_was_moved_is_the_same_data(folder, tmp_path, monkeypatch, caplog):
    train(tiny.recipe(folder), tmp_path / "whole")
    train_until(2, tiny.recipe(folder), tmp_path / "run", monkeypatch)
    folder.rename(tmp_path / "moved")
    (tmp_path / "moved/panoptic.json").rename(tmp_path / "moved/renamed.json")
    values = tiny.values(tmp_path / "moved")
    for split in ("train", "val"):
        values["data"][split] = values["data"][split] | {"annotations": "renamed.json"}
    with caplog.at_level(logging.INFO):
        train(parse_recipe(values, "tiny"), tmp_path / "run")
    assert f"data.root={tmp_path / 'moved'} (was {folder})" in caplog.text
    assert "data.train=" in caplog.text
    assert "has changed" not in caplog.text
    assert torch.equal(losses(tmp_path / "whole"), losses(tmp_path / "run"))


@pytest.mark.parametrize(
    "change", [{"train__learning_rate": 2e-3}, {"data__filter_empty": True}, {"train__precision": "bf16"}]
)
def test_settings_that_change_what_is_learned_are_still_refused(folder, tmp_path, monkeypatch, change):
    train_until(2, tiny.recipe(folder), tmp_path / "run", monkeypatch)
    with pytest.raises(RecipeError, match="holds a run with"):
        train(tiny.recipe(folder, **change), tmp_path / "run")


def test_scores_of_another_evaluation_do_not_decide_which_model_is_best(folder, tmp_path, monkeypatch, caplog):
    recipe = {"train__evaluate_every": 2, "train__checkpoint_every": 2}
    run = tmp_path / "run"
    monkeypatch.setattr(train_module, "headline", lambda scores, best: ("PQ", 0.9))
    train_until(3, tiny.recipe(folder, **recipe), run, monkeypatch)
    monkeypatch.setattr(train_module, "headline", lambda scores, best: ("PQ", 0.5))
    train(tiny.recipe(folder, evaluate__max_images=2, **recipe), run)
    assert "earlier scores are not comparable" in caplog.text
    assert read_training_checkpoint(run / "checkpoints/00000006.safetensors").progress.best_score == 0.5


# Other data


def change_json(file, change):
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def one_more_image(folder):
    tiny.write_panoptic(folder, count=5)


def another_class(folder):
    change_json(
        folder / "panoptic.json", lambda document: document["annotations"][0]["segments_info"][0].update(category_id=7)
    )


@pytest.mark.parametrize("change", [one_more_image, another_class])
def test_changed_data_is_noticed(folder, tmp_path, monkeypatch, caplog, change):
    run = tmp_path / "run"
    train_until(2, tiny.recipe(folder), run, monkeypatch)
    change(folder)
    with caplog.at_level(logging.WARNING):
        train(tiny.recipe(folder), run)
    images = 5 if change is one_more_image else 4
    for split in ("train", "val"):
        assert f"data.{split} has changed: it had 4 images, " in caplog.text
        assert any(f"data.{split} has {images} images, " in line for line in rows(run)[0]["start"])
    assert "the remaining steps use the changed data" in caplog.text


def test_measured_pixel_statistics_stay_those_of_the_run(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    measured = {"model__pixel_mean": "measure", "model__pixel_std": "measure"}
    train_until(2, tiny.recipe(folder, **measured), run, monkeypatch)
    before = (run / "recipe.yaml").read_text()
    one_more_image(folder)
    train(tiny.recipe(folder, **measured), run)
    assert (run / "recipe.yaml").read_text() == before


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_fingerprint_depends_on_content_and_not_on_the_place(tmp_path, task):
    write = {"panoptic": tiny.write_panoptic, "instance": tiny.write_instances, "semantic": tiny.write_labels}[task]
    found = {name: fingerprint(open_dataset(tiny.recipe(write(tmp_path / name), task), "train")) for name in "ab"}
    assert found["a"] == found["b"]
    assert found["a"].startswith("4 images, ")
    write(tmp_path / "b", count=3)
    if task == "semantic":
        (tmp_path / "b/labels/03.png").unlink()
        (tmp_path / "b/images/03.png").unlink()
    assert fingerprint(open_dataset(tiny.recipe(tmp_path / "b", task), "train")).startswith("3 images, ")


def test_fingerprint_covers_label_images(tmp_path):
    folder = tiny.write_labels(tmp_path / "data")
    before = fingerprint(open_dataset(tiny.recipe(folder, "semantic"), "train"))
    shutil.copy(folder / "labels/00.png", folder / "labels/01.png")
    after = fingerprint(open_dataset(tiny.recipe(folder, "semantic"), "train"))
    assert before != after
    assert before[:9] == after[:9] == "4 images,"


def test_fingerprint_covers_the_sizes_of_label_images_that_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("maskwright.data.fingerprint._SAMPLED_IMAGES", 2)
    folder = tiny.write_labels(tmp_path / "data", count=6)
    before = fingerprint(open_dataset(tiny.recipe(folder, "semantic"), "train"))
    with open(folder / "labels/05.png", "ab") as file:
        file.write(b"more")
    after = fingerprint(open_dataset(tiny.recipe(folder, "semantic"), "train"))
    assert before.split()[:3] == after.split()[:3]
    assert before != after


# Validation splits


def test_an_empty_split_is_refused_before_the_first_step(tmp_path):
    folder = tiny.write_instances(tmp_path / "data")
    document = json.loads((folder / "instances.json").read_text()) | {"images": [], "annotations": []}
    (folder / "empty.json").write_text(json.dumps(document))
    values = tiny.values(folder, "instance")
    for split in ("train", "val"):
        changed = json.loads(json.dumps(values))
        changed["data"][split]["annotations"] = "empty.json"
        with pytest.raises(DatasetError, match=rf"data\.{split}: the split has no images"):
            train(parse_recipe(changed, "tiny"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def train_one_image_each(place):
    skip_reports()
    place = Path(place)
    train(tiny.recipe(place / "data", train__steps=2, evaluate__max_images=1), place / "two")
    dist.barrier()


def test_more_processes_than_validation_images(folder, tmp_path):
    processes = start_ranks(train_one_image_each, str(tmp_path), world=2, output=tmp_path / "out")
    printed = lambda: "\n".join((tmp_path / f"out{rank}").read_text() for rank in range(2))  # noqa: E731
    assert wait(*processes) == [0, 0], printed()
    assert (tmp_path / "two/best.safetensors").is_file()
    assert rows(tmp_path / "two")[-1]["evaluation"]["images"] == 1


@pytest.mark.parametrize("score", [None, math.nan])
def test_without_a_score_the_last_model_is_the_best_and_the_run_does_not_stop_early(
    folder, tmp_path, monkeypatch, caplog, score
):
    real = train_module.evaluate

    def evaluate(*arguments, **options):
        evaluation = real(*arguments, **options)
        evaluation.scores = evaluation.scores | {"PQ": score}
        return evaluation

    monkeypatch.setattr(train_module, "evaluate", evaluate)
    run = tmp_path / "run"
    train(tiny.recipe(folder, train__steps=4, train__evaluate_every=1, train__early_stopping_patience=2), run)
    assert [row["step"] for row in rows(run) if "evaluation" in row] == [1, 2, 3, 4]
    best, last = (safetensors.torch.load_file(run / f"{name}.safetensors") for name in ("best", "last"))
    assert all(torch.equal(best[key], last[key]) for key in last)
    assert "step 4: PQ has no value, because the validation split has no objects for it" in caplog.text


def test_a_step_without_objects_has_no_class_loss_if_no_object_has_no_weight(tmp_path):
    folder = tiny.write_instances(tmp_path / "data", empty=(0, 1, 2, 3))
    recipe = tiny.recipe(folder, "instance", train__steps=2, train__no_object_weight=0.0, train__check_data=False)
    train(recipe, tmp_path / "run")
    assert losses(tmp_path / "run").tolist() == [0, 0]
    assert count_normalizers([], 8, 0.0).class_weights == 0


# Names of checkpoints


@pytest.mark.parametrize(
    "name", ["00000002 (copy).safetensors", "00000002.safetensors.bak", "2.safetensors", "00000002-old", "١٢٣٤٥٦٧٨"]
)
def test_other_names_among_the_checkpoints_are_ignored_with_a_line(folder, tmp_path, monkeypatch, caplog, name):
    run = tmp_path / "run"
    recipe = tiny.recipe(folder)
    train_until(3, recipe, run, monkeypatch)
    shutil.copy(run / "checkpoints/00000002.safetensors", run / "checkpoints" / name)
    train(recipe, run)
    assert f"{name} is ignored: its name is not that of a checkpoint" in caplog.text or not name.isascii()
    (run / "checkpoints" / name).unlink()
    assert steps_kept(run) == [4, 6]


def test_a_renamed_checkpoint_is_refused(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train_until(3, tiny.recipe(folder), run, monkeypatch)
    (run / "checkpoints/00000002.safetensors").rename(run / "checkpoints/00000005.safetensors")
    with pytest.raises(MaskwrightError, match=r"00000005\.safetensors: is of step 2; call it 00000002"):
        train(tiny.recipe(folder), run)


# The lock


def hold(place):
    with RunLock(Path(place)) as lock:
        lock.acquire()
        (Path(place) / "ready").write_text("")
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Another process that has locked the run's folder."""
    run = tmp_path / "run"
    process = start(hold, str(run), output=tmp_path / "out")
    wait_until((run / "ready").is_file, process)
    yield process
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_second_training_in_one_folder_is_refused(folder, tmp_path, holder):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        MaskwrightError, match=rf"run: another training writes into this folder \(process {holder.pid} on .*\); wait"
    ):
        train(tiny.recipe(folder), tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_lock_of_a_killed_process_is_free(folder, tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / "run" / LOCK_NAME).exists()
    train(tiny.recipe(folder, train__steps=1, train__num_workers=1), tmp_path / "run")
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_one_process_cannot_lock_a_folder_twice(tmp_path):
    with RunLock(tmp_path / "run") as lock:
        lock.acquire()
        with (
            pytest.raises(MaskwrightError, match=r"another training .* \(this process\)"),
            RunLock(tmp_path / "data/../run") as other,
        ):
            other.acquire()
        lock.check()
    assert not (tmp_path / "run").exists()
    with RunLock(tmp_path / "run") as again:
        again.acquire()


def test_a_file_system_without_locks_is_a_warning(folder, tmp_path, monkeypatch, caplog):
    def refuse(file):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("maskwright.training.run_lock._lock", refuse)
    train(tiny.recipe(folder, train__steps=1), tmp_path / "run")
    assert "run cannot be locked (Operation not supported); do not train into it twice" in caplog.text


# A folder that disappears


@pytest.mark.parametrize("log_every", [1, 100], ids=["found at the log", "found at the checkpoint"])
def test_a_run_whose_folder_is_removed_ends_with_one_line(folder, tmp_path, log_every):
    run = tmp_path / "run"
    process = start_training(
        folder, run, train__steps=100_000, train__log_every=log_every, train__checkpoint_every=20, val=False
    )
    wait_until(lambda: (run / "checkpoints").is_dir() and any((run / "checkpoints").iterdir()), process)
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(run, ignore_errors=True)
    assert wait(process, seconds=120) == [1], run.with_suffix(".out").read_text()
    printed = run.with_suffix(".out").read_text()
    assert "Traceback" not in printed
    assert printed.strip().splitlines()[-1].startswith(f"error: {run}")
    assert not (run / "recipe.yaml").exists()


def test_an_interrupted_run_is_the_same_run(folder, tmp_path, monkeypatch):
    train(tiny.recipe(folder), tmp_path / "whole")
    train_until(3, tiny.recipe(folder), tmp_path / "run", monkeypatch)
    train(tiny.recipe(folder), tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
