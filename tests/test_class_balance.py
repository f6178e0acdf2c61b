"""Rare classes: weights in losses and matching, and images that are drawn more often."""

import itertools
import logging
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

import maskwright.training.train as train_module
from maskwright.cli import main
from maskwright.config.recipe import load_recipe
from maskwright.data import class_frequencies
from maskwright.data.build import open_dataset, train_loader
from maskwright.data.class_frequencies import ClassFrequencies, count_classes
from maskwright.data.loader import TrainingSampler, epoch_length
from maskwright.errors import DatasetError, RecipeError
from maskwright.structures.annotations import Target
from maskwright.structures.predictions import MaskPrediction, ModelOutput, PixelPrediction
from maskwright.training.class_balance import balanced_weights
from maskwright.training.losses.criterion import Criterion, count_normalizers
from maskwright.training.losses.matcher import HungarianMatcher
from maskwright.training.losses.point_sampling import RandomPoints
from maskwright.training.train import train
from tests import tiny
from tests.run_files import assert_same_run

WEIGHTS = (0.5, 1.0, 4.0)


def target(labels, height=16, width=24):
    """One object per label, side by side."""
    ids = np.repeat(np.arange(1, len(labels) + 1), -(-width // max(len(labels), 1)))[:width]
    maps = torch.from_numpy(np.tile(ids, (1, height, 1)).astype(np.int32).reshape(1, height, -1))
    maps = maps if labels else torch.zeros(1, height, width, dtype=torch.int32)
    crowd = torch.zeros(len(labels), dtype=torch.bool)
    return Target(maps, torch.tensor(labels, dtype=torch.int64), crowd, 1, (height, width))


def masks_output(queries=5, images=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [(images, queries, len(WEIGHTS) + 1), (images, queries, 8), (images, 8, 4, 6)]
    return ModelOutput(MaskPrediction(*(torch.randn(*shape, generator=generator) for shape in parts)))


def points(images=1):
    return RandomPoints(0, 0, [(0, index) for index in range(images)], "cpu")


# Losses


def test_the_class_loss_is_pytorchs_cross_entropy_with_these_weights():
    output, truth = masks_output(), target([2, 0])
    criterion = Criterion(num_points=50, class_weights=WEIGHTS, no_object_weight=0.1)
    ((queries, objects),) = criterion.matcher([output.final], [truth], points())[0]
    labels = torch.full((5,), 3)
    labels[queries] = truth.labels[objects]
    expected = F.cross_entropy(output.final.class_logits[0], labels, torch.tensor([*WEIGHTS, 0.1]))
    torch.testing.assert_close(criterion(output, [truth], points())["class"], expected[None])


def test_a_weight_multiplies_the_class_term_of_its_objects_in_the_matching_cost():
    output, truth, locations = masks_output(), target([2, 0, 1]), torch.rand(1, 50, 2)
    plain, weighted = (
        HungarianMatcher(2.0, 5.0, 5.0, 50, weights).cost([output.final], 0, truth, locations)
        for weights in (None, WEIGHTS)
    )
    probabilities = output.final.class_logits[0].softmax(-1)[:, truth.labels]
    extra = 2.0 * (torch.tensor(WEIGHTS)[truth.labels] - 1) * probabilities
    torch.testing.assert_close(weighted[0], plain[0] - extra)


@pytest.mark.parametrize(("weights", "winner"), [((4.0, 1.0, 1.0), 0), ((1.0, 1.0, 4.0), 1)])
def test_the_object_of_the_heavier_class_gets_the_query_that_fits_both_best(weights, winner):
    logits = torch.tensor([[[3.0, -9.0, 3.0, -9.0], [0.0, -9.0, 0.0, 0.0]]])
    output = ModelOutput(MaskPrediction(logits, torch.zeros(1, 2, 8), torch.zeros(1, 8, 4, 6)))
    criterion = Criterion(num_points=50, class_weights=weights)
    ((queries, objects),) = criterion.matcher([output.final], [target([0, 2])], points())[0]
    assert objects[queries == 0].tolist() == [winner]


def test_weights_of_one_change_no_bit():
    output, truths = masks_output(images=2), [target([2, 0]), target([])]
    plain, ones = (Criterion(num_points=50, class_weights=w)(output, truths, points(2)) for w in (None, (1.0,) * 3))
    assert all(torch.equal(plain[term], ones[term]) for term in plain)


def test_micro_batches_with_weights_add_up_to_the_whole_batch():
    output, truths = masks_output(queries=2, images=2), [target([2, 0]), target([1])]
    criterion = Criterion(num_points=50, class_weights=WEIGHTS)
    whole = criterion(output, truths, points(2))["class"]
    normalizers = count_normalizers(truths, 2, criterion.no_object_weight, WEIGHTS)
    halves = [
        criterion(ModelOutput(MaskPrediction(*(part[i : i + 1] for part in tensors))), [truth], one, normalizers)
        for i, (truth, one, tensors) in enumerate(
            (truth, RandomPoints(0, 0, [(0, i)], "cpu"), _tensors(output.final)) for i, truth in enumerate(truths)
        )
    ]
    torch.testing.assert_close(whole, halves[0]["class"] + halves[1]["class"])


def _tensors(prediction):
    return prediction.class_logits, prediction.mask_embeddings, prediction.mask_features


def test_normalizer_counts_the_weights_of_matched_objects():
    assert count_normalizers([target([2, 0]), target([])], 3, 0.1, WEIGHTS).class_weights == pytest.approx(4.5 + 0.4)
    more_than_queries = count_normalizers([target([2, 0, 0, 0])], 2, 0.1, WEIGHTS)
    assert more_than_queries.class_weights == pytest.approx(2 * (4.0 + 1.5) / 4)


def test_pixels_are_weighted_by_their_class():
    logits, truth = torch.randn(1, 3, 4, 6), target([2, 0])
    (loss,) = Criterion(class_weights=WEIGHTS)(ModelOutput(PixelPrediction(logits)), [truth], points())["pixel"]
    resized = F.interpolate(logits, size=(16, 24), mode="bilinear", align_corners=False)
    entropies = F.cross_entropy(resized, truth.label_map()[None], reduction="none")
    torch.testing.assert_close(loss, (entropies * torch.tensor(WEIGHTS)[truth.label_map()]).mean())


# Counts


def test_balanced_weights_are_inverse_to_the_counts_with_mean_one_and_bounded():
    counts = np.array([60, 30, 10, 0])
    weights = balanced_weights(counts)
    np.testing.assert_allclose(weights, [100 / 180, 100 / 90, 100 / 30, 1.0])
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(balanced_weights(np.array([1, 10**6])), [10.0, 0.5], rtol=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_classes_are_counted_without_crowds_in_any_number_of_processes(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(class_frequencies, "_IMAGES_PER_PROCESS", 4 // workers)
    monkeypatch.setattr(class_frequencies, "available_cores", lambda: workers)
    folder = tiny.write_panoptic(tmp_path, crowds=(1,))
    found = count_classes(open_dataset(tiny.recipe(folder), "train"))
    ids, categories = zip(*(tiny.scene(number) for number in range(4)), strict=True)
    expected = Counter(c for number, image in enumerate(categories) for c in image[: len(image) - (number == 1)])
    assert found.objects.tolist() == [expected[category["id"]] for category in tiny.CATEGORIES]
    pixels = sum((ids[i] == 1 + categories[i].index(7)).sum() for i in range(4))
    assert found.pixels[1] == pixels
    assert found.images.tolist()[:2] == [4, 4]


def test_repeat_factors_are_those_of_the_paper():
    labels = [np.array([0]), np.array([0, 1]), np.array([0]), np.array([], dtype=int)]
    found = ClassFrequencies(np.array([3, 1, 0]), np.zeros(3), labels)
    np.testing.assert_allclose(found.class_repeat_factors(0.5), [1.0, 2**0.5, 1.0])
    np.testing.assert_allclose(found.repeat_factors(0.5), [1.0, 2**0.5, 1.0, 1.0])


# Sampling

FACTORS = np.array([1.0, 1.0, 2.5, 1.0, 1.3, 1.0, 3.7])


def requests(count, **options):
    return list(itertools.islice(TrainingSampler(len(FACTORS), 4, 3, repeat_factors=FACTORS, **options), count))


def test_each_image_is_drawn_as_often_as_its_factor_says():
    length = epoch_length(FACTORS)
    assert length == 12
    flat = [request for batch in requests(3 * 500) for request in batch]
    drawn = Counter(request.index % 7 for request in flat)
    np.testing.assert_allclose([drawn[i] / 500 for i in range(7)], FACTORS * length / FACTORS.sum(), atol=0.06)
    for epoch in range(500):
        indices = [request.index for request in flat if request.epoch == epoch][:length] if epoch < 20 else []
        assert len(set(indices)) == len(indices)  # every repetition has a number of its own
        counts = Counter(index % 7 for index in indices)
        assert all(int(FACTORS[i]) <= counts[i] <= int(FACTORS[i]) + 2 for i in counts)


def test_repeated_images_restart_anywhere_and_are_split_over_processes():
    whole = requests(20)
    assert requests(5, start_step=7) == whole[7:12]
    halves = [requests(20, rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole


def test_repetitions_in_one_epoch_have_other_transforms(tmp_path):
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path, count=2), train__batch_size=8)
    ((batch,),) = itertools.islice(train_loader(recipe, repeat_factors=np.array([1.0, 7.0])), 1)
    assert len(set(batch.keys)) == 8
    assert all(index % 2 == int(path[-5]) for (_, index), path in zip(batch.keys, batch.paths, strict=True))
    images = {image.numpy().tobytes() for image in batch.images}
    assert len(images) == 8


# Runs

BALANCED = {"train__class_weights": "balanced", "train__repeat_threshold": 0.9}


def test_a_resumed_run_with_both_equals_an_uninterrupted_one(tmp_path, monkeypatch, quick_report, caplog):
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path / "data", crowds=(0, 2)), val=False, **BALANCED)
    caplog.set_level(logging.INFO)
    train(recipe, tmp_path / "whole")
    assert "train.class_weights=balanced by objects in 4 images: card " in caplog.text
    assert "train.repeat_threshold=0.9: an epoch has 5 samples of 4 images; factors card 1.34" in caplog.text
    real = train_module.train_step
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_step", lambda *args: real(*args) if args[-1] < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(recipe, tmp_path / "ended")
    caplog.clear()
    train(recipe, tmp_path / "ended")
    assert "train.class_weights are kept from the run so far" in caplog.text
    assert_same_run(tmp_path / "ended", tmp_path / "whole")
    weights = load_recipe(tmp_path / "ended/recipe.yaml").train.class_weights
    assert sorted(weights) == ["box", "card", "grass", "sky"]


@pytest.mark.parametrize(("family", "counted"), [("mask2former", "images with the class"), ("semantic_fpn", "pixels")])
def test_semantic_runs_count_images_or_pixels(tmp_path, quick_report, caplog, family, counted):
    caplog.set_level(logging.INFO)
    folder = tiny.write_labels(tmp_path / "data")
    train(tiny.recipe(folder, "semantic", model__family=family, train__steps=1, **BALANCED), tmp_path / "run")
    assert f"train.class_weights=balanced by {counted} in 4 images" in caplog.text


def test_an_unknown_class_is_refused_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    file = tmp_path / "tiny.yaml"
    tiny.write_recipe(file, tiny.write_panoptic(tmp_path / "data"), train__class_weights={"carb": 2.0})
    monkeypatch.setattr("sys.argv", ["maskwright", "train", str(file), "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        main()
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert lines == ["error: train.class_weights: no class is called 'carb'; the nearest are card"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("equal", "expected balanced, or weights by class name such as {car: 1, bicycle: 4}, found 'equal'"),
        ({}, "expected balanced, or weights by class name"),
        ({"box": 0}, "the weight of class 'box' is 0, expected a number above 0"),
        ({"box": "2"}, "the weight of class 'box' is '2', expected a number above 0"),
        ({1: 2.0}, "class name 1 is not text; put it in quotes"),
    ],
)
def test_a_wrong_value_is_refused(tmp_path, value, message):
    with pytest.raises(RecipeError) as caught:
        tiny.recipe(tmp_path, train__class_weights=value)
    assert str(caught.value).startswith(f"tiny: train.class_weights: {message}")


def test_an_override_sets_weights(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny.values(tmp_path)))
    assert load_recipe(file, ["train.class_weights={box: 3, card: 0.5}"]).train.class_weights == {"box": 3, "card": 0.5}


def test_damaged_annotations_are_named(tmp_path):
    folder = tiny.write_labels(tmp_path)
    (folder / "labels/02.png").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"02\.png"):
        count_classes(open_dataset(tiny.recipe(folder, "semantic"), "train"))
