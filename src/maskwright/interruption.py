"""Leaving in good order when the machine is taken away: SIGTERM is what schedulers send before they kill.

The exit status is 75, `EX_TEMPFAIL` of sysexits.h: "try again later". It differs from 143, which shells and schedulers
report for a process that SIGTERM ended without it having saved anything, and from 1, which is an error.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from maskwright.device import start_copy
from maskwright.structures import send


class Interruption:
    """Within it, SIGTERM does not end the process at once, but is remembered.

    The signal's handler belongs to a process's main thread: in another one, SIGTERM keeps its meaning.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._answer: Callable[[], Tensor] | None = None

    def __enter__(self) -> Interruption:
        try:
            self._before = signal.signal(signal.SIGTERM, self._remember)
        except ValueError:  # not the main thread
            self._before = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def is_agreed(self, engine: Accelerator) -> bool:
        """Whether the run is to leave: the same answer in all its processes, which ask for it after each step.

        Several processes hear of the one that was asked a step later, so that none waits for its device here.
        """
        if engine.num_processes == 1:
            return self.asked
        earlier = self._answer
        asked = send(torch.tensor(float(self.asked)), engine.device)
        self._answer = start_copy(engine.reduce(asked, "sum"))
        return earlier is not None and earlier().item() > 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
