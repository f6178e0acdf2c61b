"""LoRA (Hu et al. 2021, "Low-Rank Adaptation of Large Language Models"): train small matrices next to frozen weights.

An adapted weight W becomes W + alpha / rank * up @ down. It is a parametrization of PyTorch, so whatever reads
`layer.weight`, the CPU paths included, gets the sum, and gradients reach the adapter from every use.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from maskwright.config.schema import LoraConfig
from maskwright.errors import RecipeError, printable
from maskwright.models.blocks import freeze_all_but_head, is_head
from maskwright.models.segmenter import Segmenter

_GROUPS = {
    "attention": re.compile(r"(attn|attention)[^.]*\."),
    "feedforward": re.compile(r"(^|\.)(mlp|ffn|feedforward)\."),
    "convolution": None,  # by the type of the layer
}
_STATE_NAME = re.compile(r"(.*)\.parametrizations\.(\w+)\.(original|0\.down|0\.up)")


class LowRank(nn.Module):
    """The adapter of one weight. `up` starts at zero, so the first step computes what the base does.

    Args:
        weight: (rows, ...); all axes but the first are flattened.
        rank: of the adapter.
        alpha: the product of both matrices is multiplied by alpha / rank.
    """

    def __init__(self, weight: Tensor, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, weight[0].numel()))
        self.up = nn.Parameter(torch.zeros(len(weight), rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted weight, always computed in the weights' own precision."""
        with torch.autocast(weight.device.type, enabled=False):
            return adapt(weight, self.down, self.up, self.scale)


def adapt(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return weight + scale * up @ down, (rows, ...)."""
    return torch.addmm(weight.flatten(1), up, down, alpha=scale).view(weight.shape)


def add_adapters(model: Segmenter, config: LoraConfig) -> str:
    """Freeze everything but the head, and add an adapter to each weight that `config.targets` names.

    Weights that are frozen already, such as those of `train.frozen_stages`, get none.

    Returns:
        A line that says how many adapters there are and how much is trained.

    Raises:
        RecipeError: a target matches no weight.
    """
    layers = _adaptable_layers(model)
    names = {name for target in config.targets for name in _matching(target, layers)}
    freeze_all_but_head(model)
    for name, (module, tensor_name) in layers.items():
        if name in names:
            adapter = LowRank(getattr(module, tensor_name), rank=config.rank, alpha=config.alpha)
            parametrize.register_parametrization(module, tensor_name, adapter)
    parts = Counter(name.partition(".")[0] for name in layers if name in names)
    counts = ", ".join(f"{part} {count}" for part, count in parts.items())
    parameters = list(model.parameters())
    trained, total = (
        sum(p.numel() for p in group) for group in ([p for p in parameters if p.requires_grad], parameters)
    )
    return (
        f"train.lora: adapters of rank {config.rank} on {len(names)} weights ({counts}); with the head, "
        f"{trained / 1e6:.2f} of {total / 1e6:.2f} million parameters are trained"
    )


def _adaptable_layers(model: Segmenter) -> dict[str, tuple[nn.Module, str]]:
    """Return {name of a weight matrix outside the head that is not frozen: (its module, its name there)}."""
    return {
        f"{path}.{name}": (module, name)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and _is_matrix(module, name) and not is_head(f"{path}.{name}")
    }


def _is_matrix(module: nn.Module, name: str) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return name == "in_proj_weight"
    is_layer = isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1)
    return is_layer and name == "weight"


def _matching(target: str, layers: Mapping[str, tuple[nn.Module, str]]) -> list[str]:
    """Return the weights that a target names: those of a group, or those whose name matches a pattern.

    Raises:
        RecipeError: there are none.
    """
    if found := [name for name, (module, _) in layers.items() if _is_match(target, name, module)]:
        return found
    known = [*_GROUPS, *dict.fromkeys(re.sub(r"\b\d+\b", "*", name.removesuffix(".weight")) for name in layers)]
    nearest = difflib.get_close_matches(target, known, 3, 0.0)
    raise RecipeError(
        f"'{printable(target)}' matches no weight that is neither frozen nor in the head; nearest: "
        f"{', '.join(nearest)}",
        where="train.lora.targets",
        remedy="name a group, or a pattern of weight names such as backbone.stages.3.*",
    )


def _is_match(target: str, name: str, module: nn.Module) -> bool:
    if target == "convolution":
        return isinstance(module, _ConvNd)
    if pattern := _GROUPS.get(target):
        return bool(pattern.search(name))
    return fnmatchcase(name, target) or fnmatchcase(name.removesuffix(".weight"), target)


def split_adapters(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Split the state of a model with adapters into that of its base, and {weight: (down, up)}."""
    base: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _STATE_NAME.fullmatch(key)
        name = f"{match[1]}.{match[2]}" if match else key
        if match and match[3] != "original":
            parts.setdefault(name, {})[match[3]] = tensor
        else:
            base[name] = tensor
    return base, {name: (pair["0.down"], pair["0.up"]) for name, pair in parts.items()}


def merge_adapters(
    base: Mapping[str, Tensor], adapters: Mapping[str, tuple[Tensor, Tensor]], alpha: float
) -> dict[str, Tensor]:
    """Add the adapters to the weights of a base, on the CPU; other weights are returned as they are."""
    merged = dict(base)
    for name, (down, up) in adapters.items():
        weight = base[name].detach().cpu().to(down.dtype)
        merged[name] = adapt(weight, down.detach().cpu(), up.detach().cpu(), alpha / len(down))
    return merged


def adapters_of(model: nn.Module) -> dict[str, LowRank]:
    """Return {name of the adapted weight: its adapter} of a model."""
    return {
        name.replace(".parametrizations.", ".").removesuffix(".0"): module
        for name, module in model.named_modules()
        if isinstance(module, LowRank)
    }
