"""Predictions and training steps of EoMT against transformers, with the same random weights on the same image.

A DINOv2 ViT-S with 200 queries at 640x640. Predictions go from a uint8 image to a panoptic result of its size, as in
`prediction`, and without masks in the attention, as after training. Training steps have masks in all blocks with
queries, as at the beginning, and go from prepared pixels and masks to the optimizer. Times are processor seconds,
which other load on the machine changes less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from benchmarks import peer
from benchmarks.peer import CLASSES, CONFIDENT_QUERIES, THINGS
from benchmarks.prediction import OBJECT_THRESHOLD, OVERLAP_THRESHOLD, number_format, our_call
from benchmarks.rows import Options, Part, Precision, compared
from benchmarks.timing import alternate, peak_megabytes, threads, timed
from benchmarks.training import CLIP, make_batch
from maskwright.checkpoints.load import load_model
from maskwright.config.recipe import load_recipe
from maskwright.models.eomt import Eomt
from maskwright.runtime.device import autocast, create_accelerator
from maskwright.training.optimizer import build_optimizer
from maskwright.training.step import build_criterion, train_step

if TYPE_CHECKING:
    from transformers import EomtForUniversalSegmentation

SIDE, HEIGHT, WIDTH = 640, 480, 640
VIT = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "num_blocks": 3, "num_queries": 200}


def bench_eomt(options: Options) -> Part:
    """Time whole predictions and training steps of both sides on the CPU.

    Raises:
        MaskwrightError: transformers is not installed, or this CPU only emulates the precision.
    """
    name, rounds = peer.peer_name(), options.rounds or 3
    number_format(options.precision)
    sizes = f"ViT-S, {options.precision}, {SIDE}x{SIDE}, batch 1, 1 process, {options.threads} threads"
    rows = []
    with threads(options.threads), _saved_model(options.seed) as folder:
        arguments = (folder, options.seed, options.precision)
        for part, ours, theirs in (
            ("prediction", our_prediction, their_prediction),
            ("training step", our_step, their_step),
        ):
            calls = [make(*arguments) for make in (ours, theirs)]
            timings = alternate([timed(call, time.process_time) for call in calls], rounds)
            if part == "prediction":
                segments = [call() for call in calls]
            del calls
            memory = (peak_megabytes(_run, ours, *arguments), peak_megabytes(_run, theirs, *arguments))
            row = compared("EoMT", part, sizes, name, timings)
            rows.append(replace(row, clock="processor", memory=memory))
    return Part(rows, [f"ours finds {segments[0]} segments, theirs {segments[1]}"])


@contextmanager
def _saved_model(seed: int) -> Generator[Path]:
    """Yield a transformers folder with random weights; few queries are sure of a class."""
    from transformers import EomtConfig, EomtForUniversalSegmentation

    torch.manual_seed(seed)
    theirs = EomtForUniversalSegmentation(EomtConfig(**VIT, image_size=SIDE, num_labels=CLASSES)).eval()
    with torch.no_grad():
        theirs.attn_mask_probs.zero_()
        theirs.query.weight.normal_()
        head = theirs.class_predictor
        head.weight.normal_(std=0.5)
        head.weight[-1] = 0  # "no object" has the same logit for every query
        logits = theirs(_pixels(seed)).class_queries_logits[0]  # (Q, K+1)
        lead = (logits[:, :-1].amax(1) - logits[:, -1]).sort(descending=True).values
        head.bias[-1] += lead[CONFIDENT_QUERIES - 1 : CONFIDENT_QUERIES + 1].mean()
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        yield Path(folder)


def _image(seed: int) -> np.ndarray:
    return peer.smooth_image(seed, HEIGHT, WIDTH)


def _pixels(seed: int) -> torch.Tensor:
    image = torch.from_numpy(_image(seed)).permute(2, 0, 1)[None]
    return peer.normalized(nn.functional.pad(image, (0, SIDE - WIDTH, 0, SIDE - HEIGHT)))


def our_prediction(folder: Path, seed: int, precision: Precision) -> Callable[[], int]:
    """Make a call that predicts with our model and returns the number of segments."""
    model = load_model(folder)
    update = {"short_side": SIDE, "max_side": SIDE, "pad_size": (SIDE, SIDE)}
    model.evaluate_config = model.evaluate_config.model_copy(update=update)
    return our_call(cast(Eomt, model), _image(seed), precision)


def their_prediction(folder: Path, seed: int, precision: Precision) -> Callable[[], int]:
    """Make a call that predicts with their model and returns the number of segments."""
    from transformers import EomtImageProcessor

    model, image, size = _load_theirs(folder).eval(), _image(seed), {"shortest_edge": SIDE, "longest_edge": SIDE}
    processor = EomtImageProcessor(size=size, do_split_image=False, do_pad=True)

    @torch.no_grad()
    def predict() -> int:
        inputs = processor(images=image, return_tensors="pt")
        with autocast(torch.device("cpu"), precision):
            output = model(inputs["pixel_values"])
        (result,) = processor.post_process_panoptic_segmentation(
            output,
            target_sizes=[image.shape[:2]],
            threshold=OBJECT_THRESHOLD,
            overlap_mask_area_threshold=OVERLAP_THRESHOLD,
            stuff_classes=list(range(THINGS, CLASSES)),
            size=size,
        )
        return len(result["segments_info"])

    return predict


def our_step(folder: Path, seed: int, precision: Precision) -> Callable[[], object]:
    """Make our training step, as in `maskwright train`."""
    overrides = ("train.batch_size=1", "train.mask_annealing=[]", f"train.precision={precision}")
    recipe, engine = load_recipe("coco-panoptic-eomt", overrides), create_accelerator(precision)
    model = cast(Eomt, load_model(folder)).train().to(engine.device)
    model.probabilities = [1.0] * len(model.probabilities)
    optimizer, criterion = build_optimizer(model, recipe.train, fused=True), build_criterion(recipe.train)
    batch, numbers = make_batch(seed, SIDE, 1), count()
    return lambda: train_step(engine, model, optimizer, criterion, [batch], recipe.train, next(numbers))


def their_step(folder: Path, seed: int, precision: Precision) -> Callable[[], object]:
    """Make their training step; their model computes the losses if it is given objects."""
    model = _load_theirs(folder).train()
    model.attn_mask_probs.fill_(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    batch = make_batch(seed, SIDE, 1)
    pixels = peer.normalized(batch.images)
    masks, labels = ([getattr(target, name) for target in batch.targets] for name in ("masks", "labels"))

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(torch.device("cpu"), precision):
            output = model(pixels, mask_labels=[mask.float() for mask in masks], class_labels=labels)
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return call


def _load_theirs(folder: Path) -> EomtForUniversalSegmentation:
    peer.peer_name()
    from transformers import EomtForUniversalSegmentation

    return EomtForUniversalSegmentation.from_pretrained(folder)


def _run(make: Callable[..., Callable[[], object]], *arguments: object) -> None:
    make(*arguments)()
