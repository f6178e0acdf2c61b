"""Comparing with the other implementations: logits and features, and our decisions on their logits and on ours.

These fixtures were not chosen so that every attention bit is clear of rounding; see `attention_bits`.

Their own decisions differ from the original's on purpose, except where `_DECISIONS` says that they are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from maskwright.config.schema import EvaluateConfig
from maskwright.inference.mask_upsampling import CropPrediction
from maskwright.inference.segment import segment
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, pad_images
from maskwright.structures.predictions import MaskPrediction, ModelOutput
from tests.parity.attention_bits import decided_as_theirs
from tests.parity.fixtures import Fixture
from tests.parity.report import LOGITS, PIXELS, Report, difference

MARGIN = 1e-5  # of a mask logit: rounding of a sum over 256 products

# Our name to theirs, of each layout; the numbers of levels follow.
NAMES = {
    "transformers": {
        "class_logits": "class_queries_logits",
        "mask_logits": "masks_queries_logits",
        "backbone": "backbone_stage{}",
        "first": 1,
    },
    "openmmlab": {
        "class_logits": "class_logits",
        "mask_logits": "mask_logits",
        "backbone": "backbone_level{}",
        "first": 0,
    },
}
NAMES["easycv"] = NAMES["openmmlab"]


def compare(fixture: Fixture, model: torch.nn.Module) -> Report:
    """Hold one fixture of transformers, OpenMMLab or EasyCV to the tolerances."""
    arrays, report, names = fixture.arrays, Report(), NAMES[fixture.layout]
    features: dict[str, object] = {}
    for part in ("backbone", "pixel_decoder"):
        getattr(model, part).register_forward_hook(lambda _, __, output, part=part: features.update({part: output}))
    output = _run(model, arrays, names, report)
    ours, theirs = output.final, arrays[names["mask_logits"]].astype(np.float32)
    masks = ours.mask_logits()[0].numpy()
    report.most("class logits", difference(ours.class_logits.numpy(), arrays[names["class_logits"]]), LOGITS)
    report.most("mask logits", difference(masks[::10, ::4, ::4], arrays[names["mask_logits"] + "_f32_sample"]), LOGITS)
    report.most("whole mask logits", difference(masks, theirs, rounding=np.abs(theirs) * 2**-10), LOGITS)
    if "first_class_logits" in arrays:
        first = output.intermediate[0]
        report.most("first class logits", difference(first.class_logits.numpy(), arrays["first_class_logits"]), LOGITS)
        sample = first.mask_logits()[0, ::10, ::4, ::4].numpy()
        report.most("first mask logits", difference(sample, arrays["first_mask_logits_f32_sample"]), LOGITS)
    worst = max(difference(sample, arrays[name]) for name, sample in _samples(features, names))
    report.most("features", worst, LOGITS)
    _compare_decisions(report, fixture, model.categories, ours, theirs)
    return report


def _run(model: torch.nn.Module, arrays: dict, names: dict, report: Report) -> ModelOutput:
    """Our output; with the bits that rounding decides as the reference has them."""
    images, padding = pad_images([torch.from_numpy(arrays["image"]).permute(2, 0, 1)])

    def distance(output: ModelOutput) -> float:
        return difference(output.final.class_logits.numpy(), arrays[names["class_logits"]])

    return decided_as_theirs(lambda: model(images, padding, intermediate=True), distance, MARGIN, report)


def _samples(features: dict, names: dict) -> Iterator[tuple[str, np.ndarray]]:
    """The name of each stored sample of features, and ours at the same places."""
    for level, feature in enumerate(features["backbone"].features.values()):
        name = names["backbone"].format(level + names["first"])
        yield f"{name}_f32_sample", feature[0, ::16, ::4, ::4].numpy()
    levels, mask_features = features["pixel_decoder"]
    for level, feature in enumerate(levels):
        yield f"pixel_decoder_level{level}_f32_sample", feature[0, ::16, ::2, ::2].numpy()
    yield "mask_features_f32_sample", mask_features[0, ::16, ::8, ::8].numpy()


def _compare_decisions(
    report: Report, fixture: Fixture, categories: tuple[Category, ...], ours: MaskPrediction, masks: np.ndarray
) -> None:
    """Our post-processing on both sides' logits; theirs too, where it is the original's."""
    arrays, names = fixture.arrays, NAMES[fixture.layout]
    logits = torch.from_numpy(arrays[names["class_logits"]])[None]
    theirs = MaskPrediction(logits, torch.eye(len(masks))[None], torch.from_numpy(masks)[None])
    task = "panoptic" if len(categories) == 133 else "semantic"
    on_ours, on_theirs = (_decide(prediction, task, fixture, categories) for prediction in (ours, theirs))
    share = float((on_ours == on_theirs).mean())
    report.check(f"{task} on both logits", f"{share:.4%}", share >= PIXELS)
    if task == "semantic" and "raw_semantic" in arrays:
        share = float((on_theirs == arrays["raw_semantic"]).mean())
        report.check("their semantic", f"{share:.4%}", share >= PIXELS)
    if task == "panoptic" and "raw_panoptic" in arrays and fixture.layout != "transformers":
        classes = np.where(arrays["raw_panoptic"] == 133, 133, arrays["raw_panoptic"] % 1000)
        share = float((on_theirs == classes).mean())
        report.check("their panoptic classes", f"{share:.4%}", share >= PIXELS)


def _decide(prediction: MaskPrediction, task: str, fixture: Fixture, categories: tuple[Category, ...]) -> np.ndarray:
    """(H, W) class of each pixel; 133 where a panoptic result has none."""
    result: Segmentation = segment(
        [CropPrediction(prediction, tuple(fixture.facts["padded_hw"]), tuple(fixture.facts["image_hw"]))],
        task,
        output_size=tuple(fixture.facts["image_hw"]),
        categories=categories,
        config=EvaluateConfig(task=task, semantic_resolution="input"),
    )
    if task == "semantic":
        return result.label_map
    return np.concatenate([[133], result.labels])[result.segment_map]
