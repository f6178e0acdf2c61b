"""The moving average of a model's weights over the steps, which often scores better than the last weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average of all weights; batch statistics and counters are copied as they are.

    The first steps count more, so that the random weights are soon forgotten: after step s the decay is at most
    (1 + s) / (10 + s), as in TensorFlow's `ExponentialMovingAverage`.

    Attributes:
        tensors: by name, as in the model's `state_dict`; in slices where the model is sharded.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {
            name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after step `step`, counted from 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        averaged = dict(model.named_parameters())
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in averaged:
                self.tensors[name].copy_(tensor)
        torch._foreach_lerp_([self.tensors[name] for name in averaged], list(averaged.values()), share)
