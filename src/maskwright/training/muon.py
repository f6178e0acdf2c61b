"""Muon (Jordan et al. 2024): momentum whose singular values are all made one, for weight matrices; AdamW for the rest.

Steps are as large as AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), so its rate and decay
serve for both. Unusual: the iteration runs on the product of the matrix with itself along its longer side, in float32,
because kernels of convolutions are nine times as wide as high, and most CPUs have no bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from maskwright.training.fsdp import copy_into, whole_tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5; found by Jordan et al.
_ITERATIONS = 5
_MOMENTUM = 0.95
_SIZE_OF_ADAMW = 0.2  # root mean square of its steps at a rate of 1


class Muon(torch.optim.AdamW):
    """AdamW, but groups with `orthogonal` true take orthogonal steps.

    Parameters of such groups have two axes or more, of which all behind the first are taken as one. Their state is
    `momentum`, as large as they are. Like PyTorch's fused AdamW it changes nothing where it has a `found_inf` of 1. The
    processes of a run share the work: each makes other matrices orthogonal, from the gradients that all have.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's looks for a counter in each state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients; those of orthogonal groups are None afterwards."""
        groups = (group for group in self.param_groups if group["orthogonal"])
        steps = [(p, p.grad, group) for group in groups for p in group["params"] if p.grad is not None]
        steps.sort(key=lambda step: step[0].numel())  # so that those beside each other take about as long
        processes = dist.get_world_size() if dist.is_initialized() else 1
        for start in range(0, len(steps), processes):
            some = steps[start : start + processes]
            turned = _orthogonalised_by_all([self._average(parameter, gradient) for parameter, gradient, _ in some])
            for (parameter, _, group), matrix in zip(some, turned, strict=True):
                self._move(parameter, matrix, group["lr"], group["weight_decay"])
                parameter.grad = None  # so AdamW leaves it alone
        return super().step(closure)

    def _average(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """(rows, columns): the momentum after this gradient, and the gradient once more (Nesterov)."""
        if not self.state[parameter]:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momentum = self.state[parameter]["momentum"]
        averaged = momentum.lerp(gradient, 1 - _MOMENTUM)
        momentum.copy_(self._if_sound(averaged, momentum))
        return whole_tensor(gradient.lerp(averaged, _MOMENTUM)).flatten(1)

    def _move(self, parameter: Tensor, turned: Tensor, rate: float, decay: float) -> None:
        turned.mul_(rate * _SIZE_OF_ADAMW * max(turned.shape) ** 0.5)
        change = torch.empty_like(parameter)
        copy_into(change, turned.reshape(parameter.shape))
        parameter.copy_(self._if_sound(parameter * (1 - rate * decay) - change, parameter))

    def _if_sound(self, changed: Tensor, before: Tensor) -> Tensor:
        found = getattr(self, "found_inf", None)
        if found is None:
            return changed
        return torch.where(found.to(before.device) == 0, changed, before)  # so that nothing waits for the device


def _orthogonalised_by_all(matrices: list[Tensor]) -> list[Tensor]:
    """Each of at most as many matrices as there are processes made orthogonal by one of them; all get all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [orthogonalised(matrix) for matrix in matrices]
    room = matrices[0].new_zeros(max(matrix.numel() for matrix in matrices))
    if (rank := dist.get_rank()) < len(matrices):
        own = orthogonalised(matrices[rank])
        room[: own.numel()] = own.flatten()
    rooms = [torch.empty_like(room) for _ in range(dist.get_world_size())]
    dist.all_gather(rooms, room)
    pairs = zip(rooms, matrices, strict=False)  # fewer matrices than processes, at the end
    return [room[: matrix.numel()].view(matrix.shape) for room, matrix in pairs]


def orthogonalised(matrix: Tensor) -> Tensor:
    """About the matrix U V of a singular value decomposition U S V, by Newton-Schulz iterations: (m, n) to (m, n).

    Singular values of at least 0.15 % of the norm become 0.68 to 1.21, smaller ones less; zero stays zero.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalised(matrix.t()).t()
    wide = matrix / torch.linalg.vector_norm(matrix).clamp(min=torch.finfo(matrix.dtype).tiny)
    gram = wide @ wide.t()
    polynomial = turn = _polynomial(gram)
    for _ in range(_ITERATIONS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram)
        turn = polynomial @ turn
    return turn @ wide


def _polynomial(gram: Tensor) -> Tensor:
    """What an iteration multiplies the matrix by, whose product with itself is `gram`."""
    linear, cubic, quintic = _COEFFICIENTS
    polynomial = torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic)
    polynomial.diagonal().add_(linear)
    return polynomial
