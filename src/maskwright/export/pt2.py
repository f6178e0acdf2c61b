"""Write an `ExportGraph` as a `.pt2` file, for programs that load it with `torch.export.load`.

That function unpickles, so maskwright only loads the file that it has just written, to check it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from maskwright.export.graph import ExportGraph
from maskwright.export.trace import export_errors, quiet, trace
from maskwright.inference.exported.metadata import parse_metadata
from maskwright.inference.exported.runtimes import ExportedFile, Outputs

_METADATA_FILE = "maskwright.json"


def write_pt2(graph: ExportGraph, size: tuple[int, int], path: Path, *, operators: str, metadata: str) -> None:
    """Write a `.pt2` file; arguments and errors are those of `write_onnx`."""
    program = trace(graph, size, operators)
    with export_errors(graph), quiet():
        torch.export.save(program, path, extra_files={_METADATA_FILE: metadata})


def open_own_pt2(path: Path, output_names: tuple[str, ...]) -> ExportedFile:
    """Open a `.pt2` file that this process has written: others may run code when they are loaded."""
    extra = {_METADATA_FILE: ""}
    program = torch.export.load(path, extra_files=extra).module()

    def run(images: np.ndarray) -> Outputs:
        with torch.no_grad():
            return {
                name: output.numpy()
                for name, output in zip(output_names, program(torch.from_numpy(images)), strict=True)
            }

    return ExportedFile(path, "torch", parse_metadata(extra[_METADATA_FILE]), run)
