"""The export command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators


def export(
    model: Path,
    destination: Path,
    *,
    format: Literal["onnx", "openvino", "torch", "executorch"] | None = None,
    size: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    task: Literal["semantic", "instance", "panoptic"] | None = None,
    contents: Literal["raw", "masks", "result"] = "raw",
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    operators: Literal["plain", "grid_sample"] = "plain",
    check_images: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    data: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    max_drop: Annotated[float, Parameter(validator=validators.Number(gte=0))] = 0.5,
    calibration_images: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 128,
    overwrite: bool = False,
) -> None:
    """Export a model for ONNX Runtime, TensorRT, OpenVINO or ExecuTorch, and check the file before it is kept.

    The file is run on images, and its outputs are compared with the model's. If they differ by more than the tolerance,
    the file is removed and the exit status is 1. An int8 file is kept if its score on the validation images is at most
    --max-drop lower than before. `maskwright predict` and `evaluate` take exported files.

    Parameters
    ----------
    model
        Checkpoint, weight file of another implementation, or name of a published model (see `maskwright zoo`).
    destination
        File to write: .onnx, .xml for OpenVINO, .pte for ExecuTorch, or .pt2 for torch.export.load.
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
        fp16 halves the size of the file. int8 makes it smaller still, and is faster on some CPUs; needs --data.
    operators
        plain: operators that every runtime has. grid_sample: fewer operators, among them GridSample.
    check_images
        Files, folders or globs of images for the check; default: packaged ones.
    data
        For int8: recipe whose training images calibrate and whose validation images judge; overrides may follow, such
        as data.root=DIR evaluate.max_images=100.
    max_drop
        For int8: largest accepted loss of the recipe's main score, in points of percent.
    calibration_images
        For int8: number of training images that the ranges of activations are measured on.
    overwrite
        Replace existing files.
    """
    from maskwright.config.recipe import load_recipe
    from maskwright.errors import MaskwrightError
    from maskwright.export.check import ExportError
    from maskwright.export.export import SUFFIXES, ExportOptions, parse_size
    from maskwright.export.export import export as run
    from maskwright.export.int8 import Int8Options

    by_suffix = SUFFIXES.get(destination.suffix.lower())
    if by_suffix is None or (format or by_suffix) != by_suffix:
        suffixes = {name: suffix for suffix, name in SUFFIXES.items()}
        raise MaskwrightError(
            f"its suffix does not name the format {format}" if format else "its suffix names no format",
            where=destination,
            remedy=f"use {suffixes[format] if format else ' or '.join(SUFFIXES)}",
        )
    int8 = Int8Options(load_recipe(data[0], data[1:]), max_drop, calibration_images) if data else None
    options = ExportOptions(by_suffix, contents, task, precision, operators, int8)
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
        print(error.table, file=sys.stderr)
        raise
    for file in files:
        print(f"{file.path}: {file.size[0]}x{file.size[1]}, {file.megabytes:.1f} MB, {file.seconds:.0f} s")
        print(file.comparison.table())
        if file.quantization:
            print(file.quantization.table())
