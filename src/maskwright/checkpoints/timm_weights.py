"""What timm knows about pretrained weights. A file of its own, since importing timm takes seconds and 200 MB."""

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
    """Names of weights, by the name of the file that they come from."""
    addresses = {name: timm_config(name).url for name in timm.list_pretrained()}
    return {PurePosixPath(address).name: name for name, address in addresses.items() if isinstance(address, str)}


def timm_name(source: str) -> str | None:
    """What timm calls the weights that a name, or the name of a file, stands for; None for what it does not know."""
    if source in timm.list_pretrained():
        return source
    return timm_files().get(source) or (source if timm.is_model(source) else None)


def timm_names() -> list[str]:
    """All names and names of files."""
    return [*timm_files(), *timm.list_pretrained()]


def timm_config(name: str) -> PretrainedCfg:
    """Where weights come from, and what pixels they were trained on.

    Raises:
        CheckpointError: timm has none of that name.
    """
    try:
        known = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        known = None
    if known is None or not known.has_weights:
        near = difflib.get_close_matches(name, timm.list_pretrained(), 3, 0.4)
        raise CheckpointError(f"timm has no weights of '{name}'; nearest: {', '.join(near)}")
    return known


def download(name: str) -> State:
    """Weights of a whole network, from timm's own caches or the network; raises whatever the hub's client raises."""
    return timm.create_model(name, pretrained=True).state_dict()


def expected_names(name: str, options: dict) -> set[str]:
    """Names of the weights of a whole network, classifier included."""
    with torch.device("meta"):
        return set(timm.create_model(name, **options).state_dict())
