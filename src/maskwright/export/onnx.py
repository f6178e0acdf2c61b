"""Write an `ExportGraph` as an ONNX file, and convert that to OpenVINO's format."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from maskwright.errors import MaskwrightError
from maskwright.export.graph import ExportGraph
from maskwright.export.trace import export_errors, quiet, trace
from maskwright.inference.exported.metadata import INPUT, KEY, ExportMetadata
from maskwright.inference.exported.runtimes import write_checksum

if TYPE_CHECKING:
    import onnx
    import onnx_ir

OPSET = 20
MAX_WEIGHTS = 2 * 10**9  # bytes; protobuf allows 2 GiB for a whole file
_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torch": (),
    "executorch": ("executorch",),
}
_TELEMETRY = "openvino_telemetry"


def check_packages(format: str, precision: str) -> None:
    """Raise MaskwrightError if a package that writes or checks a file is missing."""
    needed = {f"--format {format}": _PACKAGES[format], "--precision int8": ("nncf",) if precision == "int8" else ()}
    for option, names in needed.items():
        missing = [name for name in names if find_spec(name) is None]
        if missing:
            raise MaskwrightError(
                f"needs {', '.join(missing)}",
                where=option,
                remedy=f"pip install 'maskwright[{'executorch' if format == 'executorch' else 'export'}]'",
            )


def is_too_large(graph: ExportGraph) -> bool:
    """Return whether the weights of a graph do not fit into one ONNX file."""
    tensors = [*graph.parameters(), *graph.buffers()]
    return sum(tensor.nbytes for tensor in tensors) > MAX_WEIGHTS


def write_onnx(graph: ExportGraph, size: tuple[int, int], path: Path, *, operators: str, metadata: str) -> None:
    """Write an ONNX file for images of one size, in batches of any size.

    Weights that are too large for it are written to a second file, with `.data` after the name.

    Args:
        graph: see `trace`.
        size: (height, width) of the images.
        path: of the file.
        operators: see `trace`.
        metadata: JSON.

    Raises:
        MaskwrightError: the model has an operator that cannot be exported.
    """
    import onnx_ir

    program = trace(graph, size, operators)
    with torch.no_grad(), export_errors(graph), quiet():
        model = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(graph.output_names),
            external_data=False,
            optimize=False,
            verbose=False,
        )
        assert model is not None
        _simplify(model.model)
        model.model.metadata_props[KEY] = metadata
        onnx_ir.save(model.model, path, external_data=f"{path.name}.data" if is_too_large(graph) else None)


def _simplify(model: onnx_ir.Model) -> None:
    """Compute what does not depend on the images, and merge equal operators and weights.

    The exporter's own `optimize` also tries rewrite rules on every operator, which takes more than half of the time of
    an export. Runtimes have such rules themselves: the files run equally fast.
    """
    from onnx_ir.passes import Sequential
    from onnx_ir.passes import common as passes
    from onnxscript.optimizer import fold_constants

    fold_constants(model)
    Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)


def package(model: onnx.ModelProto, path: Path, metadata: ExportMetadata) -> None:
    """Write an ONNX graph as a complete file: `.onnx`, or `.xml` for OpenVINO, with its metadata and checksum."""
    import onnx

    onnx_file = path.with_suffix(".onnx")
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {KEY: metadata.to_json()})
    onnx.save(model, onnx_file)
    if path.suffix == ".xml":
        convert_to_openvino(onnx_file, path, metadata=metadata.to_json())
    write_checksum(path)


def convert_to_openvino(onnx_file: Path, path: Path, *, metadata: str) -> None:
    """Write an ONNX file as OpenVINO's `.xml` and `.bin`, with the same types of weights."""
    with without_telemetry():
        import openvino

        model = openvino.convert_model(onnx_file)
    model.set_rt_info(metadata, [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)


@contextmanager
def without_telemetry() -> Generator[None]:
    """Keep OpenVINO and NNCF from sending usage statistics to Google Analytics, which they do without asking.

    Both skip it if the package that sends them cannot be imported.
    """
    before = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # ty: ignore[invalid-assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules[_TELEMETRY]
        else:
            sys.modules[_TELEMETRY] = before
