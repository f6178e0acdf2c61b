"""Post-processing to a result of 1920x1080 against transformers, with 100 queries that are all kept.

Both begin with the same embeddings and features, whose products are masks of discs. Differs from the reference:
transformers decides at 384x384 and then upsamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import peer
from benchmarks.rows import Options, Part, compared
from benchmarks.timing import alternate, peak_megabytes, threads, timed
from maskwright.config.schema import EvaluateConfig
from maskwright.inference.mask_upsampling import CropPrediction
from maskwright.inference.segment import segment
from maskwright.structures.annotations import Category, Task
from maskwright.structures.predictions import MaskPrediction

HEIGHT, WIDTH, PADDED = 1080, 1920, 1088
QUERIES, CHANNELS = 100, 256
CLASSES: dict[Task, int] = {"panoptic": 133, "semantic": 150, "instance": 80}


def bench_postprocessing(options: Options) -> Part:
    """Time the results of the three tasks.

    Raises:
        MaskwrightError: transformers is not installed.
    """
    name, rows = peer.peer_name(), []
    setting = f"{QUERIES} queries kept, fp32, {HEIGHT}x{WIDTH}, 1 process, {options.threads} threads"
    with threads(options.threads):
        for task in CLASSES:
            calls = (our_call(task, options.seed), their_call(task, options.seed))
            timings = alternate([timed(call) for call in calls], options.rounds or 5)
            memory = (
                peak_megabytes(_decide, our_call, task, options.seed),
                peak_megabytes(_decide, their_call, task, options.seed),
            )
            rows.append(replace(compared("post-processing", task, setting, name, timings), memory=memory))
    idle = peak_megabytes(_prediction, "panoptic", options.seed)
    return Part(rows, [f"a process with only the input has {idle:.0f} MB"])


def _prediction(task: Task, seed: int) -> MaskPrediction:
    """Make confident queries, each with a disc as mask; neighbors overlap. Mask logits are -15..9."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randn(1, QUERIES, CLASSES[task] + 1, generator=generator)
    classes[..., :-1].scatter_add_(-1, classes[..., :-1].argmax(-1, keepdim=True), torch.full((1, QUERIES, 1), 12.0))
    height, width = PADDED // 4, WIDTH // 4
    places = torch.rand(QUERIES, 2, generator=generator) * torch.tensor([height, width])
    radii = (height * width / QUERIES) ** 0.5 * (0.4 + 0.6 * torch.rand(QUERIES, generator=generator))
    y, x = torch.arange(height)[None, :, None], torch.arange(width)[None, None]
    distance = ((y - places[:, 0, None, None]) ** 2 + (x - places[:, 1, None, None]) ** 2).sqrt()
    features = torch.zeros(1, CHANNELS, height, width)
    features[0, :QUERIES] = (radii[:, None, None] - distance).clamp(-15, 9)
    return MaskPrediction(classes, torch.eye(QUERIES, CHANNELS)[None], features)


def our_call(task: Task, seed: int) -> Callable[[], object]:
    """Make our call, which decides at the image's size."""
    categories = tuple(
        Category(number, f"class {number}", number < peer.THINGS, (0, 0, 0)) for number in range(CLASSES[task])
    )
    config = EvaluateConfig(task=task, object_threshold=0.8, overlap_threshold=0.0, top_k=QUERIES)
    crop = CropPrediction(_prediction(task, seed), (PADDED, WIDTH), (HEIGHT, WIDTH))
    return lambda: segment([crop], task, output_size=(HEIGHT, WIDTH), categories=categories, config=config)


def their_call(task: Task, seed: int) -> Callable[[], object]:
    """Make their call, which decides at 384x384 and upsamples to the image's size."""
    from transformers import Mask2FormerImageProcessor
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

    prediction, processor = _prediction(task, seed), Mask2FormerImageProcessor()
    options: dict[str, Any] = {"target_sizes": [(HEIGHT, WIDTH)]}
    match task:
        case "panoptic":
            decide = processor.post_process_panoptic_segmentation
            stuff = set(range(peer.THINGS, CLASSES[task]))
            options |= {"threshold": 0.8, "overlap_mask_area_threshold": 0.0, "label_ids_to_fuse": stuff}
        case "semantic":
            decide = processor.post_process_semantic_segmentation
        case "instance":
            decide = processor.post_process_instance_segmentation
            options |= {"threshold": 0.0, "return_binary_maps": True}

    def call() -> object:
        masks = prediction.mask_logits()
        output: Any = Mask2FormerForUniversalSegmentationOutput(
            class_queries_logits=prediction.class_logits, masks_queries_logits=masks
        )
        return decide(output, **options)

    return call


def _decide(make: Callable[[Task, int], Callable[[], object]], task: Task, seed: int) -> None:
    make(task, seed)()
