"""Models; `build_model` turns the names in a recipe into modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.errors import RecipeError
from maskwright.models.backbones.base import Backbone
from maskwright.models.backbones.build import build_backbone
from maskwright.models.backbones.semask import SemanticLayer, SemaskBackbone
from maskwright.models.backbones.swin import SwinBackbone
from maskwright.models.eomt import Eomt, EomtHead
from maskwright.models.fapn_pixel_decoder import AlignedPixelDecoder, FeatureAlignment
from maskwright.models.mask2former import Mask2Former
from maskwright.models.masked_decoder import MaskedDecoder
from maskwright.models.pixel_decoder import PixelDecoder
from maskwright.models.segmenter import Segmenter
from maskwright.models.semantic_fpn import FPNDecoder, SemanticFPN
from maskwright.structures.annotations import Category, Task


def build_model(config: ModelConfig, categories: Sequence[Category]) -> Segmenter:
    """Build the model that `config` describes, with random weights.

    Its `evaluate_config` has the defaults of a recipe and the most detailed task that its classes allow.

    Raises:
        RecipeError: the backbone is unknown or unsuitable, or the pixel mean and deviation have not been measured.
    """
    if not config.pixel_mean or not config.pixel_std:
        raise RecipeError(
            "not measured yet", where="model.pixel_mean and pixel_std", remedy="`maskwright train` measures them"
        )
    num_classes = len(categories)
    pixels = {"pixel_mean": config.pixel_mean, "pixel_std": config.pixel_std}
    match config.family:
        case "mask2former":
            backbone = _build_backbone(config, num_classes)
            model = Mask2Former(
                backbone=backbone,
                pixel_decoder=_build_pixel_decoder(config, backbone.channels),
                masked_decoder=_build_masked_decoder(config, num_classes),
                **pixels,
            )
        case "semantic_fpn":
            backbone = _build_backbone(config, num_classes)
            decoder = FPNDecoder(backbone.channels, hidden_dim=config.hidden_dim, num_classes=num_classes)
            model = SemanticFPN(backbone=backbone, decoder=decoder, **pixels)
        case "eomt":
            model = _build_eomt(config, num_classes)
    model.config, model.categories = config, tuple(categories)
    model.evaluate_config, model.recipe = EvaluateConfig(task=_most_detailed_task(model)), None
    return model


def _most_detailed_task(model: Segmenter) -> Task:
    kinds = {category.is_thing for category in model.categories}
    if "panoptic" not in model.tasks or True not in kinds:
        return "semantic"
    return "panoptic" if False in kinds else "instance"


def _build_backbone(config: ModelConfig, num_classes: int) -> Backbone:
    backbone = build_backbone(
        config.backbone,
        options=config.backbone_options,
        norm=config.backbone_norm,
        window=config.window_size,
        drop_path=config.drop_path_rate,
        channels=len(config.pixel_mean),
        vit_pyramid=config.vit_pyramid,
    )
    if config.semantic_attention is None:
        return backbone
    swin = cast(SwinBackbone, backbone)  # the recipe has checked it
    window = config.semantic_window_size or swin.window
    layers = [
        SemanticLayer(dim=channels, num_classes=num_classes, window=window if scope == "window" else None)
        for channels, scope in zip(swin.channels.values(), config.semantic_attention, strict=True)
    ]
    return SemaskBackbone(swin, layers)


def _build_eomt(config: ModelConfig, num_classes: int) -> Eomt:
    from maskwright.models.backbones.vit import build_vit, is_plain_vit  # imports timm

    if not is_plain_vit(config.backbone):
        raise RecipeError(
            f"family eomt puts queries into the blocks of a plain ViT, which '{config.backbone}' is not",
            where="model.backbone",
            remedy="use one such as vit_small_patch14_reg4_dinov2 or vit_small_patch16_dinov3_qkvb",
        )
    arguments = dict(config.backbone_options)
    if config.drop_path_rate:
        arguments["drop_path_rate"] = config.drop_path_rate
    if len(config.pixel_mean) != 3:
        arguments["in_chans"] = len(config.pixel_mean)
    backbone = build_vit(config.backbone, arguments, pyramid=None)
    head = EomtHead(
        backbone.width,
        patch_size=backbone.patch_size,
        num_queries=config.num_queries,
        num_classes=num_classes,
        num_prefix_tokens=backbone.num_prefix_tokens,
    )
    return Eomt(
        backbone=backbone,
        head=head,
        query_blocks=config.query_blocks,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )


def _build_pixel_decoder(config: ModelConfig, channels: dict[int, int]) -> nn.Module:
    hidden_dim, mask_dim = config.hidden_dim, config.mask_dim or config.hidden_dim
    if config.pixel_decoder == "fapn":
        return AlignedPixelDecoder(channels, hidden_dim=hidden_dim, mask_dim=mask_dim)
    return PixelDecoder(
        channels,
        hidden_dim=hidden_dim,
        mask_dim=mask_dim,
        num_heads=config.num_heads,
        num_points=config.deformable_points,
        num_layers=config.pixel_decoder_layers,
        feedforward_dim=config.pixel_decoder_feedforward_dim,
        alignment=FeatureAlignment(hidden_dim) if config.pixel_decoder == "msfapn" else None,
    )


def _build_masked_decoder(config: ModelConfig, num_classes: int) -> MaskedDecoder:
    return MaskedDecoder(
        num_queries=config.num_queries,
        num_classes=num_classes,
        hidden_dim=config.hidden_dim,
        mask_dim=config.mask_dim or config.hidden_dim,
        num_heads=config.num_heads,
        num_layers=config.masked_decoder_layers,
        feedforward_dim=config.masked_decoder_feedforward_dim,
    )
