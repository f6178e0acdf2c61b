"""The decisions that are exported, against our own post-processing: in PyTorch, and a small graph in each runtime."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.errors import MaskwrightError
from maskwright.export.check import Comparison, Tolerance, agreement, compare
from maskwright.export.export import check_size, parse_size
from maskwright.export.graph import ExportGraph
from maskwright.export.onnx import convert_to_openvino, write_onnx
from maskwright.inference import postprocess
from maskwright.inference.exported.metadata import FORMAT, ExportMetadata, parse_metadata
from maskwright.inference.exported.runtimes import open_exported, write_checksum
from maskwright.inference.mask_upsampling import CropPrediction
from maskwright.inference.predictor import Predictor
from maskwright.inference.test_time_augmentation import MaskQueries
from maskwright.models.segmenter import Segmenter
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category
from maskwright.structures.predictions import MaskPrediction, ModelOutput, PixelPrediction

pytest.importorskip("onnxscript", reason="needs the packages of the extra 'export'")

SIZE = (48, 64)
CATEGORIES = tuple(Category(n, f"class {n}", n % 2 == 0, (n, n, n)) for n in range(5))
QUERIES = 12


class Blobs(Segmenter):
    """Predicts soft discs of fixed places, shifted by the brightness of the image, so that images of a batch differ."""

    tasks = ("semantic", "instance", "panoptic")
    size_divisor = 4

    def __init__(self, seed=0, confidence=4.0):
        super().__init__((0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
        generator = torch.Generator().manual_seed(seed)
        self.categories = CATEGORIES
        self.config = ModelConfig(backbone="none", pixel_mean=(0.0, 0.0, 0.0), pixel_std=(255.0, 255.0, 255.0))
        self.evaluate_config = EvaluateConfig(task="panoptic", object_threshold=0.5, overlap_threshold=0.6, top_k=20)
        logits = torch.randn(QUERIES, len(CATEGORIES) + 1, generator=generator) * confidence
        self.register_buffer("logits", logits)
        centers = torch.rand(QUERIES, 2, generator=generator) * torch.tensor(SIZE) / 4
        radii = torch.rand(QUERIES, generator=generator) * 4 + 2
        y, x = torch.meshgrid(torch.arange(SIZE[0] / 4), torch.arange(SIZE[1] / 4), indexing="ij")
        distance = ((y - centers[:, :1, None]) ** 2 + (x - centers[:, 1:, None]) ** 2).sqrt()
        self.register_buffer("masks", (radii[:, None, None] - distance) * 1.3)

    def forward(self, images, padding=None, intermediate=False):
        brightness = images.float().mean((1, 2, 3)) / 255
        logits = self.logits + brightness[:, None, None]
        embeddings = torch.eye(QUERIES) * (1 + brightness[:, None, None])
        return ModelOutput(MaskPrediction(logits, embeddings, self.masks - brightness[:, None, None, None]))


class PixelBlobs(Blobs):
    """The same masks as class logits."""

    tasks = ("semantic",)

    def forward(self, images, padding=None, intermediate=False):
        return ModelOutput(PixelPrediction(super().forward(images).final.mask_logits()[:, : len(CATEGORIES)]))


def example_images(count=2):
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(1)) * torch.linspace(
        100, 255, count
    ).view(-1, 1, 1, 1)


def metadata_of(model, contents, task="panoptic", **changes):
    values = {
        "contents": contents,
        "task": task,
        "tasks": (task,) if contents == "result" else model.tasks,
        "size": SIZE,
        "channels": 3,
        "pixel_mean": model.config.pixel_mean,
        "pixel_std": model.config.pixel_std,
        "categories": CATEGORIES,
        "evaluate": model.evaluate_config.model_dump(mode="json"),
        "model": model.config.model_dump(mode="json"),
        "precision": "fp32",
        "operators": "plain",
        "licence": None,
        "provenance": {"maskwright": "<&\"'> \u00e9"},
        "weights_sha256": "0" * 64,
        "version": "0.1.0",
    }
    return ExportMetadata(**values | changes)


def reference(model, image, task):
    """The result of the plain post-processing of one image (1, 3, H, W) at its own size."""
    config, things = model.evaluate_config, [category.is_thing for category in CATEGORIES]
    crop = CropPrediction(model(image).final, SIZE, SIZE)
    if task == "semantic":
        label_map = postprocess.semantic(crop, SIZE, at_output=True).numpy()
        return Segmentation(task, SIZE, CATEGORIES, np.unique(label_map), label_map=label_map)
    queries = MaskQueries([crop], SIZE)
    if task == "instance":
        labels, scores, _, masks = postprocess.instance(
            queries, things, top_k=config.top_k, score_threshold=config.score_threshold
        )
        return Segmentation(task, SIZE, CATEGORIES, labels.numpy(), scores.numpy(), instance_masks=masks)
    labels, scores, segment_map = postprocess.panoptic(
        queries, things, object_threshold=config.object_threshold, overlap_threshold=config.overlap_threshold
    )
    return Segmentation(task, SIZE, CATEGORIES, labels.numpy(), scores.numpy(), segment_map=segment_map.numpy())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_the_decision_in_the_graph_is_that_of_the_plain_postprocessing(task, seed):
    model = Blobs(seed)
    model.evaluate_config = model.evaluate_config.model_copy(update={"score_threshold": 0.3})
    graph = ExportGraph(model, "result", task, model.evaluate_config)
    images = example_images()
    outputs = dict(zip(graph.output_names, graph(images), strict=True))
    for index in range(2):
        expected = reference(model, images[index : index + 1], task)
        found = {name: values[index].numpy() for name, values in outputs.items()}
        if task == "semantic":
            np.testing.assert_array_equal(found["label_map"], expected.label_map)
            continue
        count = len(expected)
        assert count >= 1
        np.testing.assert_array_equal(found["labels"][:count], expected.labels)
        np.testing.assert_allclose(found["scores"][:count], expected.scores, rtol=1e-5)
        assert (found["labels"][count:] == -1).all()
        assert (found["scores"][count:] == 0).all()
        if task == "panoptic":
            np.testing.assert_array_equal(found["segment_map"], expected.segment_map)
        else:
            np.testing.assert_array_equal(found["masks"][:count], expected.instance_masks)
            assert not found["masks"][count:].any()


def test_panoptic_decision_merges_stuff_drops_hidden_segments_and_may_find_nothing():
    kinds = set()
    for seed in range(8):
        model = Blobs(seed)
        outputs = ExportGraph(model, "result", "panoptic", model.evaluate_config)(example_images(1))
        segments = reference(model, example_images(1), "panoptic")
        candidates = (model(example_images(1)).final.class_logits.softmax(-1).max(-1).values > 0.5).sum()
        stuff = [label for label in segments.labels if not CATEGORIES[label].is_thing]
        assert len(stuff) == len(set(stuff))
        kinds |= {"dropped or merged"} if len(segments) < candidates else set()
        assert outputs[0].max() == len(segments)
    assert kinds
    nothing = Blobs(confidence=0.1)
    segment_map, labels, scores = ExportGraph(nothing, "result", "panoptic", nothing.evaluate_config)(example_images(1))
    assert not segment_map.any()
    assert (labels == -1).all()
    assert not scores.any()


def test_a_model_without_masks_exports_its_label_map():
    model = PixelBlobs()
    graph = ExportGraph(model, "result", "semantic", model.evaluate_config)
    (label_map,) = graph(example_images())
    crop = CropPrediction(model(example_images()[1:]).final, SIZE, SIZE)
    np.testing.assert_array_equal(label_map[1], postprocess.semantic(crop, SIZE, at_output=True))


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_the_decision_is_the_same_in_onnx_runtime_and_openvino(task, tmp_path):
    model = Blobs(3)
    graph = ExportGraph(model, "result", task, model.evaluate_config).eval()
    metadata = metadata_of(model, "result", task)
    write_onnx(graph, SIZE, tmp_path / "model.onnx", operators="plain", metadata=metadata.to_json())
    convert_to_openvino(tmp_path / "model.onnx", tmp_path / "model.xml", metadata=metadata.to_json())
    for name in ("model.onnx", "model.xml"):
        write_checksum(tmp_path / name)
        file = open_exported(tmp_path / name)
        assert file.runtime == {"model.onnx": "onnxruntime", "model.xml": "openvino"}[name]
        assert file.metadata.categories == CATEGORIES
        assert file.metadata.provenance == metadata.provenance
        images = [(image, SIZE) for image in example_images(3).numpy()]
        comparison = compare(graph, file, images)
        assert comparison.passed, comparison.table()
        assert comparison.agreement[task] > 0.999
        outputs = file.run(example_images(3).numpy())  # as a batch
        for index, expected in enumerate(zip(*(values.numpy() for values in graph(example_images(3))), strict=True)):
            for output, values in zip(graph.output_names, expected, strict=True):
                np.testing.assert_allclose(outputs[output][index], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "contents"), [(Blobs, "masks"), (PixelBlobs, "raw")])
def test_the_predictor_takes_masks_and_class_logits(family, contents, tmp_path):
    model = family(2)
    task = model.tasks[-1]
    model.evaluate_config = model.evaluate_config.model_copy(update={"task": task})
    graph = ExportGraph(model, contents, task, model.evaluate_config).eval()
    metadata = metadata_of(model, contents, task)
    write_onnx(graph, SIZE, tmp_path / "model.onnx", operators="plain", metadata=metadata.to_json())
    image = example_images(1)[0].permute(1, 2, 0).byte().numpy()
    expected, found = (Predictor(source, device="cpu")(image) for source in (model, tmp_path / "model.onnx"))
    assert expected.task == found.task == task
    assert len(np.unique(expected.id_map())) > 2
    assert agreement(expected, found) > 0.999


def test_an_operator_that_cannot_be_exported_is_refused_in_one_sentence(tmp_path):
    class Strange(Blobs):
        def forward(self, images, padding=None, intermediate=False):
            if images.sum() > 0:  # depends on values
                return super().forward(images)
            return super().forward(images * 2)

    model = Strange()
    graph = ExportGraph(model, "raw", "panoptic", model.evaluate_config).eval()
    with pytest.raises(MaskwrightError, match=r"^mask2former with none: cannot be exported: .+") as caught:
        write_onnx(graph, SIZE, tmp_path / "model.onnx", operators="plain", metadata="{}")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_sizes_are_checked():
    model = nn.Module()
    model.size_divisor = 32
    assert parse_size("512x704") == (512, 704)
    assert check_size((512, 704), model) == (512, 704)
    with pytest.raises(
        MaskwrightError, match="500x700 is not a multiple of 32 in height and width; the nearest is 512x704"
    ):
        check_size((500, 700), model)
    with pytest.raises(MaskwrightError, match="not within"):
        check_size((0, 64), model)
    for text in ("dynamic", "-1x-1", "512x", "*"):
        with pytest.raises(MaskwrightError, match="dynamic height and width cannot be exported"):
            parse_size(text)
    with pytest.raises(MaskwrightError, match="expected HEIGHTxWIDTH in pixels, such as 512x704, found '512'"):
        parse_size("512")


def test_metadata_survives_json_and_damage_is_named():
    metadata = metadata_of(
        Blobs(), "raw", evaluate=EvaluateConfig(task="panoptic", short_side=40).model_dump(mode="json")
    )
    assert parse_metadata(metadata.to_json()) == metadata
    assert metadata.sizing.short_side == 40
    assert metadata.to_json().isascii()
    for text in ("", "[]", "{}", metadata.to_json().replace('"raw"', '"soup"'), metadata.to_json().replace("48", "-8")):
        with pytest.raises(MaskwrightError, match="its metadata is damaged"):
            parse_metadata(text)
    with pytest.raises(MaskwrightError, match=f"has format maskwright-export-9, expected {FORMAT}"):
        parse_metadata(metadata.to_json().replace(FORMAT, "maskwright-export-9"))


def test_agreement_of_results():
    def panoptic(map_, labels):
        return Segmentation("panoptic", (1, 4), CATEGORIES, np.array(labels), segment_map=np.array([map_], np.int32))

    assert agreement(panoptic([1, 1, 2, 0], [3, 1]), panoptic([2, 2, 1, 0], [1, 3])) == 1  # numbers do not matter
    assert agreement(panoptic([1, 1, 2, 0], [3, 1]), panoptic([2, 2, 1, 0], [0, 3])) == 0.75
    assert agreement(panoptic([1, 1, 1, 1], [3]), panoptic([1, 1, 2, 2], [3, 3])) == 0  # split in two: no partner

    def instances(masks, labels):
        masks = np.array(masks, dtype=bool).reshape(len(labels), 1, 4)
        return Segmentation("instance", (1, 4), CATEGORIES, np.array(labels), instance_masks=masks)

    pair = instances([[1, 1, 0, 0], [0, 0, 1, 1]], [2, 0])
    assert agreement(pair, instances([[0, 0, 1, 1], [1, 1, 0, 0]], [0, 2])) == 1
    assert agreement(pair, instances([[0, 0, 1, 1], [1, 1, 0, 0]], [2, 0])) == 0
    assert agreement(pair, instances([[1, 1, 0, 0]], [2])) == 0.5
    assert agreement(instances([], []), instances([], [])) == 1


def test_a_comparison_fails_beyond_its_tolerance_and_says_where():
    comparison = Comparison(
        Tolerance(1e-3, 0.03, 0.99),
        {"mask_features": (10.0, 1.0, 0.009), "class_logits": (10.0, 1.0, 0.29)},
        (3, 1000),
        {"semantic": 0.995},
    )
    assert comparison.passed
    assert "mask bits that differ: 3 of 1,000" in comparison.table()
    comparison.agreement["instance"] = 0.98
    assert not comparison.passed
    assert "instance results agree: 98.000%  less than 99%" in comparison.table()
    for name, usual in (("mask_features", 0.011), ("class_logits", 0.31), ("class_logits", float("nan"))):
        wrong = Comparison(Tolerance(1e-3, 0.03, 0.99), {name: (10.0, 1.0, usual)})
        assert not wrong.passed
        assert "too large" in wrong.table()


def test_exported_files_are_read_without_torch():
    code = """
import sys
import maskwright.data.images.resize
from maskwright.inference.exported import decisions, metadata, runtimes
print({name.partition('.')[0] for name in sys.modules} & {'torch', 'pydantic', 'scipy', 'hotcoco', 'tifffile'})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
