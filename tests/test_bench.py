"""The comparisons, on pictures small enough for a test."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from maskwright.bench import data, loading, prediction
from maskwright.data.image import load_image, read_id_png
from maskwright.data.transforms import Window, crop_ids, crop_image
from maskwright.errors import MaskwrightError


def test_both_sides_compute_the_same_and_find_something(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(prediction, "HEIGHT", 64)
    monkeypatch.setattr(prediction, "WIDTH", 90)
    comparison = prediction.bench_prediction(rounds=1, threads=1)
    assert comparison.class_logit_difference < 1e-3
    assert comparison.mask_logit_difference < 1e-3
    assert comparison.maskwright.segments > 0
    values = json.loads(json.dumps(comparison.to_json()))
    assert values["ratio"]["median"] == pytest.approx(
        comparison.transformers.median / comparison.maskwright.median, rel=1e-9
    )
    assert "ratio" in comparison.table()


def test_without_transformers_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MaskwrightError, match="not installed; pip install transformers"):
        prediction.bench_prediction(rounds=1)


def test_loading_is_timed_on_both_sides():
    pytest.importorskip("transformers")
    comparison = loading.bench_loading(rounds=1)
    assert comparison.megabytes > 170
    assert min(comparison.maskwright, comparison.transformers) > 0
    assert "ratio" in comparison.table()
    with pytest.raises(MaskwrightError, match="rounds 0 must be at least 1"):
        loading.bench_loading(rounds=0)


def test_numbers_below_one_are_refused():
    with pytest.raises(MaskwrightError, match="rounds 0 and threads 2 must both be at least 1"):
        prediction.bench_prediction(rounds=0)


def test_samples_hold_what_the_mappers_of_the_original_make(monkeypatch):
    monkeypatch.setattr(data, "COCO_SIZE", (48, 64))
    monkeypatch.setattr(data, "COCO_SEGMENTS", (3, 4))
    monkeypatch.setattr(data, "CITYSCAPES_SIZE", (64, 128))
    monkeypatch.setattr(data, "CITYSCAPES_REGIONS", 9)
    comparisons = data.bench_data(rounds=1)
    assert [comparison.recipe for comparison in comparisons] == ["coco-panoptic-r50", "cityscapes-semantic-r50"]
    assert all(comparison.maskwright.segments <= comparison.mapper.segments for comparison in comparisons)
    values = json.loads(json.dumps([comparison.to_json() for comparison in comparisons]))
    assert values[0]["ratio"] == pytest.approx(values[0]["mapper"]["mean"] / values[0]["maskwright"]["mean"])
    assert "coco-panoptic-r50" in data.table(comparisons)


@pytest.mark.parametrize("flip", [False, True])
def test_the_mappers_peer_and_we_make_the_same_picture_and_masks(tmp_path, flip):
    ((picture, png, entry), _), window = data.write_coco(tmp_path, 0), Window(600, 800, 40, 60, 300, 400, flip)
    theirs = data._cropped(data._resized(np.asarray(Image.open(picture)), window, Image.Resampling.BILINEAR), window)
    ours = crop_image(load_image(picture), window)
    assert np.abs(ours.transpose(1, 2, 0).astype(int) - theirs).max() <= 1
    ids = crop_ids(read_id_png(png)[None], window)[0]
    colours = data._cropped(data._resized(np.asarray(Image.open(png)), window, Image.Resampling.NEAREST), window)
    np.testing.assert_array_equal(ids, colours.astype(int) @ [1, 256, 65536])
    assert {segment["id"] for segment in entry["segments_info"]} >= set(np.unique(ids).tolist())
