"""Read and write checkpoints: our own format, and those of other implementations.

    file, folder or Hub id -> `WeightSource` -> key map -> weights in our names -> `Checkpoint` -> model

Our format is one `.safetensors` file whose header holds, as JSON, the model's configuration, its categories, its
evaluation settings, the recipe it was trained with, and its origin. That file is all that prediction needs.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from maskwright import __version__
from maskwright.checkpoints import adapter_file
from maskwright.checkpoints.compare_weights import check_fit
from maskwright.checkpoints.infer_config import default_setting, infer_config, published_setting
from maskwright.checkpoints.infer_vit import published_base
from maskwright.checkpoints.key_maps.eomt import TRANSFORMERS_DINOV2, TRANSFORMERS_DINOV3, is_delta
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.key_maps.other_models import identify_backbone, identify_model
from maskwright.checkpoints.key_maps.transformers import TRANSFORMERS
from maskwright.checkpoints.key_maps.translate import find_key_map, translate
from maskwright.checkpoints.packaged import find_packaged
from maskwright.checkpoints.sources import WeightSource, read_source
from maskwright.checkpoints.transformers_config import SourceSettings
from maskwright.checkpoints.zoo import apply_entry, entry_categories, find_entry, find_in_cache, recognize_file
from maskwright.config.categories import category_list_names, load_categories
from maskwright.config.recipe import Recipe
from maskwright.config.schema import CategoryConfig, EvaluateConfig, ModelConfig
from maskwright.errors import CheckpointError, MaskwrightError, printable, printable_list
from maskwright.models import build_model
from maskwright.models.empty_init import assign_weights, skip_init
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.structures.annotations import Category

FORMAT = "maskwright-1"
logger = logging.getLogger(__name__)


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
    model.evaluate_config, model.recipe = checkpoint.evaluate, checkpoint.recipe
    return model.to(device).eval()


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
            checkpoint = _from_our_format(state, header)
            if header["format"] == adapter_file.FORMAT:
                checkpoint.state = _merge_adapter(state, header, found.path)
        else:
            checkpoint = _from_foreign(found, categories, named)
            checkpoint.dropped[:0] = found.weights.dropped
        _check_finite(checkpoint.state)
    except MaskwrightError as error:
        raise _checkpoint_error(error, found.path) from None
    checkpoint.path = found.path
    return checkpoint


def _merge_adapter(tensors: State, header: dict[str, str], path: Path) -> State:
    """Return the weights of an adapter file, merged with those of its base."""
    adapter = adapter_file.read_header(header)
    base = _read_file(adapter_file.find_base(adapter.base, path.parent), None, named=True)
    return adapter_file.merge_with_base(tensors, base.state, adapter)


def _from_foreign(found: WeightSource, categories: str | None, named: bool) -> Checkpoint:
    """Return the checkpoint of another implementation's weights."""
    state, settings = found.weights.state, found.settings
    key_map = find_key_map(state)
    if key_map is None:
        raise _unknown_weights(state)
    try:
        translation = translate(state, key_map)
    except CheckpointError:
        if other := identify_model(state):  # MaskFormer shares many keys with its successor
            raise _other_model(other) from None
        raise
    _check_not_empty(translation.state)
    if key_map not in (
        TRANSFORMERS,
        TRANSFORMERS_DINOV2,
        TRANSFORMERS_DINOV3,
    ):  # config.json beside it is of another file
        settings = SourceSettings(class_names=dict(enumerate(found.weights.class_names or ())))
    config, num_classes = infer_config(translation.state, settings.heads, settings.backbone, settings.norm_eps)
    delta = is_delta(state)
    if config.semantic_attention is not None and not named:
        _log_assumed_attention(config, num_classes, found.path)
    classes = _resolve_categories(categories or settings.categories, settings.class_names, num_classes)
    published_list, evaluate = published_setting(num_classes, config)
    if published_list is None or not _same_names(classes, load_categories(published_list)):
        evaluate = default_setting(config)
    checkpoint = Checkpoint(
        config=config.model_copy(update=settings.model),
        categories=classes,
        evaluate=evaluate.model_copy(update=settings.evaluate),
        state=translation.state,
        provenance={"layout": key_map.name, "file": found.path.name, "maskwright": __version__},
        dropped=translation.dropped,
        delta=delta,
    )
    if named or categories or settings.categories or settings.class_names:
        return checkpoint
    return _name_classes(checkpoint, found.path)


def _log_assumed_attention(config: ModelConfig, num_classes: int, path: Path) -> None:
    """Log the attention assumed for the semantic layers of a SeMask, unless the file is a published model."""
    if recognize_file(path) is None:
        logger.warning(
            "%s: weights do not tell where semantic layers attend; [%s] is assumed for the 4 stages, as in the "
            "published model with %d classes; results are wrong if it was trained otherwise (model.semantic_attention)",
            path,
            ", ".join(config.semantic_attention or ()),
            num_classes,
        )


def _name_classes(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Use the classes of the published model if the file is one, else number the classes; log the choice."""
    number = len(checkpoint.categories)
    entry, reason = recognize_file(path) or (None, "")
    if entry and len(entry_categories(entry)) == number:
        logger.warning("%s: classes and evaluation settings are those of %s, by its %s", path, entry.name, reason)
        return apply_entry(checkpoint, entry, entry_categories(entry))
    lists = [name for name in category_list_names() if len(load_categories(name)) == number]
    proposal = "".join(f"--categories {name} if they are those of {name}, else " for name in lists)
    logger.warning(
        "%s: names none of its %d classes, so they are called by number, and task %s is assumed; name them with "
        "maskwright convert %s%s",
        path,
        number,
        checkpoint.evaluate.task,
        proposal,
        "--categories FILE.yaml",
    )
    return checkpoint


_SUPPORTED = "use a checkpoint of Mask2Former or SeMask (published ones: maskwright zoo)"


def _other_model(name: str) -> CheckpointError:
    return CheckpointError(f"the weights of {name}", remedy=_SUPPORTED)


def _unknown_weights(state: State) -> CheckpointError:
    """Return the error for weights without a key map."""
    if name := identify_model(state):
        return _other_model(name)
    if name := identify_backbone(state):
        return CheckpointError(
            f"the weights of {name} alone, which is only a backbone",
            remedy="to start training from them, set model.backbone_weights to this file",
        )
    keys = printable_list(state, 4)
    return CheckpointError(f"not a checkpoint that maskwright can read; its first keys are {keys}", remedy=_SUPPORTED)


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
    metadata["crc32"] = checksum(state, metadata)
    write_file_atomically(path, lambda temporary: safetensors.torch.save_file(state, temporary, metadata))


def _from_our_format(state: State, header: dict[str, str]) -> Checkpoint:
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
        reason = printable(" ".join(str(error).split()), 200)
        raise CheckpointError(
            f"the header of this maskwright file is damaged: {reason}", remedy="copy or download it again"
        ) from None
    if "crc32" in header and header["crc32"] != checksum(state, header):
        raise CheckpointError(
            "damaged: its content has changed since it was written",
            remedy="copy or download it again; if you changed it yourself, remove 'crc32' from its header",
        )
    return checkpoint


def _category(category_id: object, name: object, is_thing: object, color: object) -> Category:
    valid = CategoryConfig.model_validate({"id": category_id, "name": name, "is_thing": is_thing, "color": color})
    return Category(valid.id, valid.name, valid.is_thing, valid.color or (0, 0, 0))


def checksum(state: State, header: dict[str, str]) -> str:
    """Return the CRC-32 of the header (without "crc32") and of all weights in the order of their names, as hex."""
    crc32 = zlib.crc32(json.dumps({key: header[key] for key in sorted(header) if key != "crc32"}).encode())
    for key in sorted(state):
        crc32 = zlib.crc32(state[key].reshape(-1).view(torch.uint8).numpy(), crc32)
    return f"{crc32:08x}"


def _resolve_categories(
    class_list: str | tuple[CategoryConfig, ...] | None, numbered: Mapping[int, str] | None, num_classes: int
) -> tuple[Category, ...]:
    """Return the classes of a foreign model: of a class list, else by the names stored with it, else numbered."""
    if class_list:
        categories = load_categories(class_list)
    else:
        names = _names_of_labels(numbered or {}, num_classes)
        categories = _find_built_in(names) or load_categories(
            [CategoryConfig(id=label, name=name) for label, name in enumerate(names)]
        )
    if len(categories) != num_classes:
        origin = f"the class list '{class_list}'" if isinstance(class_list, str) else "the class list stored with them"
        raise CheckpointError(
            f"the weights have {num_classes} classes, but {origin} has {len(categories)}",
            remedy="choose a class list with --categories",
        )
    return categories


def _names_of_labels(numbered: Mapping[int, str], num_classes: int) -> tuple[str, ...]:
    """Return the names of labels 0..K-1.

    Numbers with gaps or from 1 are ids of annotations: as many names as classes are taken in their order. Fewer names
    are those of single labels. A line says what was done.
    """
    if not numbered or list(numbered) == list(range(len(numbered))):
        return tuple(numbered.values()) or tuple(f"class {label}" for label in range(num_classes))
    first, last = min(numbered), max(numbered)
    if len(numbered) != num_classes and first >= 0 and last < num_classes:
        logger.warning(
            "id2label names only %d of %d classes; the others are called by number", len(numbered), num_classes
        )
        return tuple(numbered.get(label, f"class {label}") for label in range(num_classes))
    logger.warning(
        "id2label numbers its %d classes %d to %d, not 0 to %d; they are taken in that order: %s. If that is wrong, "
        "name them with maskwright convert --categories FILE.yaml",
        len(numbered),
        first,
        last,
        len(numbered) - 1,
        printable(", ".join(numbered.values()), 60),
    )
    return tuple(numbered.values())


def _find_built_in(names: Iterable[str]) -> tuple[Category, ...] | None:
    """Return the built-in class list with these names, which also has things and colors; None if none has."""
    normalized = _normalize(names)
    lists = (load_categories(name) for name in category_list_names())
    return next((each for each in lists if _normalize(category.name for category in each) == normalized), None)


def _same_names(first: Iterable[Category], second: Iterable[Category]) -> bool:
    return _normalize(category.name for category in first) == _normalize(category.name for category in second)


def _normalize(words: Iterable[str]) -> list[str]:
    return [re.sub(r"\W+|_", " ", word).strip().lower() for word in words]


def _build_uninitialized(checkpoint: Checkpoint, *, allow_delta: bool = False) -> Segmenter:
    """Return the model of a checkpoint, with uninitialized weights.

    Raises:
        CheckpointError: the checkpoint's weights are not exactly those of the model, or only differences to others.
        RecipeError: there is no such model.
    """
    _check_not_empty(checkpoint.state)
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


def _check_not_empty(state: State) -> None:
    if empty := [key for key, tensor in state.items() if not tensor.numel()]:
        raise CheckpointError(
            f"{len(empty)} of its weights are empty: {printable_list(empty)}", remedy="use the complete checkpoint"
        )


def _check_finite(state: State) -> None:
    """Refuse NaN and infinite weights: one is enough to make every prediction NaN."""
    invalid = [
        key
        for key, tensor in state.items()
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all()
    ]
    if invalid:
        raise CheckpointError(
            f"{len(invalid)} of its weights have NaN or infinite values: {printable_list(invalid, 4)}",
            remedy="use an earlier checkpoint",
        )


def make_checkpoint(model: Segmenter, recipe: Recipe, provenance: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint of a model that was trained with `recipe`."""
    return Checkpoint(model.config, model.categories, recipe.evaluate, model.state_dict(), recipe, provenance)
