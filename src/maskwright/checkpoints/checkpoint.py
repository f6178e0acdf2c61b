"""Checkpoints: our file format, and those of other implementations in our terms.

Our format is one `.safetensors` whose header holds, as JSON, the model's configuration, its categories, how it is
evaluated, the recipe it was trained with, and where it came from. A model file is therefore all that prediction needs.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from maskwright import __version__
from maskwright.checkpoints.infer_config import infer_config, published_setting
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.key_maps.other_models import lone_backbone, other_model
from maskwright.checkpoints.key_maps.translate import listing, recognise, translate
from maskwright.checkpoints.readers.weight_file import read_safetensors as read_safetensors
from maskwright.checkpoints.sources import Settings, read_source
from maskwright.checkpoints.zoo import categories_of, find_in_cache, published, settle
from maskwright.config.categories import category_list_names, load_categories
from maskwright.config.recipe import Recipe
from maskwright.config.schema import CategoryConfig, EvaluateConfig, ModelConfig
from maskwright.errors import CheckpointError, MaskwrightError, printable
from maskwright.models import build_model
from maskwright.models.empty_init import assign_weights, skip_init
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.structures.annotations import Category

FORMAT = "maskwright-1"


@dataclass
class Checkpoint:
    """Weights and all that is needed to use them.

    Attributes:
        config: the model.
        categories: its classes, in label order.
        evaluate: how it is run and decided on.
        state: our parameter names to tensors.
        recipe: what it was trained with, where that is known.
        provenance: origin, version, metrics: free JSON.
        dropped: (key, reason) of entries left out when a foreign file was read.
    """

    config: ModelConfig
    categories: tuple[Category, ...]
    evaluate: EvaluateConfig
    state: State
    recipe: Recipe | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)


def load_model(source: str | Path, device: torch.device | str = "cpu") -> Segmenter:
    """A model ready to predict, from our file or from a checkpoint of another implementation.

    Returns:
        The model in evaluation mode, with `config`, `categories`, `evaluate` and `recipe` attached.

    Raises:
        CheckpointError: the file is absent, broken, unsafe, of an unknown layout, or not a whole model.
    """
    try:
        return model_from_checkpoint(_read(source, None), device)
    except MaskwrightError as error:
        raise _about(source, error) from None


def model_from_checkpoint(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Segmenter:
    """The model of a checkpoint in evaluation mode; see `load_model`. On a CPU it shares the checkpoint's memory."""
    model = _fitting_model(checkpoint)
    assign_weights(model, checkpoint.state)
    model.evaluate_config, model.recipe = checkpoint.evaluate, checkpoint.recipe
    return model.to(device).eval()


def read_checkpoint(source: str | Path, categories: str | None = None) -> Checkpoint:
    """Read a weight file of any known layout.

    Args:
        source: a weight file (`.safetensors`, `.pkl`, `.pth`, `.pt`, `.bin`), a folder that transformers wrote, a Hub
            id, or the name of a published model (see `zoo`) whose file is in the cache folder.
        categories: class list for foreign weights (a built-in name or a YAML file); None takes the names that stand
            beside them, else guesses by the number of classes, else numbers them.

    Returns:
        The checkpoint; its tensors are mapped from the file, which may be replaced but not be changed in place.

    Raises:
        CheckpointError: as `load_model`.
    """
    checkpoint = _read(source, categories)
    try:
        _fitting_model(checkpoint)
    except MaskwrightError as error:
        raise _about(source, error) from None
    return checkpoint


def _about(source: str | Path, error: MaskwrightError) -> CheckpointError:
    """The error with the name of the source, if it does not begin with that already."""
    message = str(error)
    return CheckpointError(message if message.startswith(str(source)) else f"{source}: {message}")


def _read(source: str | Path, categories: str | None) -> Checkpoint:
    """As `read_checkpoint`, but whether the weights are those of the model has not been looked at."""
    if entry := published(source):
        checkpoint = _read(find_in_cache(entry.name), categories)
        return settle(checkpoint, entry, checkpoint.categories if categories else categories_of(entry))
    found = read_source(source)
    path, state, settings = found.path, found.weights.state, found.settings
    kind = found.weights.header.get("format", "")
    try:
        if kind == FORMAT:
            checkpoint = _own(state, found.weights.header)
        elif kind.startswith("maskwright-"):
            raise CheckpointError(
                f"has the format {printable(kind)}, expected {FORMAT}; of a run, use best.safetensors or "
                "last.safetensors"
            )
        else:
            checkpoint = _foreign(state, path.name, settings, categories)
            checkpoint.dropped[:0] = found.weights.dropped
        _check_numbers(checkpoint.state)
    except MaskwrightError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return checkpoint


def _foreign(state: State, name: str, settings: Settings, categories: str | None) -> Checkpoint:
    """A checkpoint of another implementation; `name` is that of its file."""
    layout = recognise(state)
    if layout is None:
        raise CheckpointError(f"{_stranger(state)}; its first keys are {listing(state, 4)}")
    try:
        translation = translate(state, layout)
    except CheckpointError:
        if other := other_model(state):  # MaskFormer shares many names with its successor
            raise CheckpointError(f"the weights of {other}; {_NEEDED}") from None
        raise
    _check_not_empty(translation.state)
    config, num_classes = infer_config(translation.state, settings.heads, settings.backbone)
    names, evaluate = published_setting(num_classes, config)
    named = categories or settings.categories or (None if settings.class_names else names)
    classes = _categories(named, settings.class_names, num_classes)
    config = config.model_copy(update=settings.model)
    evaluate = evaluate.model_copy(update=settings.evaluate)
    provenance = {"layout": layout.name, "file": name, "maskwright": __version__}
    return Checkpoint(config, classes, evaluate, translation.state, None, provenance, translation.dropped)


_NEEDED = "use those of a Mask2Former or SeMask (published ones: maskwright zoo)"


def _stranger(state: State) -> str:
    """What weights of no known layout are, and what to do with them."""
    if other := other_model(state):
        return f"the weights of {other}; {_NEEDED}"
    if backbone := lone_backbone(state):
        return (
            f"the weights of {backbone} alone, a backbone; to train with them, set model.backbone_weights to the file"
        )
    return f"not a checkpoint that maskwright knows; {_NEEDED}"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write our format, whole or not at all."""
    metadata = {
        "format": FORMAT,
        "model": checkpoint.config.model_dump_json(),
        "categories": json.dumps([[c.id, c.name, c.is_thing, list(c.color)] for c in checkpoint.categories]),
        "evaluate": checkpoint.evaluate.model_dump_json(),
        "recipe": checkpoint.recipe.model_dump_json() if checkpoint.recipe else "",
        "provenance": json.dumps(checkpoint.provenance),
    }
    state = {key: tensor.detach().contiguous().cpu() for key, tensor in checkpoint.state.items()}
    metadata["crc32"] = checksum(state, metadata)
    write_file_atomically(path, lambda temporary: safetensors.torch.save_file(state, temporary, metadata))


def _own(state: State, header: dict[str, str]) -> Checkpoint:
    try:
        checkpoint = Checkpoint(
            ModelConfig.model_validate_json(header["model"]),
            tuple(_category(*values) for values in json.loads(header["categories"])),
            EvaluateConfig.model_validate_json(header["evaluate"]),
            state,
            Recipe.model_validate_json(header["recipe"]) if header["recipe"] else None,
            json.loads(header["provenance"]),
        )
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        reason = printable(" ".join(str(error).split()), 200)
        raise CheckpointError(
            f"the header of this maskwright file is damaged: {reason}; copy or download it again"
        ) from None
    if "crc32" in header and header["crc32"] != checksum(state, header):
        raise CheckpointError(
            "damaged: its content has changed since it was written; copy or download it again, or, if you changed it, "
            "leave 'crc32' out of its header"
        )
    return checkpoint


def _category(number: object, name: object, is_thing: object, color: object) -> Category:
    known = CategoryConfig.model_validate({"id": number, "name": name, "is_thing": is_thing, "color": color})
    return Category(known.id, known.name, known.is_thing, known.color or (0, 0, 0))


def checksum(state: State, header: dict[str, str]) -> str:
    """CRC-32 of the header's text, but for "crc32", and of all weights in the order of their names; 8 hexadecimals."""
    digest = zlib.crc32(json.dumps({key: header[key] for key in sorted(header) if key != "crc32"}).encode())
    for key in sorted(state):
        digest = zlib.crc32(state[key].reshape(-1).view(torch.uint8).numpy(), digest)
    return f"{digest:08x}"


def _categories(
    source: str | tuple[CategoryConfig, ...] | None, names: tuple[str, ...] | None, num_classes: int
) -> tuple[Category, ...]:
    """The classes of a foreign model: those of a list, else of the names beside the weights, else numbers."""
    if source:
        categories = load_categories(source)
    else:
        names = names or tuple(f"class {number}" for number in range(num_classes))
        categories = _built_in(names) or load_categories(
            [CategoryConfig(id=number, name=name) for number, name in enumerate(names)]
        )
    if len(categories) != num_classes:
        where = f"the class list '{source}'" if isinstance(source, str) else "the list of classes beside them"
        raise CheckpointError(
            f"the weights have {num_classes} classes, {where} has {len(categories)}; name one with --categories"
        )
    return categories


def _built_in(names: tuple[str, ...]) -> tuple[Category, ...] | None:
    """The built-in list of these names, which also knows things, stuff and colours; None if no list has them."""

    def plain(words: Iterable[str]) -> list[str]:
        return [re.sub(r"\W+|_", " ", word).strip().lower() for word in words]

    lists = (load_categories(name) for name in category_list_names())
    return next((found for found in lists if plain(category.name for category in found) == plain(names)), None)


def _fitting_model(checkpoint: Checkpoint) -> Segmenter:
    """The model of a checkpoint, not yet filled.

    Raises:
        CheckpointError: the checkpoint's weights are not exactly those of the model.
        RecipeError: there is no such model.
    """
    _check_not_empty(checkpoint.state)
    with skip_init(checkpoint.state):
        model = build_model(checkpoint.config, checkpoint.categories)
    check_fit(model.state_dict(), checkpoint.state)
    return model


def check_fit(expected: State, found: State) -> None:
    """Compare names, shapes and kinds of weights with those of a model.

    Raises:
        CheckpointError: they differ; the message lists what is missing, left over, and of another shape or kind.
    """
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"{len(missing)} missing: {listing(missing)}")
    if extra := found.keys() - expected.keys():
        problems.append(f"{len(extra)} left over: {listing(extra)}")
    common = expected.keys() & found.keys()
    wrong = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in common
        if found[key].shape != expected[key].shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {listing(wrong, 4)}")
    other = [
        f"{key} {found[key].dtype}"
        for key in common
        if expected[key].is_floating_point() and not found[key].is_floating_point()
    ]
    if other:
        problems.append(f"{len(other)} are no floats: {listing(other)}")
    if problems:
        raise CheckpointError(
            f"the weights do not fit the model; {'; '.join(problems)}; use the whole, plain checkpoint"
        )


def _check_not_empty(state: State) -> None:
    if empty := [key for key, tensor in state.items() if not tensor.numel()]:
        raise CheckpointError(f"{len(empty)} of its weights are empty: {listing(empty)}; use the whole checkpoint")


def _check_numbers(state: State) -> None:
    """One weight that is no number makes every result one; a run that has lost its numbers never finds them again."""
    lost = [
        key
        for key, tensor in state.items()
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all()
    ]
    if lost:
        raise CheckpointError(
            f"{len(lost)} of its weights hold NaN or infinite values: {listing(lost, 4)}; use an earlier checkpoint"
        )


def checkpoint_of(model: Segmenter, recipe: Recipe, provenance: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a model that was trained with a recipe."""
    return Checkpoint(model.config, model.categories, recipe.evaluate, model.state_dict(), recipe, provenance)
