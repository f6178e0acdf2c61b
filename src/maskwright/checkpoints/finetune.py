"""Where a training starts: at a checkpoint, whose classes and queries may be others, or at backbone weights alone.

Every weight of the checkpoint is taken as it is, or a line says what became of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from maskwright.checkpoints.backbone import (
    compare_pixels,
    differences,
    inflate,
    load_backbone_weights,
    resize_position_tables,
)
from maskwright.checkpoints.checkpoint import read_checkpoint
from maskwright.checkpoints.key_maps.backbones import Pixels
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.key_maps.translate import listing
from maskwright.config.recipe import Recipe
from maskwright.config.schema import ModelConfig
from maskwright.errors import CheckpointError
from maskwright.models.segmenter import Segmenter
from maskwright.structures.annotations import Category

# (parameters with a row for each class, whether one for "no object" is the last)
_CLASS_ROWS = (
    (r"masked_decoder\.class_head\.(weight|bias)", True),
    (r"decoder\.classifier\.(weight|bias)", False),
    (r"backbone\.semantic_layers\.\d+\.(query|key)\.(weight|bias)", False),
)
_QUERY_ROWS = r"masked_decoder\.query_(features|positions)\.weight"
_COUNTER = r".*\.num_batches_tracked"
# What may differ between a checkpoint and a recipe: it changes no weight, or a shape that is compared or fitted.
_FREE = (
    "backbone",
    "backbone_options",
    "backbone_weights",
    "backbone_norm",
    "window_size",
    "drop_path_rate",
    "num_queries",
    "channels",
    "pixel_mean",
    "pixel_std",
)


def load_initial_weights(model: Segmenter, recipe: Recipe) -> list[str]:
    """Give a new model what the recipe starts from: `train.initial_weights`, else `model.backbone_weights`.

    Rows of classes that the checkpoint has by the same name are taken from it, as is that of "no object"; other classes
    keep their random weights. Queries are cut, or extended with random ones. Relative position tables are resized.

    Returns:
        What was done, one line for each decision; empty where all weights are random.

    Raises:
        CheckpointError: the checkpoint cannot be read, or differs in anything else; the model is unchanged.
    """
    source = recipe.train.initial_weights
    if source is None:
        return load_backbone_weights(model)
    try:
        checkpoint = read_checkpoint(source)
        _check_config(checkpoint.config, model.config)
        state, expected = dict(checkpoint.state), model.state_dict()
        lines = [
            f"train.initial_weights: the model of {source}",
            *_fit_classes(state, expected, checkpoint.categories, model.categories),
            *_fit_queries(state, expected),
            *resize_position_tables(state, expected),
            *inflate(state, expected, None),
            *_fit_counters(state, expected),
        ]
        if found := differences(expected, state):
            raise CheckpointError(f"{source} does not fit the recipe's model; {found}")
    except CheckpointError as error:
        raise CheckpointError(f"train.initial_weights: {error}") from None
    model.load_state_dict(state)
    if model.config.backbone_weights:
        lines.append(
            f"model.backbone_weights={model.config.backbone_weights} is not used: the checkpoint has a backbone"
        )
    pixels = Pixels(checkpoint.config.pixel_mean, checkpoint.config.pixel_std)
    return lines + compare_pixels("checkpoint", pixels, model.config)


def _check_config(there: ModelConfig, here: ModelConfig) -> None:
    """Refuse what no shape tells, and what a shape tells less clearly."""
    theirs, ours = (
        config.model_dump() | {"mask_dim": config.mask_dim or config.hidden_dim} for config in (there, here)
    )
    changes = [f"model.{key}={theirs[key]}" for key in theirs if key not in _FREE and theirs[key] != ours[key]]
    if changes:
        raise CheckpointError(f"the checkpoint has {', '.join(changes)}; give the recipe the same, or leave it out")


def _fit_classes(state: State, expected: State, theirs: Sequence[Category], ours: Sequence[Category]) -> list[str]:
    """Put the rows of classes in the model's order, in place."""
    labels = _match_classes(theirs, ours)  # ours -> theirs
    rows = {key: last for key in expected for pattern, last in _CLASS_ROWS if re.fullmatch(pattern, key)}
    for key, no_object in rows.items():
        found, wanted = state.get(key), expected[key]
        if found is None or found.shape[1:] != wanted.shape[1:]:
            continue  # of another width: what differs is said elsewhere
        fitted = wanted.clone()
        fitted[list(labels)] = found[list(labels.values())].to(wanted)
        if no_object:
            fitted[-1] = found[-1]
        state[key] = fitted
    kept = [ours[label].name for label in labels]
    if len(kept) == len(ours) == len(theirs):
        named = "" if _has_names(theirs) else ", in the recipe's order, since the checkpoint does not name them"
        return [f"classes: all {len(ours)} kept{named}"]
    new = [category.name for label, category in enumerate(ours) if label not in labels]
    left = [category.name for label, category in enumerate(theirs) if label not in labels.values()]
    parts = [f"{len(kept)} of {len(ours)} kept{_named(kept)}"]
    parts += [f"{len(new)} new and random{_named(new)}"] if new else []
    parts += [f"{len(left)} of the checkpoint left out{_named(left)}"] if left else []
    parts += ["'no object' kept"] if any(rows.values()) else []
    return [f"classes: {'; '.join(parts)}"]


def _match_classes(theirs: Sequence[Category], ours: Sequence[Category]) -> dict[int, int]:
    """Our label to theirs, by name; by number where they have none and as many."""
    if not _has_names(theirs) and len(theirs) == len(ours):
        return {label: label for label in range(len(ours))}
    labels = {_plain(category.name): label for label, category in enumerate(theirs)}
    found = {label: labels.get(_plain(category.name)) for label, category in enumerate(ours)}
    return {label: place for label, place in found.items() if place is not None}


def _has_names(categories: Sequence[Category]) -> bool:
    """Whether the names are more than the numbers that the reader of a checkpoint without names gives."""
    return any(category.name != f"class {label}" for label, category in enumerate(categories))


def _plain(name: str) -> str:
    return re.sub(r"\W+|_", " ", name).strip().casefold()


def _named(names: list[str]) -> str:
    return f" ({listing(names)})" if names else ""


def _fit_queries(state: State, expected: State) -> list[str]:
    """Cut or extend the queries, in place."""
    lines = []
    for key in expected:
        found, wanted = state.get(key), expected[key]
        if found is None or not re.fullmatch(_QUERY_ROWS, key) or found.shape[1:] != wanted.shape[1:]:
            continue
        there, here = len(found), len(wanted)
        state[key] = _extended(found, wanted)
        if there > here:
            lines = [f"queries: the first {here} of {there} kept"]
        elif there < here:
            lines = [f"queries: all {there} kept; {here - there} new and random"]
    return lines


def _extended(found: Tensor, wanted: Tensor) -> Tensor:
    """As many rows as are wanted: those found, then those of `wanted` behind them."""
    fitted = wanted.clone()
    common = min(len(found), len(wanted))
    fitted[:common] = found[:common]
    return fitted


def _fit_counters(state: State, expected: State) -> list[str]:
    """Frozen batch norms do not count steps; others do, and begin at 0."""
    surplus = [key for key in state if re.fullmatch(_COUNTER, key) and key not in expected]
    missing = [key for key in expected if re.fullmatch(_COUNTER, key) and key not in state]
    for key in surplus:
        del state[key]
    state |= {key: expected[key] for key in missing}
    if surplus:
        return ["batch norms: trained in the checkpoint, frozen here, with its statistics"]
    if missing:
        return ["batch norms: frozen in the checkpoint, trained here, from its statistics on"]
    return []
