"""Look up and download timm's pretrained weights. A separate file, because importing timm takes seconds and 200 MB."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import PurePosixPath

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg

from maskwright.checkpoints.key_maps.key_map import State
from maskwright.errors import CheckpointError


@cache
def timm_files() -> dict[str, str]:
    """Return the names of timm's weights by the names of their files."""
    addresses = {name: timm_config(name).url for name in timm.list_pretrained()}
    return {PurePosixPath(address).name: name for name, address in addresses.items() if isinstance(address, str)}


def timm_name(source: str) -> str | None:
    """Return timm's name for the weights that a name or file name refers to; None if it has none."""
    if source in timm.list_pretrained():
        return source
    return timm_files().get(source) or (source if timm.is_model(source) else None)


def timm_names() -> list[str]:
    """Return all names of weights and of their files."""
    return [*timm_files(), *timm.list_pretrained()]


def timm_config(name: str) -> PretrainedCfg:
    """Return the address and normalization of timm's weights.

    Raises:
        CheckpointError: timm has no weights of that name.
    """
    try:
        known = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        known = None
    if known is None or not known.has_weights:
        near = difflib.get_close_matches(name, timm.list_pretrained(), 3, 0.4)
        raise CheckpointError(f"timm has no weights of '{name}'", remedy=f"nearest: {', '.join(near)}")
    return known


def download(name: str) -> State:
    """Return the weights of a whole network, downloaded unless cached; raises whatever the Hub's client raises."""
    return timm.create_model(name, pretrained=True).state_dict()


def expected_names(name: str, options: dict) -> set[str]:
    """Return the names of the weights of a whole network, including its classifier."""
    with torch.device("meta"):
        return set(timm.create_model(name, **options).state_dict())
