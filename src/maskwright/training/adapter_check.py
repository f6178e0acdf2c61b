"""Check that every LoRA adapter learns: a layer whose weight is not read through its adapter would never change."""

from __future__ import annotations

import torch

from maskwright.errors import TrainingError, printable_list
from maskwright.models.lora import adapters_of
from maskwright.models.segmenter import Segmenter
from maskwright.training.fsdp import full_tensor

_STEPS = 10  # a step may skip a block (stochastic depth), or be skipped itself (a loss scaler); one in ten is enough


class AdapterCheck:
    """Watch the gradients of all adapters in the first steps of a process, until each has had one that is not zero.

    The gradient of `down` is zero until the first step has moved `up` away from zero.
    """

    def __init__(self, model: Segmenter) -> None:
        self._unproven = {
            f"{name} ({part})": parameter
            for name, adapter in adapters_of(model).items()
            for part, parameter in adapter.named_parameters()
        }
        self._steps = 0

    def after_step(self, *, last: bool) -> None:
        """Look at the gradients of a step; all processes call it, before these gradients are cleared.

        Args:
            last: whether this was the last step of the run.

        Raises:
            TrainingError: some adapters have had no gradient in the first steps.
        """
        if not self._unproven:
            return
        self._steps += 1
        self._unproven = {name: p for name, p in self._unproven.items() if not _has_gradient(p)}
        if self._unproven and (self._steps == _STEPS or (last and self._steps > 1)):
            raise TrainingError(
                f"{len(self._unproven)} adapter matrices have had no gradient in {self._steps} steps: "
                f"{printable_list(self._unproven)}",
                where="train.lora",
                remedy="leave these weights out of train.lora.targets",
            )


def _has_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(full_tensor(parameter.grad).any())
