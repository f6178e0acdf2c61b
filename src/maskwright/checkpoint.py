"""Checkpoints: our file format, and those of other implementations in our terms.

Our format is one `.safetensors` whose header holds, as JSON, the model's configuration, its categories, how it is
evaluated, the recipe it was trained with, and where it came from. A model file is therefore all that prediction needs.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch

from maskwright import __version__
from maskwright.data.category_lists import category_list_names, load_categories
from maskwright.errors import CheckpointError, MaskwrightError
from maskwright.layouts import State, infer_config, listing, published_setting, recognise, translate
from maskwright.layouts.architecture import HEADS
from maskwright.models import build_model
from maskwright.models.mask2former import Mask2Former
from maskwright.recipe import CategoryConfig, EvaluateConfig, ModelConfig, Recipe
from maskwright.sources import read_source
from maskwright.structures import Category
from maskwright.weight_files import read_safetensors as read_safetensors
from maskwright.weight_files import read_weight_file
from maskwright.zoo import categories_of, find_in_cache, published, settle

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


def load_model(source: str | Path, device: torch.device | str = "cpu") -> Mask2Former:
    """A model ready to predict, from our file or from a checkpoint of another implementation.

    Returns:
        The model in evaluation mode, with `config`, `categories`, `evaluate` and `recipe` attached.

    Raises:
        CheckpointError: the file is absent, broken, unsafe, of an unknown layout, or not a whole model.
    """
    checkpoint = read_checkpoint(source)
    try:
        return model_from_checkpoint(checkpoint, device)
    except MaskwrightError as error:
        raise CheckpointError(f"{source}: {error}") from None


def model_from_checkpoint(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Mask2Former:
    """The model of a checkpoint in evaluation mode; see `load_model`."""
    model = build_model(checkpoint.config, checkpoint.categories)
    _check_fit(model.state_dict(), checkpoint.state)
    model.load_state_dict(checkpoint.state)
    model.evaluate_config, model.recipe = checkpoint.evaluate, checkpoint.recipe
    return model.to(device).eval()


def read_checkpoint(source: str | Path, categories: str | None = None) -> Checkpoint:
    """Read a weight file of any known layout.

    Args:
        source: a weight file (`.safetensors`, `.pkl`, `.pth`, `.pt`, `.bin`), a folder that transformers wrote, a Hub
            id, or the name of a published model (see `zoo`) whose file is in the cache folder.
        categories: class list for foreign weights (a built-in name or a YAML file); None takes the names that stand
            beside them, else guesses by the number of classes, else numbers them.

    Raises:
        CheckpointError: as `load_model`.
    """
    if entry := published(source):
        checkpoint = read_checkpoint(find_in_cache(entry.name), categories)
        return settle(checkpoint, entry, checkpoint.categories if categories else categories_of(entry))
    found = read_source(source)
    path, state, settings = found.path, found.weights.state, found.settings
    kind = found.weights.header.get("format", "")
    if kind == FORMAT:
        return _own(path, state, found.weights.header)
    if kind.startswith("maskwright-"):
        raise CheckpointError(
            f"{path}: has the format {kind}, expected {FORMAT}; of a run, use best.safetensors or last.safetensors"
        )
    layout = recognise(state)
    if layout is None:
        raise CheckpointError(f"{path}: not a checkpoint that maskwright knows; its first keys are {listing(state, 4)}")
    try:
        translation = translate(state, layout)
        config, num_classes = infer_config(translation.state, settings.heads or HEADS)
        names, evaluate = published_setting(num_classes, config)
        classes = _categories(categories or settings.class_names or names, num_classes)
        config = config.model_copy(update=settings.pixels())
        evaluate = evaluate.model_copy(update=settings.sizes())
        with torch.device("meta"):
            expected = build_model(config, classes).state_dict()
        _check_fit(expected, translation.state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    provenance = {"layout": layout.name, "file": path.name, "maskwright": __version__}
    dropped = found.weights.dropped + translation.dropped
    return Checkpoint(config, classes, evaluate, translation.state, None, provenance, dropped)


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
    write_whole(path, lambda temporary: safetensors.torch.save_file(state, temporary, metadata))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step; an error leaves nothing.

    Raises:
        MaskwrightError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise MaskwrightError(f"{path}: cannot be written: {reason}; free space or choose another folder") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _own(path: Path, state: State, metadata: dict[str, str]) -> Checkpoint:
    try:
        categories = tuple(
            Category(number, name, thing, tuple(color))
            for number, name, thing, color in json.loads(metadata["categories"])
        )
        return Checkpoint(
            ModelConfig.model_validate_json(metadata["model"]),
            categories,
            EvaluateConfig.model_validate_json(metadata["evaluate"]),
            state,
            Recipe.model_validate_json(metadata["recipe"]) if metadata["recipe"] else None,
            json.loads(metadata["provenance"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: the header of this maskwright file is damaged: {' '.join(str(error).split())}"
        ) from None


def _categories(source: str | tuple[str, ...] | None, num_classes: int) -> tuple[Category, ...]:
    """The classes of a foreign model: a list by its name or file, names that stood beside the weights, or numbers."""
    if isinstance(source, str):
        categories = load_categories(source)
    else:
        names = source or tuple(f"class {number}" for number in range(num_classes))
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


def _check_fit(expected: State, found: State) -> None:
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"{len(missing)} missing: {listing(missing)}")
    if extra := found.keys() - expected.keys():
        problems.append(f"{len(extra)} left over: {listing(extra)}")
    wrong = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected.keys() & found.keys()
        if found[key].shape != expected[key].shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {listing(wrong)}")
    if problems:
        raise CheckpointError("the weights do not fit the model; " + "; ".join(problems))


def load_backbone_weights(model: Mask2Former, config: ModelConfig) -> None:
    """Fill the backbone of a model: pretrained by timm, or from a file with timm's names; null keeps what it has.

    Raises:
        CheckpointError: the weights cannot be had, or do not fit the backbone.
    """
    if config.backbone_weights is None:
        return
    weights = _pretrained(config)
    with torch.device("meta"):
        whole = timm.create_model(config.backbone, **config.backbone_options).state_dict()
    expected = model.backbone.state_dict()
    named = {_backbone_key(key, expected): tensor for key, tensor in weights.items()}
    problems = {
        "missing": [key for key in expected if key not in named and not re.search(_OUR_OWN, key)],
        "left over": [key for key in weights if key not in whole and not re.search(_DERIVED, key)],
        "of another shape": [key for key in expected if key in named and named[key].shape != expected[key].shape],
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {listing(keys)}" for kind, keys in problems.items() if keys)
        raise CheckpointError(
            f"model.backbone_weights={config.backbone_weights} does not fit '{config.backbone}'; {found}"
        )
    model.backbone.load_state_dict({key: named[key] for key in expected if key in named}, strict=False)


_DERIVED = r"(^|\.)(attn_mask|relative_position_index|num_batches_tracked)$"  # not weights, and not in every release
_OUR_OWN = r"^norms\.|num_batches_tracked$"


def _pretrained(config: ModelConfig) -> State:
    """Weights of the backbone with timm's names; those of its classifier may be among them."""
    if config.backbone_weights == "timm":
        try:
            return timm.create_model(config.backbone, pretrained=True).state_dict()
        except Exception as error:  # the hub's client raises many kinds
            raise CheckpointError(
                f"model.backbone_weights=timm: the weights of '{config.backbone}' are neither in the cache nor to be "
                f"downloaded ({type(error).__name__}); put them in a file and set model.backbone_weights to its path"
            ) from None
    path = Path(str(config.backbone_weights))
    if not path.is_file():
        raise CheckpointError(f"model.backbone_weights: no file {path}")
    return {key.removeprefix("module."): tensor for key, tensor in read_weight_file(path).state.items()}


def _backbone_key(key: str, expected: State) -> str:
    """A timm key inside our backbone; timm's own feature extraction joins the first two parts of some names."""
    names = (re.sub(r"^layers\.", "stages.", key), f"network.{key}", f"network.{key.replace('.', '_', 1)}")
    return next((name for name in names if name in expected), key)


def checkpoint_of(model: Mask2Former, recipe: Recipe, provenance: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a model that was trained with a recipe."""
    return Checkpoint(model.config, model.categories, recipe.evaluate, model.state_dict(), recipe, provenance)
