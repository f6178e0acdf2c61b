"""Write an `ExportGraph` as a `.pte` file of ExecuTorch, for phones and other small devices.

XNNPACK runs the operators that it has, ExecuTorch's portable kernels the others. A `.pte` file has no place for
metadata, but it may have methods that return a constant: one returns the metadata, so that no second file is needed.
"""

from __future__ import annotations

from pathlib import Path

from maskwright.export.graph import ExportGraph
from maskwright.export.trace import export_errors, quiet, trace
from maskwright.inference.exported.metadata import KEY, OUTPUTS


def write_executorch(graph: ExportGraph, size: tuple[int, int], path: Path, *, operators: str, metadata: str) -> None:
    """Write a `.pte` file for one image; other arguments and errors are those of `write_onnx`.

    The batch is fixed, because ExecuTorch reserves the memory of all activations for the largest one.
    """
    program = trace(graph, size, operators, batch=1)
    with export_errors(graph), quiet():
        from executorch.backends.xnnpack import XnnpackPartitioner  # ty: ignore[import-not-found]
        from executorch.exir import to_edge_transform_and_lower  # ty: ignore[import-not-found]
        from executorch.exir.passes.constant_prop_pass import (  # ty: ignore[import-not-found]
            constant_prop_pass as fold_constants,
        )

        program = fold_constants(program)  # XNNPACK only runs convolutions whose weights are stored
        lowered = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            constant_methods={KEY: metadata, OUTPUTS: " ".join(graph.output_names)},
        )
        lowered.to_executorch().save(str(path))
