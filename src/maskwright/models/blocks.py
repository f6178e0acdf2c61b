"""The repeated blocks of a model: what is recomputed in the backward pass, sharded, frozen, or given its own rate."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from maskwright.errors import RecipeError
from maskwright.models.backbones.base import Backbone
from maskwright.models.backbones.semask import SemanticLayer
from maskwright.models.masked_decoder import DecoderLayer
from maskwright.models.pixel_decoder import EncoderLayer
from maskwright.models.segmenter import Segmenter

_NAMES = re.compile(r"Block|Bottleneck|InvertedResidual")  # as timm calls them in all its networks, and we ours
_OURS = (EncoderLayer, DecoderLayer, SemanticLayer)


def find_blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of the outermost repeated blocks of a model or a part of one, in the order of its weights."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_modules():
        inside = found and name.startswith(found[-1][0] + ".")
        if not inside and (isinstance(child, _OURS) or _NAMES.search(type(child).__name__)):
            found.append((name, child))
    return found


def recompute_blocks(model: nn.Module) -> int:
    """Let every block forget what lies inside it, and compute it again in the backward pass; returns their number.

    Gradient checkpointing (Chen et al. 2016). The numbers are the same to the last bit: dropped paths are drawn again
    from the same random state, and batch norms do not count the second pass.
    """
    blocks = [block for _, block in find_blocks(model)]
    for block in blocks:
        norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
        contexts = partial(_contexts, norms)
        # Set on the object, so that hooks around the block, as those of sharding, are around both passes.
        block.forward = partial(_recomputed, block.forward, contexts)
    return len(blocks)


def _recomputed(forward: Any, contexts: Any, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


def _contexts(norms: list[_BatchNorm]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Around the first pass, and around the second."""
    return nullcontext(), _still(norms)


@contextmanager
def _still(norms: list[_BatchNorm]) -> Generator[None]:
    """Batch norms keep their running statistics and their counter."""
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)


def freeze_stages(model: Segmenter, stages: int) -> None:
    """Train nothing of the backbone up to its `stages`-th feature level (strides 4, 8, 16, 32), and all before it.

    Batch norms there keep their statistics too.

    Raises:
        RecipeError: the stages of this backbone cannot be told apart.
    """
    for part in _first_parts(model, stages) if stages else []:
        part.requires_grad_(False)
        for norm in part.modules():
            if isinstance(norm, _BatchNorm):
                norm.train(False)
                norm.train = partial(_stay, norm)  # `model.train()` after an evaluation does not wake it


def _stay(norm: _BatchNorm, mode: bool = True) -> _BatchNorm:
    return norm


def _first_parts(model: Segmenter, stages: int) -> list[nn.Module]:
    parts = cast(Backbone, model.backbone).first_stages(stages)
    if parts is None:
        raise RecipeError(
            f"train.frozen_stages is {stages}, but '{model.config.backbone}' does not tell its stages apart; set it to "
            "0, or give the backbone a low rate by train.backbone_lr_multiplier"
        )
    return parts


def backbone_depths(model: Segmenter) -> dict[str, int]:
    """How many blocks of the backbone lie behind each of its parameters: {parameter's name: number}; 0 in the last."""
    blocks = [name for name, block in find_blocks(model.backbone) if not isinstance(block, SemanticLayer)]
    depths, begun = {}, 0
    for name, _ in model.backbone.named_parameters():
        if begun < len(blocks) and name.startswith(blocks[begun] + "."):
            begun += 1
        depths[f"backbone.{name}"] = len(blocks) - begun
    return depths
