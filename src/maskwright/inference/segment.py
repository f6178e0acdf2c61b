"""Turn the predictions for one image into its `Segmentation`.

A CPU decides by blocks of pixels (`blockwise_postprocess`, `blockwise_confidence`), accelerators run the plain
algorithm (`postprocess`, `confidence`).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from maskwright.config.schema import EvaluateConfig
from maskwright.inference import blockwise_confidence, blockwise_postprocess, confidence, postprocess
from maskwright.inference.mask_upsampling import CropPrediction, SemanticScores, pixel_scores
from maskwright.inference.test_time_augmentation import MaskQueries, MeanScores
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Task
from maskwright.structures.predictions import MaskPrediction


def segment(
    predictions: Sequence[CropPrediction | SemanticScores],
    task: Task,
    *,
    output_size: tuple[int, int],
    categories: tuple[Category, ...],
    config: EvaluateConfig,
    confidence_map: bool = False,
) -> Segmentation:
    """Return the result for one image.

    Args:
        predictions: one for each scale and flip of the whole image. Semantic: their class scores are averaged. Instance
            and panoptic: one, or those for the image and its flip; see `MaskQueries`.
        task: "semantic", "instance" or "panoptic".
        output_size: (height, width) of the result.
        categories: in label order.
        config: thresholds, and the size at which semantic scores are combined.
        confidence_map: also compute `Segmentation.confidence`.

    Raises:
        ValueError: a prediction has no masks, which the task needs.
    """
    if task == "semantic":
        at_output = config.semantic_resolution == "output"
        prediction = _one_prediction(predictions, output_size, at_output=at_output)
        device = _device(prediction)
        label_map = postprocess_for(device).semantic(prediction, output_size, at_output=at_output)
        labels = torch.bincount(label_map.flatten(), minlength=len(categories)).nonzero()[:, 0]
        result = Segmentation(task, output_size, categories, _numpy(labels), label_map=_numpy(label_map))
        if confidence_map:
            values = confidence_for(device).semantic(prediction, output_size, at_output=at_output)
            result.confidence = _numpy(values)
        return result
    if task not in ("instance", "panoptic"):
        raise ValueError(f"unknown task '{task}'; known: semantic, instance, panoptic")
    queries = MaskQueries([one for one in predictions if isinstance(one, CropPrediction)], output_size)
    device = queries.probabilities.device
    algorithm = postprocess_for(device)
    things = [category.is_thing for category in categories]
    if task == "instance":
        labels, scores, numbers, masks = algorithm.instance(
            queries, things, top_k=config.top_k, score_threshold=config.score_threshold
        )
        result = Segmentation(task, output_size, categories, _numpy(labels), _numpy(scores), instance_masks=masks)
        if confidence_map:
            result.confidence = _numpy(confidence_for(device).instance(queries, numbers, labels))
        return result
    labels, scores, segment_map = algorithm.panoptic(
        queries, things, object_threshold=config.object_threshold, overlap_threshold=config.overlap_threshold
    )
    result = Segmentation(
        task, output_size, categories, _numpy(labels), _numpy(scores), segment_map=_numpy(segment_map)
    )
    if confidence_map:
        values = confidence_for(device).panoptic(queries, segment_map, object_threshold=config.object_threshold)
        result.confidence = _numpy(values)
    return result


def class_scores(
    prediction: CropPrediction | SemanticScores, output_size: tuple[int, int] | None = None
) -> SemanticScores:
    """Return the class scores of a prediction.

    Args:
        prediction: returned as it is if it is scores already.
        output_size: size at which masks are combined to scores; None is that of the network's input. Per-pixel logits
            are not resized here.
    """
    if isinstance(prediction, SemanticScores) or not isinstance(prediction.prediction, MaskPrediction):
        return pixel_scores(prediction)
    size = output_size or prediction.input_size
    algorithm = postprocess_for(prediction.prediction.class_logits.device)
    return SemanticScores(algorithm.class_scores(prediction, size), False, size, size)


def postprocess_for(device: torch.device) -> ModuleType:
    """Return the module whose `semantic`, `class_scores`, `instance` and `panoptic` are fastest on a device."""
    return blockwise_postprocess if device.type == "cpu" else postprocess


def confidence_for(device: torch.device) -> ModuleType:
    """Return the module whose `semantic`, `instance` and `panoptic` give confidence maps fastest on a device."""
    return blockwise_confidence if device.type == "cpu" else confidence


def _one_prediction(
    predictions: Sequence[CropPrediction | SemanticScores], output_size: tuple[int, int], *, at_output: bool
) -> CropPrediction | SemanticScores:
    """Return the only prediction, or the mean class scores of several."""
    if len(predictions) == 1:
        return predictions[0]
    mean = MeanScores(output_size)
    for one in predictions:
        mean.add(class_scores(one, output_size if at_output else None))
    return mean.mean()


def _device(prediction: CropPrediction | SemanticScores) -> torch.device:
    scores = prediction.values if isinstance(prediction, SemanticScores) else prediction.prediction.class_logits
    return scores.device


def _numpy(tensor: Tensor):
    return tensor.cpu().numpy()
