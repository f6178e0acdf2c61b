"""Compare weights with those of a model, and refuse weights that no model can use."""

from __future__ import annotations

import math
import re

import torch

from maskwright.checkpoints.key_maps.key_map import State
from maskwright.errors import CheckpointError, printable_list


def check_fit(expected: State, found: State) -> None:
    """Require exactly the weights of a model.

    Raises:
        CheckpointError: they differ; the message is that of `describe_mismatch`.
    """
    if mismatch := describe_mismatch(expected, found):
        raise CheckpointError(f"the weights do not fit the model; {mismatch}", remedy="use the complete checkpoint")


def describe_mismatch(expected: State, found: State) -> str:
    """List missing and unexpected weights, and those of another shape or dtype, in one line; empty if all fit."""
    problems = []
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or unexpected:
        expected_depths, found_depths = _backbone_depths(expected), _backbone_depths(found)
        if expected_depths and found_depths and expected_depths != found_depths:
            problems.append(f"backbone depths {found_depths} instead of {expected_depths}")
    if missing:
        problems.append(f"{len(missing)} missing: {printable_list(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {printable_list(unexpected)}")
    common = expected.keys() & found.keys()
    wrong_shape = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in common
        if found[key].shape != expected[key].shape
    ]
    if wrong_shape:
        problems.append(f"{len(wrong_shape)} with another shape: {printable_list(wrong_shape, 4)}")
    wrong_dtype = [
        f"{key} {found[key].dtype}"
        for key in common
        if expected[key].is_floating_point() and not found[key].is_floating_point()
    ]
    if wrong_dtype:
        problems.append(f"{len(wrong_dtype)} not floating-point: {printable_list(wrong_dtype)}")
    return "; ".join(problems)


def _backbone_depths(state: State) -> list[int]:
    """Return the number of blocks in each stage of the backbone."""
    depths: dict[int, int] = {}
    for key in state:
        if match := re.match(r"backbone\.(?:network\.)?(?:layer|stages[._])(\d+)\.(?:blocks\.)?(\d+)\.", key):
            stage, block = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
    return [depths[stage] for stage in sorted(depths)]


def check_not_empty(state: State) -> None:
    """Refuse weights without a value."""
    if empty := [key for key, tensor in state.items() if not tensor.numel()]:
        raise CheckpointError(
            f"{len(empty)} of its weights are empty: {printable_list(empty)}", remedy="use the complete checkpoint"
        )


def nonfinite_weights(state: State) -> list[str]:
    """Return the names of weights with NaN or infinite values."""
    return [
        key
        for key, tensor in state.items()
        if tensor.is_floating_point()
        and not math.isfinite(tensor.sum(dtype=torch.float32))
        and not tensor.isfinite().all()
    ]


def check_finite(state: State) -> None:
    """Refuse NaN and infinite weights: one is enough to make every prediction NaN."""
    if invalid := nonfinite_weights(state):
        raise CheckpointError(
            f"{len(invalid)} of its weights have NaN or infinite values: {printable_list(invalid, 4)}",
            remedy="use an earlier checkpoint",
        )
