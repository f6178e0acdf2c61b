"""Whether the numbers of a training step are finite: the device acts on it at once, the host hears of it later.

Unusual: a host that reads a number waits for all that the device has still to do, and the device then waits for the
host. So on CUDA a damaged step is left out by the optimizer itself, as are all after it, and the host raises the error
one step later, when the numbers have long arrived. On other devices it looks before the optimizer steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from maskwright.errors import TrainingError
from maskwright.runtime.device import is_asynchronous, start_copy_to_host
from maskwright.structures.annotations import Batch


class StepNumbers:
    """Losses and gradient norm of one step, on their way to the host.

    Args:
        step: its number, from 0.
        batches: the parts of this process's share of it.
        parts: the losses of each of them, (layers,) of each term.
        losses: those of the whole step, over all parts and processes.
        gradient_norm: (), before clipping.
        scaled: whether a loss scaler looks after gradients that are not finite, so that they are no error.
    """

    def __init__(
        self,
        step: int,
        batches: Sequence[Batch],
        parts: Sequence[dict[str, Tensor]],
        losses: dict[str, Tensor],
        gradient_norm: Tensor,
        *,
        scaled: bool,
    ) -> None:
        self.step, self.losses, self.gradient_norm, self.scaled = step, losses, gradient_norm, scaled
        self.images = [[target.image_id for target in batch.targets] for batch in batches]
        values = [torch.cat([part.detach() for part in terms.values()]) for terms in (*parts, losses)]
        self._wait = start_copy_to_host(torch.cat([*values, gradient_norm.detach().view(1)]).float())

    def check(self) -> None:
        """Wait for the numbers, and raise TrainingError where one is not finite: it names step, terms and images."""
        *numbers, norm = self._wait().tolist()
        if all(map(math.isfinite, numbers)) and (self.scaled or math.isfinite(norm)):
            return
        names = [
            f"{term} of layer {layer}" if len(values) > 1 else term
            for term, values in self.losses.items()
            for layer in range(len(values))
        ]
        rows = [numbers[start : start + len(names)] for start in range(0, len(numbers), len(names))]
        broken = [
            [name for name, number in zip(names, row, strict=True) if not math.isfinite(number)][:6] for row in rows
        ]
        for images, terms in zip(self.images, broken[:-1], strict=True):
            if terms:
                raise not_finite(self.step, f"loss is not finite ({', '.join(terms)})", images)
        if broken[-1]:
            raise not_finite(self.step, f"loss of another process is not finite ({', '.join(broken[-1])})", [])
        raise not_finite(self.step, f"the gradient is not finite (norm {norm})", list(chain(*self.images)))


class Unchecked:
    """Steps whose numbers the host has not looked at: at most one, between two steps.

    Where a later step fails, the `with` block ends with the error of the one before, if that was not sound.
    """

    def __enter__(self) -> Unchecked:
        self._waiting: deque[StepNumbers] = deque()
        return self

    def add(self, numbers: StepNumbers, *, at_once: bool) -> None:
        """Check the step before, and this one too if something is made of it `at_once`."""
        self._waiting.append(numbers)
        self._check_until(0 if at_once else 1)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, TrainingError):
            self._check_until(0)

    def _check_until(self, left: int) -> None:
        while len(self._waiting) > left:
            self._waiting.popleft().check()


def not_finite(step: int, what: str, images: Sequence[int | str]) -> TrainingError:
    """The error that ends a run."""
    where = f" for images {', '.join(map(str, images))}" if images else ""
    return TrainingError(
        f"step {step + 1}: {what}{where}; stopped, the last checkpoint is kept. "
        "Try a lower train.learning_rate or train.precision=fp32"
    )


def poisoned(total: Tensor) -> Tensor:
    """The same number with the same gradients; where it is not finite, all gradients become NaN.

    An infinite loss may have finite gradients. With this, the gradient's norm alone, which all processes share, says
    whether a step is sound.
    """
    return total * (total.detach() * 0 + 1)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the update is fused, and so obeys `skip_from_now_on`, on a device that the host runs ahead of."""
    groups = optimizer.param_groups
    return all(group.get("fused") for group in groups) and is_asynchronous(groups[0]["params"][0].device)


def skip_from_now_on(optimizer: torch.optim.Optimizer, damaged: Tensor) -> None:
    """Have the optimizer leave out this update and all later ones if `damaged` (() bool) is true.

    PyTorch's fused updates read a flag on the device, which is there for loss scalers.
    """
    before = getattr(optimizer, "found_inf", None)
    flag = damaged.float()
    vars(optimizer)["found_inf"] = flag if before is None else torch.maximum(before, flag)
