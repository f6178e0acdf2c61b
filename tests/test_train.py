"""Training runs: they learn, resume exactly, write every promised file, and stop on non-finite losses."""

import errno
import json
import logging
import math
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import yaml

import maskwright.training.train as train_module
from maskwright.checkpoints.checkpoint import checksum
from maskwright.checkpoints.load import load_model, read_checkpoint
from maskwright.config.recipe import load_recipe
from maskwright.data.build import open_dataset, train_loader
from maskwright.errors import CheckpointError, MaskwrightError, RecipeError, TrainingError
from maskwright.models import build_model
from maskwright.runtime.device import create_accelerator
from maskwright.training.optimizer import build_optimizer, learning_rate_advice
from maskwright.training.step import build_criterion, train_step
from maskwright.training.train import train
from tests import tiny
from tests.in_process import skip_reports
from tests.run_files import assert_same_run, last_weights, losses, partial_files, rows, steps_kept

WHOLE_CROPS = {
    "resize": "large_scale_jitter",
    "scale_range": [1.0, 1.5],
    "crop_size": [64, 64],
}  # no padding, however divided
SWIN = {
    "model__backbone": "swin_tiny_patch4_window7_224",
    "model__backbone_options": {"depths": [1, 1, 2, 1], "embed_dim": 24, "num_heads": [1, 1, 2, 2]},
}


@pytest.fixture
def real_report():
    """Request this fixture to draw real reports, which take most of the time of a tiny run."""


@pytest.fixture(autouse=True)
def quick_report(request, monkeypatch):
    if "real_report" not in request.fixturenames:
        skip_reports(monkeypatch.setattr)


@pytest.fixture
def folder(tmp_path):
    return tiny.write_panoptic(tmp_path / "data")


def command(folder, run, *arguments, launcher=(), **changes):
    """Start the real command on a tiny recipe, without waiting for it."""
    file = run.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(tiny.values(folder, **changes)))
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "maskwright", "train", str(file), "--output", str(run), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupt_at(monkeypatch, name, call):
    """Make the `call`-th call of a function of the train module interrupt the run."""
    real, calls = getattr(train_module, name), []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(train_module, name, wrapped)


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_tiny_model_overfits_two_images(tmp_path):
    still = {"resize": "large_scale_jitter", "scale_range": [1.0, 1.0], "crop_size": [64, 64], "flip": 0.0}
    folder = tiny.write_panoptic(tmp_path / "data", count=2)
    recipe = tiny.recipe(folder, train__steps=70, train__augment=still, train__checkpoint_every=70)
    scores = train(recipe, tmp_path / "run")
    history = losses(tmp_path / "run")
    assert history[-5:].mean() < 0.4 * history[:5].mean()
    assert scores["PQ"] > 0.7


def test_run_leaves_every_promised_file(folder, tmp_path, real_report):
    run = tmp_path / "run"
    recipe = tiny.recipe(folder, train__evaluate_every=3)
    train(recipe, run)
    found = {path.name for path in run.iterdir()}
    promised = {"recipe.yaml", "log.jsonl", "checkpoints", "best.safetensors", "last.safetensors", "curves.png"}
    assert promised | {"report.html"} <= found
    assert any(name.startswith("events.out.tfevents") for name in found)
    assert not partial_files(run)
    steps = [row for row in rows(run) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for row in steps:
        assert row["loss"] == pytest.approx(row["loss_class"] + row["loss_mask"] + row["loss_dice"], abs=1e-9)
        assert row["gradient_norm"] > 0
        assert row["images_per_second"] > 0
        assert 0.05 < row["memory_gb"] < 64
    evaluations = [row for row in rows(run) if "evaluation" in row]
    assert [row["step"] for row in evaluations] == [3, 6]
    assert 0 <= evaluations[0]["evaluation"]["PQ"] <= 1
    assert "<html" in (run / "report.html").read_text().lower()
    best = read_checkpoint(run / "best.safetensors")
    assert best.recipe == recipe
    assert [category.name for category in best.categories] == ["sky", "grass", "box", "card"]
    assert best.provenance["scores"]["PQ"] == max(row["evaluation"]["PQ"] for row in evaluations)


def test_logged_loss_is_the_weighted_sum_that_is_minimized(folder, tmp_path):
    zero = {"train__class_loss_weight": 0.0, "train__mask_loss_weight": 0.0, "train__steps": 1}
    train(tiny.recipe(folder, **zero), tmp_path / "dice")
    train(tiny.recipe(folder, train__dice_loss_weight=10.0, **zero), tmp_path / "double")
    (first,), (second,) = ([row for row in rows(tmp_path / name) if "loss" in row] for name in ("dice", "double"))
    assert first["loss"] == first["loss_dice"] > 0
    assert first["loss_class"] == first["loss_mask"] == 0
    # The weights also steer the matching, but a cost of one term alone has the same minimum at any scale.
    assert second["loss"] == pytest.approx(2 * first["loss"], rel=1e-6)


def test_run_without_validation_split_exports_its_last_model_as_the_best(folder, tmp_path, caplog, real_report):
    run = tmp_path / "run"
    recipe = tiny.recipe(folder, val=False)
    assert train(recipe, run) is None
    assert all((run / name).is_file() for name in ("best.safetensors", "report.html", "curves.png"))
    with caplog.at_level(logging.INFO):
        assert train(recipe, run) is None
    assert "is finished" in caplog.text


@pytest.mark.parametrize(
    ("name", "call", "changes"),
    [
        ("train_step", 4, {}),
        ("train_step", 5, {}),
        ("train_step", 5, {"train__optimizer": "muon"}),
        ("train_step", 5, {"train__ema_decay": 0.5}),
        ("train_step", 5, SWIN | {"model__drop_path_rate": 0.8}),
        ("evaluate", 1, {}),
        ("evaluate", 2, {}),
        ("save_progress", 3, {}),
        ("write_report", 2, {}),
    ],
)
def test_run_interrupted_anywhere_and_resumed_equals_an_uninterrupted_one(
    folder, tmp_path, monkeypatch, name, call, changes
):
    recipe = tiny.recipe(folder, train__evaluate_every=4, **changes)
    with monkeypatch.context() as patch:
        interrupt_at(patch, name, call)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "ended")
    train(recipe, tmp_path / "ended")
    train(recipe, tmp_path / "whole")
    assert_same_run(tmp_path / "ended", tmp_path / "whole")


def test_finished_run_started_again_does_nothing(folder, tmp_path, caplog, monkeypatch):
    run = tmp_path / "run"
    recipe = tiny.recipe(folder)
    scores = train(recipe, run)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(train_module, "evaluate", None)
    with caplog.at_level(logging.INFO):
        again = train(recipe, run)
    assert again["PQ"] == scores["PQ"]
    assert f"{run} is finished: 6 of 6 steps; nothing to do" in caplog.text
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "one bit"])
def test_damaged_latest_checkpoint_falls_back_to_the_one_before_with_a_warning(
    folder, tmp_path, monkeypatch, caplog, damage
):
    run = tmp_path / "run"
    recipe = tiny.recipe(folder)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "train_step", 6)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, run)
    newest = run / "checkpoints/00000004.safetensors"
    content = newest.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    damaged = {"cut": content[: len(content) // 2], "empty": b"", "garbage": b"\xff" * 4096, "one bit": flipped}
    newest.write_bytes(damaged[damage])
    with caplog.at_level(logging.INFO):
        train(recipe, run)
    found = {"empty": "is empty (0 bytes)", "one bit": "damaged: its content has changed"}
    assert f"00000004.safetensors: {found.get(damage, 'truncated or not a safetensors file')}" in caplog.text
    assert "resuming from step 2/6" in caplog.text
    train(recipe, tmp_path / "whole")
    assert_same_run(run, tmp_path / "whole")


def test_other_file_among_the_checkpoints_is_refused(folder, tmp_path):
    run = tmp_path / "run"
    recipe = tiny.recipe(folder, train__steps=2)
    train(recipe, run)
    (run / "last.safetensors").rename(run / "checkpoints/00000099.safetensors")
    with pytest.raises(CheckpointError, match=r"00000099\.safetensors: not a training checkpoint"):
        train(recipe, run)


@pytest.mark.parametrize("keep", [1, 3])
def test_keep_checkpoints_limits_their_number(folder, tmp_path, keep):
    train(tiny.recipe(folder, train__keep_checkpoints=keep, train__checkpoint_every=1), tmp_path / "run")
    assert steps_kept(tmp_path / "run") == [1, 2, 3, 4, 5, 6][-keep:]


def test_damaged_checkpoint_does_not_count_as_kept(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    recipe = tiny.recipe(folder, train__keep_checkpoints=1, train__checkpoint_every=1)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "train_step", 3)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, run)
        (run / "checkpoints/00000005.safetensors").write_bytes(b"half")
        interrupt_at(patch, "train_step", 2)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, run)
    assert steps_kept(run) == [3, 5]
    train(recipe, run)
    assert steps_kept(run) == [6]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"train__learning_rate": 2e-3}, "train.learning_rate=0.001, but now it is 0.002"),
        ({"model__num_queries": 9}, "model.num_queries=8, but now it is 9"),
        ({"train__steps": 7}, "train.steps=6, but now it is 7"),
    ],
)
def test_other_recipe_in_the_same_folder_is_refused_by_its_key(folder, tmp_path, changes, key):
    run = tmp_path / "run"
    train(tiny.recipe(folder), run)
    with pytest.raises(RecipeError) as error:
        train(tiny.recipe(folder, **changes), run)
    assert f"{run}: holds a run with {key}" in one_line(error) or key.split("=")[0] in one_line(error)


def test_keys_that_do_not_change_the_result_may_change_on_resume(folder, tmp_path, caplog):
    train(tiny.recipe(folder), tmp_path / "run")
    with caplog.at_level(logging.INFO):
        train(
            tiny.recipe(folder, train__keep_checkpoints=5, train__log_every=2, train__num_workers=1), tmp_path / "run"
        )
    assert "is finished" in caplog.text


def test_folder_of_a_run_without_a_checkpoint_accepts_another_recipe(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, "train_step", 2)
        with pytest.raises(KeyboardInterrupt):
            train(tiny.recipe(folder), run)
    train(tiny.recipe(folder, train__steps=2), run)
    assert [row["step"] for row in rows(run) if "loss" in row] == [1, 2]


@pytest.mark.parametrize(
    ("task", "write", "options", "changes"),
    [
        ("instance", tiny.write_instances, {"empty": (0, 1, 2, 3)}, {"train__check_data": False}),
        ("instance", tiny.write_instances, {"empty": (0, 2)}, {"train__batch_size": 1}),
        ("instance", tiny.write_instances, {"crowd_only": (0, 1, 2)}, {"train__check_data": False}),
        ("panoptic", tiny.write_panoptic, {"crowds": (0, 1, 2, 3)}, {}),
        ("semantic", tiny.write_labels, {"ignored": (0, 1, 2, 3)}, {"train__check_data": False}),
        (
            "semantic",
            tiny.write_labels,
            {"ignored": (1, 2)},
            {"train__batch_size": 1, "train__gradient_accumulation_steps": 1},
        ),
        ("instance", tiny.write_instances, {}, {"train__augment": WHOLE_CROPS | {"scale_range": [5.0, 6.0]}}),
        ("panoptic", tiny.write_panoptic, {}, {"model__num_queries": 2}),
        ("panoptic", tiny.write_panoptic, {"size": (33, 17)}, {}),
    ],
    ids=[
        "no object anywhere",
        "some images without objects",
        "crowds alone in most images",
        "crowds beside objects",
        "all ignored",
        "some ignored",
        "objects lost in the crop",
        "more objects than queries",
        "odd sizes",
    ],
)
def test_unusual_images_train_with_finite_numbers(tmp_path, task, write, options, changes):
    folder = write(tmp_path / "data", **options)
    run = tmp_path / "run"
    train(tiny.recipe(folder, task, train__steps=4, **changes), run)
    steps = [row for row in rows(run) if "loss" in row]
    assert len(steps) == 4
    assert all(math.isfinite(value) for row in steps for value in row.values())
    assert all(tensor.isfinite().all() for tensor in last_weights(run).values())


def test_nonfinite_loss_ends_the_command_with_one_line_and_keeps_the_last_checkpoint(folder, tmp_path):
    run = tmp_path / "run"
    process = command(folder, run, train__learning_rate=1e10, train__max_grad_norm=None, train__checkpoint_every=1)
    _, complaints = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in complaints
    (line,) = [line for line in complaints.splitlines() if line.startswith("error:")]
    step = int(line.split("error: step ")[1].split(":")[0])
    assert "finite" in line
    assert "its last checkpoint is kept" in line
    assert sum(str(image_id) in line.split("for images")[1] for image_id in (10, 11, 12, 13)) == 2
    assert steps_kept(run)[-1] == step - 1
    tensors = safetensors.torch.load_file(run / f"checkpoints/{step - 1:08d}.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


@pytest.mark.parametrize(
    ("weight", "terms"),
    [("masked_decoder.class_head.bias", "class"), ("pixel_decoder.mask_projection.bias", "mask, dice")],
)
def test_nonfinite_weights_stop_the_run_and_name_the_terms(folder, tmp_path, monkeypatch, weight, terms):
    run = tmp_path / "run"
    recipe = tiny.recipe(folder)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "train_step", 4)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, run)
    path = run / "checkpoints/00000002.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    tensors[f"model.{weight}"].fill_(math.nan)
    metadata["checksum"] = checksum(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(TrainingError) as error:
        train(recipe, run)
    message = one_line(error)
    assert message.startswith("step 3: ")
    assert f"({terms})" in message
    assert steps_kept(run) == [2]


def test_nonfinite_class_loss_is_named_for_images_without_objects(tmp_path):
    folder = tiny.write_instances(tmp_path / "data", empty=(0, 1, 2, 3))
    with pytest.raises(TrainingError, match="loss is not finite \\(class of layer 0") as error:
        first_step(tiny.recipe(folder, "instance"), nan_weight="masked_decoder.class_head.bias")
    one_line(error)


def first_step(recipe, nan_weight=None, infinite_gradient=None):
    """Take one step on new weights; `first_step.changed` lists the weights that it changed."""
    engine = create_accelerator("fp32")
    torch.manual_seed(0)
    model = build_model(recipe.model, open_dataset(recipe, "train").categories)
    parameters = dict(model.named_parameters())
    if nan_weight:
        parameters[nan_weight].data.fill_(math.nan)
    if infinite_gradient:
        parameters[infinite_gradient].register_hook(lambda gradient: gradient * math.inf)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, recipe.train, fused=False)
    parts = next(iter(train_loader(recipe)))
    try:
        train_step(engine, model, optimizer, build_criterion(recipe.train), parts, recipe.train, 0)
    finally:
        first_step.changed = [
            k for k, v in model.state_dict().items() if not torch.equal(v.nan_to_num(), before[k].nan_to_num())
        ]


def test_nonfinite_gradient_stops_the_run_before_it_reaches_the_weights(folder):
    with pytest.raises(TrainingError, match="step 1: the gradient is not finite") as error:
        first_step(tiny.recipe(folder), infinite_gradient="masked_decoder.class_head.weight")
    assert "for images 1" in one_line(error)
    assert not first_step.changed


def test_bfloat16_trains_and_scores(folder, tmp_path):
    scores = train(tiny.recipe(folder, train__precision="bf16", train__steps=20), tmp_path / "run")
    history = losses(tmp_path / "run")
    assert history.isfinite().all()
    assert history[-4:].mean() < history[:4].mean()
    assert 0 <= scores["PQ"] <= 1
    assert {tensor.dtype for tensor in last_weights(tmp_path / "run").values()} == {torch.float32}


def test_float16_on_a_cpu_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("maskwright.runtime.device.default_device", lambda: torch.device("cpu"))
    with pytest.raises(MaskwrightError, match="fp16 needs an accelerator; use bf16 or fp32 on a CPU") as error:
        train(tiny.recipe(folder, train__precision="fp16"), tmp_path / "run")
    one_line(error)
    assert not (tmp_path / "run").exists()


def test_full_disk_ends_the_run_with_one_line_and_leaves_no_partial_file(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    recipe = tiny.recipe(folder)
    real, calls = safetensors.torch.save_file, []

    def save(tensors, path, *arguments):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", save)
        with pytest.raises(MaskwrightError, match=r"00000004\.safetensors: cannot be written: No space left") as error:
            train(recipe, run)
    one_line(error)
    assert steps_kept(run) == [2]
    assert not partial_files(run)
    train(recipe, run)
    train(recipe, tmp_path / "whole")
    assert_same_run(run, tmp_path / "whole")


def test_logged_learning_rates_are_warm_up_times_poly_decay(folder, tmp_path):
    changes = {"train__warmup_steps": 2, "train__warmup_factor": 0.1, "train__backbone_lr_multiplier": 0.5}
    train(tiny.recipe(folder, val=False, **changes), tmp_path / "run")
    expected = [1e-3 * warmup * (1 - step / 6) ** 0.9 for step, warmup in enumerate([0.1, 0.55, 1, 1, 1, 1])]
    assert [row["learning_rate"] for row in rows(tmp_path / "run")] == pytest.approx(expected, rel=1e-12)


def test_validation_split_of_other_classes_is_refused_before_the_first_step(folder, tmp_path):
    other = json.loads((folder / "panoptic.json").read_text())
    other["categories"][2]["name"] = "crate"
    (folder / "other.json").write_text(json.dumps(other))
    split = {"images": "images", "annotations": "other.json", "masks": "masks"}
    with pytest.raises(CheckpointError, match=r"label 2 is 'box', but in data\.val it is 'crate'") as error:
        train(tiny.recipe(folder, data__val=split), tmp_path / "run")
    one_line(error)
    assert not (tmp_path / "run").exists()


def test_best_model_is_that_of_the_best_evaluation(folder, tmp_path, monkeypatch):
    run, values = tmp_path / "run", iter([0.2, 0.6, 0.5])
    real = train_module.evaluate

    def evaluate(*arguments, **options):
        evaluation = real(*arguments, **options)
        evaluation.scores["PQ"] = next(values)
        return evaluation

    monkeypatch.setattr(train_module, "evaluate", evaluate)
    train(tiny.recipe(folder, train__evaluate_every=2), run)
    assert read_checkpoint(run / "best.safetensors").provenance["step"] == 4
    assert read_checkpoint(run / "last.safetensors").provenance["step"] == 6
    assert load_model(run / "best.safetensors").categories[2].name == "box"


def test_data_without_anything_to_score_still_gives_a_best_model(tmp_path):
    folder = tiny.write_instances(tmp_path / "data", empty=(0, 1, 2, 3))
    train(tiny.recipe(folder, "instance", train__steps=2, train__check_data=False), tmp_path / "run")
    assert (tmp_path / "run/best.safetensors").is_file()


def test_a_run_with_a_smaller_batch_than_its_recipe_advises_how_to_scale_the_learning_rate(tmp_path, caplog):
    """The schedule is logged in one line, and following the advice silences it."""
    values = tiny.values(tiny.write_labels(tmp_path / "data"), "semantic", train__steps=2, train__batch_size=4)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    caplog.set_level(logging.INFO, logger="maskwright")
    train(load_recipe(file, ["train.batch_size=1"]), tmp_path / "run")
    messages = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("1 images per step x 2 steps = ") and "epochs of " in line for line in messages)
    (advice,) = [line for line in messages if "was tuned for 4 images per step" in line]
    scaled, whole = advice.split("; or keep the batch size and accumulate gradients within the same memory: ")
    for proposal in (scaled.rpartition("as many images: ")[2], whole):
        assert learning_rate_advice(load_recipe(file, proposal.split()).train) is None
