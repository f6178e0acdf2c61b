"""The sections of a recipe and their keys: types, defaults, what each means, and what contradicts what."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from maskwright.config.old_names import rename_section

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    """Values that are complete and never change; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    section: ClassVar[str] = ""  # its key in `old_names.OLD_NAMES`

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, values: Any) -> Any:
        return rename_section(cls.section, values)


# What makes timm read or download weights. A checkpoint's header, which anybody can write, must not.
_LOADING = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
}


class ModelConfig(Strict):
    """What is built. Everything that shapes a weight is here."""

    section = "model"

    family: Literal["mask2former", "semantic_fpn"] = Field(
        "mask2former", description="masks of queries, or a class per pixel (task semantic only)"
    )
    backbone: str = Field(description="a timm model name with features at strides 4, 8, 16 and 32")
    backbone_options: dict[str, Any] = Field({}, description="arguments for timm, e.g. depths of an unusual Swin")
    backbone_weights: str | None = Field(
        None, description="'timm', the name of weights in timm, a weight file or checkpoint; null starts at random"
    )
    backbone_norm: Literal["frozen", "batch", "sync", "statistics"] = Field(
        "frozen",
        description="batch norms of the backbone: fixed; trained; trained with statistics over all processes; or only "
        "these statistics, with fixed scale and shift, as MMSegmentation does",
    )
    window_size: Positive | None = Field(None, description="Swin window in cells; null takes the named model's")
    semantic_attention: tuple[Literal["window", "global"], ...] | None = Field(
        None, description="what the semantic layer (SeMask) after each Swin stage sees; null has no such layers"
    )
    semantic_window_size: Positive | None = Field(
        None, description="window of semantic layers; null takes the Swin window"
    )
    drop_path_rate: Share = 0.0
    num_queries: Positive = 100
    pixel_decoder: Literal["deformable", "fapn", "msfapn"] = Field(
        "deformable", description="deformable attention; feature alignment; attention, and alignment in the last step"
    )
    hidden_dim: Positive = Field(256, description="channels of the decoders")
    mask_dim: Positive | None = Field(None, description="channels of mask embeddings; null takes width")
    num_heads: Positive = 8
    deformable_points: Positive = Field(4, description="sampling points per level and head of the deformable attention")
    pixel_decoder_layers: Positive = 6
    pixel_decoder_feedforward_dim: Positive = 1024
    masked_decoder_layers: Positive = 9
    masked_decoder_feedforward_dim: Positive = 2048
    channels: Annotated[int, Field(ge=1, le=16)] | None = Field(
        None, description="of the pictures, with their numbers as they are stored; null reads any picture as 8-bit RGB"
    )
    pixel_mean: tuple[Finite, ...] = Field(
        (123.675, 116.28, 103.53),
        description="of each channel, for RGB in units of 0..255; 'measure' takes it from the training pictures",
    )
    pixel_std: tuple[Above0, ...] = Field((58.395, 57.12, 57.375), description="as pixel_mean")

    @field_validator("pixel_mean", "pixel_std", mode="before")
    @classmethod
    def _to_be_measured(cls, value: Any) -> Any:
        return () if value == "measure" else value

    @model_validator(mode="after")
    def _check_pixels(self) -> ModelConfig:
        channels = 3 if self.channels is None else self.channels
        for name in ("pixel_mean", "pixel_std"):
            values = getattr(self, name)
            if self.channels is not None and name not in self.model_fields_set:
                raise ValueError(f"channels {channels} needs {name}: {channels} numbers, or 'measure'")
            if len(values) not in (0, channels):
                raise ValueError(f"{name} has {len(values)} numbers, but pictures have {channels} channels")
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
        if loading := _LOADING.intersection(self.backbone_options):
            raise ValueError(f"backbone_options.{min(loading)} would load weights; use model.backbone_weights")
        return self


class CategoryConfig(Strict):
    """One class, as in `data/categories/*.yaml`."""

    id: int = Field(description="the number that stands for it in the annotations")
    name: str
    is_thing: bool = True
    color: tuple[int, int, int] | None = None
    group: str | None = Field(None, description="the larger class that it belongs to, where scores are kept of those")
    ignore: bool = Field(False, description="a known number that is no class: its pixels are ignored")


class SplitConfig(Strict):
    """Where one split lies, relative to `data.root`. A published data set knows it by itself."""

    section = "split"

    images: str | None = Field(None, description="folder of the pictures, searched recursively")
    annotations: str | None = Field(None, description="COCO json, or the folder of label pictures")
    masks: str | None = Field(None, description="folder of the panoptic PNGs")
    list: str | None = Field(None, description="text file with '<image> <label>' per line, paths relative to data.root")
    subsets: tuple[str, ...] = Field(
        (), description="a published data set's own names for what makes up the split, e.g. [train, train_extra]"
    )


GENERAL_FORMATS = ("label_maps", "coco_instance", "coco_panoptic")


class DataConfig(Strict):
    """What is read.

    The formats in the first row need `images` and `annotations` for each split. The others are layouts that say where
    everything lies: there `root` is enough, and a train and a val split are assumed unless they are null.
    """

    section = "data"

    format: Literal[
        "label_maps", "coco_instance", "coco_panoptic",
        "ade20k", "camvid", "cityscapes", "coco", "coco_stuff_10k", "mapillary", "voc", "yolo", "huggingface",
    ]  # fmt: skip
    root: str = Field(
        description="folder or archive (.zip, .tar, .tar.gz) of the data set, or a folder that holds its archives; "
        "'sample' is the one inside the package"
    )
    task: Literal["semantic", "instance", "panoptic"] = Field(
        description="what objects are trained: one per class, things only, or things and stuff"
    )
    categories: str | tuple[CategoryConfig, ...] | None = Field(
        None, description="a built-in list, a YAML file, or the list itself; null takes the data set's own"
    )
    ignore_values: tuple[int, ...] = Field((), description="raw label values that mean 'ignore' (label_maps)")
    label_map: dict[int, int | Literal["ignore"]] = Field(
        {}, description="raw label value -> category id or 'ignore', for values that are not category ids"
    )
    image_suffix: str = Field("", description="end of picture names that is not part of the pair's key")
    label_suffix: str = Field("", description="end of label names that is not part of the pair's key")
    filter_empty: bool = Field(
        False,
        description="leave out training images without any non-crowd object, as detectron2 does for instances; where "
        "labels are pictures, all of them are read for it",
    )
    image_column: str | None = Field(None, description="of a Hugging Face data set; null takes the first of pictures")
    label_column: str | None = Field(None, description="of a Hugging Face data set; null takes the second of pictures")
    train: SplitConfig | None = None
    val: SplitConfig | None = None
    test: SplitConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _assume_splits(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("format") not in GENERAL_FORMATS:
            return {"train": {}, "val": {}} | values
        return values


class AugmentConfig(Strict):
    """How a training sample is changed.

    `large_scale_jitter`: the image is scaled to fit the crop size times a factor from `scale`, then cropped or padded.
    `short_side`: its short side becomes one of `short_sides` (pixels) or its own times a factor from `scale`; then a
    random crop.
    """

    section = "augment"

    resize: Literal["large_scale_jitter", "short_side"]
    crop_size: tuple[Positive, Positive] = Field(description="height, width in pixels")
    scale_range: tuple[float, float] | None = None
    short_sides: tuple[Positive, ...] | None = None
    max_side: Positive | None = Field(None, description="limit of the long side in pixels (short_side)")
    single_category_max_area: Share = Field(1.0, description="largest share of one class in a crop; 1 is no limit")
    flip_probability: Share = 0.5
    color_jitter: bool = Field(False, description="brightness, contrast, saturation and hue as in SSD")

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        if self.resize == "large_scale_jitter" and self.scale_range is None:
            raise ValueError("large_scale_jitter needs scale_range: [min, max]")
        if self.resize == "short_side" and (self.scale_range is None) == (self.short_sides is None):
            raise ValueError("short_side needs either short_sides or scale_range")
        if self.scale_range is not None and not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"scale_range {list(self.scale_range)} must be [min, max], both above 0")
        return self


class SmallerSamples(Strict):
    """Steps whose samples, pictures and crops, are smaller than `augment` says."""

    until: Share = Field(description="share of all steps after which this ends")
    size: Annotated[float, Field(gt=0, le=1)] = Field(description="height and width, relative")


class TrainConfig(Strict):
    """How it is trained. Defaults are the original's."""

    section = "train"

    steps: Positive
    batch_size: Positive = Field(16, description="images per step over all processes and accumulated parts")
    gradient_accumulation_steps: Positive = Field(
        1, description="parts into which a process divides its share of a step"
    )
    augment: AugmentConfig
    progressive_resizing: tuple[SmallerSamples, ...] = Field(
        (),
        description="smaller samples at first, as in progressive learning (Tan & Le 2021): [{until: 0.6, size: 0.5}] "
        "halves height and width in the first 60 % of the steps, and takes as many points per area; such steps take "
        "little more than a quarter of the time",
    )
    initial_weights: str | None = Field(
        None, description="a checkpoint, or the name of a published model, to start from; its classes may be others"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon gives weight matrices orthogonal steps (Jordan et al. 2024) and leaves the rest to adamw; "
        "from random weights a short training learns much more with it",
    )
    muon_lr_multiplier: Annotated[float, Field(gt=0)] = Field(
        2.0, description="learning rate of such matrices, relative"
    )
    muon_max_dim: Positive | None = Field(
        None, description="largest shorter side of such matrices, to spare a CPU the time; null takes all"
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    base_batch_size: Positive | None = Field(
        None,
        description="images per step that learning_rate was chosen for; null is batch_size. Set by itself where an "
        "override changes batch_size alone",
    )
    backbone_lr_multiplier: Annotated[float, Field(ge=0)] = Field(
        0.1, description="learning rate of the backbone, relative"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    decay_batch_norms: bool = Field(False, description="whether batch norms decay like other weights, as in SeMask-FPN")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="learning rate of a block of the backbone relative to that of the next one; 1 is the same"
    )
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = Field(
        0, description="feature levels of the backbone that are not trained, from the first on, with all before them"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(0.01, description="limit of the whole gradient's norm")
    schedule: Literal["poly", "step"] = "poly"
    poly_power: float = 0.9
    milestones: tuple[Share, ...] = Field(
        (0.9, 0.95), description="shares of the steps after which 'step' divides by 10"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_factor: Share = Field(1.0, description="rate at step 0, relative")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of a moving average of the weights, which is then what is scored and kept; e.g. 0.9998"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute blocks again in the backward pass instead of keeping what lies inside them"
    )
    fsdp: bool = Field(
        False, description="divide weights, gradients and optimizer state over the processes (FSDP2), for large models"
    )
    auto_gradient_accumulation: bool = Field(
        False,
        description="choose gradient_accumulation_steps: the fewest that memory allows; batch_size stays",
    )
    seed: int = 0
    deterministic: bool = Field(
        False, description="only operators that give the same bits each time; an accelerator is slower with them"
    )
    num_workers: Annotated[int, Field(ge=0)] = 4
    num_points: Positive = Field(12544, description="sampled points per mask, for matching and for the mask losses")
    oversample_ratio: Annotated[float, Field(ge=1)] = 3.0
    importance_sample_ratio: Share = 0.75
    class_loss_weight: float = 2.0
    mask_loss_weight: float = 5.0
    dice_loss_weight: float = 5.0
    no_object_weight: Share = 0.1
    semantic_loss_weight: Annotated[float, Field(ge=0)] = Field(
        0.4, description="of the maps of semantic layers (SeMask)"
    )
    ohem_pixels: Positive | None = Field(
        None, description="pixels per image that a per-pixel loss counts, those of highest loss; null counts all"
    )
    evaluate_every: Positive | None = Field(None, description="steps; null evaluates only at the end")
    checkpoint_every: Positive = Field(1000, description="steps between resumable checkpoints")
    keep_checkpoints: Positive = Field(2, description="resumable checkpoints kept")
    best_metric: str | None = Field(
        None, description="name of the score that decides which model is best; null is the first of evaluate.metrics"
    )
    early_stopping_patience: Positive | None = Field(
        None, description="evaluations without a better score after which training stops; null never stops early"
    )
    probe_memory: bool = Field(
        True, description="measure memory and time of one part before the first step, and say them"
    )
    check_data: bool = Field(True, description="look at a sample of the files before the first step, for a few seconds")
    log_every: Positive = Field(10, description="steps between rows of log.jsonl")
    max_log_megabytes: Positive = Field(
        64, description="size at which log.jsonl becomes log.1.jsonl, and a new one begins"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio"], ...] = Field(
        ("tensorboard",), description="who is told what is logged, as far as it is installed"
    )
    hang_timeout_seconds: Positive | None = Field(
        600, description="without any step after which the stacks of all threads are printed; null never"
    )

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        ends = [part.until for part in self.progressive_resizing]
        if any(end <= before for end, before in zip(ends, [0.0, *ends], strict=False)):
            raise ValueError(
                f"progressive_resizing ends after the shares {ends} of the steps; they must grow, from above 0"
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}"
            )
        if self.auto_gradient_accumulation and self.fsdp:
            raise ValueError(
                "auto_gradient_accumulation cannot be combined with fsdp: if one process of a sharded model runs out "
                "of memory, the others hang; set gradient_accumulation_steps instead"
            )
        return self


MetricName = Literal["mean_iou", "pq", "ap", "boundary_ap", "cityscapes_iou", "cityscapes_ap"]


class EvaluateConfig(Strict):
    """How images are prepared for prediction, and how predictions are decided and scored."""

    section = "evaluate"

    task: Literal["semantic", "instance", "panoptic"]
    metrics: tuple[MetricName, ...] | None = Field(
        None,
        description="what is scored, the first decides which checkpoint is best; task panoptic scores all of them, the "
        "others those of their kind; null, or none of the kind, is mean_iou (semantic), ap (instance), pq (panoptic)",
    )
    short_side: Positive | None = Field(None, description="pixels; null keeps the image's size")
    max_side: Positive | None = None
    batch_size: Positive = Field(1, description="pictures per forward pass; only such of one size share one")
    max_images: Positive | None = Field(None, description="images scored; null is all")
    semantic_resolution: Literal["input", "output"] = Field(
        "output", description="size at which class scores are combined; 'input' then resizes the scores"
    )
    object_threshold: Share = Field(0.8, description="least class score of a panoptic segment")
    overlap_threshold: Share = Field(0.8, description="least visible share of a panoptic segment")
    top_k: Positive = Field(100, description="instances kept per image")
    score_threshold: Share = Field(0.0, description="least score of an instance")
    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0,), min_length=1, description="sizes, relative, whose class scores are averaged (semantic)"
    )
    flip: bool = Field(False, description="also see each image with left and right exchanged, and average")
    window_size: tuple[Positive, Positive] | None = Field(
        None,
        description="height, width in pixels of the network's input of windows that slide over it (semantic); class "
        "scores are then combined at the input",
    )
    window_stride: tuple[Positive, Positive] | None = Field(
        None, description="steps of the window down and across in pixels; null is two thirds of it"
    )
    tile_size: Positive | None = Field(
        None,
        description="side in pixels of the parts in which larger images are segmented, each as an image of its own",
    )
    tile_overlap: Annotated[int, Field(ge=0)] | None = Field(
        None, description="least overlap of neighbouring tiles in pixels; null is an eighth of a tile"
    )
    tile_mask_megabytes: Positive = Field(
        256,
        description="memory for the run-length masks of all instances of an image in tiles, 10^6 bytes; of more, the "
        "least sure are left out, with a warning. A hundred thousand objects with smooth outlines fit; noise does not",
    )

    @model_validator(mode="after")
    def _check_views(self) -> EvaluateConfig:
        if self.task != "semantic" and self.scales != (1.0,):
            raise ValueError(
                f"scales {list(self.scales)} are averaged for task semantic only; task {self.task} has flip"
            )
        if self.task != "semantic" and self.window_size:
            raise ValueError(
                f"window_size {list(self.window_size)} is for task semantic; for task {self.task} set tile_size"
            )
        if self.window_size and self.tile_size:
            raise ValueError(
                f"window_size {list(self.window_size)} and tile_size {self.tile_size} both cut images; set one of them"
            )
        if self.window_stride and not self.window_size:
            raise ValueError(
                f"window_stride {list(self.window_stride)} says how a window slides, but window_size is not set; set it"
            )
        if (
            self.window_stride
            and self.window_size
            and (self.window_stride[0] > self.window_size[0] or self.window_stride[1] > self.window_size[1])
        ):
            raise ValueError(
                f"window_stride {list(self.window_stride)} leaves gaps between windows of {list(self.window_size)}; "
                "lower it"
            )
        if self.tile_overlap is not None and not self.tile_size:
            raise ValueError(
                f"tile_overlap {self.tile_overlap} says how tiles overlap, but tile_size is not set; set it"
            )
        if self.tile_size and self.tile_overlap is not None and self.tile_overlap >= self.tile_size:
            raise ValueError(f"tile_overlap {self.tile_overlap} must be below tile_size {self.tile_size}")
        return self

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        chosen = self.metrics or ()
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"metrics {list(chosen)} names one twice; name each once")
        for pair in (("mean_iou", "cityscapes_iou"), ("ap", "cityscapes_ap")):
            if set(pair) <= set(chosen):
                raise ValueError(f"metrics has {' and '.join(pair)}, which give scores of the same names; keep one")
        return self
