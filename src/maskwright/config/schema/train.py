"""The `train` section of a recipe."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from maskwright.config.schema.base import Factor, Fraction, Positive, PositiveFinite, Strict


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
