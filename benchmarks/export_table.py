"""`python -m benchmarks.export_table`: export published architectures, and print how far each file is from its model.

Weights are random, so nothing is downloaded. Each row is printed when it is done; a large model takes minutes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import App, Parameter

from maskwright.checkpoints.checkpoint import make_checkpoint, save_checkpoint
from maskwright.checkpoints.packaged import find_packaged
from maskwright.checkpoints.zoo import entry_categories, get_entry, published_models
from maskwright.config.recipe import load_recipe
from maskwright.errors import MaskwrightError
from maskwright.export.export import SUFFIXES, Exported, ExportOptions, export, parse_size
from maskwright.models import build_model

app = App(name="benchmarks.export_table")

HEAD = ("model", "input", "format", "contents", "precision", "largest difference", "results agree", "MB")
_EQUAL = {"backbone_weights", "backbone_norm", "pixel_mean", "pixel_std"}  # they do not change what is exported


def architectures() -> list[str]:
    """Return the first published model of each architecture."""
    first: dict[str, str] = {}
    for name, entry in published_models().items():
        if entry.recipe:
            first.setdefault(load_recipe(name).model.model_dump_json(exclude=_EQUAL), name)
    return list(first.values())


def export_random(name: str, size: tuple[int, int], options: ExportOptions, folder: Path) -> Exported:
    """Export a published architecture with random weights, or a model in the package with its own.

    Args:
        name: of the published or packaged model.
        size: (height, width) of the input.
        options: format, contents and precision.
        folder: where the checkpoint and the file are written.

    Raises:
        MaskwrightError: the model is unknown, or the file differs from it.
    """
    source: str | Path = name
    if find_packaged(name) is None:
        recipe = load_recipe(name)
        torch.manual_seed(0)
        model = build_model(recipe.model, entry_categories(get_entry(name)))
        source = folder / f"{name}.safetensors"
        save_checkpoint(source, make_checkpoint(model, recipe, {}))
    suffix = {format: suffix for suffix, format in SUFFIXES.items()}[options.format]
    (exported,) = export(source, folder / f"{name}{suffix}", options, sizes=[size], overwrite=True)
    return exported


def row(name: str, exported: Exported, options: ExportOptions) -> tuple[str, ...]:
    """Return the cells of `HEAD`; the largest difference is a share of the largest value of the output."""
    comparison = exported.comparison
    largest = max((difference / value for value, difference, _ in comparison.largest.values()), default=None)
    agreement = min(comparison.agreement.values())
    return (
        name,
        f"{exported.size[0]}x{exported.size[1]}",
        options.format,
        options.contents,
        options.precision,
        "" if largest is None else f"{largest:.1e}",
        f"{agreement:.2%}",
        f"{exported.megabytes:.0f}",
    )


@app.default
def export_table(
    *models: str,
    size: str = "256x256",
    format: Literal["onnx", "openvino", "torch", "executorch"] = "onnx",
    contents: Annotated[tuple[Literal["raw", "masks", "result"], ...], Parameter(consume_multiple=True)] = ("raw",),
    precision: Literal["fp32", "fp16"] = "fp32",
) -> None:
    """Export published architectures with random weights, and print a table of their differences.

    A file that cannot be made, such as an ONNX file of more than 2 GB, is reported instead.

    Parameters
    ----------
    models
        Names of published models, or of models in the package; default: the first one of each architecture.
    size
        Height and width of the input in pixels.
    format
        Format of the files.
    contents
        Contents of the files; several give one file each.
    precision
        Precision of the weights.
    """
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}", flush=True)
    for name in models or architectures():
        for kind in contents:
            options = ExportOptions(format, kind, None, precision)
            try:
                with tempfile.TemporaryDirectory() as folder:
                    exported = export_random(name, parse_size(size), options, Path(folder))
            except MaskwrightError as error:
                print(f"{name}, {kind}: {error}", file=sys.stderr)
                continue
            print(f"| {' | '.join(row(name, exported, options))} |", flush=True)


if __name__ == "__main__":
    try:
        app()
    except MaskwrightError as error:
        sys.exit(f"error: {error}")
