"""The list of models by size: costs, licenses, and recipes that can be pasted."""

import json
import shlex

import pytest

from maskwright.checkpoints import model_sizes
from maskwright.config.recipe import load_recipe
from tests.in_process import run_command


@pytest.fixture
def say(monkeypatch, capsys):
    return lambda *arguments: run_command(monkeypatch, capsys, *arguments)


def test_a_model_has_two_lines_the_second_of_which_is_a_recipe_to_train(say):
    status, out, _ = say("recipes", "lite0", "--models")
    assert status == 0
    head, costs, recipe = out.splitlines()
    assert head.split() == ["parameters", "GFLOP", "license", "of", "the", "weights"]
    assert costs.split()[-5:] == ["decoders", "5.5", "M", "27", "Apache-2.0"]
    name, *overrides = shlex.split(recipe)
    assert load_recipe(name, overrides).model.backbone == "tf_efficientnet_lite0"


def test_operations_are_two_for_each_multiplication_of_the_matrices():
    """A ViT-S of 12 blocks: four matrices of 384x384 and two of 384x1536 for each of 1,605 tokens, and attention."""
    size = model_sizes.model_size("EoMT, DINOv3 ViT-S")
    tokens, width, blocks = 1600 + 5, 384, 12
    products = blocks * (12 * width * width * tokens + 2 * width * tokens * tokens)
    assert 2 * products / 1e9 < size.gflops < 1.6 * 2 * products / 1e9  # queries, upscaling and heads
    assert size.license == "DINOv3 License"
    assert size.parameters == pytest.approx(23, abs=1)


def test_every_model_is_a_recipe_whose_weights_have_a_known_license():
    for name in model_sizes.model_names():
        recipe, keys = model_sizes._MODELS[name]
        assert model_sizes._license(load_recipe(recipe, keys)) != "not stated", name


def test_unknown_models_are_refused_and_json_has_all_fields(say):
    status, _, error = say("recipes", "resnet-17", "--models")
    assert status == 1
    assert "no model has 'resnet-17' in its name" in error
    assert say("recipes", "--measure")[0] == 1
    _, out, _ = say("recipes", "mobilenet", "--models", "--json")
    (model,) = json.loads(out)
    assert model["seconds"] is None
    assert 3 < model["parameters"] < 4


@pytest.mark.slow
def test_a_measured_model_has_time_and_memory():
    size = model_sizes.model_size("MobileNetV3-S, small decoders", measured=True)
    assert size.seconds > 0
    assert size.memory > 0.1
    assert " s " in model_sizes.table([size])
