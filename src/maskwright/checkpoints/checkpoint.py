"""Our checkpoint format: one `.safetensors` file that is all that prediction needs.

Its header holds, as JSON, the model's configuration, its categories, its evaluation settings, the recipe it was trained
with, and its origin.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from maskwright.checkpoints import adapter_file
from maskwright.checkpoints.compare_weights import nonfinite_weights
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.config.recipe import Recipe
from maskwright.config.schema import CategoryConfig, EvaluateConfig, ModelConfig
from maskwright.errors import CheckpointError, one_line, printable
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.structures.annotations import Category

FORMAT = "maskwright-1"


@dataclass
class Checkpoint:
    """Weights, and everything needed to use them.

    Attributes:
        config: the model's configuration.
        categories: its classes, in label order.
        evaluate: settings of prediction and evaluation.
        state: our parameter names to tensors.
        recipe: the recipe it was trained with, if known.
        provenance: origin, version and metrics, as free JSON.
        dropped: (key, reason) of entries dropped when a foreign file was read.
        path: of the file or folder that it was read from.
        delta: the backbone's weights are deltas from the weights it was fine-tuned from.
    """

    config: ModelConfig
    categories: tuple[Category, ...]
    evaluate: EvaluateConfig
    state: State
    recipe: Recipe | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    path: Path | None = None
    delta: bool = False


def save_checkpoint(path: Path, checkpoint: Checkpoint, adapter: adapter_file.Adapter | None = None) -> None:
    """Write our format, atomically; with `adapter`, an adapter file, whose tensors are the checkpoint's state."""
    metadata = {
        "format": adapter_file.FORMAT if adapter else FORMAT,
        "model": checkpoint.config.model_dump_json(),
        "categories": json.dumps([[c.id, c.name, c.is_thing, list(c.color)] for c in checkpoint.categories]),
        "evaluate": checkpoint.evaluate.model_dump_json(),
        "recipe": checkpoint.recipe.model_dump_json() if checkpoint.recipe else "",
        "provenance": json.dumps(checkpoint.provenance),
        **(adapter.to_header() if adapter else {}),
    }
    state = {key: tensor.detach().contiguous().cpu() for key, tensor in checkpoint.state.items()}
    metadata["finite"] = json.dumps(not nonfinite_weights(state))
    metadata["checksum"] = checksum(state, metadata)
    write_file_atomically(path, lambda temporary: safetensors.torch.save_file(state, temporary, metadata))


def from_header(state: State, header: dict[str, str]) -> Checkpoint:
    """Return the checkpoint of a file in our format, or an adapter file.

    Raises:
        CheckpointError: the header is damaged or of another version, or the content has changed.
    """
    if header["format"] not in (FORMAT, adapter_file.FORMAT):
        raise CheckpointError(
            f"has format {printable(header['format'])}, expected {FORMAT}",
            remedy="of a run, use best.safetensors or last.safetensors",
        )
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
        reason = printable(one_line(error), 200)
        raise CheckpointError(
            f"the header of this maskwright file is damaged: {reason}", remedy="copy or download it again"
        ) from None
    name = "checksum" if "checksum" in header else "crc32"
    if name in header and not is_undamaged(state, header):
        raise CheckpointError(
            "damaged: its content has changed since it was written",
            remedy=f"copy or download it again; if you changed it yourself, remove '{name}' from its header",
        )
    return checkpoint


def _category(category_id: object, name: object, is_thing: object, color: object) -> Category:
    valid = CategoryConfig.model_validate({"id": category_id, "name": name, "is_thing": is_thing, "color": color})
    return Category(valid.id, valid.name, valid.is_thing, valid.color or (0, 0, 0))


def is_known_finite(header: dict[str, str]) -> bool:
    """Return whether weights that have passed `from_header` were finite when they were written, so still are.

    Reading all weights once less is 7 of 60 ms of loading an R50.
    """
    return header.get("format") == FORMAT and "checksum" in header and header.get("finite") == "true"


def is_undamaged(state: State, header: dict[str, str]) -> bool:
    """Return whether weights and header have the checksum in the header; earlier versions wrote a CRC-32."""
    if "checksum" in header:
        return header["checksum"] == checksum(state, header)
    return header.get("crc32") == _crc32(state, header)


def checksum(state: State, header: dict[str, str]) -> str:
    """Return a checksum of the header (without its checksums) and of the weights, as hex.

    It is the CRC-32 of names, shapes and sums of 8-byte words. For 176 MB, the sums take 0.013 s, a CRC-32 of all bytes
    0.054 s.
    """
    sums: list[object] = [sorted((key, text) for key, text in header.items() if key != "checksum")]
    for key in sorted(state):
        data = _bytes(state[key])
        whole = data.size // 8 * 8
        total = int(data[:whole].view(np.uint64).sum())
        sums.append([key, str(state[key].dtype), list(state[key].shape), total, bytes(data[whole:]).hex()])
    return f"{zlib.crc32(json.dumps(sums).encode()):08x}"


def _crc32(state: State, header: dict[str, str]) -> str:
    """Return the CRC-32 of the header (without its checksum) and of all weights in the order of their names, as hex."""
    crc32 = zlib.crc32(json.dumps({key: header[key] for key in sorted(header) if key != "crc32"}).encode())
    for key in sorted(state):
        crc32 = zlib.crc32(_bytes(state[key]).data, crc32)
    return f"{crc32:08x}"


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def make_checkpoint(model: Segmenter, recipe: Recipe, provenance: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint of a model that was trained with `recipe`."""
    return Checkpoint(model.config, model.categories, recipe.evaluate, model.state_dict(), recipe, provenance)
