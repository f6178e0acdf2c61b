"""The comparison with transformers, on a picture small enough for a test."""

import json
import sys

import pytest

from maskwright import bench
from maskwright.errors import MaskwrightError


def test_both_sides_compute_the_same_and_find_something(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "HEIGHT", 64)
    monkeypatch.setattr(bench, "WIDTH", 90)
    comparison = bench.bench(rounds=1, threads=1)
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
        bench.bench(rounds=1)


def test_numbers_below_one_are_refused():
    with pytest.raises(MaskwrightError, match="rounds 0 and threads 2 must both be at least 1"):
        bench.bench(rounds=0)
