"""The export command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def export(
    model: Path,
    destination: Path,
    *,
    format: Literal["onnx", "openvino", "torch"] | None = None,
    size: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    task: Literal["semantic", "instance", "panoptic"] | None = None,
    contents: Literal["raw", "masks", "result"] = "raw",
    precision: Literal["fp32", "fp16"] = "fp32",
    operators: Literal["plain", "grid_sample"] = "plain",
    check_images: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    overwrite: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Export a model for ONNX Runtime, TensorRT or OpenVINO, and check the file before it is kept.

    The file is run on images, and its outputs are compared with the model's. If they differ by more than the tolerance,
    the file is removed and the exit status is 1. `maskwright predict` and `evaluate` take exported files.

    Parameters
    ----------
    model
        Checkpoint, weight file of another implementation, or name of a published model (see `maskwright zoo`).
    destination
        File to write: .onnx, .xml for OpenVINO, or .pt2 for torch.export.load.
    format
        Format of the file; default: by the suffix of the destination.
    size
        Height and width of the input in pixels, such as 512x704; several sizes give one file each. Default: the
        recipe's.
    task
        Task of the result; default: the checkpoint's.
    contents
        raw: class logits, mask embeddings and mask features, from which maskwright makes results of any task. masks:
        class and mask logits. result: the finished label map, segments or instances.
    precision
        fp16 halves the size of the file.
    operators
        plain: operators that every runtime has. grid_sample: fewer operators, among them GridSample.
    check_images
        Files, folders or globs of images for the check; default: packaged ones.
    overwrite
        Replace existing files.
    """
    from maskwright.errors import MaskwrightError
    from maskwright.export.export import SUFFIXES, ExportError, ExportOptions, parse_size
    from maskwright.export.export import export as run

    by_suffix = SUFFIXES.get(destination.suffix.lower())
    if by_suffix is None or (format or by_suffix) != by_suffix:
        suffixes = {name: suffix for suffix, name in SUFFIXES.items()}
        raise MaskwrightError(
            f"its suffix does not name the format {format}" if format else "its suffix names no format",
            where=destination,
            remedy=f"use {suffixes[format] if format else ' or '.join(SUFFIXES)}",
        )
    options = ExportOptions(by_suffix, contents, task, precision, operators)
    try:
        files = run(
            model,
            destination,
            options,
            sizes=[parse_size(text) for text in size],
            check_images=check_images,
            overwrite=overwrite,
        )
    except ExportError as error:
        print(error.comparison.table(), file=sys.stderr)
        raise
    for file in files:
        print(f"{file.path}: {file.size[0]}x{file.size[1]}, {file.megabytes:.1f} MB, {file.seconds:.0f} s")
        print(file.comparison.table())
