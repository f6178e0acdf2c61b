"""Muon (Jordan et al. 2024): orthogonalized momentum for weight matrices, AdamW for all other parameters.

Updates are scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), so one
learning rate and weight decay serve both. Unusual: the iteration runs on the Gram matrix of the shorter side, in
float32, because convolution kernels are nine times as wide as high, and most CPUs have no bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from maskwright.training.fsdp import copy_into, full_tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5, from Jordan et al.
_ITERATIONS = 5
_MOMENTUM = 0.95
_ADAMW_UPDATE_RMS = 0.2  # root mean square of AdamW's updates at learning rate 1


class Muon(torch.optim.AdamW):
    """AdamW, but parameter groups with `orthogonal` true take orthogonalized steps.

    Parameters of such groups have two or more axes; all but the first are flattened. Their state is `momentum`, of the
    same shape. Like PyTorch's fused AdamW, it skips an update if its `found_inf` is 1. The processes of a run share the
    work: each orthogonalizes different matrices, as all have the same gradients.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's expects a step counter in each state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters; gradients of orthogonal groups are None afterwards."""
        groups = (group for group in self.param_groups if group["orthogonal"])
        matrices = [(p, p.grad, group) for group in groups for p in group["params"] if p.grad is not None]
        matrices.sort(key=lambda matrix: matrix[0].numel())  # matrices of one round then take about the same time
        processes = dist.get_world_size() if dist.is_initialized() else 1
        for start in range(0, len(matrices), processes):
            one_each = matrices[start : start + processes]
            directions = _orthogonalize_in_parallel([self._momentum(p, gradient) for p, gradient, _ in one_each])
            for (parameter, _, group), direction in zip(one_each, directions, strict=True):
                self._update(parameter, direction, group["lr"], group["weight_decay"])
                parameter.grad = None  # so that AdamW skips it
        return super().step(closure)

    def _momentum(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Update the momentum; return the Nesterov direction, (rows, columns)."""
        if not self.state[parameter]:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momentum = self.state[parameter]["momentum"]
        averaged = momentum.lerp(gradient, 1 - _MOMENTUM)
        momentum.copy_(self._unless_skipped(averaged, momentum))
        return full_tensor(gradient.lerp(averaged, _MOMENTUM)).flatten(1)

    def _update(self, parameter: Tensor, direction: Tensor, learning_rate: float, weight_decay: float) -> None:
        direction.mul_(learning_rate * _ADAMW_UPDATE_RMS * max(direction.shape) ** 0.5)
        update = torch.empty_like(parameter)
        copy_into(update, direction.reshape(parameter.shape))
        parameter.copy_(self._unless_skipped(parameter * (1 - learning_rate * weight_decay) - update, parameter))

    def _unless_skipped(self, updated: Tensor, before: Tensor) -> Tensor:
        """Select on the device, so that the host does not wait."""
        found_inf = getattr(self, "found_inf", None)
        return updated if found_inf is None else torch.where(found_inf.to(before.device) == 0, updated, before)


def _orthogonalize_in_parallel(matrices: list[Tensor]) -> list[Tensor]:
    """Orthogonalize at most one matrix per process, each in another process; all processes get all results."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [orthogonalize(matrix) for matrix in matrices]
    buffer = matrices[0].new_zeros(max(matrix.numel() for matrix in matrices))
    if (rank := dist.get_rank()) < len(matrices):
        own = orthogonalize(matrices[rank])
        buffer[: own.numel()] = own.flatten()
    buffers = [torch.empty_like(buffer) for _ in range(dist.get_world_size())]
    dist.all_gather(buffers, buffer)
    pairs = zip(buffers, matrices, strict=False)  # the last round may have fewer matrices than processes
    return [buffer[: matrix.numel()].view(matrix.shape) for buffer, matrix in pairs]


def orthogonalize(matrix: Tensor) -> Tensor:
    """Approximate U V of the singular value decomposition U S V by Newton-Schulz iterations: (m, n) to (m, n).

    Singular values of at least 0.15 % of the norm become 0.68 to 1.21, smaller ones less; zero stays zero.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.t()).t()
    wide = matrix / torch.linalg.vector_norm(matrix).clamp(min=torch.finfo(matrix.dtype).tiny)
    gram = wide @ wide.t()
    polynomial = product = _polynomial(gram)
    for _ in range(_ITERATIONS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram)
        product = polynomial @ product
    return product @ wide


def _polynomial(gram: Tensor) -> Tensor:
    """Compute the factor by which one iteration multiplies the matrix whose Gram matrix this is."""
    linear, cubic, quintic = _COEFFICIENTS
    polynomial = torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic)
    polynomial.diagonal().add_(linear)
    return polynomial
