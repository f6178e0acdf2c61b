"""Running one fixture and holding it to the tolerances."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from maskwright.config.schema import EvaluateConfig
from maskwright.inference import blockwise_postprocess
from maskwright.inference.mask_upsampling import CropPrediction
from maskwright.inference.segment import segment
from maskwright.inference.test_time_augmentation import MaskQueries
from maskwright.structures.annotations import Category, Target
from maskwright.structures.predictions import MaskPrediction, ModelOutput
from maskwright.training.losses.criterion import Criterion
from tests.parity import other_layouts, semask, written
from tests.parity.fixtures import OURS, Fixture
from tests.parity.report import GRADIENTS, LOGITS, LOSSES, MASK_IOU, PIXELS, SCORES, Report, difference


def run(fixture: Fixture, write: bool = False) -> Report:
    """Compare one supported fixture; with `write`, its model also goes out to the other layouts."""
    if fixture.kind == "criterion":
        return _criterion(fixture)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = fixture.model(Path(folder))
        kinds = {"batch": _batch, "image": _image, "logits": other_layouts.compare, "semask": semask.compare}
        report = kinds[fixture.kind](fixture, model)
        if write:
            written.compare(fixture, model, Path(folder) / OURS, report)
        return report


def _image(fixture: Fixture, model: torch.nn.Module) -> Report:
    facts, arrays, report = fixture.facts, fixture.arrays, Report()
    images, padding = _pad([arrays["image"]], facts["padded_size"])
    output = model(images, padding, intermediate=True)
    _compare_logits(report, output, arrays)
    _compare_layers(report, output, fixture)
    flipped = sum(
        _flipped_bits(prediction, arrays[f"attn_mask_{layer}"], layer, facts["padded_size"])
        for layer, prediction in enumerate(output.intermediate)
    )
    report.check("attention bits flipped", str(flipped), flipped == 0)
    categories = _categories(facts)
    config = EvaluateConfig(
        task="semantic",
        semantic_resolution="output" if facts["sem_seg_postprocess_before_inference"] else "input",
        object_threshold=facts["object_mask_threshold"],
        overlap_threshold=facts["overlap_threshold"],
        top_k=facts["detections_per_image"],
    )
    crop = CropPrediction(output.final, tuple(facts["padded_size"]), tuple(facts["input_size"]))
    settings = {"output_size": tuple(facts["output_size"]), "categories": categories, "config": config}
    if facts["semantic_on"]:
        result = segment([crop], "semantic", **settings)
        _agreement(report, "semantic", result.label_map, arrays["semantic"])
    if facts["panoptic_on"]:
        result = segment([crop], "panoptic", **settings)
        _agreement(report, "panoptic", result.segment_map, arrays["panoptic"])
        ours = [
            (number + 1, bool(categories[label].is_thing), int(label)) for number, label in enumerate(result.labels)
        ]
        theirs = [(info["id"], info["isthing"], info["category_id"]) for info in facts["segments_info"]]
        report.check("segments", f"{len(ours)}/{len(theirs)}", ours == theirs)
    if facts["instance_on"]:
        _compare_instances(report, crop, arrays, categories, config, settings["output_size"])
    return report


def _batch(fixture: Fixture, model: torch.nn.Module) -> Report:
    facts, arrays, report = fixture.facts, fixture.arrays, Report()
    pictures = [arrays["image_0"], arrays["image_1"]]
    images, padding = _pad(pictures, facts["padded_size"])
    output = model(images, padding, intermediate=True)
    _compare_logits(report, output, arrays)
    config = EvaluateConfig(
        task="semantic", semantic_resolution="output" if facts.get("sem_seg_postprocess_before_inference") else "input"
    )
    for index, picture in enumerate(pictures):
        result = segment(
            [CropPrediction(output.final.image(index), tuple(facts["padded_size"]), picture.shape[:2])],
            "semantic",
            output_size=tuple(facts["output_sizes"][index]),
            categories=_categories(facts),
            config=config,
        )
        _agreement(report, f"semantic {index}", result.label_map, arrays[f"semantic_{index}"])
    return report


def _compare_logits(report: Report, output: ModelOutput, arrays: dict[str, np.ndarray]) -> None:
    """The final logits."""
    masks = output.final.mask_logits()[..., ::4, ::4].numpy()
    classes = output.final.class_logits.numpy()
    report.most("class logits", difference(classes, arrays["pred_logits"]), LOGITS)
    report.most("mask logits", difference(masks, arrays["pred_masks_sub4"]), LOGITS)


def _compare_layers(report: Report, output: ModelOutput, fixture: Fixture) -> None:
    """What the reference stored in float16, so held to its rounding: classes of all layers, masks, mask features."""
    final, first = output.final, output.intermediate[0]
    classes = torch.cat([prediction.class_logits for prediction in output.intermediate])
    for name, array, ours in (
        ("earlier class logits", "aux_pred_logits", classes),
        ("first class logits", "stage0_pred_logits", first.class_logits),
        ("first mask logits", "stage0_pred_masks", first.mask_logits()),
        ("whole mask logits", "pred_masks", final.mask_logits()),
        ("mask features", "mask_features_sub8", final.mask_features[:, :, ::8, ::8]),
    ):
        if fixture.holds(array):
            stored = fixture.arrays[array].astype(np.float32)
            report.most(name, difference(ours.numpy(), stored, rounding=np.abs(stored) * 2**-10), LOGITS)


def _flipped_bits(prediction: MaskPrediction, packed: np.ndarray, layer: int, padded: list[int]) -> int:
    stride = (32, 16, 8)[layer % 3]
    size = (padded[0] // stride, padded[1] // stride)
    small = F.interpolate(prediction.mask_features, size=size, mode="bilinear", align_corners=False).flatten(2)
    masked = (prediction.mask_embeddings @ small < 0)[0].numpy()
    truth = np.unpackbits(packed, axis=1, count=masked.shape[1]).astype(bool)
    return int((masked != truth).sum())


def _agreement(report: Report, name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    share = float((ours == theirs).mean())
    report.check(name, f"{share:.4%}", share >= PIXELS)


def _compare_instances(
    report: Report,
    crop: CropPrediction,
    arrays: dict[str, np.ndarray],
    categories: tuple[Category, ...],
    config: EvaluateConfig,
    output_size: tuple[int, int],
) -> None:
    things = [category.is_thing for category in categories]
    labels, scores, queries, found = blockwise_postprocess.instance(
        MaskQueries([crop], output_size), things, top_k=config.top_k, score_threshold=0.0
    )
    ours = {
        (int(query), int(label)): (float(score), mask)
        for query, label, score, mask in zip(queries, labels, scores, found, strict=True)
    }
    height, width = output_size
    bits = np.unpackbits(arrays["instance_masks"], axis=1, count=height * width).reshape(-1, height, width).astype(bool)
    theirs = {
        (int(query), int(label)): (float(score), mask)
        for query, label, score, mask in zip(
            arrays["instance_query"], arrays["instance_classes"], arrays["instance_scores"], bits, strict=True
        )
    }
    report.check("instances", f"{len(ours)}/{len(theirs)}", ours.keys() == theirs.keys())
    common = ours.keys() & theirs.keys()
    # In a small mask one pixel whose logit is zero up to rounding counts much; such a mask is left out of both figures.
    plain = [key for key in common if np.count_nonzero(ours[key][1] != theirs[key][1]) != 1]
    report.most("scores", max((abs(ours[key][0] - theirs[key][0]) for key in plain), default=0.0), SCORES)
    worst = min((_iou(ours[key][1], theirs[key][1]) for key in plain), default=1.0)
    report.check("mask IoU", f"{worst:.5f}", worst >= MASK_IOU)
    report.check(
        "masks with one other pixel", f"{len(common) - len(plain)}", len(common) - len(plain) <= len(common) / 4
    )


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    union = (first | second).sum()
    return 1.0 if union == 0 else float((first & second).sum() / union)


def _pad(pictures: list[np.ndarray], size: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.zeros(len(pictures), 3, *size, dtype=torch.uint8)
    padding = torch.ones(len(pictures), *size, dtype=torch.bool)
    for index, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        images[index, :, :height, :width] = torch.from_numpy(picture).permute(2, 0, 1)
        padding[index, :height, :width] = False
    return images, padding


def _categories(facts: dict) -> tuple[Category, ...]:
    things = set(facts.get("thing_classes", range(facts["num_classes"])))
    return tuple(Category(label, str(label), label in things, (0, 0, 0)) for label in range(facts["num_classes"]))


class RecordedPoints:
    """The points that the reference drew, image after image."""

    def __init__(self, arrays: dict[str, np.ndarray], case: str, order: list[int], masks: list[int]) -> None:
        self.arrays, self.case, self.order = arrays, case, order
        self.starts = np.concatenate([[0], np.cumsum(masks)])

    def _array(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[f"{self.case}/{name}"])

    def matching(self, image: int, layers: int, count: int) -> torch.Tensor:
        return torch.cat([self._array(f"matcher_points_{layer}_{image}") for layer in range(layers)])

    def candidates(self, layer: int, image: int, masks: int, count: int) -> torch.Tensor:
        return self._array(f"oversampled_points_{layer}")[self.starts[image] : self.starts[image + 1]]

    def uniform(self, layer: int, image: int, masks: int, count: int) -> torch.Tensor:
        return self._array(f"random_points_{layer}")[self.starts[image] : self.starts[image + 1]]


def _criterion(fixture: Fixture) -> Report:
    facts, report = fixture.facts, Report()
    weights = facts["loss_weights"]
    criterion = Criterion(
        class_weight=weights["loss_ce"],
        mask_weight=weights["loss_mask"],
        dice_weight=weights["loss_dice"],
        no_object_weight=facts["no_object_weight"],
        num_points=facts["num_points"],
        oversample_ratio=facts["oversample_ratio"],
        importance_sample_ratio=facts["importance_sample_ratio"],
    )
    for name in facts["cases"]:
        _criterion_case(report, criterion, fixture, name)
    return report


def _criterion_case(report: Report, criterion: Criterion, fixture: Fixture, name: str) -> None:
    facts, arrays = fixture.facts, fixture.arrays
    layers = facts["aux_layers"] + 1
    case = facts["cases"][name]
    logits = [torch.from_numpy(arrays[f"{name}/pred_logits_{layer}"]).requires_grad_() for layer in range(layers)]
    masks = [torch.from_numpy(arrays[f"{name}/pred_masks_{layer}"]).requires_grad_() for layer in range(layers)]
    # Masks as they are: each query's embedding picks its own mask out of the features.
    identity = torch.eye(facts["num_queries"]).expand(facts["batch"], -1, -1)
    predictions = [MaskPrediction(c, identity, m) for c, m in zip(logits, masks, strict=True)]
    targets = [_target(arrays, name, image, facts["target_size"]) for image in range(facts["batch"])]
    points = RecordedPoints(arrays, name, case["order"], [min(len(t), facts["num_queries"]) for t in targets])
    matchings = criterion.matcher(predictions, targets, points)
    same = all(
        np.array_equal(queries, arrays[f"{name}/match_query_{layer}_{image}"])
        and np.array_equal(objects, arrays[f"{name}/match_target_{layer}_{image}"])
        for layer, images in enumerate(matchings)
        for image, (queries, objects) in enumerate(images)
    )
    report.check(f"{name}: matching", "same" if same else "different", same)
    losses = criterion(ModelOutput(predictions[-1], predictions[:-1]), targets, points)
    expected = torch.tensor(
        [
            [case["losses"][str(layer)][term] for term in ("loss_ce", "loss_mask", "loss_dice")]
            for layer in range(layers)
        ]
    )
    found = torch.stack([losses[term] for term in ("class", "mask", "dice")], 1)
    report.most("losses", (found - expected).abs().max().item(), LOSSES)
    total = criterion.total(losses)
    report.most("total", abs(total.item() - case["weighted_total"]) / case["weighted_total"], LOSSES)
    total.backward()
    worst = max(
        float(np.abs(tensor.grad.numpy() - arrays[f"{name}/grad_{kind}_{layer}"]).max())
        for kind, tensors in (("pred_logits", logits), ("pred_masks", masks))
        for layer, tensor in enumerate(tensors)
    )
    report.most("gradients", worst, GRADIENTS)


def _target(arrays: dict[str, np.ndarray], case: str, image: int, size: list[int]) -> Target:
    labels = torch.from_numpy(arrays[f"{case}/target_labels_{image}"])
    bits = np.unpackbits(arrays[f"{case}/target_masks_{image}"], axis=1, count=size[0] * size[1])
    masks = torch.from_numpy(bits).view(len(labels), *size).bool()
    numbers = torch.arange(1, len(labels) + 1, dtype=torch.int32)[:, None, None]
    id_maps = masks * numbers if len(labels) else torch.zeros(1, *size, dtype=torch.int32)
    return Target(id_maps, labels, torch.zeros(len(labels), dtype=torch.bool), image, tuple(size))
