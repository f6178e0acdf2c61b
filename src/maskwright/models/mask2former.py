"""Mask2Former (Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation"): the assembly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskwright.recipe import EvaluateConfig, ModelConfig, Recipe
from maskwright.structures import Category, ModelOutput

SIZE_DIVISOR = 32


class Mask2Former(nn.Module):
    """Backbone, pixel decoder and masked decoder, and the normalisation of pixels in front of them.

    A model knows what it is: `build_model` attaches `config` and `categories`, `load_model` also `evaluate_config` and
    the `recipe` that it was trained with, where that is known.
    """

    config: ModelConfig
    categories: tuple[Category, ...]
    evaluate_config: EvaluateConfig
    recipe: Recipe | None
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        pixel_decoder: nn.Module,
        masked_decoder: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.masked_decoder = masked_decoder
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std)[:, None, None], persistent=False)

    def forward(self, images: Tensor, padding: Tensor | None = None, intermediate: bool = False) -> ModelOutput:
        """Predict.

        Args:
            images: (B, 3, H, W) RGB, uint8 or float in 0..255; H and W multiples of 32.
            padding: (B, H, W) bool, True where there is no image; those pixels become 0 after normalisation.
            intermediate: whether the predictions of all decoder layers are wanted (training).

        Raises:
            ValueError: H or W is not a multiple of 32.
        """
        height, width = images.shape[-2:]
        if height % SIZE_DIVISOR or width % SIZE_DIVISOR:
            padded = [-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in (height, width)]
            raise ValueError(f"images are {height}x{width}; pad them right and bottom to {padded[0]}x{padded[1]}")
        pixels = (images.float() - self.pixel_mean) / self.pixel_std
        if padding is not None:
            pixels = pixels.masked_fill(padding[:, None], 0)
        levels, mask_features = self.pixel_decoder(self.backbone(pixels))
        *earlier, final = self.masked_decoder(levels, mask_features, intermediate)
        return ModelOutput(final, earlier)
