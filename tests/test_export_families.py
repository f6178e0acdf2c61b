"""Every family of models is exported at a small size, and the file agrees with the model."""

import math

import pytest
import torch

from benchmarks import export_table
from maskwright.checkpoints.checkpoint import Checkpoint, save_checkpoint
from maskwright.checkpoints.load import load_model
from maskwright.config.schema import ModelConfig
from maskwright.errors import MaskwrightError
from maskwright.export.check import TOLERANCES, Comparison
from maskwright.export.export import Exported, ExportOptions, export
from maskwright.export.graph import ExportGraph
from maskwright.export.trace import trace
from maskwright.models import build_model
from maskwright.structures.annotations import Category
from tests import tiny

onnx = pytest.importorskip("onnx", reason="needs the packages of the extra 'export'")
pytest.importorskip("onnxruntime", reason="needs the packages of the extra 'export'")

CATEGORIES = tuple(Category(number, f"class {number}", number > 1, (0, 0, 0)) for number in range(4))
SMALL = {
    "num_queries": 5,
    "hidden_dim": 32,
    "num_heads": 2,
    "deformable_points": 2,
    "pixel_decoder_layers": 1,
    "pixel_decoder_feedforward_dim": 16,
    "masked_decoder_layers": 1,
    "masked_decoder_feedforward_dim": 16,
}
SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_options": {"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
}
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 1}
SEMASK = {**SWIN, "semantic_attention": ("window", "global", "global", "global")}
FAMILIES = {
    "resnet": {**SMALL, "backbone": "resnet18", "backbone_options": {"layers": [1, 1, 1, 1]}},
    "swin": {**SMALL, **SWIN},
    "timm": {**SMALL, "backbone": "tf_efficientnet_lite0"},
    "vit": {**SMALL, "backbone": "vit_small_patch14_dinov2", "backbone_options": VIT},
    "vit_adapter": {
        **SMALL,
        "backbone": "vit_small_patch14_dinov2",
        "backbone_options": {**VIT, "depth": 4},
        "vit_pyramid": "adapter",
    },
    "eomt": {
        "family": "eomt",
        "backbone": "vit_small_patch16_dinov3_qkvb",
        "backbone_options": VIT,
        "num_queries": 5,
        "query_blocks": 1,
    },
    "semask_fpn": {**SEMASK, "family": "semantic_fpn", "hidden_dim": 32},
    "semask_mask2former": {**SMALL, **SEMASK, "pixel_decoder": "msfapn"},
    "semask_fapn": {**SMALL, **SEMASK, "pixel_decoder": "fapn"},
}


def checkpoint_of(family, folder, categories=CATEGORIES):
    """Write a model with random weights, in which every layer has an effect."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(**FAMILIES[family]), categories)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "places.weight", "offsets.weight", "attention.weights.weight")):
            torch.nn.init.normal_(parameter, std=0.1)
    path = folder / "model.safetensors"
    save_checkpoint(path, Checkpoint(model.config, categories, model.evaluate_config, model.state_dict()))
    return path


SLOW = ("vit", "vit_adapter", "eomt")


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=pytest.mark.slow if family in SLOW else ()) for family in FAMILIES]
)
def test_the_file_of_a_family_agrees_with_its_model_and_has_no_custom_operator(family, tmp_path):
    size = (32, 64)
    (done,) = export(checkpoint_of(family, tmp_path), tmp_path / "model.onnx", ExportOptions(), sizes=[size])
    for name, (value, difference, _) in done.comparison.largest.items():
        assert difference < 1e-4 * value, name
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    assert "GridSample" not in {node.op_type for node in nodes}


def test_positions_of_patches_are_resized_before_the_export(tmp_path):
    """OpenVINO resizes bicubically in another way."""
    model = load_model(checkpoint_of("vit", tmp_path))
    program = trace(ExportGraph(model, "raw", "semantic", model.evaluate_config).eval(), (64, 96), "plain")
    assert not any("bicubic" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_the_result_of_a_model_without_masks_agrees(tmp_path, suffix):
    pytest.importorskip("openvino")
    options = ExportOptions(contents="result")
    (done,) = export(checkpoint_of("semask_fpn", tmp_path), tmp_path / f"model{suffix}", options, sizes=[(32, 64)])
    assert done.comparison.agreement == {"semantic": 1.0}


def test_a_model_without_masks_has_no_contents_masks_and_no_instances(tmp_path):
    checkpoint = checkpoint_of("semask_fpn", tmp_path)
    with pytest.raises(MaskwrightError, match="this model classifies pixels and has no masks; use raw or result"):
        export(checkpoint, tmp_path / "model.onnx", ExportOptions(contents="masks"), sizes=[(32, 64)])
    with pytest.raises(MaskwrightError, match="cannot do task instance; use task semantic"):
        export(checkpoint, tmp_path / "model.onnx", ExportOptions(task="instance"), sizes=[(32, 64)])


def test_grid_sample_is_one_operator_per_level_and_masks_are_those_of_the_model(tmp_path):
    options = ExportOptions(contents="masks", operators="grid_sample", precision="fp16")
    (done,) = export(tiny.trained_model(), tmp_path / "model.onnx", options, sizes=[(64, 64)])
    assert done.comparison.flipped is not None
    model = onnx.load(tmp_path / "model.onnx")
    assert sum(node.op_type == "GridSample" for node in model.graph.node) == 3
    assert [output.name for output in model.graph.output] == ["class_logits", "mask_logits"]
    halves = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16]
    weights = tiny.trained_model().stat().st_size / 4
    assert sum(math.prod(tensor.dims) for tensor in halves) > 0.6 * weights  # small ones are folded back to float32


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in export_table.architectures() if "giant" not in name])  # over 2 GB
def test_each_published_architecture_is_exported_and_agrees(name, tmp_path):
    options = ExportOptions()
    done = export_table.export_random(name, (256, 256), options, tmp_path)
    assert done.comparison.passed
    assert export_table.row(name, done, options)[:4] == (name, "256x256", "onnx", "raw")


@pytest.mark.slow
@pytest.mark.parametrize("contents", ["raw", "result"])
@pytest.mark.parametrize("name", ["mask2former-resnet50-coco-panoptic", "mask2former-swin-tiny-coco-panoptic"])
def test_large_images_are_exported_too(name, contents, tmp_path):
    assert export_table.export_random(name, (800, 1088), ExportOptions(contents=contents), tmp_path).comparison.passed


def test_the_table_of_exports_has_one_row_per_file(monkeypatch, capsys):
    def export_random(name, size, options, folder):
        if options.contents == "masks":
            raise MaskwrightError("this model classifies pixels and has no masks")
        comparison = Comparison(TOLERANCES["fp32"], {"class_logits": (4.0, 0.002, 0.001)}, None, {"panoptic": 1.0})
        return Exported(folder / "model.onnx", size, 12.3, 5.0, comparison)

    monkeypatch.setattr(export_table, "export_random", export_random)
    export_table.export_table("nuclei", size="160x160", contents=("raw", "masks", "result"))
    output = capsys.readouterr()
    rows = output.out.splitlines()
    assert len(rows) == 4
    assert output.err == "nuclei, masks: this model classifies pixels and has no masks\n"
    assert rows[2] == "| nuclei | 160x160 | onnx | raw | fp32 | 5.0e-04 | 100.00% | 12 |"
    names = export_table.architectures()
    assert len(names) == len(set(names)) > 15
