"""AdamW or Muon with the parameter groups of the original, and the learning rate schedule.

Original: `train_net.py::build_optimizer`.
"""

from __future__ import annotations

import re
from bisect import bisect_right

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from maskwright.config.schema import TrainConfig
from maskwright.models.blocks import backbone_depths, is_pretrained
from maskwright.models.lora import LowRank
from maskwright.models.segmenter import Segmenter
from maskwright.training.muon import Muon

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OTHER_NORMS = (nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm)
_TABLES_AND_TOKENS = ("relative_position_bias_table", "pos_embed", "cls_token", "reg_token")
_CLASSIFIERS = re.compile(r"\b(class_head|classifier)\b")


def build_optimizer(model: Segmenter, config: TrainConfig, *, fused: bool) -> torch.optim.AdamW:
    """Build the optimizer: one group for each combination of learning rate, weight decay and kind of step.

    - The backbone's learning rate is multiplied by `backbone_lr_multiplier`, and by `layer_decay` once more for each
      block farther from its end. LoRA adapters and the feature pyramid of a plain ViT take the whole learning rate:
      they are new, unlike the rest of the backbone.
    - Norms, embeddings, position tables and class tokens have no weight decay. With `decay_batch_norms` batch norms do,
      as in mmsegmentation's recipes for Swin, whose rule looks for "norm" in a parameter's name.
    - With Muon, weights of linear layers and convolutions take orthogonalized steps, with their learning rate
      multiplied by `muon_lr_multiplier`; except classifiers, depthwise kernels, and matrices larger than
      `muon_max_dim`.

    Each group has `initial_lr`, its learning rate before the schedule, and `second_stage`: whether it waits for the end
    of `warmup_steps`, see `backbone_warmup_steps`.
    """
    depths = backbone_depths(model, skip_query_blocks=not config.query_block_decay) if config.layer_decay < 1 else {}
    two_stages = config.backbone_warmup_steps is not None
    groups: dict[tuple[float, float, bool, bool], list[nn.Parameter]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            full_name = f"{module_name}.{name}"
            orthogonal = config.optimizer == "muon" and _is_muon_matrix(module, full_name, config.muon_max_dim)
            multiplier = 1.0
            in_backbone = is_pretrained(full_name) and not isinstance(module, LowRank)
            if in_backbone:
                multiplier = config.backbone_lr_multiplier * config.layer_decay ** depths.get(full_name, 0)
            multiplier *= config.muon_lr_multiplier if orthogonal else 1.0
            weight_decay = config.weight_decay if _has_weight_decay(module, name, config) else 0.0
            groups.setdefault((multiplier, weight_decay, orthogonal, two_stages and in_backbone), []).append(parameter)
    optimizer = Muon if config.optimizer == "muon" else torch.optim.AdamW
    return optimizer(
        [
            {
                "params": parameters,
                "lr": config.learning_rate * multiplier,
                "initial_lr": config.learning_rate * multiplier,
                "weight_decay": weight_decay,
                "orthogonal": orthogonal,
                "second_stage": second_stage,
            }
            for (multiplier, weight_decay, orthogonal, second_stage), parameters in groups.items()
        ],
        fused=fused,
    )


def _has_weight_decay(module: nn.Module, name: str, config: TrainConfig) -> bool:
    if config.decay_norms_and_embeddings:
        return True
    norms = _OTHER_NORMS if config.decay_batch_norms else (*_BATCH_NORMS, *_OTHER_NORMS)
    return not isinstance(module, (*norms, nn.Embedding)) and name not in _TABLES_AND_TOKENS


def _is_muon_matrix(module: nn.Module, full_name: str, max_dim: int | None) -> bool:
    """Return whether Muon updates a parameter of the module: a weight matrix with at most `max_dim` rows or columns."""
    if not isinstance(module, nn.Linear | _ConvNd) or not full_name.endswith(".weight"):
        return False
    if _CLASSIFIERS.search(full_name) or (isinstance(module, _ConvNd) and module.groups > 1):
        return False
    return max_dim is None or min(len(module.weight), module.weight[0].numel()) <= max_dim


def learning_rate_factor(step: int, config: TrainConfig, *, second_stage: bool = False) -> float:
    """Return the learning rate at a step (from 0), relative to the initial one: warm-up times poly or step decay.

    As detectron2's `WarmupPolyLR` and `WarmupMultiStepLR`; with `backbone_warmup_steps` as EoMT's
    `TwoStageWarmupPolySchedule`, whose second stage is that of the backbone.
    """
    if config.backbone_warmup_steps is not None:
        start = config.warmup_steps if second_stage else 0
        end = start + (config.backbone_warmup_steps if second_stage else config.warmup_steps)
        if step < end:
            return max(step - start, 0) / (end - start)
        return (1 - (step - end) / max(config.steps - end, 1)) ** config.poly_power
    warmup = 1.0
    if step < config.warmup_steps:
        done = step / config.warmup_steps
        warmup = config.warmup_factor * (1 - done) + done
    if config.schedule == "poly":
        return warmup * (1 - step / config.steps) ** config.poly_power
    return warmup * 0.1 ** bisect_right([round(share * config.steps) for share in config.milestones], step)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> float:
    """Set every group to its learning rate at a step, counted from 0; return the largest learning rate."""
    first, second = (learning_rate_factor(step, config, second_stage=stage) for stage in (False, True))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (second if group.get("second_stage") else first)
    return max(group["lr"] for group in optimizer.param_groups)


def describe_schedule(config: TrainConfig, images: int, processes: int = 1) -> str:
    """Describe images per step, steps, epochs over the training images and learning rate in one line."""
    micro_batches = config.gradient_accumulation_steps
    factors = [f"{processes} processes"] if processes > 1 else []
    factors += [f"{micro_batches} micro-batches"] if micro_batches > 1 else []
    product = f" ({' x '.join([*factors, str(config.batch_size // (processes * micro_batches))])})" if factors else ""
    epochs = config.steps * config.batch_size / max(images, 1)
    return (
        f"{config.batch_size} images per step{product} x {config.steps} steps = {epochs:.1f} epochs of {images} "
        f"images, learning rate {config.learning_rate:g}"
    )


def learning_rate_advice(config: TrainConfig) -> str | None:
    """Advise on a batch smaller than the one for which the learning rate was tuned; None if it is not smaller.

    The learning rate is scaled with the batch size, the number of steps inversely (Goyal et al. 2017, section 2.1;
    detectron2 does the same if the number of workers changes).
    """
    tuned_for = config.base_batch_size or config.batch_size
    if config.batch_size >= tuned_for:
        return None
    scale, steps_per_batch = config.batch_size / tuned_for, -(-tuned_for // config.batch_size)
    return (
        f"train.batch_size is {config.batch_size}, but the learning rate {config.learning_rate:g} was tuned for "
        f"{tuned_for} images per step. Either scale it and train on as many images: "
        f"train.learning_rate={config.learning_rate * scale:.3g} train.steps={round(config.steps / scale)}; or keep "
        "the batch size and accumulate gradients within the same memory: "
        f"train.batch_size={steps_per_batch * config.batch_size} "
        f"train.gradient_accumulation_steps={steps_per_batch * config.gradient_accumulation_steps}"
    )
