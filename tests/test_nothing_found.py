"""Hints where nothing is seen: by prediction over a run, and by training whose scores stay at zero."""

import logging
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.checkpoints.checkpoint import make_checkpoint, save_checkpoint
from maskwright.cli import main
from maskwright.config.schema import EvaluateConfig
from maskwright.data.build import open_dataset
from maskwright.inference.mask_upsampling import CropPrediction
from maskwright.inference.nothing_found import NothingFound
from maskwright.inference.predictor import Predictor
from maskwright.inference.segment import segment
from maskwright.models import build_model
from maskwright.structures.annotations import Category
from maskwright.structures.predictions import MaskPrediction
from maskwright.training.train import train
from tests import tiny

CATEGORIES = tuple(Category(number, name, True, (0, 0, 0)) for number, name in enumerate(("cat", "dog")))
SIZE = (32, 32)


def hint(task, probabilities, *, masks=None, images=1, **thresholds):
    """The hint for images with queries of these class probabilities (Q, 3) and mask logits (Q, 8, 8)."""
    probabilities = torch.tensor(probabilities)
    masks = torch.full((len(probabilities), 8, 8), 9.0) if masks is None else masks
    parts = (probabilities.log()[None], torch.eye(len(masks))[None], masks[None])
    config, crop = EvaluateConfig(task=task, **thresholds), CropPrediction(MaskPrediction(*parts), SIZE, SIZE)
    found = NothingFound(config)
    for _ in range(images):
        found.add(segment([crop], task, output_size=SIZE, categories=CATEGORIES, config=config), [crop])
    return found.hint(task)


def test_a_panoptic_class_score_below_the_threshold_is_named_with_a_value_that_passes():
    assert hint("panoptic", [[0.1, 0.57, 0.33], [0.3, 0.1, 0.6]], images=3) == (
        "no segment in any of 3 images: the best score is 0.570 ('dog'), not above object_threshold 0.8; "
        "try --object-threshold 0.5"
    )
    assert hint("panoptic", [[0.1, 0.57, 0.33]], object_threshold=0.5, overlap_threshold=0.0) is None


def test_the_suggested_threshold_is_below_the_score():
    for score in (0.4, 0.45, 0.38, 0.91, 0.6001):
        rest = (1 - score) / 2
        text = hint("panoptic", [[score, rest, rest]], object_threshold=0.95)
        assert float(text.rpartition(" ")[2]) < score


def test_queries_that_all_prefer_no_object_are_not_helped_by_a_threshold():
    text = hint("panoptic", [[0.1, 0.2, 0.7], [0.3, 0.1, 0.6]])
    assert text.startswith("no segment: every query says 'no object', and the best score is 0.300 ('cat')")
    assert "no threshold helps" in text


def test_hidden_masks_name_the_overlap_threshold():
    masks = torch.full((2, 8, 8), -9.0)
    masks[0, :, :5], masks[1, :, 3:] = 9.0, 9.1
    text = hint("panoptic", [[0.9, 0.05, 0.05], [0.9, 0.05, 0.05]], masks=masks, overlap_threshold=1.0)
    assert text.endswith("more than its overlap_threshold 1 allows; try --overlap-threshold 0.4")


def test_instances_below_the_score_threshold_are_named_with_their_own_score():
    masks = torch.full((1, 8, 8), 0.5)  # the score is the class probability times the mean mask probability
    expected = 0.6 * torch.tensor(0.5).sigmoid().item()
    text = hint("instance", [[0.6, 0.2, 0.2]], masks=masks, score_threshold=0.5)
    assert text == (
        f"no segment: the best score is {expected:.3f} ('cat'), below score_threshold 0.5; try --score-threshold 0.3"
    )
    assert hint("instance", [[0.6, 0.2, 0.2]], masks=masks, score_threshold=0.3) is None


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A model with random weights, whose class scores are about one fifth."""
    folder = tmp_path_factory.mktemp("model")
    recipe = tiny.recipe(tiny.write_panoptic(folder / "data", count=1))
    torch.manual_seed(0)
    model = build_model(recipe.model, open_dataset(recipe, "train").categories)
    with torch.no_grad():
        model.masked_decoder.class_head.weight.mul_(0.01)
        model.masked_decoder.class_head.bias.copy_(torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0]))
    save_checkpoint(folder / "model.safetensors", make_checkpoint(model, recipe, {}))
    return folder / "model.safetensors"


def test_the_command_gives_one_hint_for_all_images_and_its_advice_works(untrained, tmp_path, monkeypatch, caplog):
    for number in range(3):
        Image.fromarray(tiny.scene_image(number)).save(tmp_path / f"{number}.png")

    def run(*options):
        caplog.clear()
        output = str(tmp_path / f"out{len(options)}")
        command = ["maskwright", "predict", str(untrained), str(tmp_path), "--output", output, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(SystemExit, match="0"):
            main()
        return [message for message in caplog.messages if "no segment" in message]

    (message,) = run()
    assert message.startswith("no segment in any of 3 images: the best score is 0.6")
    assert message.endswith("('box'), not above object_threshold 0.8; try --object-threshold 0.6")
    assert run("--object-threshold", "0.6", "--overlap-threshold", "0") == []


def test_a_predictor_warns_once(untrained, caplog):
    predictor = Predictor(untrained, device="cpu")
    for _ in range(2):
        predictor(np.zeros((40, 40, 3), dtype=np.uint8))
    assert len([message for message in caplog.messages if message.startswith("no segment: ")]) == 1
    Predictor(untrained, device="cpu")(np.zeros((40, 40, 3), dtype=np.uint8), task="semantic")
    assert len(caplog.messages) == 1


# Training


def zero_warnings(folder, run, caplog, task="panoptic", **changes):
    changes = {"train__steps": 3, "train__evaluate_every": 1, "train__learning_rate": 1e-6} | changes
    caplog.set_level(logging.WARNING)
    caplog.clear()
    train(tiny.recipe(folder, task, **changes), run)
    return [message for message in caplog.messages if "is still 0 after two evaluations" in message]


def test_the_second_evaluation_of_zero_names_what_can_be_checked(tmp_path, caplog, quick_report):
    folder = tiny.write_panoptic(tmp_path / "data")
    changes = {"train__warmup_steps": 3, "train__base_batch_size": 16}
    (message,) = zero_warnings(folder, tmp_path / "run", caplog, **changes)
    assert message.startswith("step 2: PQ is still 0 after two evaluations: no segment in any of 4 images: ")
    assert "train.batch_size is 2, but the learning rate 1e-06 was tuned for 16 images per step" in message
    assert "the learning rate is still growing (step 2 of train.warmup_steps=3)" in message
    assert "the weights started at random and have seen 1.0 epochs" in message


def test_samples_without_objects_and_classes_of_one_split_only_are_named(tmp_path, caplog, quick_report):
    empty = tiny.write_instances(tmp_path / "empty", empty=(0, 1, 2, 3))
    full = tiny.write_instances(tmp_path / "full")
    (full / "empty.json").write_text((empty / "instances.json").read_text())
    split = {"images": "images", "annotations": "empty.json"}
    options = {"train__check_data": False, "data__train": split}
    (message,) = zero_warnings(full, tmp_path / "one", caplog, "instance", **options)
    assert "no training sample that was looked at has an object" in message
    document = (full / "instances.json").read_text()
    (full / "boxes.json").write_text(document.replace('"category_id": 20', '"category_id": 8'))
    (full / "cards.json").write_text(document.replace('"category_id": 8', '"category_id": 20'))
    files = {"data__train": split | {"annotations": "boxes.json"}, "data__val": split | {"annotations": "cards.json"}}
    (message,) = zero_warnings(full, tmp_path / "two", caplog, "instance", train__check_data=False, **files)
    assert "the training samples have only box, the validation images only card" in message
