"""Load the initial weights of a run: a checkpoint, possibly with other classes and queries, or only a backbone.

Every weight of the checkpoint is either used unchanged or reported in a line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from maskwright.checkpoints.adapter_file import Base, changed_weights
from maskwright.checkpoints.backbone import (
    compare_normalization,
    fit_plain_vit,
    inflate_first_convolution,
    load_backbone_weights,
    resize_position_tables,
)
from maskwright.checkpoints.compare_weights import describe_mismatch
from maskwright.checkpoints.key_maps.backbones import Normalization
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.load import read_checkpoint
from maskwright.checkpoints.sources import weight_digest
from maskwright.config.recipe import Recipe
from maskwright.config.schema import ModelConfig
from maskwright.errors import CheckpointError, printable_list
from maskwright.models.segmenter import Segmenter
from maskwright.structures.annotations import Category

# (parameters with one row per class; whether the last row is "no object")
_CLASS_ROWS = (
    (r"(masked_decoder|head)\.class_head\.(weight|bias)", True),
    (r"decoder\.classifier\.(weight|bias)", False),
    (r"backbone\.semantic_layers\.\d+\.(query|key)\.(weight|bias)", False),
)
_QUERY_ROWS = r"(masked_decoder|head)\.query_(features|positions)\.weight"
_COUNTER = r".*\.num_batches_tracked"
# Settings that may differ between checkpoint and recipe: they affect no weight, or only shapes that are checked later.
_MAY_DIFFER = (
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
    """Load the weights that the recipe starts from: `train.initial_weights`, else `model.backbone_weights`.

    Classifier rows are loaded for "no object" and for classes whose names the checkpoint has; other classes keep
    their random weights. Queries are truncated, or extended with random ones. Relative position tables are resized.

    Returns:
        One line for each decision; empty if all weights are random.

    Raises:
        CheckpointError: the checkpoint cannot be read, or differs in anything else. The model is unchanged.
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
            *fit_plain_vit(state, model),
            *inflate_first_convolution(state, expected, None),
            *_fit_counters(state, expected),
        ]
        if mismatch := describe_mismatch(expected, state):
            raise CheckpointError(f"{source} does not fit the recipe's model; {mismatch}")
    except CheckpointError as error:
        raise error.located_in("train.initial_weights") from None
    model.load_state_dict(state)
    if model.config.backbone_weights:
        lines.append(
            f"model.backbone_weights={model.config.backbone_weights} is ignored: the checkpoint includes a backbone"
        )
    normalization = Normalization(checkpoint.config.pixel_mean, checkpoint.config.pixel_std)
    return lines + compare_normalization("checkpoint", normalization, model.config)


def identify_base(model: Segmenter, source: str) -> Base:
    """Describe the checkpoint that a LoRA run starts from; `model` has its initial weights, and no adapters yet."""
    checkpoint = read_checkpoint(source)
    assert checkpoint.path, "it was read from there"
    replaced = changed_weights(checkpoint.state, model.state_dict())
    return Base(source, str(checkpoint.path.absolute()), weight_digest(checkpoint.path), replaced)


def _check_config(checkpoint: ModelConfig, recipe: ModelConfig) -> None:
    """Refuse settings that differ: not all change a shape, and a wrong shape explains less."""
    theirs, ours = (
        config.model_dump() | {"mask_dim": config.mask_dim or config.hidden_dim} for config in (checkpoint, recipe)
    )
    changes = [f"model.{key}={theirs[key]}" for key in theirs if key not in _MAY_DIFFER and theirs[key] != ours[key]]
    if changes:
        raise CheckpointError(
            f"the checkpoint has {', '.join(changes)}",
            remedy="set the same in the recipe, or remove train.initial_weights",
        )


def _fit_classes(state: State, expected: State, theirs: Sequence[Category], ours: Sequence[Category]) -> list[str]:
    """Rearrange the rows of classes to the model's classes, in place."""
    labels = _match_classes(theirs, ours)  # ours -> theirs
    rows = {key: last for key in expected for pattern, last in _CLASS_ROWS if re.fullmatch(pattern, key)}
    for key, no_object in rows.items():
        found, wanted = state.get(key), expected[key]
        if found is None or found.shape[1:] != wanted.shape[1:]:
            continue  # of another width, which is reported later
        fitted = wanted.clone()
        fitted[list(labels)] = found[list(labels.values())].to(wanted)
        if no_object:
            fitted[-1] = found[-1]
        state[key] = fitted
    kept = [ours[label].name for label in labels]
    if len(kept) == len(ours) == len(theirs):
        named = "" if _has_names(theirs) else ", in the recipe's order, because the checkpoint does not name them"
        return [f"classes: all {len(ours)} kept{named}"]
    new = [category.name for label, category in enumerate(ours) if label not in labels]
    unused = [category.name for label, category in enumerate(theirs) if label not in labels.values()]
    parts = [f"{len(kept)} of {len(ours)} kept{_in_parentheses(kept)}"]
    parts += [f"{len(new)} new and random{_in_parentheses(new)}"] if new else []
    parts += [f"{len(unused)} of the checkpoint dropped{_in_parentheses(unused)}"] if unused else []
    parts += ["'no object' kept"] if any(rows.values()) else []
    return [f"classes: {'; '.join(parts)}"]


def _match_classes(theirs: Sequence[Category], ours: Sequence[Category]) -> dict[int, int]:
    """Map our labels to theirs, by name; in order if theirs have no names and are as many."""
    if not _has_names(theirs) and len(theirs) == len(ours):
        return {label: label for label in range(len(ours))}
    labels = {_normalize(category.name): label for label, category in enumerate(theirs)}
    found = {label: labels.get(_normalize(category.name)) for label, category in enumerate(ours)}
    return {label: their_label for label, their_label in found.items() if their_label is not None}


def _has_names(categories: Sequence[Category]) -> bool:
    """Return whether classes have real names, not the numbered ones of a checkpoint without names."""
    return any(category.name != f"class {label}" for label, category in enumerate(categories))


def _normalize(name: str) -> str:
    return re.sub(r"\W+|_", " ", name).strip().casefold()


def _in_parentheses(names: list[str]) -> str:
    return f" ({printable_list(names)})" if names else ""


def _fit_queries(state: State, expected: State) -> list[str]:
    """Truncate or extend the queries, in place."""
    lines = []
    for key in expected:
        found, wanted = state.get(key), expected[key]
        if found is None or not re.fullmatch(_QUERY_ROWS, key) or found.shape[1:] != wanted.shape[1:]:
            continue
        available, needed = len(found), len(wanted)
        common = min(available, needed)
        state[key] = torch.cat([found[:common].to(wanted), wanted[common:]])
        if available > needed:
            lines = [f"queries: the first {needed} of {available} kept"]
        elif available < needed:
            lines = [f"queries: all {available} kept; {needed - available} new and random"]
    return lines


def _fit_counters(state: State, expected: State) -> list[str]:
    """Remove or add the step counters of batch norms, which frozen ones do not have, in place."""
    surplus = [key for key in state if re.fullmatch(_COUNTER, key) and key not in expected]
    missing = [key for key in expected if re.fullmatch(_COUNTER, key) and key not in state]
    for key in surplus:
        del state[key]
    state |= {key: expected[key] for key in missing}
    if surplus:
        return ["batch norms: trained in the checkpoint, frozen here, with its statistics"]
    if missing:
        return ["batch norms: frozen in the checkpoint, trained here, starting from its statistics"]
    return []
