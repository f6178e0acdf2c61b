"""Adapter files: what a LoRA run trained, and which checkpoint it belongs to.

An adapter file is a small `.safetensors` file with the header of our checkpoints and the entry "adapter" (see
`Adapter`). Its tensors are NAME.lora_down and NAME.lora_up for an adapted weight NAME, and every other weight that
differs from the base, whole. Reading it merges it with its base, so everything else sees a complete checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.sources import weight_digest
from maskwright.checkpoints.zoo import find_in_cache, published_models
from maskwright.errors import CheckpointError, printable
from maskwright.models.lora import merge_adapters, split_adapters

FORMAT = "maskwright-lora-1"
_DOWN, _UP = ".lora_down", ".lora_up"
_SHOWN_DIGITS = 16


@dataclass(frozen=True)
class Base:
    """The checkpoint that a LoRA run started from.

    Attributes:
        name: as the recipe names it.
        path: of its file or folder, absolute.
        sha256: of its weight file, or of its shards one after the other.
        replaced: names of frozen weights that differ from the checkpoint's, such as resized position tables, and of
            weights that only the checkpoint has.
    """

    name: str
    path: str
    sha256: str
    replaced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """The parts of an adapter file's header that other checkpoints do not have.

    Attributes:
        base: see the class.
        alpha: as in `train.lora`.
    """

    base: Base
    alpha: float

    def to_header(self) -> dict[str, str]:
        """Return the header's entry."""
        return {"adapter": TypeAdapter(Adapter).dump_json(self).decode()}


def read_header(header: Mapping[str, str]) -> Adapter:
    """Read the header's entry.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return TypeAdapter(Adapter).validate_json(header.get("adapter", ""), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        reason = printable(": ".join(map(str, (*problem["loc"], problem["msg"]))))
        raise CheckpointError(
            f"the header of this adapter file is damaged: {reason}", remedy="copy or download it again"
        ) from None


def changed_weights(base: State, initial: State) -> tuple[str, ...]:
    """Return the names of weights that only one state has, or that are not bit-identical."""
    same = {key for key in base.keys() & initial.keys() if _equal(base[key], initial[key])}
    return tuple(sorted((base.keys() | initial.keys()) - same))


def _equal(weight: Tensor, other: Tensor) -> bool:
    return weight.shape == other.shape and torch.equal(weight.to(other), other)


def adapter_tensors(state: State, trained: Iterable[str], base: Base) -> State:
    """Return the tensors of an adapter file.

    Args:
        state: of the model with adapters.
        trained: names of the weights that are trained as a whole.
        base: of the run.
    """
    weights, adapters = split_adapters(state)
    whole = {*trained, *base.replaced} & weights.keys()
    return {
        **{name: weights[name] for name in sorted(whole)},
        **{f"{name}{_DOWN}": down for name, (down, _) in adapters.items()},
        **{f"{name}{_UP}": up for name, (_, up) in adapters.items()},
    }


def merge_with_base(tensors: State, base_state: State, adapter: Adapter) -> State:
    """Return the complete weights: the base's, with the adapters added and the other tensors in their place.

    Raises:
        CheckpointError: an adapter does not fit its weight.
    """
    down, up = (
        {key.removesuffix(end): tensor for key, tensor in tensors.items() if key.endswith(end)} for end in (_DOWN, _UP)
    )
    whole = {key: tensor for key, tensor in tensors.items() if not key.endswith((_DOWN, _UP))}
    state = {key: tensor for key, tensor in base_state.items() if key not in adapter.base.replaced} | whole
    for name in down.keys() | up.keys():
        if not _fits(state.get(name), down.get(name), up.get(name)):
            raise CheckpointError(
                f"the adapter of {printable(name)} does not fit that weight of its base",
                remedy="copy or download it again",
            )
    return merge_adapters(state, {name: (down[name], up[name]) for name in down}, adapter.alpha)


def _fits(weight: Tensor | None, down: Tensor | None, up: Tensor | None) -> bool:
    if weight is None or down is None or up is None or not len(down) or weight.ndim < 2:
        return False
    return down.shape == (len(down), weight[0].numel()) and up.shape == (len(weight), len(down))


def find_base(base: Base, folder: Path) -> Path:
    """Return the file or folder of a base: where it was in training, next to the adapter file, or in the cache.

    Nothing is downloaded, and a file with another digest is not read.

    Raises:
        CheckpointError: it is in none of these places, or the files there have another digest.
    """
    known = Path(base.path)
    candidates = [known, folder / known.name, *_in_cache(base.name)]
    others = []
    for path in dict.fromkeys(path for path in candidates if path.is_file() or path.is_dir()):
        with suppress(CheckpointError, OSError):  # unreadable, or a folder without weights
            found = weight_digest(path)
            if found == base.sha256:
                return path
            others.append(f"{path} has SHA-256 {found[:_SHOWN_DIGITS]}...")
    problem = f"but {', '.join(others)}" if others else "which is not there"
    if base.name != base.path:
        problem = f"{problem} ({printable(known)})"
    raise CheckpointError(
        f"is an adapter of {printable(base.name)} with SHA-256 {base.sha256[:_SHOWN_DIGITS]}..., {problem}",
        remedy=f"put it there, or beside the adapter as {printable(known.name)}",
    )


def _in_cache(name: str) -> list[Path]:
    """Return the file of a published model, if that is what the name is and it has been downloaded."""
    if name in published_models():
        with suppress(CheckpointError):
            return [find_in_cache(name)]
    return []
