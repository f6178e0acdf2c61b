"""Guard against NaN and infinite losses and gradients: no such step reaches the weights, and the run stops.

Unusual: a host that reads a value waits for all work queued on the device, and then the device waits for the host. So
on CUDA the optimizer itself skips a non-finite step and all steps after it, and the host raises the error one step
later, when the values have long arrived. On other devices the host checks before the optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from maskwright.errors import TrainingError
from maskwright.runtime.device import is_asynchronous, start_copy_to_host
from maskwright.structures.annotations import Batch


class StepResult:
    """Losses and gradient norm of one step, being copied to the host.

    Args:
        step: its number, from 0.
        micro_batches: of this process.
        micro_batch_losses: the losses of each micro-batch, (layers,) for each term.
        losses: of the whole step, summed over micro-batches and processes.
        gradient_norm: (), before clipping.
        scaled: a loss scaler handles non-finite gradients, so they are not an error.
    """

    def __init__(
        self,
        step: int,
        micro_batches: Sequence[Batch],
        micro_batch_losses: Sequence[dict[str, Tensor]],
        losses: dict[str, Tensor],
        gradient_norm: Tensor,
        *,
        scaled: bool,
    ) -> None:
        self.step, self.losses, self.gradient_norm, self.scaled = step, losses, gradient_norm, scaled
        self.images = [[target.image_id for target in batch.targets] for batch in micro_batches]
        values = [torch.cat([value.detach() for value in terms.values()]) for terms in (*micro_batch_losses, losses)]
        self._wait_for_copy = start_copy_to_host(torch.cat([*values, gradient_norm.detach().view(1)]).float())

    def check(self) -> None:
        """Wait for the values, and raise a TrainingError that names step, terms and images if one is not finite."""
        *losses, norm = self._wait_for_copy().tolist()
        if all(map(math.isfinite, losses)) and (self.scaled or math.isfinite(norm)):
            return
        names = [
            f"{term} of layer {layer}" if len(values) > 1 else term
            for term, values in self.losses.items()
            for layer in range(len(values))
        ]
        count = len(names)
        *own, total = [_nonfinite_names(names, losses[start : start + count]) for start in range(0, len(losses), count)]
        for images, terms in zip(self.images, own, strict=True):
            if terms:
                raise nonfinite_error(self.step, f"loss is not finite ({terms})", images)
        if total:
            raise nonfinite_error(self.step, f"loss of another process is not finite ({total})", [])
        raise nonfinite_error(self.step, f"the gradient is not finite (norm {norm})", list(chain(*self.images)))


class DelayedChecks:
    """Check each step after the next one, so that the host does not wait for the device.

    If a later step fails, the `with` block ends with the error of the step before it, if that was not finite.
    """

    def __enter__(self) -> DelayedChecks:
        self._unchecked: list[StepResult] = []
        return self

    def add(self, result: StepResult, *, now: bool) -> None:
        """Check the previous step, and this one too if it is about to be logged, saved or scored (`now`)."""
        self._unchecked.append(result)
        self._check_all_but(0 if now else 1)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, TrainingError):
            self._check_all_but(0)

    def _check_all_but(self, count: int) -> None:
        while len(self._unchecked) > count:
            self._unchecked.pop(0).check()


def nonfinite_error(step: int, found: str, images: Sequence[int | str]) -> TrainingError:
    """Return the error that stops a run."""
    in_images = f" for images {', '.join(map(str, images))}" if images else ""
    return TrainingError(
        f"{found}{in_images}",
        where=f"step {step + 1}",
        remedy="the run has stopped, its last checkpoint is kept; try a lower train.learning_rate or "
        "train.precision=fp32",
    )


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """Return the same loss with the same gradients; but if it is not finite, all gradients become NaN.

    An infinite loss may have finite gradients. With this, the gradient norm alone, which all processes share, says
    whether a step is finite.
    """
    return loss * (loss.detach() * 0 + 1)


def can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `skip_updates` works: the update is fused, and the host runs ahead of the device."""
    groups = optimizer.param_groups
    return all(group.get("fused") for group in groups) and is_asynchronous(groups[0]["params"][0].device)


def skip_updates(optimizer: torch.optim.Optimizer, condition: Tensor) -> None:
    """Make the optimizer skip this update and all later ones if the condition (() bool) is true.

    PyTorch's fused updates read a flag on the device, which is meant for loss scalers.
    """
    before = getattr(optimizer, "found_inf", None)
    flag = condition.float()
    vars(optimizer)["found_inf"] = flag if before is None else torch.maximum(before, flag)


def _nonfinite_names(names: Sequence[str], values: Sequence[float]) -> str:
    """List the first six names whose value is not finite."""
    return ", ".join([name for name, value in zip(names, values, strict=True) if not math.isfinite(value)][:6])
