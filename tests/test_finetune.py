"""A training that starts from a checkpoint keeps all that fits, and says what became of the rest."""

import json
import logging
import shutil

import pytest
import torch

import maskwright.training.train as train_module
from maskwright.checkpoints.backbone import resize_position_tables
from maskwright.checkpoints.checkpoint import Checkpoint, save_checkpoint
from maskwright.checkpoints.finetune import load_initial_weights
from maskwright.checkpoints.load import load_model, read_checkpoint
from maskwright.checkpoints.write_foreign import write_detectron2
from maskwright.config.recipe import Recipe, parse_recipe
from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.errors import CheckpointError, RecipeError
from maskwright.evaluation.evaluate import evaluate
from maskwright.models import build_model
from maskwright.structures.annotations import Category
from maskwright.training.train import train
from tests import tiny

SMALL = {"hidden_dim": 32, "pixel_decoder_layers": 1, "masked_decoder_layers": 2, "num_queries": 5}
SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_options": {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]},
    "window_size": 4,
}


def build(*names: str, seed: int = 0, **changes: object):
    torch.manual_seed(seed)
    config = ModelConfig(**({"backbone": "test_resnet"} | SMALL | changes))
    return build_model(config, tuple(Category(number, name, True, (0, 0, 0)) for number, name in enumerate(names)))


def save(path, model):
    evaluate = EvaluateConfig(task="semantic")
    save_checkpoint(path, Checkpoint(model.config, model.categories, evaluate, model.state_dict()))
    return str(path)


def start(model, source: str | None) -> list[str]:
    """As `train` does it."""
    values = tiny.values("anywhere", train__initial_weights=source)
    return load_initial_weights(model, parse_recipe(values, "test"))


def refuse(model, source: str) -> str:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        start(model, source)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("train.initial_weights: ")
    return message


def differing(model, other) -> set[str]:
    """Names of weights that are not equal."""
    ours, theirs = model.state_dict(), other.state_dict()
    return {key for key in ours if not torch.equal(ours[key], theirs[key])}


CLASS_HEAD = {"masked_decoder.class_head.weight", "masked_decoder.class_head.bias"}
QUERIES = {"masked_decoder.query_features.weight", "masked_decoder.query_positions.weight"}


def test_a_checkpoint_of_the_same_model_is_taken_whole(tmp_path):
    theirs, ours = build("sky", "tree", seed=1), build("Sky", "tree")
    source = save(tmp_path / "model.safetensors", theirs)
    assert start(ours, source) == [f"train.initial_weights: the model of {source}", "classes: all 2 kept"]
    assert not differing(ours, theirs)


def test_rows_of_classes_are_found_by_name_and_no_object_is_kept(tmp_path):
    theirs, ours = build("sky", "tree", "traffic_light", seed=1), build("car", "Traffic Light", "sky", "pole")
    fresh = build("car", "Traffic Light", "sky", "pole")
    _, line = start(ours, save(tmp_path / "model.safetensors", theirs))
    assert line == (
        "classes: 2 of 4 kept (Traffic Light, sky); 2 new and random (car, pole); "
        "1 of the checkpoint dropped (tree); 'no object' kept"
    )
    for name in ("weight", "bias"):
        found, old, new = (getattr(model.masked_decoder.class_head, name) for model in (ours, theirs, fresh))
        assert torch.equal(found[[1, 2, 4]], old[[2, 0, 3]])
        assert torch.equal(found[[0, 3]], new[[0, 3]])
    others = ours.state_dict().keys() - CLASS_HEAD
    assert all(torch.equal(ours.state_dict()[key], theirs.state_dict()[key]) for key in others)


def test_the_same_classes_in_another_order_are_put_in_order(tmp_path):
    theirs, ours = build("a", "b", "c", seed=1), build("c", "a", "b")
    _, line = start(ours, save(tmp_path / "model.safetensors", theirs))
    assert line == "classes: all 3 kept"
    assert torch.equal(ours.masked_decoder.class_head.bias, theirs.masked_decoder.class_head.bias[[2, 0, 1, 3]])


def test_only_no_object_is_kept_if_no_class_matches(tmp_path):
    theirs, ours = build("a", "b", seed=1), build("x")
    _, line = start(ours, save(tmp_path / "model.safetensors", theirs))
    assert line == ("classes: 0 of 1 kept; 1 new and random (x); 2 of the checkpoint dropped (a, b); 'no object' kept")
    assert torch.equal(ours.masked_decoder.class_head.bias[1], theirs.masked_decoder.class_head.bias[2])


@pytest.mark.parametrize(
    ("there", "here", "line"),
    [
        (5, 3, "queries: the first 3 of 5 kept"),
        (5, 8, "queries: all 5 kept; 3 new and random"),
    ],
)
def test_queries_are_cut_or_extended(tmp_path, there, here, line):
    theirs, ours, fresh = (
        build("a", seed=1, num_queries=there),
        build("a", num_queries=here),
        build("a", num_queries=here),
    )
    assert start(ours, save(tmp_path / "model.safetensors", theirs))[2:] == [line]
    for key in QUERIES:
        found = ours.state_dict()[key]
        assert torch.equal(found[: min(there, here)], theirs.state_dict()[key][:here])
        assert torch.equal(found[there:], fresh.state_dict()[key][there:])


@pytest.mark.parametrize("names", [("class 0", "class 1"), ("cat", "dog")])
def test_classes_of_a_checkpoint_without_names_are_used_in_order(tmp_path, names):
    theirs, ours = build(*names, seed=1, **SWIN), build("cat", "dog", **SWIN)
    save(tmp_path / "model.safetensors", theirs)
    write_detectron2(tmp_path / "model.pkl", read_checkpoint(tmp_path / "model.safetensors"))
    _, line = start(ours, str(tmp_path / "model.pkl"))
    assert line == "classes: all 2 kept, in the recipe's order, because the checkpoint does not name them"
    assert not differing(ours, theirs)
    _, line = start(build("cat", **SWIN), str(tmp_path / "model.pkl"))
    assert line.startswith("classes: 0 of 1 kept; 1 new and random (cat); 2 of the checkpoint dropped (class")


def test_a_semantic_fpn_has_its_classes_by_name_too(tmp_path):
    theirs = build("sky", "tree", seed=1, family="semantic_fpn")
    ours = build("tree", "car", "sky", family="semantic_fpn")
    _, line = start(ours, save(tmp_path / "model.safetensors", theirs))
    assert line == "classes: 2 of 3 kept (sky, tree); 1 new and random (car)"
    assert torch.equal(ours.decoder.classifier.weight[[2, 0]], theirs.decoder.classifier.weight)
    assert differing(ours, build("tree", "car", "sky", family="semantic_fpn")) >= {"decoder.levels.0.0.conv.weight"}


@pytest.mark.parametrize("family", ["semantic_fpn", "mask2former"])
def test_semantic_layers_have_their_classes_by_name_too(tmp_path, family):
    semask = SWIN | {"family": family, "semantic_attention": ["window", "window", "global", "global"]}
    theirs, ours = build("sky", "tree", seed=1, **semask), build("tree", "car", "sky", **semask)
    _, line = start(ours, save(tmp_path / "model.safetensors", theirs))
    assert line.startswith("classes: 2 of 3 kept (sky, tree); 1 new and random (car)")
    fresh = build("tree", "car", "sky", **semask)
    for old, new, layer in zip(*(model.backbone.semantic_layers for model in (theirs, fresh, ours)), strict=True):
        for name in ("query", "key"):
            found = getattr(layer, name).weight
            assert torch.equal(found[[2, 0]], getattr(old, name).weight)
            assert torch.equal(found[1], getattr(new, name).weight[1])
        assert torch.equal(layer.value.weight, old.value.weight)
    source = save(tmp_path / "plain.safetensors", build("sky", seed=1, **SWIN | {"family": family}))
    assert "the checkpoint has model.semantic_attention=None; set the same in the recipe" in refuse(ours, source)


def test_another_window_resizes_position_tables(tmp_path):
    theirs, ours = build("a", seed=1, **SWIN), build("a", **SWIN | {"window_size": 6})
    lines = start(ours, save(tmp_path / "model.safetensors", theirs))
    assert lines[2:] == ["relative position tables of 4 blocks resized bicubically from window 4 to 6"]
    state = theirs.state_dict()
    resize_position_tables(state, ours.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("there", "here", "line"),
    [
        ("sync", "frozen", "batch norms: trained in the checkpoint, frozen here, with its statistics"),
        ("frozen", "batch", "batch norms: frozen in the checkpoint, trained here, starting from its statistics"),
    ],
)
def test_frozen_and_trained_norms_initialize_each_other(tmp_path, there, here, line):
    theirs, ours = build("a", seed=1, backbone_norm=there), build("a", backbone_norm=here)
    assert start(ours, save(tmp_path / "model.safetensors", theirs))[2:] == [line]
    assert torch.equal(ours.backbone.network.bn1.running_mean, theirs.backbone.network.bn1.running_mean)
    assert torch.equal(ours.masked_decoder.norm.weight, theirs.masked_decoder.norm.weight)


def test_backbone_weights_are_not_looked_for_beside_a_checkpoint(tmp_path):
    theirs, ours = build("a", seed=1), build("a", backbone_weights="nowhere.pth")
    lines = start(ours, save(tmp_path / "model.safetensors", theirs))
    assert lines[2:] == ["model.backbone_weights=nowhere.pth is ignored: the checkpoint includes a backbone"]
    with pytest.raises(CheckpointError, match=r"model\.backbone_weights: no file nowhere\.pth"):
        start(ours, None)


def test_other_normalization_is_reported(tmp_path):
    theirs, ours = build("a", seed=1, pixel_std=(1, 1, 1)), build("a")
    (line,) = start(ours, save(tmp_path / "model.safetensors", theirs))[2:]
    assert line.startswith(
        "warning: the checkpoint was trained with pixel_std [1.0, 1.0, 1.0], model.pixel_std is [58."
    )


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ({"hidden_dim": 64}, "the checkpoint has model.hidden_dim=64, model.mask_dim=64; set the same in the recipe"),
        ({"num_heads": 4}, "the checkpoint has model.num_heads=4; "),
        (
            {"masked_decoder_layers": 3, "deformable_points": 2},
            "the checkpoint has model.deformable_points=2, model.masked_decoder_layers=3; ",
        ),
        ({"family": "semantic_fpn"}, "the checkpoint has model.family=semantic_fpn"),
        (
            {"backbone": "test_resnet", "backbone_options": {"layers": [2, 1, 1, 1]}},
            "backbone depths [2, 1, 1, 1] instead of",
        ),
        (SWIN, "missing: backbone.network.bn1.bias,"),
    ],
)
def test_anything_else_that_differs_is_refused(tmp_path, there, wanted):
    source = save(tmp_path / "model.safetensors", build("a", **there))
    assert wanted in refuse(build("a"), source)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("nothing.safetensors", "no checkpoint file nothing.safetensors"),
        ("mask2former-resnet50-coco-panoptc", "nearest published models: mask2former-resnet50-coco-panoptic"),
        ("mask2former-resnet50-coco-panoptic", "download https://dl.fbaipublicfiles.com/"),
    ],
)
def test_error_for_a_missing_source_is_one_line(source, wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("MASKWRIGHT_CACHE", str(tmp_path))
    assert wanted in refuse(build("a"), source)


# The whole command


def fine_tune(folder, **changes) -> Recipe:
    """The scenes with one class less and one that is never seen, in another order, from the model that knows them."""
    names = {20: "card", 7: "Grass", 3: "sky", 99: "zebra"}
    categories = [{"id": number, "name": name, "is_thing": number > 7} for number, name in names.items()]
    values = tiny.values(folder, "semantic", **({"train__initial_weights": str(tiny.trained_model())} | changes))
    values["data"] |= {"categories": categories, "label_map": {8: "ignore"}}
    values["model"]["num_queries"] = 10
    return parse_recipe(values, "fine-tune")


def test_accuracy_of_kept_classes_survives_step_0(tmp_path, quick_report, caplog):
    caplog.set_level(logging.INFO)
    labels = tiny.write_labels(tmp_path / "data")
    recipe = fine_tune(labels, train__steps=1, train__learning_rate=1e-9)  # which changes nothing
    train(recipe, tmp_path / "run")
    before = evaluate(load_model(tiny.trained_model()), tiny.recipe(labels, "semantic")).scores["per_class"]
    after = evaluate(load_model(tmp_path / "run" / "last.safetensors"), recipe).scores["per_class"]
    for name in ("card", "Grass", "sky"):
        assert after[name]["IoU"] > before[name.lower()]["IoU"] - 0.02 > 0.7
    lines = [
        f"train.initial_weights: the model of {tiny.trained_model()}",
        "classes: 3 of 4 kept (Grass, card, sky); 1 new and random (zebra); 1 of the checkpoint dropped (box); "
        "'no object' kept",
        "queries: all 8 kept; 2 new and random",
    ]
    assert caplog.messages[:3] == lines
    assert read_checkpoint(tmp_path / "run" / "last.safetensors").provenance["start"] == lines
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0]) == {"step": 0, "start": lines}
    assert "1 new and random (zebra)" in (tmp_path / "run" / "report.html").read_text()


def test_resumed_run_does_not_load_initial_weights_again(tmp_path, quick_report, monkeypatch):
    source = shutil.copy(tiny.trained_model(), tmp_path / "source.safetensors")
    labels = tiny.write_labels(tmp_path / "data")
    recipe = fine_tune(labels, train__steps=3, train__checkpoint_every=1, train__initial_weights=str(source))
    train(recipe, tmp_path / "whole")
    real, calls = train_module.train_step, []

    def stop_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(train_module, "train_step", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "parts")
    source.unlink()
    train(recipe, tmp_path / "parts")
    whole, parts = (read_checkpoint(tmp_path / run / "last.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(value, parts.state[key]) for key, value in whole.state.items())
    assert parts.provenance["start"] == whole.provenance["start"]
    assert len(parts.provenance["start"]) == 3
    starts = [row for row in (tmp_path / "parts" / "log.jsonl").read_text().splitlines() if "start" in row]
    assert len(starts) == 1
    assert train(recipe, tmp_path / "parts")["mIoU"] > 0


def test_a_run_that_starts_elsewhere_is_another_run(tmp_path, quick_report):
    labels = tiny.write_labels(tmp_path / "data")
    train(fine_tune(labels, train__steps=1), tmp_path / "run")
    with pytest.raises(
        RecipeError, match=r"holds a run with train\.initial_weights=.*, but now it is other\.safetensors"
    ):
        train(fine_tune(labels, train__steps=1, train__initial_weights="other.safetensors"), tmp_path / "run")
