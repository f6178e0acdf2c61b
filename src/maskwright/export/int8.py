"""`--precision int8`: post-training quantization by NNCF, kept only if the score on the validation split holds.

Weights and activations of convolutions and linear layers become int8. These stay in float32: sampling offsets and
weights of deformable attention, and the products of embeddings with mask features, whose signs are the attention masks,
because they decide where the network looks; and the heads. The file is ONNX with QuantizeLinear and DequantizeLinear,
which ONNX Runtime and OpenVINO fuse into int8 operators.
"""

from __future__ import annotations

import ast
import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch

from maskwright.config.recipe import Recipe, change_settings
from maskwright.data.build import open_dataset
from maskwright.data.images.tiled_tiff import ArrayImage
from maskwright.errors import MaskwrightError, one_line, printable
from maskwright.evaluation.evaluate import check_classes, check_evaluation, evaluate, headline
from maskwright.export.check import ExportError
from maskwright.export.graph import Head
from maskwright.export.onnx import package, without_telemetry
from maskwright.export.trace import quiet
from maskwright.inference.exported.metadata import INPUT
from maskwright.inference.exported.runtimes import ExportedFile, open_exported
from maskwright.inference.exported_model import ExportedModel
from maskwright.inference.pipeline import ImageInProgress, Pipeline
from maskwright.inference.preprocess import Prepared, prepare_whole
from maskwright.inference.tiling import cut_tiles
from maskwright.models.eomt import Eomt, EomtHead
from maskwright.models.fapn_pixel_decoder import FeatureAlignment
from maskwright.models.masked_decoder import MaskedDecoder
from maskwright.models.ops.deformable_attention import DeformableAttention
from maskwright.models.segmenter import Segmenter
from maskwright.structures.annotations import Task, pad_images

if TYPE_CHECKING:
    import onnx
    import onnx_ir

# Modules whose own operators stay in float32; the layers inside them, such as the projections of values, do not.
FLOAT_MODULES = (DeformableAttention, FeatureAlignment, MaskedDecoder, Eomt, EomtHead, *get_args(Head))
# Layers that stay in float32: offsets of `FeatureAlignment`, and the heads, which are small.
FLOAT_LAYERS = ("places", "class_head", "mask_head", "mask_projection")

CALIBRATION_IMAGES = 128
_TIMED_RUNS = 5
_ORIGIN = ("class_hierarchy", "name_scopes")  # of an operator, outermost module first; written by PyTorch's exporter
_ANY_SIZE = 2**40  # bytes


@dataclass(frozen=True)
class Int8Options:
    """How a file is quantized and judged.

    Attributes:
        recipe: the training split of its data calibrates, the validation split and its first metric judge.
        max_drop: the largest loss of that score that is accepted, in points of percent.
        calibration_images: number of training images, evenly spread over the split.
    """

    recipe: Recipe
    max_drop: float = 0.5
    calibration_images: int = CALIBRATION_IMAGES


@dataclass(frozen=True)
class Quantization:
    """The scores of a quantized file; part of its metadata.

    Attributes:
        data: name of the recipe.
        calibration_images: number of images that the ranges of activations were measured on.
        images: number of validation images.
        metric: name of the score.
        fp32: score of the file before it was quantized, in the same runtime; 0..1.
        int8: score of the quantized file.
        max_drop: accepted loss, in points of percent.
        fp32_seconds: median time of a forward pass for one input.
        int8_seconds: the same of the quantized file.
    """

    data: str
    calibration_images: int
    images: int
    metric: str
    fp32: float
    int8: float
    max_drop: float
    fp32_seconds: float
    int8_seconds: float

    @property
    def drop(self) -> float:
        """Loss of the score in points of percent."""
        return 100 * (self.fp32 - self.int8)

    @property
    def passed(self) -> bool:
        """Whether the loss is accepted; NaN is not."""
        return self.drop <= self.max_drop

    def table(self) -> str:
        """Format as lines of text."""
        mark = "" if self.passed else "  too large"
        return "\n".join(
            [
                f"{f'{self.images} images of {self.data}':<30}{'fp32':>10}{'int8':>10}{'drop':>10}{'allowed':>10}",
                f"{f'{self.metric}, %':<30}{100 * self.fp32:>10.2f}{100 * self.int8:>10.2f}{self.drop:>10.2f}"
                f"{self.max_drop:>10.2f}{mark}",
                f"{'seconds for one input':<30}{self.fp32_seconds:>10.3f}{self.int8_seconds:>10.3f}",
            ]
        )


def check_int8(options: Int8Options, model: Segmenter, task: Task) -> None:
    """Raise MaskwrightError if the data cannot calibrate or judge the model for a task."""
    recipe = _for_task(options.recipe, task)
    open_dataset(recipe, "train")
    annotated = open_dataset(recipe, "val")
    check_classes(model.categories, annotated.categories, f"data.val of recipe '{recipe.name}'")
    check_evaluation(recipe, "val", annotated, recipe.train.best_metric)


def quantize_file(
    float_file: ExportedFile,
    onnx_file: Path,
    options: Int8Options,
    on_step: Callable[[str], None],
    where: Path,
) -> tuple[Path, Quantization]:
    """Quantize an exported file, and score both.

    Args:
        float_file: the file in float32, opened.
        onnx_file: the same as ONNX, with the names of the exporter.
        options: see the class.
        on_step: called with a text before each step.
        where: name of the file in errors.

    Returns:
        The quantized file, beside the other and with its suffix, and its scores.

    Raises:
        ExportError: the score drops by more than is accepted.
        MaskwrightError: NNCF fails on this model, or the validation split has nothing to score.
    """
    import onnx

    model = ExportedModel(float_file)
    recipe = _recipe_for(model, options.recipe)
    inputs = calibration_inputs(model, recipe, options.calibration_images)
    on_step(f"quantizing with {len(inputs)} training images")
    quantized = quantize_graph(onnx.load(onnx_file), inputs)
    path = float_file.path.with_stem("int8")
    metadata = replace(float_file.metadata, precision="int8")
    package(quantized, path, metadata)
    models = model, ExportedModel(open_exported(path))
    scores, images = [], 0
    for name, scored in zip(("float32", "int8"), models, strict=True):
        on_step(f"scoring {name} on the validation split")
        found = evaluate(scored, recipe, "val").scores
        metric, score = headline(found, recipe.train.best_metric)
        if score is None:
            raise MaskwrightError("has nothing to score", where=f"data.val of recipe '{recipe.name}'")
        scores.append(score)
        images = found["images"]
    seconds = _time_in_turns([each.file for each in models], inputs)
    result = Quantization(recipe.name, len(inputs), images, metric, *scores, options.max_drop, *seconds)
    if not result.passed:
        raise ExportError(
            f"loses {result.drop:.2f} points of {metric} by int8, more than --max-drop {options.max_drop:g}, "
            "so it was not kept",
            where=where,
            remedy="use --precision fp16, or accept more with --max-drop",
            table=result.table(),
        )
    package(quantized, path, replace(metadata, quantization=asdict(result)))
    return path, result


def calibration_inputs(model: ExportedModel, recipe: Recipe, count: int) -> list[np.ndarray]:
    """Return inputs (1, C, H, W) float32 as evaluation passes them to the file, one per training image.

    An image that evaluation cuts into tiles or crops contributes one of them, drawn with a fixed seed.

    Args:
        model: the file.
        recipe: its training images, evenly spread, and its rules for sizes, tiles and windows.
        count: at most this many.
    """
    annotated = open_dataset(recipe, "train")
    pipeline = Pipeline(model, recipe.evaluate)
    generator = np.random.default_rng(0)
    inputs = []
    for index in np.linspace(0, len(annotated) - 1, min(count, len(annotated))).round().astype(int):
        image = ArrayImage(annotated.image(int(index)))
        prepared = pipeline.prepare(image)
        if not isinstance(prepared, Prepared):
            side, overlap = recipe.evaluate.tile_size, recipe.evaluate.tile_overlap
            assert side is not None
            tiles = list(cut_tiles(image.size, side, side // 8 if overlap is None else overlap))
            area = tiles[generator.integers(len(tiles))].area
            prepared = prepare_whole(image.read(*area), recipe.evaluate, model.fixed_size)
        crops = pipeline.list_crops(ImageInProgress(prepared, None))
        crop = crops[generator.integers(len(crops))]
        pixels, padding = pad_images([crop.pixels()], size=model.fixed_size)
        inputs.append(torch.where(padding[:, None], model.pixel_mean, pixels.float()).numpy())
    return inputs


def quantize_graph(model: onnx.ModelProto, inputs: list[np.ndarray]) -> onnx.ModelProto:
    """Return a graph with int8 weights and activations, but for `FLOAT_MODULES`.

    Args:
        model: as PyTorch exports it, with the names of its modules.
        inputs: that ranges of activations are measured on; (1, C, H, W) each.

    Raises:
        MaskwrightError: NNCF fails on this model.
    """
    with without_telemetry():
        import nncf

    with quiet():
        prepared = _prepare(model)
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()):  # its progress bars
            return nncf.quantize(
                prepared,
                nncf.Dataset(inputs, lambda images: {INPUT: images}),
                preset=nncf.QuantizationPreset.MIXED,
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(inputs),
                # not validated: NNCF removes casts without effect first, which may be among the names
                ignored_scope=nncf.IgnoredScope(names=float_nodes(prepared), validate=False),
            )
    except Exception as error:  # its exceptions have no common base
        raise MaskwrightError(
            f"NNCF cannot quantize this model: {printable(one_line(error), 200)}",
            where="--precision int8",
            remedy="use --precision fp16",
        ) from None


def float_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of the operators of `FLOAT_MODULES` themselves, and of all in `FLOAT_LAYERS`."""
    kept = {f"{module.__module__}.{module.__qualname__}" for module in FLOAT_MODULES}
    names = []
    for node in model.graph.node:
        properties = {entry.key: entry.value for entry in node.metadata_props}
        classes, scopes = (ast.literal_eval(properties.get(f"pkg.torch.onnx.{key}", "[]")) for key in _ORIGIN)
        modules = [name for name in classes if not name.startswith("aten.")]
        layers = {name for scope in scopes for name in scope.split(".")}
        if (modules and modules[-1] in kept) or layers.intersection(FLOAT_LAYERS):
            names.append(node.name)
    return names


def _prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph that NNCF 3.4 can quantize: its ONNX backend needs weights stored as they are used.

    So weights are transposed in advance, and products whose first factor is a weight are rewritten.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    program = onnx_ir.serde.deserialize_model(model)
    fold_constants(program, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE)
    for node in list(program.graph):
        if node.op_type == "Gemm" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            _transpose_product(program.graph, node)
    RemoveUnusedNodesPass()(program)
    return onnx_ir.serde.serialize_model(program)


def _transpose_product(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """Replace W X + b with (X^T W^T + b^T)^T: the attention logits of deformable attention have the weight first."""
    import onnx_ir

    weight, values, *biases = node.inputs
    factors = [values, weight]
    for bias in biases:
        assert bias is not None
        assert bias.const_value is not None
        transposed_bias = onnx_ir.tensor(bias.const_value.numpy().T.copy(), name=f"{node.name}_transposed_bias")
        stored = onnx_ir.val(transposed_bias.name, const_value=transposed_bias)
        graph.register_initializer(stored)
        factors.append(stored)
    for place, value in enumerate(factors):
        node.replace_input_with(place, value)
    first, second = (node.attributes.get_int(name, 0) for name in ("transA", "transB"))
    for name, before in (("transA", second), ("transB", first)):
        node.attributes[name] = onnx_ir.AttrInt64(name, 1 - before)
    product = node.outputs[0]
    product.shape = None
    users = list(product.uses())
    transposed = onnx_ir.node("Transpose", [product], {"perm": [1, 0]}, metadata_props=dict(node.metadata_props))
    graph.insert_after(node, transposed)
    for user, place in users:
        user.replace_input_with(place, transposed.outputs[0])


def _for_task(recipe: Recipe, task: Task) -> Recipe:
    return recipe.model_copy(update={"evaluate": change_settings(recipe.evaluate, task=task)})


def _recipe_for(model: ExportedModel, recipe: Recipe) -> Recipe:
    """Return the recipe for a file; settings of results inside the file cannot change."""
    recipe = _for_task(recipe, model.evaluate_config.task)
    if not model.decides:
        return recipe
    kept = {key: getattr(recipe.evaluate, key) for key in ("metrics", "max_images", "batch_size")}
    return recipe.model_copy(update={"evaluate": model.evaluate_config.model_copy(update=kept)})


def _time_in_turns(files: list[ExportedFile], inputs: list[np.ndarray]) -> list[float]:
    """Return the median seconds of a forward pass of each file."""
    seconds: list[list[float]] = [[] for _ in files]
    for index in range(_TIMED_RUNS + 1):
        for file, times in zip(files, seconds, strict=True):
            start = time.perf_counter()
            file.run(inputs[index % len(inputs)])
            times.append(time.perf_counter() - start)
    return [float(np.median(times[1:])) for times in seconds]  # the first run allocates memory
