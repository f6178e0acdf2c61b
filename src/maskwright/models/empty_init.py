"""Models that get their weights from a file: made without random weights, then filled without copying.

Unusual: a model is not made on the meta device. There, buffers that no file holds (relative position indices, pixel
means) would have no values either, and each kind of network has its own way to compute them. Here everything is made as
always, but no parameter is filled: its memory is only promised by the system and never touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskwright.errors import CheckpointError

# What initialisation calls on a parameter.
_FILLERS = frozenset(
    (
        "add_",
        "clamp_",
        "constant_",
        "copy_",
        "div_",
        "erfinv_",
        "fill_",
        "kaiming_normal_",
        "kaiming_uniform_",
        "mul_",
        "normal_",
        "ones_",
        "orthogonal_",
        "sub_",
        "trunc_normal_",
        "uniform_",
        "xavier_normal_",
        "xavier_uniform_",
        "zero_",
        "zeros_",
    )
)
_SPARE_BYTES, _SPARE_TENSORS = 1 << 28, 5_000


class unfilled(TorchFunctionMode):
    """Within it, parameters are made without values, for a model that `fill` completes.

    Args:
        weights: that the model will get. A description of a far larger model, as only a false header gives it, ends in
            an error, before the memory is asked for.

    Raises:
        CheckpointError: the model is far larger than the weights.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.bytes = _SPARE_BYTES + 16 * sum(tensor.nbytes for tensor in weights.values())
        self.tensors = _SPARE_TENSORS + 20 * len(weights)

    def __enter__(self) -> unfilled:
        self.random = torch.get_rng_state()  # some fill another tensor first, as often as its values ask for
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        torch.set_rng_state(self.random)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            self._pay(args[0] if args else kwargs.get("size", ()), args)
        elif getattr(func, "__name__", "") in _FILLERS:
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, nn.Parameter):
                return filled
        return func(*args, **kwargs)

    def _pay(self, first: Any, args: tuple) -> None:
        sizes = first if isinstance(first, tuple | list) else args
        self.bytes -= 4 * math.prod(size for size in sizes if isinstance(size, int))
        self.tensors -= 1
        if self.bytes < 0 or self.tensors < 0:
            raise CheckpointError("the model that it describes is far larger than its weights; download it again")


def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model its weights, without copying those that already are of the right kind of number.

    Args:
        model: made within `unfilled`, or any other.
        weights: by the names of its `state_dict`; all, and of the same shapes.
    """
    expected, filled, seen = model.state_dict(), {}, set()
    for key, tensor in weights.items():
        tensor = tensor.detach().to(expected[key]).contiguous()
        if tensor.data_ptr() in seen:  # two names for one memory would be trained as one
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        filled[key] = tensor
    model.load_state_dict(filled, assign=True)
