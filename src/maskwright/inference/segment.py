"""Turn the predictions for one image into its `Segmentation`.

A CPU decides by blocks of pixels (`blockwise_postprocess`), accelerators run the plain algorithm (`postprocess`).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from maskwright.config.schema import EvaluateConfig
from maskwright.inference import blockwise_postprocess, postprocess
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
) -> Segmentation:
    """Return the result for one image.

    Args:
        predictions: one for each scale and flip of the whole image. Semantic: their class scores are averaged. Instance
            and panoptic: one, or those for the image and its flip; see `MaskQueries`.
        task: "semantic", "instance" or "panoptic".
        output_size: (height, width) of the result.
        categories: in label order.
        config: thresholds, and the size at which semantic scores are combined.

    Raises:
        ValueError: a prediction has no masks, which the task needs.
    """
    if task == "semantic":
        label_map = _semantic(predictions, output_size, at_output=config.semantic_resolution == "output")
        labels = torch.bincount(label_map.flatten(), minlength=len(categories)).nonzero()[:, 0]
        return Segmentation(task, output_size, categories, _numpy(labels), label_map=_numpy(label_map))
    if task not in ("instance", "panoptic"):
        raise ValueError(f"unknown task '{task}'; known: semantic, instance, panoptic")
    queries = MaskQueries([one for one in predictions if isinstance(one, CropPrediction)], output_size)
    algorithm = postprocess_for(queries.probabilities.device)
    things = [category.is_thing for category in categories]
    if task == "instance":
        labels, scores, _, masks = algorithm.instance(
            queries, things, top_k=config.top_k, score_threshold=config.score_threshold
        )
        return Segmentation(task, output_size, categories, _numpy(labels), _numpy(scores), instance_masks=masks)
    labels, scores, segment_map = algorithm.panoptic(
        queries, things, object_threshold=config.object_threshold, overlap_threshold=config.overlap_threshold
    )
    return Segmentation(task, output_size, categories, _numpy(labels), _numpy(scores), segment_map=_numpy(segment_map))


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


def _semantic(
    predictions: Sequence[CropPrediction | SemanticScores], output_size: tuple[int, int], *, at_output: bool
) -> Tensor:
    prediction = predictions[0]
    if len(predictions) > 1:
        mean = MeanScores(output_size)
        for one in predictions:
            mean.add(class_scores(one, output_size if at_output else None))
        prediction = mean.mean()
    scores = prediction.values if isinstance(prediction, SemanticScores) else prediction.prediction.class_logits
    return postprocess_for(scores.device).semantic(prediction, output_size, at_output=at_output)


def _numpy(tensor: Tensor):
    return tensor.cpu().numpy()
