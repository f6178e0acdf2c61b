"""AdamW or Muon with the original's parameter groups, and the rate at each step.

Original: `train_net.py::build_optimizer`.
"""

from __future__ import annotations

import re
from bisect import bisect_right

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from maskwright.config.schema import TrainConfig
from maskwright.models.blocks import backbone_depths
from maskwright.models.segmenter import Segmenter
from maskwright.training.muon import Muon

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OTHER_NORMS = (nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm)
_OUTPUTS = re.compile(r"\b(class_head|classifier)\b")


def build_optimizer(model: Segmenter, config: TrainConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW; the backbone at `backbone_factor` times the rate, no decay for norms, embeddings and position tables.

    With optimizer "muon" the weights of linear layers and convolutions take orthogonal steps at `muon_factor` times
    their rate, but not those of layers that name classes, depthwise kernels, and what is larger than `muon_side`.
    With `decay_batch_norms` only layer and group norms are spared, as in mmsegmentation's recipes for Swin, whose rule
    goes by the word "norm" in a name. With `layer_factor`, blocks of the backbone have lower rates the farther they are
    from its end. Each group carries `base_rate`, its rate before the schedule.
    """
    norms = _OTHER_NORMS if config.decay_batch_norms else (*_BATCH_NORMS, *_OTHER_NORMS)
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    depths = backbone_depths(model) if config.layer_decay < 1 else {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            factor = config.backbone_lr_multiplier if module_name.startswith("backbone") else 1.0
            factor *= config.layer_decay ** depths.get(f"{module_name}.{name}", 0)
            plain = isinstance(module, (*norms, nn.Embedding)) or name in ("relative_position_bias_table", "pos_embed")
            orthogonal = config.optimizer == "muon" and _is_matrix(module, f"{module_name}.{name}", config.muon_max_dim)
            factor *= config.muon_lr_multiplier if orthogonal else 1.0
            groups.setdefault((factor, 0.0 if plain else config.weight_decay, orthogonal), []).append(parameter)
    kind = Muon if config.optimizer == "muon" else torch.optim.AdamW
    return kind(
        [
            {
                "params": parameters,
                "lr": config.learning_rate * factor,
                "base_rate": config.learning_rate * factor,
                "weight_decay": decay,
                "orthogonal": orthogonal,
            }
            for (factor, decay, orthogonal), parameters in groups.items()
        ],
        fused=fused,
    )


def _is_matrix(module: nn.Module, name: str, side: int | None) -> bool:
    """Whether a parameter of the module, by its whole name, is a matrix of at most so many rows or columns."""
    if not isinstance(module, nn.Linear | _ConvNd) or not name.endswith(".weight") or _OUTPUTS.search(name):
        return False
    depthwise = isinstance(module, _ConvNd) and module.groups > 1
    return not depthwise and (side is None or min(len(module.weight), module.weight[0].numel()) <= side)


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
    return warmup * 0.1 ** bisect_right([round(drop * config.steps) for drop in config.milestones], step)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to `factor` times its base rate; returns the largest rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_rate"] * factor
    return max(group["lr"] for group in optimizer.param_groups)


def describe_steps(config: TrainConfig, images: int, processes: int = 1) -> str:
    """In one line: what a step is, how many there are, and how often they see each of the training images."""
    part = config.batch_size // (processes * config.gradient_accumulation_steps)
    factors = [f"{processes} processes"] * (processes > 1) + [f"{config.gradient_accumulation_steps} parts"] * (
        config.gradient_accumulation_steps > 1
    )
    made_of = f" ({' x '.join([*factors, str(part)])})" if factors else ""
    epochs = config.steps * config.batch_size / max(images, 1)
    return (
        f"{config.batch_size} images per step{made_of} x {config.steps} steps = {epochs:.1f} epochs of {images} "
        f"images, learning rate {config.learning_rate:g}"
    )


def advise_on_rate(config: TrainConfig) -> str | None:
    """What to do about steps of fewer images than the learning rate was chosen for; None where they are whole.

    The rate scales with the images per step, the number of steps inversely (Goyal et al. 2017, section 2.1; detectron2
    does so where the number of workers changes).
    """
    wanted = config.base_batch_size or config.batch_size
    if config.batch_size >= wanted:
        return None
    share, parts = config.batch_size / wanted, -(-wanted // config.batch_size)
    return (
        f"train.batch_size is {config.batch_size}, but the learning rate {config.learning_rate:g} was chosen for "
        f"{wanted} images per step. Either scale it, and see as many images in all: "
        f"train.learning_rate={config.learning_rate * share:.3g} train.steps={round(config.steps / share)}; or keep "
        "the step whole within the same memory: "
        f"train.batch_size={parts * config.batch_size} "
        f"train.gradient_accumulation_steps={parts * config.gradient_accumulation_steps}"
    )
