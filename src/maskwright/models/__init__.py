"""Models. `build_model` is the one place where names become modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.errors import RecipeError
from maskwright.models.backbones.base import Backbone
from maskwright.models.backbones.build import build_backbone
from maskwright.models.backbones.semask import SemanticLayer, SemaskBackbone
from maskwright.models.backbones.swin import SwinBackbone
from maskwright.models.fapn_pixel_decoder import AlignedPixelDecoder, FeatureAlignment
from maskwright.models.mask2former import Mask2Former
from maskwright.models.masked_decoder import MaskedDecoder
from maskwright.models.pixel_decoder import PixelDecoder
from maskwright.models.segmenter import Segmenter
from maskwright.models.semantic_fpn import FPNDecoder, SemanticFPN
from maskwright.structures.annotations import Category, Task


def build_model(config: ModelConfig, categories: Sequence[Category]) -> Segmenter:
    """The model that `config` describes, for these classes, with random weights.

    Its `evaluate_config` has a recipe's defaults, and the task that its classes allow; set another where a recipe says
    how images are prepared.

    Raises:
        RecipeError: the backbone is unknown or unsuitable, or pixel mean and deviation have not been measured.
    """
    if not config.pixel_mean or not config.pixel_std:
        raise RecipeError("model.pixel_mean and pixel_std are still to be measured, which `maskwright train` does")
    backbone = build_backbone(
        config.backbone,
        options=config.backbone_options,
        norm=config.backbone_norm,
        window=config.window_size,
        drop_path=config.drop_path_rate,
        channels=len(config.pixel_mean),
    )
    if config.semantic_attention is not None:
        backbone = _semask(config, cast(SwinBackbone, backbone), len(categories))
    match config.family:
        case "mask2former":
            model = _mask2former(config, backbone, len(categories))
        case "semantic_fpn":
            decoder = FPNDecoder(backbone.channels, width=config.hidden_dim, num_classes=len(categories))
            model = SemanticFPN(
                backbone=backbone, decoder=decoder, pixel_mean=config.pixel_mean, pixel_std=config.pixel_std
            )
    model.config, model.categories = config, tuple(categories)
    model.evaluate_config, model.recipe = EvaluateConfig(task=_widest_task(model)), None
    return model


def _widest_task(model: Segmenter) -> Task:
    """What tells most about an image, of what the model and its classes allow."""
    kinds = {category.is_thing for category in model.categories}
    if "panoptic" not in model.tasks or True not in kinds:
        return "semantic"
    return "panoptic" if False in kinds else "instance"


def _semask(config: ModelConfig, swin: SwinBackbone, num_classes: int) -> SemaskBackbone:
    window = config.semantic_window_size or swin.window
    return SemaskBackbone(
        swin,
        [
            SemanticLayer(width=width, num_classes=num_classes, window=window if scope == "window" else None)
            for width, scope in zip(swin.channels.values(), config.semantic_attention or (), strict=True)
        ],
    )


def _mask2former(config: ModelConfig, backbone: Backbone, num_classes: int) -> Mask2Former:
    mask_width = config.mask_dim or config.hidden_dim
    if config.pixel_decoder == "fapn":
        pixel_decoder = AlignedPixelDecoder(backbone.channels, width=config.hidden_dim, mask_width=mask_width)
    else:
        pixel_decoder = PixelDecoder(
            backbone.channels,
            width=config.hidden_dim,
            mask_width=mask_width,
            heads=config.num_heads,
            points=config.deformable_points,
            layers=config.pixel_decoder_layers,
            feedforward=config.pixel_decoder_feedforward_dim,
            alignment=FeatureAlignment(config.hidden_dim) if config.pixel_decoder == "msfapn" else None,
        )
    masked_decoder = MaskedDecoder(
        queries=config.num_queries,
        num_classes=num_classes,
        width=config.hidden_dim,
        mask_width=mask_width,
        heads=config.num_heads,
        layers=config.masked_decoder_layers,
        feedforward=config.masked_decoder_feedforward_dim,
    )
    return Mask2Former(
        backbone=backbone,
        pixel_decoder=pixel_decoder,
        masked_decoder=masked_decoder,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )
