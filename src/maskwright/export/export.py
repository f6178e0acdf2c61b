"""`maskwright export`: write a model as a file for other runtimes, and keep it only if it gives the model's results."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from maskwright import __version__
from maskwright.checkpoints.checkpoint import Checkpoint
from maskwright.checkpoints.load import model_from_checkpoint, read_checkpoint
from maskwright.config.recipe import change_settings
from maskwright.data.images.find import find_images
from maskwright.data.images.multichannel import load_pixels
from maskwright.errors import MaskwrightError
from maskwright.export.check import Comparison, ExportError, compare
from maskwright.export.executorch import write_executorch
from maskwright.export.graph import ExportGraph
from maskwright.export.half_weights import with_half_weights
from maskwright.export.int8 import Int8Options, Quantization, check_int8, quantize_file
from maskwright.export.onnx import check_packages, convert_to_openvino, is_too_large, write_onnx
from maskwright.export.pt2 import open_own_pt2, write_pt2
from maskwright.inference.exported.metadata import Contents, ExportMetadata
from maskwright.inference.exported.predictor import fit
from maskwright.inference.exported.runtimes import is_exported, open_exported, write_checksum
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.atomic_write import temporary_folder
from maskwright.structures.annotations import Task

logger = logging.getLogger(__name__)

Format = Literal["onnx", "openvino", "torch", "executorch"]
Precision = Literal["fp32", "fp16", "int8"]
Operators = Literal["plain", "grid_sample"]

SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch", ".pte": "executorch"}
_SAMPLES = 2  # images of the packaged sample that files are checked with
_MAX_SIDE = 8192


@dataclass(frozen=True)
class ExportOptions:
    """How a model is exported.

    Attributes:
        format: "onnx", "openvino", "torch" or "executorch".
        contents: "raw", "masks" or "result"; see `ExportMetadata`.
        task: None is the one of the checkpoint.
        precision: "fp32"; "fp16" to store the weights as float16; or "int8" to quantize.
        operators: "plain", or "grid_sample" for the operator GridSample in deformable attention.
        int8: how the file is quantized and judged; for "int8" only.
    """

    format: Format = "onnx"
    contents: Contents = "raw"
    task: Task | None = None
    precision: Precision = "fp32"
    operators: Operators = "plain"
    int8: Int8Options | None = None


@dataclass(frozen=True)
class Exported:
    """One file that was written.

    Attributes:
        path: the file.
        size: (height, width) of its input.
        megabytes: of the file, and of its `.bin` if it has one, in 10^6 bytes.
        seconds: duration of the export.
        comparison: with the model; before it was quantized.
        quantization: scores of an int8 file, None for others.
    """

    path: Path
    size: tuple[int, int]
    megabytes: float
    seconds: float
    comparison: Comparison
    quantization: Quantization | None = None


def export(
    source: str | Path,
    destination: Path,
    options: ExportOptions,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    check_images: Sequence[str | Path] = (),
    overwrite: bool = False,
    on_step: Callable[[str], None] = logger.info,
) -> list[Exported]:
    """Export a model at one or several sizes, one file each.

    Args:
        source: what `read_checkpoint` takes.
        destination: the file; with several sizes, each is added to its name.
        options: see the class.
        sizes: (height, width) each; empty uses `default_size`.
        check_images: files, folders and globs of images for the check; empty uses packaged ones.
        overwrite: replace existing files.
        on_step: called with a text before each step.

    Raises:
        CheckpointError: the source cannot be used.
        ExportError: a file differs from the model, or an int8 file has a lower score than is accepted.
        MaskwrightError: the model cannot be exported in this way, or the file cannot be written.
    """
    if is_exported(source):
        raise MaskwrightError("an exported file", where=source, remedy="export the checkpoint that it was made from")
    _check_precision(options)
    check_packages(options.format, options.precision)
    checkpoint = read_checkpoint(source)
    model = model_from_checkpoint(checkpoint)
    model.evaluate_config = _settings(model, options)
    sizes = [check_size(size, model) for size in sizes] or [default_size(model)]
    paths = [_path_of(destination, size, len(sizes) > 1) for size in sizes]
    for path in paths:
        if path.exists() and not overwrite:
            raise MaskwrightError("exists already", where=path, remedy="choose another name, or add --overwrite")
    if options.int8:
        check_int8(options.int8, model, model.evaluate_config.task)
    graph = _build_graph(model, options)
    written = _build_graph(with_half_weights(model), options) if options.precision == "fp16" else graph
    if (options.format == "onnx" or options.int8) and is_too_large(written):
        raise MaskwrightError(
            "this model has more than 2 GB of weights, the most that an ONNX file can hold",
            where="--precision int8" if options.int8 else destination,
            remedy="export it to .xml or .pt2" + (" in fp32 or fp16" if options.int8 else ""),
        )
    images = _load_images(check_images, model)
    digest = weights_digest(checkpoint)
    done = []
    for size, path in zip(sizes, paths, strict=True):
        metadata = _describe(checkpoint, model, options, size, digest)
        start = time.monotonic()
        checked = [fit(image, metadata) for image in images]
        comparison, quantization, count = _write_checked(written, graph, metadata, path, checked, options.int8, on_step)
        done.append(Exported(path, size, count / 1e6, time.monotonic() - start, comparison, quantization))
    return done


def default_size(model: Segmenter) -> tuple[int, int]:
    """Return the input size of an exported model if none is requested, rounded up to a multiple that the network takes.

    It is `evaluate.size`, else the crop size of the training, else a square of `evaluate.short_side`.

    Raises:
        MaskwrightError: the model has none of these.
    """
    config = model.evaluate_config
    size = config.size
    if size is None and model.recipe is not None:
        size = model.recipe.train.augment.crop_size
    if size is None and config.short_side is not None:
        size = (config.short_side, config.short_side)
    if size is None:
        raise MaskwrightError(
            "this model has no default size", where="--size", remedy="add it, for example --size 512x704"
        )
    height, width = (-(-side // model.size_divisor) * model.size_divisor for side in size)
    return height, width


def parse_size(text: str) -> tuple[int, int]:
    """Parse HEIGHTxWIDTH, such as 512x704.

    Raises:
        MaskwrightError: it is something else, such as a dynamic size.
    """
    if match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower()):
        return int(match[1]), int(match[2])
    if re.search(r"dyn|-1|\*|\?|^\d*x$|^x\d*$", text.lower()):
        raise MaskwrightError(
            f"dynamic height and width cannot be exported, found '{text}': position tables and windows depend on them",
            where="--size",
            remedy="name the sizes that are needed, one file each, such as --size 512x704 --size 704x512; "
            "the batch is always dynamic",
        )
    raise MaskwrightError(f"expected HEIGHTxWIDTH in pixels, such as 512x704, found '{text}'", where="--size")


def check_size(size: tuple[int, int], model: Segmenter) -> tuple[int, int]:
    """Return the size.

    Raises:
        MaskwrightError: it is not a multiple of what the network takes, or out of range.
    """
    divisor = model.size_divisor
    nearest = tuple(max(divisor, round(side / divisor) * divisor) for side in size)
    if not all(0 < side <= _MAX_SIDE for side in size):
        raise MaskwrightError(f"{size[0]}x{size[1]} is not within 1 to {_MAX_SIDE} pixels", where="--size")
    if nearest != size:
        raise MaskwrightError(
            f"{size[0]}x{size[1]} is not a multiple of {divisor} in height and width",
            where="--size",
            remedy=f"the nearest is {nearest[0]}x{nearest[1]}",
        )
    return size


def weights_digest(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of all weights in the order of their names, as hex."""
    digest = hashlib.sha256()
    for key in sorted(checkpoint.state):
        digest.update(key.encode())
        digest.update(checkpoint.state[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_precision(options: ExportOptions) -> None:
    if options.precision == "int8" and options.format not in ("onnx", "openvino"):
        raise MaskwrightError("is for ONNX and OpenVINO", where="--precision int8", remedy="use .onnx or .xml")
    if options.precision == "fp16" and options.format == "executorch":
        raise MaskwrightError("is not for ExecuTorch", where="--precision fp16", remedy="leave it out")
    if options.precision == "int8" and options.int8 is None:
        raise MaskwrightError(
            "needs images to measure activations and scores on", where="--precision int8", remedy="add --data RECIPE"
        )
    if options.precision != "int8" and options.int8 is not None:
        raise MaskwrightError("is for --precision int8", where="--data", remedy="leave it out")


def _settings(model: Segmenter, options: ExportOptions):
    """Return the `evaluate` section of the file; a result inside it is decided from a single prediction."""
    config = change_settings(model.evaluate_config, task=options.task)
    model.check_task(config.task)
    if options.contents == "masks" and "panoptic" not in model.tasks:
        raise MaskwrightError(
            "this model classifies pixels and has no masks", where="--contents masks", remedy="use raw or result"
        )
    if options.contents != "result":
        return config
    dropped = [key for key in ("flip", "window_size", "scales") if getattr(config, key) not in (None, False, (1.0,))]
    if dropped:
        logger.warning(
            "the result in the file is decided from one prediction of the whole image: %s of the checkpoint's settings "
            "are not used",
            ", ".join(dropped),
        )
    values = config.model_dump() | {"flip": False, "window_size": None, "window_stride": None, "scales": (1.0,)}
    return type(config).model_validate(values)


def _path_of(destination: Path, size: tuple[int, int], several: bool) -> Path:
    if not several:
        return destination
    return destination.with_name(f"{destination.stem}-{size[0]}x{size[1]}{destination.suffix}")


def _describe(
    checkpoint: Checkpoint, model: Segmenter, options: ExportOptions, size: tuple[int, int], digest: str
) -> ExportMetadata:
    config = model.evaluate_config
    return ExportMetadata(
        contents=options.contents,
        task=config.task,
        tasks=(config.task,) if options.contents == "result" else _tasks(model),
        size=size,
        channels=len(model.config.pixel_mean),
        pixel_mean=tuple(model.config.pixel_mean),
        pixel_std=tuple(model.config.pixel_std),
        categories=model.categories,
        evaluate=config.model_dump(mode="json"),
        model=model.config.model_dump(mode="json"),
        precision="fp32" if options.int8 else options.precision,  # until it is quantized
        operators=options.operators,
        licence=checkpoint.provenance.get("weights_licence") or checkpoint.provenance.get("licence"),
        provenance=checkpoint.provenance,
        weights_sha256=digest,
        version=__version__,
    )


def _tasks(model: Segmenter) -> tuple[Task, ...]:
    has_things = any(category.is_thing for category in model.categories)
    return tuple(task for task in model.tasks if task != "instance" or has_things)


def _build_graph(model: Segmenter, options: ExportOptions) -> ExportGraph:
    config = model.evaluate_config
    return ExportGraph(model, options.contents, config.task, config).eval()


def _write_checked(
    written: ExportGraph,
    reference: ExportGraph,
    metadata: ExportMetadata,
    path: Path,
    images: list[tuple[np.ndarray, tuple[int, int]]],
    int8: Int8Options | None,
    on_step: Callable[[str], None],
) -> tuple[Comparison, Quantization | None, int]:
    """Write a file to a hidden folder, check it there, and move it into place; also return its size in bytes."""
    shape = f"{metadata.size[0]}x{metadata.size[1]}"
    with temporary_folder(path) as folder:
        on_step(f"exporting at {shape}; for a large model this takes minutes")
        file = _write(written, metadata, folder, SUFFIXES[path.suffix.lower()])
        on_step(f"checking with {len(images)} images")
        is_pt2 = file.suffix == ".pt2"
        opened = open_own_pt2(file, written.output_names) if is_pt2 else open_exported(file)
        comparison = compare(reference, opened, images)
        if not comparison.passed:
            raise ExportError(
                "differs from the model by more than the tolerance, so it was not kept",
                where=path,
                remedy="try --operators grid_sample or --precision fp32, and report this with the table",
                table=comparison.table(),
            )
        quantization = None
        if int8:
            file, quantization = quantize_file(opened, folder / "model.onnx", int8, on_step, path)
        count = 0
        for part in sorted(folder.glob(f"{file.stem}.*")):  # .bin before .xml
            if part.suffix in (file.suffix, ".bin"):
                count += part.stat().st_size
                part.replace(path.with_suffix(part.suffix) if part.suffix == ".bin" else path)
    return comparison, quantization, count


def _write(graph: ExportGraph, metadata: ExportMetadata, folder: Path, format: Format) -> Path:
    """Write a file `model.*` into a folder, and return its path."""
    text = metadata.to_json()
    if format == "torch":
        write_pt2(graph, metadata.size, folder / "model.pt2", operators=metadata.operators, metadata=text)
        return folder / "model.pt2"
    if format == "executorch":
        file = folder / "model.pte"
        write_executorch(graph, metadata.size, file, operators=metadata.operators, metadata=text)
        write_checksum(file)
        return file
    file = folder / "model.onnx"
    write_onnx(graph, metadata.size, file, operators=metadata.operators, metadata=text)
    if format == "openvino":
        file = folder / "model.xml"
        convert_to_openvino(folder / "model.onnx", file, metadata=text)
    write_checksum(file)
    return file


def _load_images(sources: Sequence[str | Path], model: Segmenter) -> list[np.ndarray]:
    channels = model.config.channels
    if sources:
        paths = sorted({path for source in sources for path in find_images(str(source))})
        return [load_pixels(path, channels) for path in paths]
    folder = resources.files("maskwright.data") / "sample" / "val"
    paths = sorted(Path(str(folder)).glob("*.jpg")) + sorted(Path(str(folder)).glob("*.png"))
    images = [load_pixels(path, None) for path in paths[:_SAMPLES]]
    count = len(model.config.pixel_mean)
    return images if count == 3 else [np.resize(image, (*image.shape[:2], count)) for image in images]
