"""Comparing with SeMask: features, maps, logits and class maps, views and windows, then losses and gradients.

The gradient of `mlp_cls_k.bias` is zero in theory, so only rounding is stored of it; that of `gamma` is a sum that
cancels. What the fixtures store in float16 is compared up to its rounding.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.checkpoints.key_maps.translate import find_key_map, translate
from maskwright.config.schema import EvaluateConfig
from maskwright.inference.mask_upsampling import CropPrediction, SemanticScores
from maskwright.inference.pipeline import Pipeline
from maskwright.inference.preprocess import Prepared
from maskwright.inference.segment import segment
from maskwright.models.segmenter import Segmenter
from maskwright.structures.annotations import Category, Target, pad_images
from maskwright.structures.predictions import MaskPrediction, ModelOutput, PixelPrediction
from maskwright.training.losses.criterion import Criterion, Losses
from tests.parity.attention_bits import decided_as_theirs
from tests.parity.fixtures import Fixture
from tests.parity.report import LOGITS, LOSSES, PIXELS, Report, difference

MARGIN = 5e-5  # of a mask logit: what float32 and float64 of the reference differ by
GRADIENT_NORM, GAMMA_NORM = 1e-3, 2e-2  # relative
GRADIENT_NORMS = {"fpn_swin_b_ade20k": 5e-3}  # the original's own float32 is 3.4e-3 from float64 there
_FIGURES = {
    "feat": "features",
    "map": "maps",
    "pixel_level": "levels",
    "logits": "class logits",
    "pred_masks": "mask logits",
}
_STAGES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}


def compare(fixture: Fixture, model: Segmenter) -> Report:
    """Hold one fixture of SeMask to the tolerances."""
    report, arrays = Report(), fixture.arrays
    images, padding = pad_images([torch.from_numpy(arrays["image"]).permute(2, 0, 1)], model.size_divisor)
    seen: dict = {}
    for name, part in model.named_children():
        part.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))

    def distance(output: ModelOutput) -> float:
        if isinstance(output.final, PixelPrediction):
            return 0.0  # it has no attention bits
        return difference(output.final.class_logits.detach().numpy(), arrays["pred_logits"])

    with torch.enable_grad():
        output = decided_as_theirs(lambda: model(images, padding, intermediate=True), distance, MARGIN, report)
    _compare_tensors(report, fixture, _tensors(output, seen))
    _compare_decisions(report, fixture, output.final, (images.shape[-2], images.shape[-1]))
    if "losses" in fixture.facts["facts"]:
        with torch.enable_grad():
            _compare_losses(report, fixture, model, output, padding)
    if "tta" in fixture.facts["facts"]:
        _compare_views(report, fixture, model)
        _compare_windows(report, fixture, model)
    _compare_without_attention(report, fixture, model, images, padding)
    return report


def _tensors(output: ModelOutput, seen: dict) -> dict[str, Tensor]:
    """All that fixtures hold, under their names."""
    found = {"semantic": output.semantic_logits}
    per_pixel = isinstance(output.final, PixelPrediction)
    features, maps = seen["backbone"]
    for level, (stride, feature) in enumerate(features.items()):
        suffix = level if per_pixel else f"_{_STAGES[stride]}"
        found |= {f"feat{suffix}": feature, f"map{suffix}": maps[level]}
    if per_pixel:
        return found | {"logits": output.final.class_logits}
    levels, mask_features = seen["pixel_decoder"]
    found |= {f"pixel_level{level}": feature for level, feature in enumerate(levels)}
    return found | {"mask_features": mask_features, "pred_masks": output.final.mask_logits()}


def _compare_tensors(report: Report, fixture: Fixture, found: dict[str, Tensor]) -> None:
    """Samples in float32, and all or part of the tensors in float16; one figure for each kind of tensor."""
    worst: dict[str, float] = {}
    for name, tensor in found.items():
        facts = fixture.facts["facts"]["outputs"][name]
        assert list(tensor.shape) == facts["shape"], f"{name} is {list(tensor.shape)} instead of {facts['shape']}"
        ours, step = tensor.detach().numpy(), facts.get("stride", 1)
        channels, rows, columns = facts.get("sub_stride", (1, step, step))
        sample, part = ours.ravel()[:: facts["probe_step"]], ours[0, ::channels, ::rows, ::columns]
        arrays = {f"{name}_probe": (sample, 0.0)}
        if "sub_stride" in facts:
            arrays[f"{name}_sub"] = (part, 2.0**-10)
        elif "stride" in facts or name in ("logits", "semantic"):
            arrays[name] = (part, 2.0**-10)
        if name == "logits":
            arrays["logits_probe_float64"] = (sample, 0.0)
        kind = name.split("_res")[0].rstrip("0123456789")
        for array, (values, rounding) in arrays.items():
            if fixture.holds(array):
                theirs = fixture.arrays[array].astype(np.float64)
                distance = difference(values, theirs, rounding=np.abs(theirs) * rounding)
                worst[kind] = max(worst.get(kind, 0.0), distance)
    for kind, distance in worst.items():
        report.most(_FIGURES.get(kind, kind), distance, LOGITS)


def _compare_decisions(
    report: Report, fixture: Fixture, final: MaskPrediction | PixelPrediction, padded: tuple[int, int]
) -> None:
    size, original = fixture.arrays["image"].shape[:2], tuple(fixture.facts["original_size"])
    if isinstance(final, MaskPrediction):
        theirs = fixture.arrays["pred_logits"]
        report.most("class logits", difference(final.class_logits.detach().numpy(), theirs), LOGITS)
        _compare_scores(report, fixture, "sem_seg", "sem_seg_probe", final, padded)
    outputs = {"pred": original} if isinstance(final, MaskPrediction) else {"pred_input": size, "pred": original}
    for name, output_size in outputs.items():
        if fixture.holds(name):
            result = segment(
                [CropPrediction(final, padded, size)],
                "semantic",
                output_size=output_size,
                categories=_categories(fixture),
                config=EvaluateConfig(task="semantic", semantic_resolution="input"),
            )
            share = float((result.label_map == fixture.arrays[name]).mean())
            report.check(name, f"{share:.4%}", share >= PIXELS)


def _compare_scores(
    report: Report, fixture: Fixture, name: str, array: str, final: MaskPrediction, padded: tuple[int, int]
) -> None:
    """Sums of class times mask probability, at the original size; they are not of one size, hence relative."""
    height, width = fixture.arrays["image"].shape[:2]
    masks = F.interpolate(final.mask_logits().detach(), padded, mode="bilinear", align_corners=False).sigmoid()
    classes = final.class_logits.detach().softmax(-1)[..., :-1]
    scores = torch.einsum("bqk,bqhw->bkhw", classes, masks)[:, :, :height, :width]
    scores = F.interpolate(scores, tuple(fixture.facts["original_size"]), mode="bilinear", align_corners=False)
    theirs = fixture.arrays[array]
    ours = scores.numpy().ravel()[:: fixture.facts["facts"]["outputs"]["sem_seg"]["probe_step"]]
    report.most(name, float((np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1)).max()), LOGITS)


def _compare_views(report: Report, fixture: Fixture, model: Segmenter) -> None:
    """The mean over two sizes, each with its flip, of probabilities at the original size."""
    arrays, facts = fixture.arrays, fixture.facts["facts"]["tta"]
    pixels = np.zeros((*fixture.facts["original_size"], 3), np.uint8)
    image = Prepared(pixels, (arrays["image"], arrays["tta_image_small"]))
    config = EvaluateConfig(task="semantic", flip=True, semantic_resolution="input")
    (result,) = Pipeline(model, config).predict([(image, None)])
    (scores,) = result.predictions
    step, theirs = facts["prob_sub_stride"], arrays["tta_prob_sub"].astype(np.float64)
    ours = scores.values[:, ::step, ::step].numpy()
    report.most("views", difference(ours, theirs, rounding=np.abs(theirs) * 2.0**-10), LOGITS)
    _compare_labels(report, fixture, scores, "tta_pred")


def _compare_windows(report: Report, fixture: Fixture, model: Segmenter) -> None:
    """Sliding windows: the mean of their logits at the size of the input."""
    facts, pixels = fixture.facts["facts"]["slide"], fixture.arrays["image"]
    config = EvaluateConfig(task="semantic", window_size=facts["crop"], window_stride=facts["stride"])
    (result,) = Pipeline(model, config).predict([(Prepared(pixels, (pixels,)), None)])
    (scores,) = result.predictions
    ours = scores.values.numpy().ravel()[:: facts["probe_step"]]
    report.most("windows", difference(ours, fixture.arrays["slide_logits_probe"]), LOGITS)
    _compare_labels(report, fixture, scores, "slide_pred_input")


def _compare_labels(report: Report, fixture: Fixture, scores: SemanticScores, name: str) -> None:
    theirs = fixture.arrays[name]
    result = segment(
        [scores],
        "semantic",
        output_size=theirs.shape,
        categories=_categories(fixture),
        config=EvaluateConfig(task="semantic"),
    )
    share = float((result.label_map == theirs).mean())
    report.check(name, f"{share:.4%}", share >= PIXELS)


def _compare_without_attention(
    report: Report, fixture: Fixture, model: Segmenter, images: Tensor, padding: Tensor
) -> None:
    """The same result when every `gamma` is zero: semantic layers are layer norms then."""
    for layer in model.backbone.semantic_layers:
        layer.gamma.zero_()
    final = model(images, padding).final
    if isinstance(final, PixelPrediction):
        step = fixture.facts["facts"]["outputs"]["logits"]["probe_step"]
        ours, theirs = final.class_logits.numpy().ravel()[::step], fixture.arrays["gamma_zero_logits_probe"]
        report.most("gamma 0: logits", difference(ours, theirs), LOGITS)
    else:
        _compare_scores(
            report, fixture, "gamma 0: sem_seg", "gamma_zero_sem_seg_probe", final, tuple(images.shape[-2:])
        )


class _StoredPoints:
    """The same points for every layer and mask, and none chosen for their uncertainty."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def matching(self, image: int, layers: int, count: int) -> Tensor:
        return torch.from_numpy(self.arrays["match_points"]).expand(layers, -1, -1)

    def candidates(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        return torch.zeros(masks, count, 2)

    def uniform(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        return torch.from_numpy(self.arrays["loss_points"]).expand(masks, -1, -1)


def _compare_losses(report: Report, fixture: Fixture, model: Segmenter, output: ModelOutput, padding: Tensor) -> None:
    facts, per_pixel = fixture.facts["facts"], isinstance(output.final, PixelPrediction)
    target = _target(fixture.arrays["label"], tuple(padding.shape[-2:]))
    points = _StoredPoints(fixture.arrays)
    hard = (fixture.facts["losses_config"].get("hard_pixels") or {}).get("keep_per_image")
    settings = {} if per_pixel else {"num_points": len(fixture.arrays["loss_points"]), "importance_sample_ratio": 0.0}
    criterion = Criterion(ohem_pixels=hard, **settings)
    losses = criterion(output, [target], points)
    total = criterion.total(losses)
    report.most("losses", _loss_difference(criterion, losses, facts["losses"]), LOSSES)
    report.most("total", abs(total.item() / facts["losses"]["total"] - 1), LOSSES)
    for name, count in (("losses_hard_pixels_20000", 20000), ("losses_no_hard_pixels", None)):
        if name in facts:
            other = Criterion(ohem_pixels=count)
            found = other(output, [target], points)
            report.most(name.replace("_", " "), _loss_difference(other, found, facts[name]), LOSSES)
    if not per_pixel:
        queries, objects = criterion.matcher([output.final], [target], points)[0][0]
        same = queries.tolist() == fixture.arrays["matched_queries"].tolist()
        same &= objects.tolist() == fixture.arrays["matched_targets"].tolist()
        report.check("matching", "same" if same else "different", same)
    if "grad_l2" in facts:
        total.backward()
        _compare_gradients(report, fixture, model)


def _loss_difference(criterion: Criterion, losses: Losses, facts: dict) -> float:
    """The largest, relative where a loss is above 1."""
    if "raw" in facts:
        last = len(losses["class"]) - 1
        names = {"class": "loss_ce", "mask": "loss_mask", "dice": "loss_dice", "semantic": "loss_cate"}
        pairs = [
            (value, facts["raw"][names[term] + ("" if layer == last or term == "semantic" else f"_{layer}")])
            for term, values in losses.items()
            for layer, value in enumerate(values.tolist())
        ]
    else:
        names = {"pixel": "decode.loss_ce", "semantic": "decode.loss_cate"}
        pairs = [(criterion.weights[term] * losses[term].item(), facts[name]) for term, name in names.items()]
    return max(abs(ours - theirs) / max(1, abs(theirs)) for ours, theirs in pairs)


def _compare_gradients(report: Report, fixture: Fixture, model: Segmenter) -> None:
    squares: dict[str, float] = {}
    owners = _owners(fixture)
    for name, parameter in model.named_parameters():
        squares[owners[name]] = squares.get(owners[name], 0.0) + parameter.grad.double().square().sum().item()
    other_names = {key: name for group in fixture.facts.get("shared_keys", ()) for key in group for name in group}
    worst = {"gradient norms": (0.0, ""), "of gamma": (0.0, "")}
    for key, theirs in fixture.facts["facts"]["grad_l2"].items():
        if key.endswith("mlp_cls_k.bias"):
            continue
        ours = squares[key if key in squares else other_names[key]] ** 0.5
        kind = "of gamma" if key.endswith("gamma") else "gradient norms"
        worst[kind] = max(worst[kind], (abs(ours - theirs) / theirs, key))
    tolerances = GRADIENT_NORMS.get(fixture.path.stem, GRADIENT_NORM), GAMMA_NORM
    for (kind, (distance, key)), tolerance in zip(worst.items(), tolerances, strict=True):
        report.check(kind, f"{distance:.1e}" + (f" ({key})" if distance > tolerance else ""), distance <= tolerance)


def _owners(fixture: Fixture) -> dict[str, str]:
    """Which foreign key each of our parameters came from: the converter is given numbers in place of weights."""
    keys = list(fixture.facts["keys"])
    state = {key: torch.tensor(float(n)).expand(fixture.facts["keys"][key]) for n, key in enumerate(keys)}
    translated = translate(state, find_key_map(state)).state
    return {name: keys[int(tensor.flatten()[0])] for name, tensor in translated.items()}


def _categories(fixture: Fixture) -> tuple[Category, ...]:
    return tuple(
        Category(label, str(label), False, (0, 0, 0)) for label in range(fixture.facts["model"]["num_classes"])
    )


def _target(labels: np.ndarray, size: tuple[int, int]) -> Target:
    """One object per class that occurs, padded with pixels of none."""
    classes = np.setdiff1d(np.unique(labels), [255])
    ids = np.zeros(size, np.int32)
    table = np.zeros(256, np.int32)
    table[classes] = np.arange(1, len(classes) + 1)
    ids[: labels.shape[0], : labels.shape[1]] = table[labels]
    crowds = torch.zeros(len(classes), dtype=torch.bool)
    return Target(torch.from_numpy(ids)[None], torch.from_numpy(classes.astype(np.int64)), crowds, 0, size)
