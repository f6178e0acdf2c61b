"""`Segmenter`, the base of all models: pixels in, `ModelOutput` out, with its configuration and class list."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwright.config.recipe import Recipe
from maskwright.config.schema import EvaluateConfig, ModelConfig, TrainConfig
from maskwright.errors import MaskwrightError, RecipeError
from maskwright.models.ops.cpu_path import trains_channels_last
from maskwright.structures.annotations import Category, Task


class Segmenter(nn.Module):
    """A network whose forward maps images to `ModelOutput`.

    `forward(images, padding=None, intermediate=False)` takes images (B, 3, H, W) RGB, uint8 or float in 0..255, and
    padding (B, H, W) bool, True outside the image; `intermediate` adds what only the losses need. `build_model` sets
    `config`, `categories` and a default `evaluate_config`; `load_model` also sets the checkpoint's own
    `evaluate_config` and, if known, the `recipe` that the model was trained with.

    Attributes:
        tasks: tasks that the predictions can be used for.
        size_divisor: H and W must be multiples of it.
        window_divisor: height and width of sliding windows must be multiples of it.
        fixed_size: the only (H, W) that an exported file takes; None for a model.
    """

    config: ModelConfig
    categories: tuple[Category, ...]
    evaluate_config: EvaluateConfig
    recipe: Recipe | None
    tasks: tuple[Task, ...]
    size_divisor: int
    window_divisor: int = 1
    fixed_size: tuple[int, int] | None = None
    backbone: nn.Module
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std)[:, None, None], persistent=False)

    def normalize(self, images: Tensor, padding: Tensor | None) -> Tensor:
        """Return pixels (B, 3, H, W) with `pixel_mean` subtracted, divided by `pixel_std`, and 0 in the padding.

        Raises:
            ValueError: H or W is not a multiple of `size_divisor`.
        """
        height, width = images.shape[-2:]
        if height % self.size_divisor or width % self.size_divisor:
            padded = [-(-side // self.size_divisor) * self.size_divisor for side in (height, width)]
            raise ValueError(f"images are {height}x{width}; pad them right and bottom to {padded[0]}x{padded[1]}")
        pixels = (images.float() - self.pixel_mean) / self.pixel_std
        if padding is not None:
            pixels = pixels.masked_fill(padding[:, None], 0)
        if torch.compiler.is_exporting():  # ExecuTorch mixes up layouts
            return pixels
        if torch.is_grad_enabled() and not trains_channels_last(pixels):
            return pixels
        return pixels.contiguous(memory_format=torch.channels_last)  # all convolutions that follow keep the layout

    def begin_step(self, step: int, config: TrainConfig) -> None:
        """Prepare for a training step, counted from 0, if anything in the model depends on it."""

    def on_weights_loaded(self) -> None:
        """Recompute what depends on the weights; called after loading them."""

    def check_window(self, size: tuple[int, int] | None) -> None:
        """Raise RecipeError if sliding windows of a size (height, width) would cut patches; None is no windows."""
        if size and any(side % self.window_divisor for side in size):
            nearest = [max(1, round(side / self.window_divisor)) * self.window_divisor for side in size]
            raise RecipeError(
                f"{list(size)} are not multiples of the patch size {self.window_divisor}",
                where="evaluate.window_size",
                remedy=f"{nearest} are the nearest",
            )

    def check_task(self, task: Task) -> None:
        """Raise MaskwrightError if the model cannot do the task."""
        if task not in self.tasks:
            raise MaskwrightError(
                f"this model classifies pixels and finds no separate objects, so it cannot do task {task}",
                remedy=f"use task {' or '.join(self.tasks)}",
            )
        if task == "instance" and not any(category.is_thing for category in self.categories):
            raise MaskwrightError(
                "this checkpoint has no thing classes, so it cannot find instances", remedy="use task semantic"
            )
