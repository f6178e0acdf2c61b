"""`Predictor(compile=True)` gives the same results, and says in one line what it lacks."""

import numpy as np
import pytest

import maskwright.inference.compile as module
from maskwright import Predictor
from maskwright.errors import MaskwrightError
from tests import tiny


@pytest.mark.slow
@pytest.mark.skipif(module.compiler() is None, reason="no C++ compiler")
def test_a_compiled_predictor_equals_the_plain_one():
    plain, compiled = (Predictor(tiny.trained_model(), compile=compile) for compile in (False, True))
    for number in range(2):
        expected, found = plain(tiny.scene_image(number)), compiled(tiny.scene_image(number))
        assert len(expected) > 1
        assert expected.names == found.names
        np.testing.assert_allclose(expected.scores, found.scores, atol=1e-3)
        assert np.mean(expected.segment_map == found.segment_map) > 0.999  # a pixel on a border may fall either way


def test_without_a_compiler_the_error_is_one_line(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(
        MaskwrightError, match=r"needs a C\+\+ compiler, found none .*; install one, or run without --compile$"
    ) as error:
        Predictor(tiny.trained_model(), compile=True)
    assert "\n" not in str(error.value)
    Predictor(tiny.trained_model())


def test_a_model_that_does_not_compile_is_one_line(monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def compile(forward, **_):
        def fail(*_):
            raise TorchDynamoException("no such thing\nwith many\nlines")

        return fail

    monkeypatch.setattr(module.torch, "compile", compile)
    monkeypatch.setattr(module, "compiler", lambda: "g++")
    with pytest.raises(MaskwrightError) as error:
        Predictor(tiny.trained_model(), compile=True)(tiny.scene_image(0))
    assert str(error.value) == "torch.compile failed on this model: no such thing; run without --compile"
