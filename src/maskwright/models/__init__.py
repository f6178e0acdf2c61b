"""Models. `build_model` is the one place where names become modules."""

from __future__ import annotations

from collections.abc import Sequence

from maskwright.models.backbone import build_backbone
from maskwright.models.mask2former import Mask2Former
from maskwright.models.masked_decoder import MaskedDecoder
from maskwright.models.pixel_decoder import PixelDecoder
from maskwright.recipe import ModelConfig
from maskwright.structures import Category


def build_model(config: ModelConfig, categories: Sequence[Category]) -> Mask2Former:
    """The model that `config` describes, for these classes, with random weights.

    Raises:
        RecipeError: the backbone is unknown or unsuitable.
    """
    backbone = build_backbone(
        config.backbone,
        options=config.backbone_options,
        norm=config.backbone_norm,
        window=config.window,
        drop_path=config.drop_path,
    )
    mask_width = config.mask_width or config.width
    pixel_decoder = PixelDecoder(
        backbone.channels,
        width=config.width,
        mask_width=mask_width,
        heads=config.heads,
        points=config.points,
        layers=config.pixel_decoder_layers,
        feedforward=config.pixel_decoder_feedforward,
    )
    masked_decoder = MaskedDecoder(
        queries=config.queries,
        num_classes=len(categories),
        width=config.width,
        mask_width=mask_width,
        heads=config.heads,
        layers=config.masked_decoder_layers,
        feedforward=config.masked_decoder_feedforward,
    )
    model = Mask2Former(
        backbone=backbone,
        pixel_decoder=pixel_decoder,
        masked_decoder=masked_decoder,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )
    model.config, model.categories = config, tuple(categories)
    return model
