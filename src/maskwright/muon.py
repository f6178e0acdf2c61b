"""Muon (Jordan et al. 2024): momentum whose singular values are all made one, for weight matrices; AdamW for the rest.

Steps are as large as AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), so its rate and decay
serve for both. Unusual: the iteration runs on the product of the matrix with itself along its longer side, in float32,
because kernels of convolutions are nine times as wide as high, and most CPUs have no bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskwright.sharding import copy_into, whole_tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5; found by Jordan et al.
_ITERATIONS = 5
_MOMENTUM = 0.95
_SIZE_OF_ADAMW = 0.2  # root mean square of its steps at a rate of 1


class Muon(torch.optim.AdamW):
    """AdamW, but groups with `orthogonal` true take orthogonal steps.

    Parameters of such groups have two axes or more, of which all behind the first are taken as one. Their state is
    `momentum`, as large as they are. Like PyTorch's fused AdamW it changes nothing where it has a `found_inf` of 1.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's looks for a counter in each state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients; those of orthogonal groups are None afterwards."""
        for group in self.param_groups:
            for parameter in group["params"] if group["orthogonal"] else ():
                if parameter.grad is not None:
                    self._step_orthogonally(parameter, parameter.grad, group["lr"], group["weight_decay"])
                    parameter.grad = None  # so AdamW leaves it alone
        return super().step(closure)

    def _step_orthogonally(self, parameter: Tensor, gradient: Tensor, rate: float, decay: float) -> None:
        momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        averaged = momentum * _MOMENTUM + gradient * (1 - _MOMENTUM)
        matrix = whole_tensor(averaged * _MOMENTUM + gradient * (1 - _MOMENTUM)).flatten(1)
        turned = orthogonalised(matrix).mul_(_SIZE_OF_ADAMW * max(matrix.shape) ** 0.5)
        change = torch.empty_like(parameter)
        copy_into(change, turned.reshape(parameter.shape))
        changed = parameter * (1 - rate * decay) - change * rate
        if (found := getattr(self, "found_inf", None)) is not None:  # asked on the device, so that nothing waits for it
            sound = found.to(parameter.device) == 0
            averaged, changed = torch.where(sound, averaged, momentum), torch.where(sound, changed, parameter)
        momentum.copy_(averaged)
        parameter.copy_(changed)


def orthogonalised(matrix: Tensor) -> Tensor:
    """About the matrix U V of a singular value decomposition U S V, by Newton-Schulz iterations: (m, n) to (m, n).

    Singular values of at least a thousandth of the norm become 0.7 to 1.2; zero stays zero.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalised(matrix.t()).t()
    wide = matrix / torch.linalg.vector_norm(matrix).clamp(min=torch.finfo(matrix.dtype).tiny)
    gram = wide @ wide.t()
    turn = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    linear, cubic, quintic = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        polynomial = torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic)
        polynomial.diagonal().add_(linear)
        turn = polynomial @ turn
        gram = polynomial @ gram @ polynomial
    return turn @ wide
