"""Recipes: one complete, typed YAML file per data set, task and model family. Unknown keys are errors.

There is no inheritance between files: the value in force is in the file, or it is the default written here. The
resolved recipe is saved with every run and inside every checkpoint.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from maskwright.errors import RecipeError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Strict):
    """What is built. Everything that shapes a weight is here."""

    family: Literal["mask2former"] = "mask2former"
    backbone: str = Field(description="a timm model name with features at strides 4, 8, 16 and 32")
    backbone_options: dict[str, Any] = Field({}, description="arguments for timm, e.g. depths of an unusual Swin")
    backbone_weights: str | None = Field(None, description="'timm', or a weight file; null starts from random weights")
    backbone_norm: Literal["frozen", "batch", "sync"] = Field("frozen", description="batch norms of the backbone")
    window: Positive | None = Field(None, description="Swin window in cells; null takes the named model's")
    drop_path: Share = 0.0
    queries: Positive = 100
    width: Positive = Field(256, description="channels of both decoders")
    mask_width: Positive | None = Field(None, description="channels of mask embeddings; null takes width")
    heads: Positive = 8
    points: Positive = Field(4, description="sampling points per level and head of the deformable attention")
    pixel_decoder_layers: Positive = 6
    pixel_decoder_feedforward: Positive = 1024
    masked_decoder_layers: Positive = 9
    masked_decoder_feedforward: Positive = 2048
    pixel_mean: tuple[float, float, float] = Field((123.675, 116.28, 103.53), description="RGB, in units of 0..255")
    pixel_std: tuple[float, float, float] = Field((58.395, 57.12, 57.375), description="RGB, in units of 0..255")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.width % 32:
            raise ValueError(f"width {self.width} must be a multiple of 32 (group norm has 32 groups)")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class CategoryConfig(_Strict):
    """One class, as in `data/categories/*.yaml`."""

    id: int
    name: str
    is_thing: bool = True
    color: tuple[int, int, int] | None = None


class SplitConfig(_Strict):
    """Where one split lies, relative to `data.root`."""

    images: str = Field(description="folder of the pictures, searched recursively")
    annotations: str | None = Field(None, description="COCO json, or the folder of label pictures")
    masks: str | None = Field(None, description="folder of the panoptic PNGs")
    list: str | None = Field(None, description="text file with '<image> <label>' per line, paths relative to data.root")


class DataConfig(_Strict):
    """What is read."""

    format: Literal["label_maps", "coco_instance", "coco_panoptic"]
    root: str = Field(description="folder of the data set; 'sample' is the one inside the package")
    task: Literal["semantic", "instance", "panoptic"] = Field(
        description="what objects are trained: one per class, things only, or things and stuff"
    )
    categories: str | tuple[CategoryConfig, ...] | None = Field(
        None, description="a built-in list, a YAML file, or the list itself; null takes the json's own"
    )
    ignore_values: tuple[int, ...] = Field((), description="raw label values that mean 'ignore' (label_maps)")
    label_map: dict[int, int | Literal["ignore"]] = Field(
        {}, description="raw label value -> category id or 'ignore', for values that are not category ids"
    )
    image_suffix: str = Field("", description="end of picture names that is not part of the pair's key")
    label_suffix: str = Field("", description="end of label names that is not part of the pair's key")
    skip_empty: bool = Field(
        False,
        description="leave out training images without any non-crowd object, as detectron2 does for COCO instance",
    )
    train: SplitConfig | None = None
    val: SplitConfig | None = None
    test: SplitConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.skip_empty and self.format == "label_maps":
            raise ValueError("skip_empty is for the COCO formats; label_maps would have to read every label first")
        return self


class AugmentConfig(_Strict):
    """How a training sample is changed.

    `large_scale_jitter`: the image is scaled to fit the crop size times a factor from `scale`, then cropped or padded.
    `short_side`: its short side becomes one of `short_sides` (pixels) or its own times a factor from `scale`; then a
    random crop.
    """

    resize: Literal["large_scale_jitter", "short_side"]
    crop: tuple[Positive, Positive] = Field(description="height, width in pixels")
    scale: tuple[float, float] | None = None
    short_sides: tuple[Positive, ...] | None = None
    max_side: Positive | None = Field(None, description="limit of the long side in pixels (short_side)")
    single_category_max_area: Share = Field(1.0, description="largest share of one class in a crop; 1 is no limit")
    flip: Share = 0.5
    color: bool = Field(False, description="brightness, contrast, saturation and hue as in SSD")

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        if self.resize == "large_scale_jitter" and self.scale is None:
            raise ValueError("large_scale_jitter needs scale: [smallest, largest]")
        if self.resize == "short_side" and (self.scale is None) == (self.short_sides is None):
            raise ValueError("short_side needs either short_sides or scale")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {list(self.scale)} must be [smallest, largest], both above 0")
        return self


class TrainConfig(_Strict):
    """How it is trained. Defaults are the original's."""

    steps: Positive
    batch_size: Positive = Field(16, description="images per step over all processes and accumulated parts")
    accumulate: Positive = Field(1, description="parts into which a process divides its share of a step")
    augment: AugmentConfig
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    backbone_factor: Annotated[float, Field(ge=0)] = Field(0.1, description="learning rate of the backbone, relative")
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(0.01, description="limit of the whole gradient's norm")
    schedule: Literal["poly", "step"] = "poly"
    poly_power: float = 0.9
    drops: tuple[Share, ...] = Field((0.9, 0.95), description="shares of the steps after which 'step' divides by 10")
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_factor: Share = Field(1.0, description="rate at step 0, relative")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0
    workers: Annotated[int, Field(ge=0)] = 4
    points: Positive = Field(12544, description="sampled points per mask, for matching and for the mask losses")
    oversample_ratio: Annotated[float, Field(ge=1)] = 3.0
    importance_ratio: Share = 0.75
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: Share = 0.1
    evaluate_every: Positive | None = Field(None, description="steps; null evaluates only at the end")
    checkpoint_every: Positive = Field(1000, description="steps between resumable checkpoints")
    keep: Positive = Field(2, description="resumable checkpoints kept")
    log_every: Positive = Field(10, description="steps between rows of log.jsonl")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        return self


class EvaluateConfig(_Strict):
    """How images are prepared for prediction, and how predictions are decided and scored."""

    task: Literal["semantic", "instance", "panoptic"]
    short_side: Positive | None = Field(None, description="pixels; null keeps the image's size")
    max_side: Positive | None = None
    batch_size: Positive = 1
    limit: Positive | None = Field(None, description="images scored; null is all")
    semantic_at: Literal["input", "output"] = Field(
        "output", description="size at which class scores are combined; 'input' then resizes the scores"
    )
    object_threshold: Share = Field(0.8, description="least class score of a panoptic segment")
    overlap_threshold: Share = Field(0.8, description="least visible share of a panoptic segment")
    top_k: Positive = Field(100, description="instances kept per image")
    score_threshold: Share = Field(0.0, description="least score of an instance")


class Recipe(_Strict):
    """A whole recipe."""

    name: str
    description: str = ""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig


def load_recipe(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        source: a YAML file, or the name of a recipe that comes with the package (see `recipe_names`).
        overrides: "key.path=value" each; values are YAML, so `null`, `true`, `3e-4` and `[1, 2]` work.

    Raises:
        RecipeError: the file is absent or not YAML; a key is unknown (the message names the nearest valid one); a
            value has the wrong type; a needed key is missing.
    """
    path = _find(source)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path.name}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path.name}: expected keys and values, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return parse_recipe(values, path.name)


def parse_recipe(values: dict, where: str) -> Recipe:
    """A recipe from plain values; `where` names their origin in errors.

    Raises:
        RecipeError: as `load_recipe`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise RecipeError(f"{where}: {_explain(problem)}") from None


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.name[:-5] for file in _folder().iterdir() if file.name.endswith(".yaml"))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, default_flow_style=None)


def data_root(root: str) -> Path:
    """The folder that `data.root` names; "sample" is the one inside the package."""
    if root == "sample":
        return Path(str(resources.files("maskwright") / "sample"))
    return Path(root).expanduser()


def _folder():
    return resources.files("maskwright") / "recipes"


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    packaged = Path(str(_folder() / f"{source}.yaml"))
    if path.suffix not in (".yaml", ".yml") and packaged.is_file():
        return packaged
    near = difflib.get_close_matches(str(source), recipe_names(), 3, 0.4)
    hint = f"nearest recipes: {', '.join(near)}" if near else f"recipes: {', '.join(recipe_names())}"
    raise RecipeError(f"no recipe '{source}': neither a file nor one of the package's; {hint}")


def _apply(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override '{override}' is not of the form key.path=value")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.get(parent)
        if not isinstance(child, dict):
            child = values[parent] = {}
        values = child
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"override '{override}': the value is not YAML; quote it") from None


def _explain(problem: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(key, _keys(Recipe), 1, 0.0)
            return f"unknown key '{key}'; the nearest valid key is '{near[0]}'"
        case "missing":
            return f"key '{key}' is missing"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
    found = problem["input"]
    return f"{key}: {problem['msg'][:1].lower()}{problem['msg'][1:]}; found {found!r} ({type(found).__name__})"


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        for part in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                keys += _keys(part, f"{prefix}{name}.")
    return keys
