"""Store the weights of a model as float16; everything is still computed in float32."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from maskwright.models.segmenter import Segmenter


class _AsFloat(nn.Module):
    def forward(self, stored: Tensor) -> Tensor:
        return stored.float()


def with_half_weights(model: Segmenter) -> Segmenter:
    """Return a copy of a model whose weight matrices and kernels are float16 and are converted where they are used.

    Biases, norms and position tables stay float32: they are small, and positions need the precision.
    """
    halved = copy.deepcopy(model)
    for module in list(halved.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.ndim >= 2 and weight.dtype == torch.float32 and weight.abs().max() < torch.finfo(torch.half).max:
                setattr(module, name, nn.Parameter(weight.half(), requires_grad=False))
                parametrize.register_parametrization(module, name, _AsFloat(), unsafe=True)
    return halved.eval()
