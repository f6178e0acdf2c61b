"""Old names of recipe keys. Recipes, checkpoints and runs that use them are still read.

This table is the only place that knows them. `docs/recipe-keys.md` lists current and old names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Section -> {old key: current key}.
OLD_NAMES: Mapping[str, Mapping[str, str]] = {
    "model": {
        "window": "window_size",
        "semantic_scope": "semantic_attention",
        "semantic_window": "semantic_window_size",
        "drop_path": "drop_path_rate",
        "queries": "num_queries",
        "width": "hidden_dim",
        "mask_width": "mask_dim",
        "heads": "num_heads",
        "points": "deformable_points",
        "pixel_decoder_feedforward": "pixel_decoder_feedforward_dim",
        "masked_decoder_feedforward": "masked_decoder_feedforward_dim",
    },
    "data": {"skip_empty": "filter_empty"},
    "split": {"parts": "subsets"},
    "augment": {
        "crop": "crop_size",
        "scale": "scale_range",
        "flip": "flip_probability",
        "color": "color_jitter",
    },
    "train": {
        "accumulate": "gradient_accumulation_steps",
        "progressive": "progressive_resizing",
        "muon_factor": "muon_lr_multiplier",
        "muon_side": "muon_max_dim",
        "learning_rate_batch": "base_batch_size",
        "backbone_factor": "backbone_lr_multiplier",
        "layer_factor": "layer_decay",
        "freeze_stages": "frozen_stages",
        "clip_norm": "max_grad_norm",
        "drops": "milestones",
        "ema": "ema_decay",
        "shard": "fsdp",
        "find_batch_size": "auto_gradient_accumulation",
        "workers": "num_workers",
        "points": "num_points",
        "importance_ratio": "importance_sample_ratio",
        "class_weight": "class_loss_weight",
        "mask_weight": "mask_loss_weight",
        "dice_weight": "dice_loss_weight",
        "semantic_weight": "semantic_loss_weight",
        "hard_pixels": "ohem_pixels",
        "keep": "keep_checkpoints",
        "best_score": "best_metric",
        "patience": "early_stopping_patience",
        "estimate": "probe_memory",
        "check": "check_data",
        "log_megabytes": "max_log_megabytes",
        "stall_seconds": "hang_timeout_seconds",
    },
    "evaluate": {
        "limit": "max_images",
        "semantic_at": "semantic_resolution",
        "window": "window_size",
        "stride": "window_stride",
        "tile": "tile_size",
    },
}

# Path in a recipe -> section.
_SECTIONS: Mapping[str, str] = {
    "model": "model",
    "data": "data",
    "data.train": "split",
    "data.val": "split",
    "data.test": "split",
    "train": "train",
    "train.augment": "augment",
    "evaluate": "evaluate",
}


def rename_section(section: str, values: Any) -> Any:
    """Rename the old keys of one section.

    Args:
        section: a key of `OLD_NAMES`; other sections have no old names.
        values: the section's values; anything but a mapping is returned unchanged.

    Raises:
        ValueError: a key is set by both names.
    """
    names = OLD_NAMES.get(section)
    if not names or not isinstance(values, Mapping):
        return values
    for old, new in names.items():
        if old in values and new in values:
            raise ValueError(f"'{old}' is the old name of '{new}', and both are set; keep '{new}'")
    return {names.get(key, key): value for key, value in values.items()}


def rename_key(key: str) -> str:
    """Return the current name of a dotted key: `train.accumulate` -> `train.gradient_accumulation_steps`."""
    parent, _, last = key.rpartition(".")
    new = OLD_NAMES.get(_SECTIONS.get(parent, ""), {}).get(last, last)
    return f"{parent}.{new}" if parent else new


def rename_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """Rename the old keys in all sections of a recipe.

    A key that is set by both names keeps both, so that validation refuses it.
    """
    renamed = dict(values)
    for old, new in old_keys(values):
        *parents, last = old.split(".")
        inner = renamed
        for part in parents:
            inner[part] = dict(inner[part])
            inner = inner[part]
        name = new.rpartition(".")[2]
        if name not in inner:
            inner[name] = inner.pop(last)
    return renamed


def old_keys(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the (old, new) dotted names of the old keys in a recipe."""
    found = []
    for place, section in _SECTIONS.items():
        inner: Any = values
        for part in place.split("."):
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            found += [(f"{place}.{key}", f"{place}.{new}") for key, new in OLD_NAMES[section].items() if key in inner]
    return found
