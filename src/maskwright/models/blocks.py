"""The repeated blocks of a model: for gradient checkpointing, sharding, freezing and layer-wise learning rates."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

from torch import is_grad_enabled, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from maskwright.errors import RecipeError
from maskwright.models.backbones.base import Backbone
from maskwright.models.backbones.semask import SemanticLayer
from maskwright.models.backbones.vit_adapter import Extractor, Injector
from maskwright.models.masked_decoder import DecoderLayer
from maskwright.models.pixel_decoder import EncoderLayer
from maskwright.models.segmenter import Segmenter

_CLASS_NAMES = re.compile(r"Block|Bottleneck|InvertedResidual")  # blocks of timm's networks and of ours
_CLASSES = (EncoderLayer, DecoderLayer, SemanticLayer, Injector, Extractor)
_NOT_DECAYED = (SemanticLayer, Injector, Extractor)  # their learning rate does not depend on the depth of the blocks
_HEAD = re.compile(
    r"(masked_decoder|head)\.(class_head|mask_head|query_features|query_positions)\."
    r"|decoder\.classifier\.|backbone\.semantic_layers\.\d+\.(query|key)\."
)


def find_blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, block) for the outermost repeated blocks of a model or a part of one, in order of registration."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_modules():
        is_inside_block = found and name.startswith(found[-1][0] + ".")
        is_block = isinstance(child, _CLASSES) or _CLASS_NAMES.search(type(child).__name__)
        if is_block and not is_inside_block:
            found.append((name, child))
    return found


def recompute_blocks(model: nn.Module) -> int:
    """Enable gradient checkpointing (Chen et al. 2016) for every block; return the number of blocks.

    Activations inside a block are recomputed in the backward pass. Results are bit-identical: stochastic depth restores
    the random state, and batch norms do not count the second pass.
    """
    blocks = [block for _, block in find_blocks(model)]
    for block in blocks:
        norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
        # Replaced on the instance, so that hooks of the block, such as those of FSDP, run around both passes.
        block.forward = partial(_forward_checkpointed, block.forward, partial(_pass_contexts, norms))
    return len(blocks)


def _forward_checkpointed(forward: Any, contexts: Any, *inputs: Any, **options: Any) -> Any:
    if not is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **options)


def _pass_contexts(norms: list[_BatchNorm]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of the first pass and of the recomputation."""
    return nullcontext(), _keep_statistics(norms)


@contextmanager
def _keep_statistics(norms: list[_BatchNorm]) -> Generator[None]:
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)


def freeze_stages(model: Segmenter, stages: int) -> None:
    """Freeze the backbone up to feature level `stages` (of strides 4, 8, 16, 32), including batch norm statistics.

    Raises:
        RecipeError: the backbone does not separate its stages.
    """
    for part in _first_stages(model, stages) if stages else []:
        part.requires_grad_(False)
        _freeze_statistics(part)


def freeze_all_but_head(model: Segmenter) -> None:
    """Freeze all parameters but those of the head (see `is_head`), and the statistics of all batch norms."""
    for name, parameter in model.named_parameters():
        if not is_head(name):
            parameter.requires_grad_(False)
    _freeze_statistics(model)


def is_head(name: str) -> bool:
    """Return whether a parameter belongs to the head: queries, mask head, and everything with a row per class."""
    return bool(_HEAD.match(name))


def is_pretrained(name: str) -> bool:
    """Return whether a parameter belongs to the backbone, but not to what is added to a plain ViT (`neck`)."""
    return name.startswith("backbone.") and not name.startswith("backbone.neck.")


def _freeze_statistics(part: nn.Module) -> None:
    for norm in part.modules():
        if isinstance(norm, _BatchNorm):
            norm.train(False)
            norm.train = partial(_ignore_train, norm)  # `model.train()` after an evaluation must not undo this


def _ignore_train(norm: _BatchNorm, mode: bool = True) -> _BatchNorm:
    return norm


def _first_stages(model: Segmenter, stages: int) -> list[nn.Module]:
    parts = cast(Backbone, model.backbone).first_stages(stages)
    if parts is None:
        raise RecipeError(
            f"{stages}, but '{model.config.backbone}' does not separate its stages",
            where="train.frozen_stages",
            remedy="set it to 0, or lower train.backbone_lr_multiplier instead",
        )
    return parts


def backbone_depths(model: Segmenter, *, skip_query_blocks: bool = False) -> dict[str, int]:
    """Return {parameter name: number of backbone blocks after it}; 0 in the last block.

    With `skip_query_blocks` it is 0 in all blocks that process queries, and unchanged in those before them.
    """
    skipped = getattr(model.backbone, "query_blocks", 0) if skip_query_blocks else 0
    blocks = [name for name, block in find_blocks(model.backbone) if not isinstance(block, _NOT_DECAYED)]
    depths, entered = {}, 0
    for name, _ in model.backbone.named_parameters():
        if entered < len(blocks) and name.startswith(blocks[entered] + "."):
            entered += 1
        depth = len(blocks) - entered
        depths[f"backbone.{name}"] = depth if depth >= skipped else 0
    return depths
