"""Trace an `ExportGraph` to a program of PyTorch's basic operators, from which all formats are written."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch.export import Dim, ExportedProgram

from maskwright.errors import MaskwrightError, one_line, printable
from maskwright.export.graph import ExportGraph
from maskwright.inference.exported.metadata import INPUT
from maskwright.models.ops.cpu_path import plain_paths
from maskwright.models.ops.deformable_attention import use_backend

BACKENDS = {"plain": "gather", "grid_sample": "grid"}  # of deformable attention, by --operators

_BATCH = 2  # while tracing: a batch of one would become a constant


def trace(graph: ExportGraph, size: tuple[int, int], operators: str, batch: int | None = None) -> ExportedProgram:
    """Trace a graph for images of one size.

    Args:
        graph: in evaluation mode, on a CPU.
        size: (height, width) of the images.
        operators: "plain", or "grid_sample" for the operator GridSample.
        batch: number of images; None allows any.

    Raises:
        MaskwrightError: the model cannot be traced.
    """
    images = torch.zeros(batch or _BATCH, len(graph.model.pixel_mean), *size)
    dynamic = None if batch else {INPUT: {0: Dim("batch")}}
    with torch.no_grad(), use_backend(BACKENDS[operators]), export_errors(graph), quiet():
        with plain_paths():
            graph(images)  # fills the caches of position tables, which tracing would fill with tensors without values
        return torch.export.export(graph, (images,), dynamic_shapes=dynamic)


@contextmanager
def export_errors(graph: ExportGraph) -> Generator[None]:
    """Turn errors of PyTorch's exporters into one sentence with their root cause."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # the exporter wraps it several times
            reason = reason.__cause__
        config = graph.model.config
        raise MaskwrightError(
            f"cannot be exported: {printable(one_line(reason), 300)}", where=f"{config.family} with {config.backbone}"
        ) from None


@contextmanager
def quiet() -> Generator[None]:
    """Hide what the exporters log and warn about their own steps."""
    names = ("torch.onnx", "torch.export", "torch.utils", "onnxscript", "onnx_ir", "nncf")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
