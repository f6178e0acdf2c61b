"""Load checkpoints: our own format, and those of other implementations.

file, folder or Hub id -> `WeightSource` -> key map -> weights in our names -> `Checkpoint` -> model
"""

from __future__ import annotations

from pathlib import Path

import torch

from maskwright.checkpoints import adapter_file
from maskwright.checkpoints.checkpoint import Checkpoint, from_header, is_known_finite
from maskwright.checkpoints.compare_weights import check_finite, check_fit, check_not_empty
from maskwright.checkpoints.infer_vit import published_base
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.packaged import find_packaged
from maskwright.checkpoints.read_foreign import read_foreign
from maskwright.checkpoints.sources import read_source
from maskwright.checkpoints.zoo import apply_entry, entry_categories, find_entry, find_in_cache
from maskwright.errors import CheckpointError, MaskwrightError
from maskwright.models import build_model
from maskwright.models.empty_init import assign_weights, skip_init
from maskwright.models.segmenter import Segmenter


def load_model(source: str | Path, device: torch.device | str = "cpu") -> Segmenter:
    """Load a model for prediction from our format or from a checkpoint of another implementation.

    Returns:
        The model in evaluation mode, with `config`, `categories`, `evaluate_config` and `recipe` attached.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, in an unknown layout, or not a complete model.
    """
    try:
        return model_from_checkpoint(_read(source, None), device)
    except MaskwrightError as error:
        raise _checkpoint_error(error, source) from None


def model_from_checkpoint(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Segmenter:
    """Return the model of a checkpoint in evaluation mode; on a CPU it shares the checkpoint's memory."""
    model = _build_uninitialized(checkpoint)
    assign_weights(model, checkpoint.state)
    model.on_weights_loaded()
    model.evaluate_config, model.recipe = checkpoint.evaluate, checkpoint.recipe
    if model.pixel_mean.device != torch.device(device):
        model = model.to(device)
    return model.eval()


def read_checkpoint(source: str | Path, categories: str | None = None, *, allow_delta: bool = False) -> Checkpoint:
    """Read a weight file of any known layout.

    Args:
        source: a weight file (`.safetensors`, `.pkl`, `.pth`, `.pt`, `.bin`), a folder that transformers wrote, a Hub
            id, the name of a model in the package (see `packaged`), or that of a published model (see `zoo`) whose file
            is in the cache folder.
        categories: class list for foreign weights, a built-in name or a YAML file. None uses the names stored with the
            weights, else those of the published model that the file is by its name or digest, else numbers.
        allow_delta: also read weights that are deltas from a base.

    Returns:
        The checkpoint. Its tensors are mapped from the file, which may be replaced but must not be changed in place.

    Raises:
        CheckpointError: as for `load_model`.
    """
    checkpoint = _read(source, categories)
    try:
        _build_uninitialized(checkpoint, allow_delta=allow_delta)
    except MaskwrightError as error:
        raise _checkpoint_error(error, source) from None
    return checkpoint


def _checkpoint_error(error: MaskwrightError, where: str | Path) -> CheckpointError:
    return CheckpointError(error.found, where=error.where, remedy=error.remedy).located_in(where)


def _read(source: str | Path, categories: str | None) -> Checkpoint:
    """Read a checkpoint without comparing its weights to the model."""
    if packaged := find_packaged(source):
        return _read_file(packaged, categories)
    if entry := find_entry(source):
        path, classes = find_in_cache(entry.name), entry_categories(entry)
        checkpoint = _read_file(path, categories, named=True)
        return apply_entry(checkpoint, entry, checkpoint.categories if categories else classes)
    return _read_file(source, categories)


def _read_file(source: str | Path, categories: str | None, *, named: bool = False) -> Checkpoint:
    """Read a checkpoint that is not given by the name of a published model; `named` if its classes follow later."""
    found = read_source(source)
    state, header = found.weights.state, found.weights.header
    try:
        if header.get("format", "").startswith("maskwright-"):
            checkpoint = from_header(state, header)
            if header["format"] == adapter_file.FORMAT:
                checkpoint.state = _merge_adapter(state, header, found.path)
        else:
            checkpoint = read_foreign(found, categories, named)
            checkpoint.dropped[:0] = found.weights.dropped
        if not is_known_finite(header):
            check_finite(checkpoint.state)
    except MaskwrightError as error:
        raise _checkpoint_error(error, found.path) from None
    checkpoint.path = found.path
    return checkpoint


def _merge_adapter(tensors: State, header: dict[str, str], path: Path) -> State:
    """Return the weights of an adapter file, merged with those of its base."""
    adapter = adapter_file.read_header(header)
    base = _read_file(adapter_file.find_base(adapter.base, path.parent), None, named=True)
    return adapter_file.merge_with_base(tensors, base.state, adapter)


def _build_uninitialized(checkpoint: Checkpoint, *, allow_delta: bool = False) -> Segmenter:
    """Return the model of a checkpoint, with uninitialized weights.

    Raises:
        CheckpointError: the checkpoint's weights are not exactly those of the model, or only differences to others.
        RecipeError: there is no such model.
    """
    check_not_empty(checkpoint.state)
    if checkpoint.delta and not allow_delta:
        base = published_base(checkpoint.config.backbone)
        raise CheckpointError(
            f"the weights of its backbone are only deltas from their base, the DINOv3 of {base}",
            remedy="get the base (its license is Meta's own) and add it with maskwright convert --base FILE_OR_FOLDER",
        )
    with skip_init(checkpoint.state):
        model = build_model(checkpoint.config, checkpoint.categories)
    check_fit(model.state_dict(), checkpoint.state)
    return model
