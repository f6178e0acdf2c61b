"""The trained model in the package, eager and exported, on one image in turns, and the score of each.

Every side predicts as its users do, from a uint8 image to a panoptic result of the image's size. The score is the
panoptic quality of nuclei on three validation images in the package.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.peer import first_call
from benchmarks.rows import Options, Part, Row
from benchmarks.timing import WHOLE, alternate, threads, timed
from maskwright.checkpoints.load import load_model
from maskwright.config.recipe import data_root, load_recipe
from maskwright.data.images.find import find_images
from maskwright.data.images.load import load_image
from maskwright.data.images.resize import resize_to
from maskwright.errors import one_line
from maskwright.evaluation.evaluate import evaluate
from maskwright.export.export import ExportOptions, export
from maskwright.export.int8 import calibration_inputs, quantize_graph
from maskwright.export.onnx import package
from maskwright.inference.exported.metadata import INPUT
from maskwright.inference.exported.runtimes import ExportedFile, Outputs, open_exported, openvino_core
from maskwright.inference.exported_model import ExportedModel
from maskwright.inference.predictor import Predictor
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.device import has_fast_bfloat16

MODEL, RECIPE = "nuclei", "demo"
SIZE = (160, 160)
CALIBRATION_IMAGES, SCORED_IMAGES = 16, 3
EAGER, COMPILED = "eager fp32", "torch.compile fp32"


class Subject(NamedTuple):
    """One way to run the model.

    Attributes:
        name: library and precision.
        model: the model, or a file of it.
        precision: of PyTorch.
        compile: whether PyTorch compiles it.
    """

    name: str
    model: Segmenter
    precision: str = "fp32"
    compile: bool = False


def bench_export(options: Options) -> Part:
    """Time eager PyTorch against exported files in their runtimes, and score each.

    Raises:
        MaskwrightError: the packages of the extra `export` are not installed.
    """
    with tempfile.TemporaryDirectory() as folder, threads(options.threads):
        path = write_file(Path(folder))
        subjects, notes = list(_subjects(path, options.threads)), []
        if find_spec("nncf") is None:
            notes.append("int8: NNCF is not installed")
        else:
            subjects += _int8_subjects(write_int8_file(path), options.threads)
        if options.compile_minutes:
            subjects.append(Subject(COMPILED, load_model(MODEL), compile=True))
        image = sample_image()
        calls = {subject.name: _call(subject, image) for subject in subjects}
        subjects, failures = _working(subjects, calls)
        notes += failures
        if COMPILED in calls:
            done, note = first_call(calls[COMPILED], options.compile_minutes, "our model")
            notes.append(note)
            subjects = subjects if done else subjects[:-1]
        timings = alternate([timed(calls[subject.name]) for subject in subjects], options.rounds or 10)
        scores = {subject.name: score(subject.model, subject.precision) for subject in subjects if not subject.compile}
        scores[COMPILED] = scores[EAGER]
    setting = f"{MODEL}, one image of {SIZE[0]}x{SIZE[1]}, {options.threads} threads"
    rows = [
        Row(
            "export",
            f"{subject.name}, PQ {100 * scores[subject.name]:.1f} %",
            setting,
            "that",
            timings[0][WHOLE],
            timing[WHOLE],
        )
        for subject, timing in zip(subjects, timings, strict=True)
    ]
    return Part(rows, ["ours is eager PyTorch in float32, that is what the row names", *notes])


def _working(subjects: list[Subject], calls: dict[str, Callable[[], object]]) -> tuple[list[Subject], list[str]]:
    """Return the subjects whose first call succeeds, and a note on each of the others; compiled ones are not called."""
    working, notes = [], []
    for subject in subjects:
        try:
            if not subject.compile:
                calls[subject.name]()
            working.append(subject)
        except RuntimeError as error:  # the runtime cannot run the file
            notes.append(f"{subject.name}: {one_line(error)}")
    return working, notes


def write_file(folder: Path) -> Path:
    """Export the model."""
    export(MODEL, folder / "model.onnx", ExportOptions(), sizes=[SIZE])
    return folder / "model.onnx"


def write_int8_file(path: Path) -> Path:
    """Quantize an exported file, whatever its score then is: that is in the table."""
    import onnx

    file = open_exported(path)
    inputs = calibration_inputs(ExportedModel(file), load_recipe(RECIPE), CALIBRATION_IMAGES)
    quantized = path.with_stem("int8")
    package(quantize_graph(onnx.load(path), inputs), quantized, replace(file.metadata, precision="int8"))
    return quantized


def sample_image() -> np.ndarray:
    """Return an image of the package at the size of the file."""
    pixels = load_image(find_images(data_root("sample") / "val")[0])
    return resize_to(pixels, SIZE)


def score(model: Segmenter, precision: str) -> float:
    """Return the panoptic quality of nuclei, 0..1."""
    recipe = load_recipe(RECIPE, ["evaluate.batch_size=1", f"evaluate.max_images={SCORED_IMAGES}"])
    return evaluate(model, recipe, precision=precision).scores["PQ_th"]


def _subjects(path: Path, count: int) -> Iterator[Subject]:
    yield Subject(EAGER, load_model(MODEL))
    if has_fast_bfloat16():
        yield Subject("eager bf16", load_model(MODEL), "bf16")
    yield Subject("ONNX Runtime fp32", ExportedModel(open_onnxruntime(path, count)))
    yield Subject("OpenVINO fp32", ExportedModel(open_openvino(path, count, "f32")))
    if has_fast_bfloat16():
        yield Subject("OpenVINO bf16", ExportedModel(open_openvino(path, count, "bf16")))


def _int8_subjects(path: Path, count: int) -> list[Subject]:
    return [
        Subject("ONNX Runtime int8", ExportedModel(open_onnxruntime(path, count))),
        Subject("OpenVINO int8", ExportedModel(open_openvino(path, count, "f32"))),
    ]


def open_onnxruntime(path: Path, count: int) -> ExportedFile:
    """Open a file in ONNX Runtime with this number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = count
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: np.ndarray) -> Outputs:
        return dict(zip(names, map(np.asarray, session.run(names, {INPUT: images})), strict=True))

    return ExportedFile(path, "onnxruntime", open_exported(path).metadata, run)


def open_openvino(path: Path, count: int, precision: str) -> ExportedFile:
    """Open a file in OpenVINO with this number of threads and this precision, "f32" or "bf16".

    The batch is set to one image: with a dynamic one, OpenVINO 2026.4 returns no image in bf16.
    """
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": count}
    core = openvino_core()
    model = core.read_model(path)
    model.reshape([1, *model.input(INPUT).partial_shape[1:]])
    compiled = core.compile_model(model, "CPU", settings)

    def run(images: np.ndarray) -> Outputs:
        outputs = compiled({INPUT: images})
        return {output.get_any_name(): np.array(outputs[output]) for output in compiled.outputs}

    return ExportedFile(path, "openvino", open_exported(path).metadata, run)


def _call(subject: Subject, image: np.ndarray) -> Callable[[], object]:
    predictor = Predictor(subject.model, device="cpu", precision=subject.precision, compile=subject.compile)
    return lambda: predictor(image, task="panoptic", tile_size=max(SIZE))
