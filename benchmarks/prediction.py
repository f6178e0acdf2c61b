"""Whole predictions against transformers, with the same weights on the same image.

Each side runs the way its users run it, from a uint8 image to a panoptic result of the image's size, with pre- and
post-processing and the same thresholds. tests/test_against_transformers.py checks that both compute the same logits.

A third side is the peer with its networks compiled by `torch.compile`. The fourth and fifth are our model, exported, in
ONNX Runtime and OpenVINO, with our pre- and post-processing; in bf16 only OpenVINO.

Differs from the reference: transformers stretches 800x1066 to 800x1088, and ours pads; the networks' inputs have the
same size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from benchmarks import peer
from benchmarks.rows import Options, Part, Precision, compared
from benchmarks.timing import WHOLE, ModuleTimer, alternate, matrix_rate, peak_megabytes, threads, timed
from maskwright.checkpoints.checkpoint import save_checkpoint
from maskwright.checkpoints.load import read_checkpoint
from maskwright.errors import MaskwrightError, one_line
from maskwright.inference.exported_model import ExportedModel
from maskwright.inference.predictor import Predictor
from maskwright.models.mask2former import Mask2Former
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.device import autocast, has_fast_bfloat16

if TYPE_CHECKING:
    from transformers import Mask2FormerForUniversalSegmentation

OBJECT_THRESHOLD = 0.8
OVERLAP_THRESHOLD = 0.0  # random masks overlap; a higher threshold would reject all of them
PIECES = ("backbone", "pixel decoder", "masked decoder")
REST = "pre- and post-processing"


def bench_prediction(options: Options) -> Part:
    """Time whole predictions of both sides on the CPU, and their components.

    Raises:
        MaskwrightError: transformers is not installed, or this CPU only emulates the precision.
    """
    from torch.utils.flop_counter import (
        FlopCounterMode,
    )  # imported here because it imports Triton, which would count as memory of the measured processes

    name = peer.peer_name()
    kind = number_format(options.precision)
    with threads(options.threads), peer.saved_model(options.backbone, options.seed) as folder:
        ours, theirs = peer.load_ours(folder), peer.load_theirs(folder)
        pixels = peer.smooth_image(options.seed)
        common = peer.common_input(pixels)
        calls = (our_call(ours, pixels, options.precision), their_call(theirs, pixels, options.precision))
        found = [call() for call in calls]
        with FlopCounterMode(display=False) as counter:
            ours.masked_decoder(*ours.pixel_decoder(ours.backbone(common).features), False)
        rate = matrix_rate(kind)
        timers = (ModuleTimer(_our_pieces(ours)), ModuleTimer(_their_pieces(theirs)))
        sides = [timer.side(call, REST) for timer, call in zip(timers, calls, strict=True)]
        others, other_notes = _other_calls(folder, pixels, options)
        timings = alternate([*sides, *(timed(call) for call in others.values())], options.rounds or 5)
        names = tuple(others)
        del ours, theirs, others
        arguments = (folder, options.seed, options.precision)
        memory = (peak_megabytes(_predict_ours, *arguments), peak_megabytes(_predict_theirs, *arguments))
        imports = peer.imports_note(__name__)
    size = f"{peer.HEIGHT}x{peer.WIDTH}"
    setting = f"{options.backbone}, {options.precision}, one image of {size}, 1 process, {options.threads} threads"
    flops = counter.get_total_flops()
    whole, *pieces = (
        compared("prediction", piece, setting, name, timings, piece, names) for piece in (WHOLE, *PIECES, REST)
    )
    rows = [replace(whole, memory=memory, roofline=flops / rate), *pieces]
    notes = [
        f"ours finds {found[0]} segments, theirs {found[1]}, because it decides at 384x384",
        f"{flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s",
        imports,
    ]
    return Part(rows, notes + other_notes)


def _other_calls(
    folder: Path, image: np.ndarray, options: Options
) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """Return calls of further sides by their names, and notes on them."""
    calls: dict[str, Callable[[], object]] = {}
    notes = []
    if options.compile_minutes:
        theirs = peer.load_theirs(folder)
        peer.compile_networks(theirs)
        call = their_call(theirs, image, options.precision)
        compiled, note = peer.first_call(call, options.compile_minutes)
        calls |= {peer.COMPILED: call} if compiled else {}
        notes.append(note)
    if options.runtimes:
        try:
            exported, note = _exported_calls(folder, image, options)
        except MaskwrightError as error:  # e.g. a package is missing
            exported, note = {}, f"no exported model: {one_line(error)}"
        calls |= exported
        notes.append(note)
    return calls, notes


def _exported_calls(folder: Path, image: np.ndarray, options: Options) -> tuple[dict[str, Callable[[], object]], str]:
    """Return calls of our exported model in each runtime, and a note.

    Raises:
        MaskwrightError: a package is missing, or the file differs from the model.
    """
    from benchmarks.exported import open_onnxruntime, open_openvino  # here, for the memory of the measured processes
    from maskwright.export.export import ExportOptions, export
    from maskwright.export.onnx import check_packages

    check_packages("openvino", "fp32")
    height, width = peer.common_input(image).shape[2:]
    with TemporaryDirectory() as own:  # the runtimes have read the file when they are made
        checkpoint, path = Path(own) / "model.safetensors", Path(own) / "model.onnx"
        read = read_checkpoint(folder)
        sizes = read.evaluate.model_copy(update={"short_side": peer.HEIGHT, "max_side": peer.MAX_SIDE})
        save_checkpoint(checkpoint, replace(read, evaluate=sizes))
        export(checkpoint, path, ExportOptions(task="panoptic"), sizes=[(height, width)], on_step=lambda _: None)
        files = {}
        if options.precision == "fp32":
            files["ONNX Runtime"] = open_onnxruntime(path, options.threads)
        kind = "bf16" if options.precision == "bf16" else "f32"
        files["OpenVINO"] = open_openvino(path, options.threads, kind)
    calls = {name: our_call(ExportedModel(file), image, "fp32") for name, file in files.items()}
    return calls, f"{', '.join(calls)}: our model, exported at {height}x{width}, with our pre- and post-processing"


def number_format(precision: Precision) -> torch.dtype:
    """Return the type of the network's matrix products.

    Raises:
        MaskwrightError: bf16 on a CPU that only emulates it.
    """
    if precision == "bf16" and not has_fast_bfloat16():
        raise MaskwrightError("this CPU has no bfloat16 matrix instructions", remedy="use --precision fp32")
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _our_pieces(model: Mask2Former) -> dict[str, nn.Module]:
    return dict(zip(PIECES, (model.backbone, model.pixel_decoder, model.masked_decoder), strict=True))


def _their_pieces(model: Mask2FormerForUniversalSegmentation) -> dict[str, nn.Module]:
    pixels = model.model.pixel_level_module
    return dict(zip(PIECES, (pixels.encoder, pixels.decoder, model.model.transformer_module), strict=True))


def our_call(model: Segmenter, image: np.ndarray, precision: Precision, device: str = "cpu") -> Callable[[], int]:
    """Make a call that predicts with our model and returns the number of segments."""
    predictor = Predictor(model, device=device, precision=precision)
    return lambda: len(
        predictor(image, task="panoptic", object_threshold=OBJECT_THRESHOLD, overlap_threshold=OVERLAP_THRESHOLD).labels
    )


def their_call(
    model: Mask2FormerForUniversalSegmentation, image: np.ndarray, precision: Precision, device: str = "cpu"
) -> Callable[[], int]:
    """Make a call that predicts with their model and returns the number of segments."""
    from transformers import Mask2FormerImageProcessor

    processor = Mask2FormerImageProcessor(size={"shortest_edge": peer.HEIGHT, "longest_edge": peer.MAX_SIDE})

    @torch.no_grad()
    def predict() -> int:
        inputs = processor(images=image, return_tensors="pt").to(device)
        with autocast(torch.device(device), precision):
            output = model(**inputs)
        result = processor.post_process_panoptic_segmentation(
            output,
            threshold=OBJECT_THRESHOLD,
            overlap_mask_area_threshold=OVERLAP_THRESHOLD,
            label_ids_to_fuse=set(range(peer.THINGS, peer.CLASSES)),
            target_sizes=[image.shape[:2]],
        )
        return len(result[0]["segments_info"])

    return predict


def _predict_ours(folder: Path, seed: int, precision: Precision) -> int:
    return our_call(peer.load_ours(folder), peer.smooth_image(seed), precision)()


def _predict_theirs(folder: Path, seed: int, precision: Precision) -> int:
    return their_call(peer.load_theirs(folder), peer.smooth_image(seed), precision)()
