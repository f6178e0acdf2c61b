"""Exponential moving average (EMA) of a model's weights, which often scores better than the last weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Moving average of all parameters. Buffers, such as batch norm statistics, are copied.

    Differs from a constant decay: at step s the decay is at most (1 + s) / (10 + s), as in TensorFlow's
    `ExponentialMovingAverage`, so that the random initial weights are forgotten quickly.

    Attributes:
        tensors: by name, as in the model's `state_dict`; sharded if the model is.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {
            name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Include the weights after step `step`, counted from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        parameters = dict(model.named_parameters())
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in parameters:
                self.tensors[name].copy_(tensor)
        torch._foreach_lerp_([self.tensors[name] for name in parameters], list(parameters.values()), weight)
