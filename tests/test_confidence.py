"""Confidence maps against their formulas with all masks at full size, in both forms; and what users get of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.config.schema import EvaluateConfig
from maskwright.inference import (
    blockwise_confidence,
    confidence,
    mask_upsampling,
    postprocess,
)
from maskwright.inference import segment as segment_module
from maskwright.inference.mask_upsampling import CropPrediction
from maskwright.inference.predictor import Predictor
from maskwright.inference.segment import segment
from maskwright.inference.test_time_augmentation import MaskQueries
from maskwright.structures.predictions import PixelPrediction
from tests import tiny
from tests.in_process import run_command
from tests.test_postprocess import CATEGORIES, EVERY_SIZE, SIZES, THINGS, crop, full_masks, prediction, resized


@pytest.fixture(params=["plain", "plain, few", "blocks", "blocks, few"])
def form(request, monkeypatch):
    """The form of the computation, and how many values it holds at a time."""
    name, _, amount = request.param.partition(", ")
    module = {"plain": confidence, "blocks": blockwise_confidence}[name]
    monkeypatch.setattr(segment_module, "confidence_for", lambda device: module)
    values = 3 * 64 * 96 if amount else 10**9
    monkeypatch.setattr(postprocess, "CHUNK_VALUES", values)
    monkeypatch.setattr(mask_upsampling, "SCORE_VALUES", values)
    monkeypatch.setattr(blockwise_confidence, "BAND_VALUES", values)
    monkeypatch.setattr(blockwise_confidence, "CACHED_BLOCKS", 3 if amount else 64)


def run(crops, task, sizes, **settings):
    return segment(
        crops,
        task,
        output_size=sizes["output_size"],
        categories=CATEGORIES,
        config=EvaluateConfig(task=task, **settings),
        confidence_map=True,
    )


def mean_masks(crops, sizes):
    """(N, H, W) mask logits of the queries of several crops."""
    queries = MaskQueries(crops, sizes["output_size"])
    return queries.probabilities, queries.mask_logits(torch.arange(len(queries.probabilities)))


@EVERY_SIZE
@pytest.mark.parametrize("at", ["input", "output"])
def test_semantic_confidence_is_the_share_of_the_best_class(sizes, at, form):
    predicted = prediction(sizes["padded_size"], queries=3)
    probabilities = predicted.class_logits[0].softmax(-1)[:, :-1]
    scores = torch.einsum("qk,qhw->khw", probabilities, full_masks(predicted, sizes, at).sigmoid())
    scores = resized(scores, sizes["output_size"])
    expected = scores.amax(0) / scores.sum(0).clamp_min(1)
    result = run([crop(predicted, sizes)], "semantic", sizes, semantic_resolution=at)
    assert result.confidence.dtype == np.float32
    np.testing.assert_allclose(result.confidence, expected, atol=2e-5)
    if expected.numel() > 1:
        assert scores.sum(0).min() < 1 < scores.sum(0).max(), "both cases must occur"


@EVERY_SIZE
@pytest.mark.parametrize("flip", [False, True])
def test_instance_confidence_is_that_of_the_best_instance_at_the_pixel(sizes, flip, form):
    crops = [crop(prediction(sizes["padded_size"], seed=3), sizes)]
    if flip:
        crops.append(crop(prediction(sizes["padded_size"], seed=4), sizes, flipped=True))
    probabilities, logits = mean_masks(crops, sizes)
    result = run(crops, "instance", sizes, top_k=30)
    _, _, numbers, _ = postprocess.instance(
        MaskQueries(crops, sizes["output_size"]), list(THINGS), top_k=30, score_threshold=0
    )
    expected = np.zeros(sizes["output_size"], np.float32)
    for number, label in reversed(list(zip(numbers.tolist(), result.labels.tolist(), strict=True))):
        inside = (logits[number] > 0).numpy()
        expected[inside] = (probabilities[number, label] * logits[number].sigmoid()).numpy()[inside]
    near_border = (logits.abs() < 1e-4).any(0).numpy()
    np.testing.assert_allclose(result.confidence[~near_border], expected[~near_border], atol=2e-5)
    assert ((result.confidence > 0) == result.masks.any(0))[~near_border].all()


def test_the_mean_confidence_of_an_instance_that_nothing_hides_is_its_score(form):
    result = run([crop(prediction((64, 96)), SIZES["padded"])], "instance", SIZES["padded"])
    assert result.mean_confidence[0] == pytest.approx(result.scores[0], rel=1e-4)


@EVERY_SIZE
@pytest.mark.parametrize("threshold", [0.8, 0.3])
def test_panoptic_confidence_is_class_times_mask_probability_of_the_segment(sizes, threshold, form):
    predicted = prediction(sizes["padded_size"], seed=1)
    scores, labels = predicted.class_logits[0].softmax(-1).max(-1)
    keep = (labels != len(CATEGORIES)) & (scores > threshold)
    values = scores[keep, None, None] * full_masks(predicted, sizes).sigmoid()[keep]
    result = run([crop(predicted, sizes)], "panoptic", sizes, object_threshold=threshold, overlap_threshold=0.3)
    expected = values.amax(0).numpy() if len(values) else np.zeros(sizes["output_size"])
    np.testing.assert_allclose(result.confidence, expected * (result.segment_map > 0), atol=2e-5)


@pytest.mark.parametrize("flipped", [False, True])
def test_logits_of_a_per_pixel_decoder_become_the_softmax_of_the_best_class(flipped, form):
    logits = torch.randn(1, len(CATEGORIES), 16, 24, generator=torch.Generator().manual_seed(0)) * 30
    sizes = SIZES["padded and larger"] | {"padded_size": (64, 96)}
    result = run([CropPrediction(PixelPrediction(logits), (64, 96), (33, 29), flipped)], "semantic", sizes)
    cropped = resized(logits[0], (64, 96))[:, :33, :29]
    expected = resized(cropped, sizes["output_size"]).softmax(0).amax(0)
    np.testing.assert_allclose(result.confidence, expected.flip(-1) if flipped else expected, atol=2e-5)


def test_nothing_found_is_no_confidence(form):
    predicted = prediction((64, 96))
    predicted.class_logits[..., -1] += 100
    for task in ("instance", "panoptic"):
        result = run([crop(predicted, SIZES["padded"])], task, SIZES["padded"], top_k=1)
        assert result.confidence.max() < 1e-6
    predicted.class_logits[..., -1] = -100
    predicted.class_logits[..., 1] += 100  # stuff
    assert run([crop(predicted, SIZES["padded"])], "instance", SIZES["padded"], top_k=5).confidence.max() == 0


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny.trained_model(), device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"task": "semantic"},
        {"task": "semantic", "window_size": (32, 48)},
        {"task": "semantic", "scales": (0.5, 1.0), "flip": True},
        {"task": "semantic", "tile_size": 48},
        {"task": "instance", "flip": True},
        {"task": "instance", "tile_size": 48},
        {"task": "instance", "tile_size": 48, "score_threshold": 0.5},
        {"task": "panoptic"},
        {"task": "panoptic", "tile_size": 48},
    ],
    ids=str,
)
def test_the_map_changes_nothing_else_and_is_there_only_if_asked_for(predictor, options):
    image = tiny.scene_image(1, (64, 90))
    without, result = predictor(image, **options), predictor(image, confidence=True, **options)
    assert without.confidence is None
    assert without.mean_confidence is None
    assert without.to_json() == {
        **result.to_json(),
        "segments": [
            {key: value for key, value in segment.items() if key != "confidence"}
            for segment in result.to_json()["segments"]
        ],
    }
    assert result.confidence.shape == (64, 90)
    assert 0 <= result.confidence.min() < result.confidence.max() <= 1
    if options["task"] != "semantic":
        assert ((result.confidence > 0) == result.masks.any(0)).all()
    stated = [segment["confidence"] for segment in result.to_json()["segments"]]
    means = [result.confidence[mask].mean() for mask in result.masks]
    np.testing.assert_allclose(np.array(stated, dtype=float), means, rtol=1e-4)


def test_where_tiles_overlap_instances_have_the_highest_value(predictor):
    image, options = tiny.scene_image(1, (64, 90)), {"task": "instance", "score_threshold": 0.5, "confidence": True}
    whole = predictor(image, tile_size=64, tile_overlap=30, **options)
    left, right = predictor(image[:, :64], **options), predictor(image[:, 26:], **options)
    expected = np.zeros((64, 90), np.float32)
    expected[:, :64] = left.confidence
    expected[:, 26:] = np.maximum(expected[:, 26:], right.confidence)
    np.testing.assert_array_equal(whole.confidence, expected * whole.masks.any(0))


def command(monkeypatch, capsys, *arguments):
    """`maskwright predict` with the trained model."""
    return run_command(monkeypatch, capsys, "predict", tiny.trained_model(), *arguments, "--device", "cpu")


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_command_writes_a_gray_png_and_json(predictor, task, tmp_path, monkeypatch, capsys):
    Image.fromarray(tiny.scene_image(1)).save(tmp_path / "one.png")
    arguments = (tmp_path / "one.png", "--task", task, "--output", tmp_path / "out", "--confidence")
    status, _, _ = command(monkeypatch, capsys, *arguments)
    assert status == 0
    with Image.open(tmp_path / "out/one_confidence.png") as image:
        assert image.mode == "L"
        gray = np.asarray(image)
    expected = predictor(tmp_path / "one.png", task=task, confidence=True)
    np.testing.assert_array_equal(gray, np.rint(255 * expected.confidence))
    if task == "panoptic":
        segments = json.loads((tmp_path / "out/one.json").read_text())["segments_info"]
        assert [segment["confidence"] for segment in segments] == expected.mean_confidence.tolist()
    status, _, _ = command(monkeypatch, capsys, *arguments[:-1])
    assert status == 0, "results are replaced"
    (tmp_path / "out/one_confidence.png").write_text("mine")
    status, _, errors = command(monkeypatch, capsys, *arguments)
    assert status == 1
    assert "one_confidence.png: exists, and is not a result of maskwright" in errors


def test_a_submission_has_no_confidence(tmp_path, monkeypatch, capsys):
    Image.fromarray(tiny.scene_image(1)).save(tmp_path / "one.png")
    arguments = (tmp_path / "one.png", "--submission", "coco", "--confidence", "--output", tmp_path / "out")
    status, _, errors = command(monkeypatch, capsys, *arguments)
    assert status == 1
    assert "the submission format of coco has no confidence maps; leave --confidence out" in errors
    assert not (tmp_path / "out").exists()
