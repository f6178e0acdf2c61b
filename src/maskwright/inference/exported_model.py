"""An exported file as a `Segmenter`, so that prediction and evaluation take it like a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwright.checkpoints.load import load_model
from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.errors import MaskwrightError
from maskwright.inference.exported.decisions import read_decision
from maskwright.inference.exported.runtimes import ExportedFile, Outputs, is_exported, open_exported
from maskwright.inference.exported.settings import RAW, decided_otherwise
from maskwright.models.segmenter import Segmenter
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.device import pick_device
from maskwright.structures.annotations import Task
from maskwright.structures.predictions import MaskPrediction, ModelOutput, PixelPrediction


def open_model(source: str | Path, device: str | None = None) -> Segmenter:
    """Load a checkpoint, or open an exported file.

    Args:
        source: an exported file (see `runtimes`), or what `load_model` takes.
        device: see `Predictor`.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        MaskwrightError: the exported file cannot be used, or the device cannot.
    """
    if is_exported(source):
        return ExportedModel(open_exported(source, device))
    return load_model(source, pick_device(device))


class ExportedModel(Segmenter):
    """Runs an exported file. It takes images of one size, and stays on the CPU as far as PyTorch is concerned.

    Args:
        file: opened.
    """

    def __init__(self, file: ExportedFile) -> None:
        metadata = file.metadata
        super().__init__(metadata.pixel_mean, metadata.pixel_std)
        self.file = file
        self.fixed_size = metadata.size
        self.size_divisor = 1
        self.tasks = metadata.tasks
        self.categories = metadata.categories
        self.config = ModelConfig.model_validate(metadata.model)
        self.evaluate_config = EvaluateConfig.model_validate(metadata.evaluate | {"task": metadata.task})
        self.recipe = None

    @property
    def decides(self) -> bool:
        """Whether the outputs of the file are results."""
        return self.file.metadata.contents == "result"

    def forward(self, images: Tensor, padding: Tensor | None = None, intermediate: bool = False) -> ModelOutput:
        """Predict; see `Segmenter`. There are no intermediate predictions, and files with results have none."""
        if self.decides:
            raise self._refuse("it holds decisions, without the scores that this needs")
        return ModelOutput(as_prediction(self._run(images, padding)))

    def decide(
        self, images: Tensor, padding: Tensor, input_size: tuple[int, int], output_size: tuple[int, int]
    ) -> Segmentation:
        """Return the result for one image (1, C, H, W), decided inside the file; see `read_decision`."""
        outputs = {name: array[0] for name, array in self._run(images, padding).items()}
        return read_decision(outputs, self.file.metadata, input_size, output_size)

    def check_task(self, task: Task) -> None:
        """See `Segmenter`."""
        if self.decides and task not in self.tasks:
            raise self._refuse(f"it holds results of task {self.evaluate_config.task}, not {task}")
        super().check_task(task)

    def check_settings(self, config: EvaluateConfig, precision: str, confidence: bool) -> None:
        """Raise MaskwrightError for settings that the file cannot follow."""
        if precision != "fp32":
            raise MaskwrightError(
                f"--precision {precision} is for checkpoints",
                where=self.file.path,
                remedy="leave it out; `maskwright export --precision` (fp32, fp16, int8) chose that of the file",
            )
        height, width = self.file.metadata.size
        window = config.window_size
        if window and (window[0] > height or window[1] > width):
            raise self._refuse(f"window_size {list(window)} is larger than its {height}x{width} pixels")
        if config.scales != (1.0,) and not window:
            raise self._refuse(f"scales {list(config.scales)} need more sizes than its {height}x{width} pixels")
        if not self.decides:
            return
        if confidence:
            raise self._refuse("it holds decisions, without the scores that a confidence is computed from")
        if config.flip or window:
            raise self._refuse("flip and window_size average predictions, but it holds decisions")
        if reason := decided_otherwise(self.file.metadata, config):
            raise self._refuse(reason)

    def _refuse(self, reason: str) -> MaskwrightError:
        return MaskwrightError(reason, where=self.file.path, remedy=RAW)

    def _run(self, images: Tensor, padding: Tensor | None) -> Outputs:
        pixels = images.float()
        if padding is not None:
            pixels = torch.where(padding[:, None], self.pixel_mean, pixels)
        return self.file.run(np.ascontiguousarray(pixels.numpy()))


def as_prediction(outputs: dict[str, np.ndarray]) -> MaskPrediction | PixelPrediction:
    """Return the prediction (B images) that the outputs of a file with raw contents or masks are."""
    tensors = {name: torch.from_numpy(array).float() for name, array in outputs.items()}
    if "pixel_logits" in tensors:
        return PixelPrediction(tensors["pixel_logits"])
    if "mask_logits" in tensors:  # as the product of embeddings and features that `MaskPrediction` holds
        masks = tensors["mask_logits"]
        embeddings = torch.eye(masks.shape[1]).expand(len(masks), -1, -1)
        return MaskPrediction(tensors["class_logits"], embeddings, masks)
    return MaskPrediction(tensors["class_logits"], tensors["mask_embeddings"], tensors["mask_features"])
