"""AdamW with the original's parameter groups, and the rate at each step. Original: `train_net.py::build_optimizer`."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import nn

from maskwright.recipe import TrainConfig

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.LayerNorm,
)


def build_optimizer(model: nn.Module, config: TrainConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW; the backbone at `backbone_factor` times the rate, no decay for norms, embeddings and position tables.

    Each group carries `base_rate`, its rate before the schedule.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            factor = config.backbone_factor if module_name.startswith("backbone") else 1.0
            plain = isinstance(module, (*_NORMS, nn.Embedding)) or name in ("relative_position_bias_table", "pos_embed")
            groups.setdefault((factor, 0.0 if plain else config.weight_decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": config.learning_rate * factor,
                "base_rate": config.learning_rate * factor,
                "weight_decay": decay,
            }
            for (factor, decay), parameters in groups.items()
        ],
        fused=fused,
    )


def rate_factor(step: int, config: TrainConfig) -> float:
    """The rate at a step (from 0), relative to the base rate: warm-up times poly decay or drops.

    detectron2's `WarmupPolyLR` and `WarmupMultiStepLR`.
    """
    warmup = 1.0
    if step < config.warmup_steps:
        done = step / config.warmup_steps
        warmup = config.warmup_factor * (1 - done) + done
    if config.schedule == "poly":
        return warmup * (1 - step / config.steps) ** config.poly_power
    return warmup * 0.1 ** bisect_right([round(drop * config.steps) for drop in config.drops], step)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to `factor` times its base rate; returns the largest rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_rate"] * factor
    return max(group["lr"] for group in optimizer.param_groups)
