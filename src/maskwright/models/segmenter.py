"""What every model is, whatever its decoder: pixels in, `ModelOutput` out, and it knows what it was made for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwright.config.recipe import Recipe
from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.errors import MaskwrightError
from maskwright.structures.annotations import Category, Task


class Segmenter(nn.Module):
    """A network whose forward maps images to `ModelOutput`.

    `forward(images, padding=None, intermediate=False)` takes images (B, 3, H, W) RGB, uint8 or float in 0..255, and
    padding (B, H, W) bool, True where there is no image; with `intermediate` it also gives what only losses need.
    `build_model` attaches `config`, `categories` and an `evaluate_config` of defaults, `load_model` also what the
    checkpoint holds: its own `evaluate_config`, and the `recipe` that it was trained with, where that is known.

    Attributes:
        tasks: what its predictions can be turned into.
        size_divisor: H and W must be multiples of it.
    """

    config: ModelConfig
    categories: tuple[Category, ...]
    evaluate_config: EvaluateConfig
    recipe: Recipe | None
    tasks: tuple[Task, ...]
    size_divisor: int
    backbone: nn.Module
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std)[:, None, None], persistent=False)

    def normalise(self, images: Tensor, padding: Tensor | None) -> Tensor:
        """(B, 3, H, W) float with mean 0 and deviation 1 over natural pictures, 0 where there is no image.

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
        if torch.is_grad_enabled():  # some gradients of convolutions are three times slower with channels last
            return pixels
        return pixels.contiguous(memory_format=torch.channels_last)  # all convolutions after this keep the layout

    def check_task(self, task: Task) -> None:
        """Raise MaskwrightError where the model cannot do the task."""
        if task not in self.tasks:
            raise MaskwrightError(
                f"this model gives each pixel a class and finds no separate objects, so it cannot do task {task}; "
                f"use task {' or '.join(self.tasks)}"
            )
        if task == "instance" and not any(category.is_thing for category in self.categories):
            raise MaskwrightError(
                "this checkpoint has no thing classes, so it cannot find instances; use task semantic"
            )
