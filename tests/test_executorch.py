"""`.pte` files: a small trained model is exported, opened by everything that takes exported files, and damaged."""

import functools

import numpy as np
import pytest
import torch

from maskwright.errors import MaskwrightError
from maskwright.export.check import agreement
from maskwright.export.export import ExportOptions, export
from maskwright.inference.exported.runtimes import open_exported
from maskwright.inference.predictor import Predictor
from tests import tiny

pytestmark = pytest.mark.slow
pytest.importorskip("executorch", reason="needs the packages of the extra 'executorch'")

SIZE = (64, 64)


@functools.cache
def exported(contents="raw", operators="plain"):
    path = tiny.trained_model().parent / f"{contents}.pte"
    options = ExportOptions("executorch", contents, operators=operators)
    (done,) = export(tiny.trained_model(), path, options, sizes=[SIZE])
    for value, difference, _ in done.comparison.largest.values():
        assert difference < 1e-4 * value
    return path


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_the_predictor_gives_the_results_of_the_model(task):
    image = tiny.scene_image(3, (50, 60))
    expected, found = (
        Predictor(source, device="cpu")(image, task=task) for source in (tiny.trained_model(), exported())
    )
    assert agreement(expected, found) > 0.99


def test_results_are_decided_inside_the_file():
    image = tiny.scene_image(4, SIZE)
    found = Predictor(exported("result", "grid_sample"))(image)
    assert agreement(Predictor(tiny.trained_model(), device="cpu")(image), found) > 0.99


def test_images_of_a_batch_are_run_one_by_one():
    file = open_exported(exported())
    images = np.random.default_rng(0).uniform(0, 255, (2, 3, *SIZE)).astype(np.float32)
    both = file.run(images)
    assert list(both) == ["class_logits", "mask_embeddings", "mask_features"]
    for name, values in file.run(images[1:]).items():
        np.testing.assert_array_equal(values[0], both[name][1])


def test_bad_files_give_one_line_each(tmp_path):
    good = exported().read_bytes()

    def refuse(content, message):
        (tmp_path / "bad.pte").write_bytes(content)
        with pytest.raises(MaskwrightError, match=message) as caught:
            Predictor(tmp_path / "bad.pte")
        assert str(caught.value).startswith(str(tmp_path / "bad.pte"))
        assert "\n" not in str(caught.value)

    refuse(b"", "cannot be read, it is damaged or of another format")
    refuse(b"soup" * 100, "cannot be read, it is damaged or of another format")
    refuse(good[: len(good) // 2], "damaged")
    refuse(good[:-1000] + bytes([good[-1000] ^ 1]) + good[-999:], "its content has changed since it was written")
    with pytest.raises(MaskwrightError, match="its operators are for CPUs, not for device 'cuda'"):
        Predictor(exported(), device="cuda")


def test_files_of_other_programs_are_refused(tmp_path):
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(1),))
    to_edge_transform_and_lower(program).to_executorch().save(str(tmp_path / "other.pte"))
    with pytest.raises(MaskwrightError, match="was not exported by maskwright"):
        Predictor(tmp_path / "other.pte")
