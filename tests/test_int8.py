"""`--precision int8`: a small trained model is quantized, scored before and after, and kept or refused."""

import functools
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from maskwright.data.build import open_dataset
from maskwright.errors import MaskwrightError
from maskwright.export import export as export_module
from maskwright.export import int8
from maskwright.export import onnx as onnx_module
from maskwright.export.export import ExportOptions, export
from maskwright.export.int8 import Int8Options, Quantization, calibration_inputs, float_nodes
from maskwright.inference.exported.runtimes import open_exported
from maskwright.inference.exported_model import ExportedModel, open_model
from tests import tiny
from tests.in_process import run_command
from tests.test_export_families import checkpoint_of

onnx = pytest.importorskip("onnx", reason="needs the packages of the extra 'export'")
pytest.importorskip("nncf", reason="needs the packages of the extra 'export'")

SIZE = (64, 64)


@functools.cache
def recipe():
    folder = tiny.trained_model().parent / "int8-data"
    return tiny.recipe(tiny.write_panoptic(folder), evaluate__object_threshold=0.4, evaluate__overlap_threshold=0.5)


@functools.cache
def exported():
    """Return the float32 file and the int8 file of one model, and the scores; traced once per process."""
    folder = tiny.trained_model().parent
    options = ExportOptions(precision="int8", operators="grid_sample", int8=Int8Options(recipe(), 60, 4))
    with pytest.MonkeyPatch.context() as patch:
        given = []
        quantize = int8.quantize_graph
        patch.setattr(int8, "quantize_graph", lambda model, inputs: quantize(given.append(model) or model, inputs))
        (done,) = export(tiny.trained_model(), folder / "int8.onnx", options, sizes=[SIZE])
    metadata = replace(open_exported(folder / "int8.onnx").metadata, precision="fp32", quantization=None)
    onnx_module.package(given[0], folder / "float.onnx", metadata)
    return folder / "float.onnx", folder / "int8.onnx", done.quantization


@pytest.fixture
def say(monkeypatch, capsys):
    """`say("export", ...)` runs a command and returns exit status, output and errors."""
    return lambda *arguments: run_command(monkeypatch, capsys, *arguments)


def test_a_quantized_file_runs_is_smaller_and_records_its_scores():
    full, small, scores = exported()
    assert scores.passed
    assert scores.metric == "PQ"
    assert (scores.calibration_images, scores.images) == (4, 4)
    assert scores.fp32 > 0.5
    metadata = open_exported(small).metadata
    assert metadata.precision == "int8"
    assert metadata.quantization["int8"] == scores.int8
    assert metadata.quantization["fp32"] == scores.fp32
    assert small.stat().st_size < 0.6 * full.stat().st_size
    images = np.full((2, 3, *SIZE), 100, dtype=np.float32)
    assert open_exported(small).run(images)["class_logits"].shape[0] == 2


def test_offsets_attention_masks_and_heads_stay_in_float():
    full, small, _ = exported()
    model = onnx.load(full)
    kept = set(float_nodes(model))
    operators = {node.name: node for node in model.graph.node}
    products = [name for name in kept if operators[name].op_type in ("MatMul", "Gemm", "Conv")]
    # offsets and weights of the only encoder layer; before each of the two decoder layers an attention mask and three
    # layers of embeddings; embeddings and classes at the end; the projection to mask features
    assert len(products) == 2 + 2 * (1 + 3) + 3 + 1 + 1
    quantized = onnx.load(small)
    maker = {output: node.op_type for node in quantized.graph.node for output in node.output}
    products = [node for node in quantized.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    in_int8 = {node.name for node in products if "DequantizeLinear" in {maker.get(name) for name in node.input}}
    assert len(in_int8) > 20
    assert not in_int8 & kept


def test_calibration_sees_what_evaluation_sees(tmp_path):
    full, _, _ = exported()
    model = ExportedModel(open_exported(full))
    inputs = calibration_inputs(model, recipe(), 3)
    assert [images.shape for images in inputs] == [(1, 3, *SIZE)] * 3
    tiles = tiny.recipe(tiny.write_panoptic(tmp_path), evaluate__tile_size=48, evaluate__short_side=32)
    for images in calibration_inputs(model, tiles, 2):  # 32x32 pixels of a tile, and padding
        np.testing.assert_array_equal(images[0, :, 32:], np.broadcast_to(model.pixel_mean, (3, 32, 64)))
    first, again = calibration_inputs(model, tiles, 2), calibration_inputs(model, tiles, 2)
    assert all((one == other).all() for one, other in zip(first, again, strict=True))


def write_again(graph, size, path, **options):
    """Write the float32 file of `exported` in place of tracing the model again."""
    path.write_bytes(exported()[0].read_bytes())


def test_a_larger_drop_is_refused_with_the_table(tmp_path, monkeypatch, say):
    exported()  # before the parts that it uses are replaced
    scores = iter([0.8, 0.7])
    monkeypatch.setattr(export_module, "write_onnx", write_again)
    monkeypatch.setattr(int8, "quantize_graph", lambda model, inputs: model)
    monkeypatch.setattr(int8, "headline", lambda found, best: ("PQ", next(scores)))
    tiny.write_recipe(tmp_path / "mine.yaml", recipe().data.root)
    words = ("--precision", "int8", "--data", tmp_path / "mine.yaml", "--calibration-images", "1")
    status, _, text = say("export", tiny.trained_model(), tmp_path / "model.xml", *words, "--size", "64x64")
    assert status == 1, text
    assert "PQ, %                              80.00     70.00     10.00      0.50  too large" in text
    assert "loses 10.00 points of PQ by int8, more than --max-drop 0.5, so it was not kept" in text
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_score_that_is_not_a_number_never_passes():
    assert not Quantization("mine", 1, 1, "PQ", 0.8, float("nan"), 100, 1, 1).passed


def test_mistakes_give_one_line_each(tmp_path, say, monkeypatch):
    def refuse(*words, message):
        status, _, text = say("export", tiny.trained_model(), *words)
        assert status == 1
        assert message in text
        assert text.count("\n") == 1

    tiny.write_recipe(tmp_path / "mine.yaml", recipe().data.root)
    tiny.write_recipe(tmp_path / "half.yaml", recipe().data.root, val=False)
    with_data = ("--precision", "int8", "--data", tmp_path / "mine.yaml")
    refuse(tmp_path / "a.onnx", "--precision", "int8", message="--precision int8: needs images")
    refuse(tmp_path / "a.onnx", "--data", tmp_path / "mine.yaml", message="--data: is for --precision int8")
    refuse(tmp_path / "a.pt2", *with_data, message="--precision int8: is for ONNX and OpenVINO; use .onnx or .xml")
    half = ("--precision", "int8", "--data", tmp_path / "half.yaml")
    refuse(tmp_path / "a.onnx", *half, message="the recipe has no data.val")
    refuse(tmp_path / "a.onnx", *half[:3], "nuclei-small", f"data.root={recipe().data.root}", message="data.train")
    found = onnx_module.find_spec
    monkeypatch.setattr(onnx_module, "find_spec", lambda name: None if name == "nncf" else found(name))
    refuse(tmp_path / "a.onnx", *with_data, message="--precision int8: needs nncf; pip install 'maskwright[export]'")


def test_an_error_of_nncf_is_one_sentence(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("Not supported\nmetatype")

    import nncf

    monkeypatch.setattr(nncf, "quantize", fail)
    with pytest.raises(MaskwrightError, match="NNCF cannot quantize this model: Not supported metatype; use --prec"):
        int8.quantize_graph(onnx.load(exported()[0]), [])


def test_predict_takes_a_quantized_file(tmp_path):
    from maskwright.inference.predictor import Predictor

    assert len(Predictor(open_model(exported()[1]))(tiny.scene_image(1))) > 0


def test_no_statistics_are_sent(tmp_path):
    (tmp_path / "openvino_telemetry").mkdir()
    (tmp_path / "openvino_telemetry" / "__init__.py").write_text("raise SystemExit('telemetry is imported')")
    code = f"""
import json, sys
sys.path.insert(0, {json.dumps(str(tmp_path))})
from maskwright.export.onnx import without_telemetry
with without_telemetry():
    import nncf, openvino
print("openvino_telemetry" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("False"), done.stderr[-300:]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["swin", "vit_adapter", "eomt", "semask_fpn", "semask_mask2former", "semask_fapn"])
def test_every_family_is_quantized(family, tmp_path, monkeypatch):
    from onnxruntime import InferenceSession

    semantic = tiny.recipe(tiny.write_labels(tmp_path / "data"), "semantic")
    source = checkpoint_of(family, tmp_path, open_dataset(semantic, "train").categories)
    options = ExportOptions(precision="int8", task="semantic", int8=Int8Options(semantic, 100, 2))
    given, quantize = [], int8.quantize_graph
    monkeypatch.setattr(int8, "quantize_graph", lambda model, inputs: quantize(given.append(model) or model, inputs))
    (done,) = export(source, tmp_path / "model.onnx", options, sizes=[SIZE])
    assert done.comparison.passed
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    image = np.random.default_rng(0).uniform(0, 255, (1, 3, *SIZE)).astype(np.float32)
    assert all(np.isfinite(values).all() for values in open_exported(tmp_path / "model.onnx").run(image).values())
    sessions = [InferenceSession(model.SerializeToString()) for model in (given[0], int8._prepare(given[0]))]
    expected, prepared = (session.run(None, {"images": image}) for session in sessions)
    for one, other in zip(expected, prepared, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())
