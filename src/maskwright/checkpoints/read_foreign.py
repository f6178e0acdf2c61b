"""Make checkpoints of the weights of other implementations: rename them, infer the configuration, name the classes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from maskwright import __version__
from maskwright.checkpoints.checkpoint import Checkpoint
from maskwright.checkpoints.compare_weights import check_not_empty
from maskwright.checkpoints.infer_config import default_setting, infer_config, published_setting
from maskwright.checkpoints.key_maps.eomt import TRANSFORMERS_DINOV2, TRANSFORMERS_DINOV3, is_delta
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.key_maps.other_models import identify_backbone, identify_model
from maskwright.checkpoints.key_maps.transformers import TRANSFORMERS
from maskwright.checkpoints.key_maps.translate import find_key_map, translate
from maskwright.checkpoints.sources import WeightSource
from maskwright.checkpoints.transformers_config import SourceSettings
from maskwright.checkpoints.zoo import apply_entry, entry_categories, recognize_file
from maskwright.config.categories import category_list_names, load_categories
from maskwright.config.schema import CategoryConfig, ModelConfig
from maskwright.errors import CheckpointError, printable, printable_list
from maskwright.structures.annotations import Category

logger = logging.getLogger(__name__)


_SUPPORTED = "use a checkpoint of Mask2Former, SeMask or EoMT (published ones: maskwright zoo)"


def read_foreign(found: WeightSource, categories: str | None, named: bool) -> Checkpoint:
    """Return the checkpoint of another implementation's weights.

    Args:
        found: the weights, and the settings stored with them.
        categories: see `load.read_checkpoint`.
        named: the caller sets the classes afterwards.

    Raises:
        CheckpointError: the layout is unknown, or the weights are incomplete or do not fit any model.
    """
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
    check_not_empty(translation.state)
    if key_map not in (TRANSFORMERS, TRANSFORMERS_DINOV2, TRANSFORMERS_DINOV3):  # config.json is about another file
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
