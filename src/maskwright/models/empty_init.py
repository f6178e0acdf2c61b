"""Build a model without initializing its parameters, then assign the weights of a file without copying them.

Unusual: the model is not built on the meta device. There, buffers that no file holds (relative position indices, pixel
means) would have no values, and each kind of network computes them in its own way. Instead everything is built as
usual, but parameters are never written: the system reserves their memory without touching it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskwright.errors import CheckpointError

_EXTRA_BYTES, _EXTRA_TENSORS = 1 << 28, 5_000  # allowed beyond a multiple of the weights


class skip_init(TorchFunctionMode):
    """Context in which in-place operations on parameters, as in initialization, do nothing.

    Restores the random state at the end, because some networks initialize a tensor that is not a parameter.

    Args:
        weights: weights that the model will get. They limit the size of the model, so that a forged description of a
            huge one fails before memory is allocated.

    Raises:
        CheckpointError: the model is far larger than the weights.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.bytes_left = _EXTRA_BYTES + 16 * sum(tensor.nbytes for tensor in weights.values())
        self.tensors_left = _EXTRA_TENSORS + 20 * len(weights)

    def __enter__(self) -> skip_init:
        self.random_state = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        torch.set_rng_state(self.random_state)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            self._count(args[0] if args else kwargs.get("size", ()), args)
        elif _is_in_place(func):
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)

    def _count(self, first: Any, args: tuple) -> None:
        sizes = first if isinstance(first, tuple | list) else args
        self.bytes_left -= 4 * math.prod(size for size in sizes if isinstance(size, int))
        self.tensors_left -= 1
        if self.bytes_left < 0 or self.tensors_left < 0:
            raise CheckpointError(
                "the model that it describes is far larger than its weights", remedy="download it again"
            )


@functools.cache
def _is_in_place(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


def assign_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make `weights` the parameters and buffers of a model, without copying tensors that have the right dtype.

    Takes a quarter of the time of `load_state_dict(assign=True)`: 16 -> 4 ms of loading an R50.

    Args:
        model: any model, typically built under `skip_init`.
        weights: complete, with the names and shapes of the model's `state_dict`. Hooks of `load_state_dict` are not
            called.
    """
    addresses = set()

    def matching(tensor: Tensor, old: Tensor) -> Tensor:
        tensor = tensor.detach().to(old).contiguous()
        if tensor.data_ptr() in addresses:  # two names for the same memory would be trained as one weight
            tensor = tensor.clone()
        addresses.add(tensor.data_ptr())
        return tensor

    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for key, old in module.named_parameters(recurse=False, remove_duplicate=False):
            weight = matching(weights[prefix + key], old)
            module.register_parameter(key, nn.Parameter(weight, requires_grad=old.requires_grad))
        for key, old in module.named_buffers(recurse=False, remove_duplicate=False):
            if prefix + key in weights:
                module.register_buffer(key, matching(weights[prefix + key], old))
