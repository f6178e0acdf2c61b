"""Prediction options of exported files: those that work without PyTorch, and those that are fixed inside a file."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

from maskwright.errors import MaskwrightError
from maskwright.inference.exported.metadata import ExportMetadata
from maskwright.structures.category import Task

# Options that change the decision, which is part of a file with contents "result".
DECIDED = ("semantic_resolution", "object_threshold", "overlap_threshold", "top_k", "score_threshold")

RAW = "export the model again with --contents raw"

# Options that combine several predictions for an image, and their values for one prediction.
SINGLE: dict[str, Any] = {"flip": False, "scales": [1.0], "window_size": None}


@dataclass(frozen=True)
class Settings:
    """Options of a prediction, as in a recipe's `evaluate` section.

    Attributes:
        task: "semantic", "instance" or "panoptic".
        semantic_resolution: "output", or "input" to combine masks to class scores at the size of the resized image.
        object_threshold: minimum class score of a panoptic segment, 0..1.
        overlap_threshold: minimum visible share of a panoptic segment's mask, 0..1.
        top_k: maximum instances per image.
        score_threshold: minimum score of an instance, 0..1.
        tile_size: side in pixels of tiles into which larger images are cut; None is no tiles.
        tile_overlap: minimum overlap of tiles in pixels; None is an eighth of `tile_size`.
        tile_mask_megabytes: memory for the run-length encoded masks of a tiled image, in 10^6 bytes.
    """

    task: Task
    semantic_resolution: Literal["input", "output"]
    object_threshold: float
    overlap_threshold: float
    top_k: int
    score_threshold: float
    tile_size: int | None
    tile_overlap: int | None
    tile_mask_megabytes: int


def settings_of(metadata: ExportMetadata, **options: Any) -> Settings:
    """Return the settings of a file, changed by options.

    Args:
        metadata: of the file.
        options: fields of `Settings`, or keys of `SINGLE` with their values there, to predict once whatever the file's
            settings are. None keeps the file's value.

    Raises:
        MaskwrightError: an option is unknown, out of range, or contradicts the file; or the file's settings combine
            several predictions, which needs maskwright itself.
    """
    options = {name: value for name, value in options.items() if value is not None}
    names = [field.name for field in fields(Settings)]
    for name in options:
        if name not in names and name not in SINGLE:
            near = get_close_matches(name, [*names, *SINGLE], 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
            raise MaskwrightError(f"unknown option '{name}'", remedy=hint)
    _check_single({name: options.pop(name, metadata.evaluate.get(name, single)) for name, single in SINGLE.items()})
    inside = {name: metadata.evaluate[name] for name in names if name != "task"}
    settings = replace(Settings(metadata.task, **inside), **options)
    _check_ranges(settings)
    if settings.task not in metadata.tasks:
        raise MaskwrightError(
            f"it has no results of task {settings.task}", remedy=f"it has {', '.join(metadata.tasks)}"
        )
    if metadata.contents == "result" and (reason := decided_otherwise(metadata, settings)):
        raise MaskwrightError(reason, remedy=RAW)
    return settings


def decided_otherwise(metadata: ExportMetadata, wanted: object) -> str | None:
    """Return why a file that holds decisions cannot follow options; None if none of `DECIDED` differs."""
    for name in DECIDED:
        inside, found = metadata.evaluate[name], getattr(wanted, name)
        if inside != found:
            return f"it decides with {name} {inside}, not {found}"
    return None


def _check_single(values: dict[str, Any]) -> None:
    for name, value in values.items():
        single = SINGLE[name]
        if (list(value) if isinstance(value, tuple) else value) != single:
            raise MaskwrightError(
                f"{name} {value} combines several predictions for an image, which needs PyTorch",
                remedy="use maskwright itself"
                + ("" if single is None else f", or set {name}={single} to predict once"),
            )


def _check_ranges(settings: Settings) -> None:
    if settings.task not in get_args(Task):
        raise MaskwrightError(f"task is '{settings.task}', expected {', '.join(get_args(Task))}")
    if settings.semantic_resolution not in ("input", "output"):
        raise MaskwrightError(f"semantic_resolution is '{settings.semantic_resolution}', expected input or output")
    for name in ("object_threshold", "overlap_threshold", "score_threshold"):
        value = getattr(settings, name)
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise MaskwrightError(f"{name} is {value}, expected 0..1")
    for name in ("top_k", "tile_size", "tile_mask_megabytes"):
        value = getattr(settings, name)
        if not (isinstance(value, int) and value >= 1) and (name, value) != ("tile_size", None):
            raise MaskwrightError(f"{name} is {value}, expected a whole number from 1")
    overlap, side = settings.tile_overlap, settings.tile_size
    if overlap is not None and side is not None and not (isinstance(overlap, int) and 0 <= overlap < side):
        raise MaskwrightError(f"tile_overlap is {overlap}, expected 0 to less than tile_size {side}")
