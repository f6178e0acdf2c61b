"""Training options: EMA, gradient checkpointing, layer decay, frozen stages, early stopping, logging and profiling."""

import json
import logging
import re

import pytest
import safetensors.torch
import torch
from torch import nn

import maskwright.training.memory_probe as memory_probe
import maskwright.training.train as train_module
from maskwright.checkpoints.load import load_model, read_checkpoint
from maskwright.config.recipe import parse_recipe
from maskwright.data.build import open_dataset
from maskwright.errors import MaskwrightError, RecipeError
from maskwright.models import build_model
from maskwright.models.blocks import backbone_depths, find_blocks, freeze_stages, recompute_blocks
from maskwright.training.ema import ExponentialMovingAverage
from maskwright.training.losses.matcher import HungarianMatcher
from maskwright.training.optimizer import build_optimizer
from maskwright.training.train import train
from tests import tiny
from tests.run_files import assert_same_run, history, last_weights, losses, rows

SWIN = {
    "model__backbone": "swin_tiny_patch4_window7_224",
    "model__backbone_options": {"depths": [1, 1, 2, 1], "embed_dim": 24, "num_heads": [1, 1, 2, 2]},
}
SHORT = {"val": False, "train__steps": 2, "train__checkpoint_every": 1}


pytestmark = pytest.mark.usefixtures("quick_report")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_panoptic(tmp_path_factory.mktemp("data"))


def model_of(folder, **changes):
    recipe = tiny.recipe(folder, **changes)
    torch.manual_seed(0)
    return build_model(recipe.model, open_dataset(recipe, "train").categories), recipe


def test_averaged_weights_are_scored_and_exported(folder, tmp_path):
    train(
        tiny.recipe(folder, train__steps=3, train__ema_decay=0.3, train__keep_checkpoints=3, train__checkpoint_every=1),
        tmp_path,
    )
    saved = [safetensors.torch.load_file(path) for path in sorted((tmp_path / "checkpoints").iterdir())]
    name = "masked_decoder.class_head.weight"
    weights = [state[f"model.{name}"] for state in saved]
    kept = load_model(tmp_path / "best.safetensors")
    assert read_checkpoint(tmp_path / "best.safetensors").provenance["weights"] == "moving average"
    torch.testing.assert_close(kept.state_dict()[name], saved[-1][f"average.{name}"], rtol=0, atol=0)
    expected = saved[0][f"average.{name}"]
    for step, now in ((2, weights[1]), (3, weights[2])):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * now
    torch.testing.assert_close(saved[-1][f"average.{name}"], expected)
    assert not torch.equal(expected, weights[-1])


def test_average_copies_batch_norm_statistics_and_counters():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = ExponentialMovingAverage(model, 0.5)
    model(torch.ones(3, 2))
    average.update(model, 100)
    assert torch.equal(average.tensors["1.running_mean"], model[1].running_mean)
    assert average.tensors["1.num_batches_tracked"] == 1


@pytest.mark.parametrize(
    "changes",
    [{"model__backbone_norm": "batch", "model__drop_path_rate": 0.5}, SWIN | {"model__drop_path_rate": 0.5}],
    ids=["batch norms", "Swin"],
)
def test_recomputed_blocks_give_the_same_bits(folder, tmp_path, changes):
    for name, on in (("kept", False), ("recomputed", True)):
        train(tiny.recipe(folder, train__gradient_checkpointing=on, **SHORT, **changes), tmp_path / name)
    assert_same_run(tmp_path / "kept", tmp_path / "recomputed")


def test_recomputed_blocks_store_less_for_the_backward_pass(folder):
    model, _ = model_of(folder, **SWIN)
    images = torch.zeros(1, 3, 64, 64)

    def stored():
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t)
        with hooks:
            model(images, intermediate=True)
        return sum(sizes)

    before = stored()
    assert recompute_blocks(model) == 5 + 1 + 2
    assert stored() < 0.6 * before


def test_blocks_are_found_in_all_kinds_of_backbones(folder):
    for backbone, count in (("test_resnet", 4), ("resnet18", 8), ("test_convnext", 9)):
        model, _ = model_of(folder, model__backbone=backbone)
        assert len(find_blocks(model.backbone)) == count, backbone


def test_layer_decay_lowers_learning_rates_towards_the_input(folder):
    model, recipe = model_of(folder, train__layer_decay=0.5, train__backbone_lr_multiplier=0.1, **SWIN)
    optimizer = build_optimizer(model, recipe.train, fused=False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    last = recipe.train.learning_rate * 0.1
    assert rates["backbone.stages.3.blocks.0.norm1.weight"] == pytest.approx(last)
    assert rates["backbone.norms.0.weight"] == pytest.approx(last)
    assert rates["backbone.stages.2.blocks.1.mlp.fc1.weight"] == pytest.approx(last / 2)
    assert rates["backbone.stages.2.blocks.0.mlp.fc1.weight"] == pytest.approx(last / 4)
    assert rates["backbone.patch_embed.proj.weight"] == pytest.approx(last / 32)
    assert rates["masked_decoder.class_head.weight"] == pytest.approx(recipe.train.learning_rate)
    assert set(backbone_depths(model)) == {name for name in names.values() if name.startswith("backbone.")}


@pytest.mark.parametrize(
    ("changes", "frozen", "trained"),
    [
        (
            {"model__backbone_norm": "batch"},
            r"backbone\.network\.(conv1|bn1|layer1|layer2)",
            r"backbone\.network\.layer3",
        ),
        (SWIN, r"backbone\.(patch_embed|stages\.[01])\.", r"backbone\.stages\.2\."),
        (
            {"model__backbone": "tf_efficientnet_lite0", "model__backbone_norm": "batch"},
            r"backbone\.network\.(conv_stem|bn1|blocks\.[012])\.",
            r"backbone\.network\.blocks\.3\.",
        ),
    ],
    ids=["ResNet", "Swin", "EfficientNet"],
)
def test_frozen_stages_keep_their_weights_and_statistics(folder, tmp_path, changes, frozen, trained):
    model, _ = model_of(folder, **changes)
    before = model.state_dict()
    train(tiny.recipe(folder, train__frozen_stages=2, **SHORT, **changes), tmp_path)
    after = last_weights(tmp_path)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert not [key for key in changed if re.match(frozen, key)]
    assert [key for key in changed if re.match(trained, key)]
    saved = safetensors.torch.load_file(tmp_path / "checkpoints/00000002.safetensors")
    assert not [key for key in saved if re.match(r"optimizer\." + frozen, key)]


def test_frozen_norms_stay_frozen_when_the_model_is_set_to_training_mode(folder):
    model, _ = model_of(folder, model__backbone_norm="batch")
    freeze_stages(model, 1)
    model.eval().train()
    assert not model.backbone.network.bn1.training
    assert model.pixel_decoder.training


def set_scores(monkeypatch, values, name="PQ"):
    real, given = train_module.evaluate, iter(values)

    def evaluate(*arguments, **options):
        evaluation = real(*arguments, **options)
        evaluation.scores[name] = next(given)
        return evaluation

    monkeypatch.setattr(train_module, "evaluate", evaluate)


def test_run_stops_early_without_improvement_and_is_then_finished(folder, tmp_path, monkeypatch, caplog):
    set_scores(monkeypatch, [0.2, 0.5, 0.4, 0.5])
    recipe = tiny.recipe(
        folder, train__steps=9, train__evaluate_every=1, train__early_stopping_patience=2, train__ema_decay=0.5
    )
    with caplog.at_level(logging.INFO):
        train(recipe, tmp_path)
        assert "stopped early at step 4: the score has not improved in 2 evaluations" in caplog.text
        assert train(recipe, tmp_path)["PQ"] == 0.5
    assert f"{tmp_path} is finished: 4 of 9 steps" in caplog.text
    assert read_checkpoint(tmp_path / "best.safetensors").provenance["step"] == 2


def test_best_metric_selects_the_best_model(folder, tmp_path, monkeypatch, caplog):
    set_scores(monkeypatch, [0.6, 0.2], "SQ")
    recipe = tiny.recipe(
        folder, train__steps=2, train__evaluate_every=1, train__best_metric="SQ", evaluate__max_images=2
    )
    with caplog.at_level(logging.INFO):
        train(recipe, tmp_path)
    assert read_checkpoint(tmp_path / "best.safetensors").provenance["step"] == 1
    assert "step 1  SQ 0.6000  (best so far)" in caplog.text
    assert [row["evaluation"]["images"] for row in rows(tmp_path) if "evaluation" in row] == [2, 2]


def test_unknown_best_metric_is_refused_before_the_first_step(folder, tmp_path):
    with pytest.raises(
        RecipeError, match=r"train.best_metric is 'mAP', but evaluate\.metrics gives the scores PQ, SQ, RQ"
    ):
        train(tiny.recipe(folder, train__best_metric="mAP"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("probe", [True, False])
def test_images_too_small_for_batch_normalization_are_named(folder, tmp_path, probe):
    small = {"resize": "short_side", "scale_range": [0.5, 0.5], "crop_size": [32, 32]}
    options = {"train__steps": 1, "train__batch_size": 1, "train__augment": small, "model__backbone_norm": "batch"}
    options["train__probe_memory"] = probe
    with pytest.raises(MaskwrightError, match="batch normalization needs more than one value"):
        train(tiny.recipe(folder, **options), tmp_path / "run")
    frozen = tiny.recipe(folder, **options | {"model__backbone_norm": "frozen"})
    train(frozen, tmp_path / "frozen")


def test_memory_probe_is_logged_and_changes_nothing(folder, tmp_path, caplog):
    changes = SHORT | {"model__backbone_norm": "batch", "model__drop_path_rate": 0.5}
    with caplog.at_level(logging.INFO):
        train(tiny.recipe(folder, train__probe_memory=True, **changes), tmp_path / "with")
    pattern = (
        r"memory probe: 2 images, forward and backward: \d+\.\d\d s, peak \d+\.\d GB; with 0\.0 GB of optimizer "
        r"state about \d+\.\d of \d+\.\d GB\. 2 steps: about 0 min \d\d s, without data loading"
    )
    assert re.search(pattern, caplog.text)
    train(tiny.recipe(folder, train__probe_memory=False, **changes), tmp_path / "without")
    assert_same_run(tmp_path / "with", tmp_path / "without")


def test_step_is_split_into_as_few_micro_batches_as_fit_into_memory(folder, tmp_path, monkeypatch, caplog):
    real = memory_probe.backward_micro_batch

    def backward_micro_batch(engine, model, criterion, batch, *arguments):
        if len(batch.images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(engine, model, criterion, batch, *arguments)

    monkeypatch.setattr(memory_probe, "backward_micro_batch", backward_micro_batch)
    changes = SHORT | {
        "train__batch_size": 4,
        "train__augment": {"resize": "large_scale_jitter", "scale_range": [1.0, 1.0]},
    }
    changes["train__augment"]["crop"] = [64, 64]
    with caplog.at_level(logging.INFO):
        train(tiny.recipe(folder, train__auto_gradient_accumulation=True, **changes), tmp_path / "found")
    assert "4 images at once do not fit into memory" in caplog.text
    assert "4 images per step (4 micro-batches x 1) x 2 steps" in caplog.text
    monkeypatch.undo()
    train(tiny.recipe(folder, **changes), tmp_path / "whole")
    torch.testing.assert_close(losses(tmp_path / "found"), losses(tmp_path / "whole"), rtol=1e-5, atol=1e-5)


def test_image_that_does_not_fit_into_memory_is_an_error(folder, tmp_path, monkeypatch):
    def backward_micro_batch(*arguments):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(memory_probe, "backward_micro_batch", backward_micro_batch)
    with pytest.raises(MaskwrightError, match="a single image does not fit into memory; lower"):
        train(tiny.recipe(folder, train__auto_gradient_accumulation=True, **SHORT), tmp_path / "run")


def test_auto_gradient_accumulation_and_fsdp_exclude_each_other(folder):
    with pytest.raises(RecipeError, match="auto_gradient_accumulation cannot be combined with fsdp"):
        parse_recipe(tiny.values(folder, train__auto_gradient_accumulation=True, train__fsdp=True), "tiny")


def test_deterministic_run_gives_the_same_numbers(folder, tmp_path):
    train(tiny.recipe(folder, **SHORT), tmp_path / "plain")
    try:
        train(tiny.recipe(folder, train__deterministic=True, **SHORT), tmp_path / "deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert history(tmp_path / "plain") == history(tmp_path / "deterministic")


def test_profile_is_a_trace_of_three_steps_with_their_phases(folder, tmp_path):
    train(tiny.recipe(folder, val=False, train__steps=6), tmp_path, profile=True)
    trace = json.loads((tmp_path / "profile-rank-0.json").read_text())
    spans = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    assert all({"name", "ts", "dur", "pid", "tid"} <= event.keys() for event in spans)
    names = [event["name"] for event in spans if event.get("cat") == "user_annotation"]
    for phase in ("forward", "criterion", "backward", "optimizer"):
        assert names.count(phase) == 3


def test_tracker_that_is_not_installed_is_refused_with_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MaskwrightError, match=r"train\.trackers: wandb is listed, but the package 'wandb' is not installed; run pip"
    ):
        train(tiny.recipe(folder, train__trackers=["wandb"]), tmp_path / "run")
    with pytest.raises(RecipeError, match="trackers"):
        parse_recipe(tiny.values(folder, train__trackers=["wandbb"]), "tiny")


def test_trackers_receive_the_values_of_the_log(folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny.recipe(folder, train__steps=2, train__log_every=1), tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    steps = [row for row in rows(tmp_path) if "loss" in row]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([row["loss"] for row in steps])
    assert [event.step for event in events.Scalars("evaluation/PQ")] == [2]


def test_progress_lines_show_losses_speed_and_memory(folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(tiny.recipe(folder, **SHORT), tmp_path)
    (line,) = [message for message in caplog.messages if message.startswith("step 1/2")]
    assert re.fullmatch(
        r"step 1/2  loss \d+\.\d\d \(class \S+ mask \S+ dice \S+\)  lr 1\.00e-03  \d+\.\d\d images/s  data "
        r"wait \d+%  \d+\.\d GB  \d+ min \d\d s left",
        line,
    )
    assert all(0 < row["data_wait"] <= 1 for row in rows(tmp_path))


def test_progressive_resizing_shrinks_samples_and_points_also_after_a_resume(folder, tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(HungarianMatcher, "__call__", recording_points(HungarianMatcher.__call__, counts))
    changes = {"val": False, "train__steps": 4, "train__checkpoint_every": 1}
    changes |= {"train__progressive_resizing": [{"until": 0.5, "size": 0.5}], "train__probe_memory": True}
    recipe = tiny.recipe(folder, **changes)
    train(recipe, tmp_path / "whole")
    points = recipe.train.num_points
    assert counts == [points] + [round(points / 4)] * 2 + [points] * 2  # the memory probe uses full-size samples
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "save_progress", interrupted_after(train_module.save_progress, 3))
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "parts")
    train(recipe, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def recording_points(match, counts):
    def wrapped(matcher, *inputs):
        counts.append(matcher.num_points)
        return match(matcher, *inputs)

    return wrapped


def interrupted_after(save, step):
    def save_and_interrupt(session):
        save(session)
        if session.progress.step == step:
            raise KeyboardInterrupt

    return save_and_interrupt
