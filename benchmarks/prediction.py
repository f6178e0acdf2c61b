"""Whole predictions against transformers, with the same weights on the same picture.

Each side runs as its user runs it, from a uint8 picture to a panoptic result of the picture's size, pre- and
post-processing included. Both sides use the same thresholds.

Differs from the reference: transformers stretches 800x1066 to 800x1088, where ours pads; the networks' inputs have the
same size. The difference of logits is taken on one common input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from benchmarks import peer
from benchmarks.rows import Options, Part, Precision, compared
from benchmarks.timing import WHOLE, Stopwatch, alternate, matrix_rate, peak_megabytes, threads
from maskwright.errors import MaskwrightError
from maskwright.inference.predictor import Predictor
from maskwright.models.mask2former import Mask2Former
from maskwright.runtime.device import autocast, has_fast_bfloat16

if TYPE_CHECKING:
    from transformers import Mask2FormerForUniversalSegmentation

OBJECT_THRESHOLD = 0.8
OVERLAP_THRESHOLD = 0.0  # random masks overlap; a higher one would reject them all
PIECES = ("backbone", "pixel decoder", "masked decoder")
REST = "pre- and post-processing"


def bench_prediction(options: Options) -> Part:
    """Time whole predictions of both sides on the CPU, and their parts.

    Raises:
        MaskwrightError: transformers is not installed, or this CPU would emulate the precision.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which the measured processes need not hold

    name = peer.peer_name()
    kind = number_format(options.precision)
    with threads(options.threads), peer.saved_model(options.backbone, options.seed) as folder:
        ours, theirs = peer.load_ours(folder), peer.load_theirs(folder)
        pixels = peer.picture(options.seed)
        common = peer.common_input(pixels)
        classes, masks = _differences(ours, theirs, common)
        calls = (our_call(ours, pixels, options.precision), their_call(theirs, pixels, options.precision))
        found = [call() for call in calls]
        with FlopCounterMode(display=False) as counter:
            ours.masked_decoder(*ours.pixel_decoder(ours.backbone(common).features), False)
        rate = matrix_rate(kind)
        watches = (Stopwatch(_our_pieces(ours)), Stopwatch(_their_pieces(theirs)))
        sides = [watch.side(call, REST) for watch, call in zip(watches, calls, strict=True)]
        timings = alternate(sides, options.rounds or 5)
        del ours, theirs
        arguments = (folder, options.seed, options.precision)
        memory = (peak_megabytes(_predict_ours, *arguments), peak_megabytes(_predict_theirs, *arguments))
    setting = f"{options.backbone}, {options.precision}, {peer.HEIGHT}x{peer.WIDTH}, {options.threads} threads"
    flops = counter.get_total_flops()
    whole = compared("prediction", WHOLE, setting, name, timings)
    pieces = [compared("prediction", piece, setting, name, timings, piece) for piece in (*PIECES, REST)]
    rows = [replace(whole, memory=memory, roofline=flops / rate), *pieces]
    notes = [
        f"largest difference on one input (fp32): class logits {classes:.1e}, mask logits {masks:.1e}",
        f"ours finds {found[0]} segments, theirs, which decides at 384x384, {found[1]}",
        f"{flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s",
    ]
    return Part(rows, notes)


def number_format(precision: Precision) -> torch.dtype:
    """The type of a precision's products.

    Raises:
        MaskwrightError: bf16 on a CPU that only emulates it, where nobody would use it.
    """
    if precision == "bf16" and not has_fast_bfloat16():
        raise MaskwrightError("bench: this CPU has no instructions for products of bfloat16; use --precision fp32")
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _our_pieces(model: Mask2Former) -> dict[str, nn.Module]:
    return dict(zip(PIECES, (model.backbone, model.pixel_decoder, model.masked_decoder), strict=True))


def _their_pieces(model: Mask2FormerForUniversalSegmentation) -> dict[str, nn.Module]:
    pixels = model.model.pixel_level_module
    return dict(zip(PIECES, (pixels.encoder, pixels.decoder, model.model.transformer_module), strict=True))


@torch.no_grad()
def _differences(
    ours: Mask2Former, theirs: Mask2FormerForUniversalSegmentation, pixels: torch.Tensor
) -> tuple[float, float]:
    """The largest difference of class and of mask logits."""
    prediction = ours.masked_decoder(*ours.pixel_decoder(ours.backbone(pixels).features), False)[-1]
    expected = theirs(pixel_values=pixels)
    classes = (prediction.class_logits - expected.class_queries_logits).abs().max().item()
    return classes, (prediction.mask_logits() - expected.masks_queries_logits).abs().max().item()


def our_call(model: Mask2Former, picture: np.ndarray, precision: Precision) -> Callable[[], int]:
    """A prediction of ours, which gives the number of segments."""
    predictor = Predictor(model, device="cpu", precision=precision)
    return lambda: len(
        predictor(
            picture, task="panoptic", object_threshold=OBJECT_THRESHOLD, overlap_threshold=OVERLAP_THRESHOLD
        ).labels
    )


def their_call(
    model: Mask2FormerForUniversalSegmentation, picture: np.ndarray, precision: Precision
) -> Callable[[], int]:
    """A prediction of theirs, which gives the number of segments."""
    from transformers import Mask2FormerImageProcessor

    processor = Mask2FormerImageProcessor(size={"shortest_edge": peer.HEIGHT, "longest_edge": peer.MAX_SIDE})

    @torch.no_grad()
    def predict() -> int:
        inputs = processor(images=picture, return_tensors="pt")
        with autocast(torch.device("cpu"), precision):
            output = model(**inputs)
        result = processor.post_process_panoptic_segmentation(
            output,
            threshold=OBJECT_THRESHOLD,
            overlap_mask_area_threshold=OVERLAP_THRESHOLD,
            label_ids_to_fuse=set(range(peer.THINGS, peer.CLASSES)),
            target_sizes=[picture.shape[:2]],
        )
        return len(result[0]["segments_info"])

    return predict


def _predict_ours(folder: Path, seed: int, precision: Precision) -> int:
    return our_call(peer.load_ours(folder), peer.picture(seed), precision)()


def _predict_theirs(folder: Path, seed: int, precision: Precision) -> int:
    return their_call(peer.load_theirs(folder), peer.picture(seed), precision)()
