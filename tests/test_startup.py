"""What a first prediction loads: nothing that only training, other formats or other backbones need."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from maskwright.checkpoints.checkpoint import Checkpoint, save_checkpoint
from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.models import build_model
from maskwright.runtime.device import constant_when_compiled
from maskwright.structures.annotations import Category

UNNEEDED = (
    "timm",
    "torchvision",
    "transformers",
    "matplotlib",
    "accelerate",
    "huggingface_hub",
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "scipy.optimize",
    "scipy.io",
    "maskwright.data.formats.dispatch",
    "maskwright.training.losses.criterion",
)
BY_PREDICTOR = "from maskwright import Predictor; Predictor('model.safetensors')('picture.png', task='panoptic')"
BY_COMMAND = (
    "from maskwright.cli import app; "
    "app(['predict', 'model.safetensors', 'picture.png', '--output', 'out'], result_action='return_value')"
)


@pytest.fixture(scope="module", params=["resnet50", "swin_tiny_patch4_window7_224"])
def place(request, tmp_path_factory):
    """A folder with a model and an image."""
    folder = tmp_path_factory.mktemp("startup")
    categories = (Category(0, "thing", True, (255, 0, 0)), Category(1, "stuff", False, (0, 0, 255)))
    config = ModelConfig(backbone=request.param, queries=5, width=32, heads=4, masked_decoder_layers=1)
    state = build_model(config, categories).state_dict()
    evaluate = EvaluateConfig(task="panoptic", short_side=64)
    save_checkpoint(
        folder / "model.safetensors", Checkpoint(state=state, config=config, categories=categories, evaluate=evaluate)
    )
    Image.new("RGB", (80, 64), (200, 100, 50)).save(folder / "picture.png")
    return folder


@pytest.mark.parametrize("code", [BY_PREDICTOR, BY_COMMAND], ids=["Predictor", "command"])
def test_a_first_prediction_loads_nothing_that_it_does_not_need(place, code):
    report = f"{code}\nimport sys\nprint('loaded:', *[name for name in {UNNEEDED!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", report], cwd=place, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.rpartition("loaded:")[2].split() == []


def test_the_compiler_is_told_of_constants_as_pytorch_tells_it():
    assert vars(constant_when_compiled(lambda: 0)) == vars(torch.compiler.assume_constant_result(lambda: 0))
