"""Write an `ExportGraph` as an ONNX file, and that as OpenVINO's format."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from maskwright.errors import MaskwrightError
from maskwright.export.graph import ExportGraph
from maskwright.export.trace import export_errors, quiet, trace
from maskwright.inference.exported.metadata import INPUT, KEY

OPSET = 20
_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torch": (),
}


def check_packages(format: str) -> None:
    """Raise MaskwrightError if a package that writes or checks the format is missing."""
    missing = [name for name in _PACKAGES[format] if find_spec(name) is None]
    if missing:
        raise MaskwrightError(
            f"needs {', '.join(missing)}", where=f"--format {format}", remedy="pip install maskwright[export]"
        )


def write_onnx(graph: ExportGraph, size: tuple[int, int], path: Path, *, operators: str, metadata: str) -> None:
    """Write an ONNX file for images of one size, in batches of any size.

    Unusual: the optimizer of onnxscript 0.7.2 names the limits of a `clamp` after its input, and confuses those of two
    clamps of one value. So no value may be clamped twice; see `_gather` in `deformable_attention.py`.

    Args:
        graph: see `trace`.
        size: (height, width) of the images.
        path: of the file.
        operators: see `trace`.
        metadata: JSON.

    Raises:
        MaskwrightError: the model has an operator that cannot be exported.
    """
    program = trace(graph, size, operators)
    with torch.no_grad(), export_errors(graph), quiet():
        model = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(graph.output_names),
            external_data=False,
            optimize=True,
            verbose=False,
        )
        assert model is not None
        model.model.metadata_props[KEY] = metadata
        model.save(path)


def convert_to_openvino(onnx_file: Path, path: Path, *, metadata: str) -> None:
    """Write an ONNX file as OpenVINO's `.xml` and `.bin`, with the same types of weights."""
    import openvino

    model = openvino.convert_model(onnx_file)
    model.set_rt_info(metadata, [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)
