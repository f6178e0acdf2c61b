"""Leaving in good order when the machine is taken away: SIGTERM is what schedulers send before they kill.

The exit status is 75, `EX_TEMPFAIL` of sysexits.h: "try again later". It differs from 143, which shells and schedulers
report for a process that SIGTERM ended without it having saved anything, and from 1, which is an error.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from maskwright.runtime.device import shared_store, start_copy_to_host
from maskwright.structures.annotations import to_device

_LOOK_SECONDS = 1.0  # between two looks at what other processes say, while there is work to do
_POLL_SECONDS = 0.05  # the same, while there is none
_LATEST_SECONDS = 1800.0  # for which a process waits for the others
_PARTING_SECONDS = 20.0  # for which the process that keeps the store waits for those that have not looked yet

_numbers = itertools.count()  # of meetings; a store outlives a run


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
        asked = to_device(torch.tensor(float(self.asked)), engine.device)
        self._answer = start_copy_to_host(engine.reduce(asked, "sum"))
        return earlier is not None and earlier().item() > 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class Meeting:
    """A point that all processes reach at their own time; or all leave before it, because one was asked to.

    It is decided once, in the store that the processes share: whoever comes last writes that they have met, whoever is
    asked before that writes that they leave. Nobody waits for another one on the way, and no device is involved.

    Args:
        engine: of the run; all its processes make the same meetings in the same order.
        interruption: what tells that this process is asked.
    """

    def __init__(self, engine: Accelerator, interruption: Interruption) -> None:
        self._key, self._interruption = f"maskwright/meeting-{next(_numbers)}", interruption
        self._store, self._world = shared_store(engine), engine.num_processes
        self._keeps_store = engine.process_index == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._looked = -_LOOK_SECONDS

    def is_off(self) -> bool:
        """Whether all leave; to be asked again and again on the way, which mostly costs nothing."""
        if self._store is None:
            return self._interruption.asked
        now = time.monotonic()
        if not self._interruption.asked and now - self._looked < _LOOK_SECONDS:
            return False
        self._looked = now
        return self._decision() == "leave" and self._part()

    def takes_place(self) -> bool:
        """Wait for the others; whether all have come, else all leave.

        Also true after half an hour: whoever is missing then is dead, and what follows will say so.
        """
        if self._store is None:
            return True
        if self._store.add(f"{self._key}/come", 1) == self._world:
            self._store.compare_set(self._key, "", "met")
        deadline = time.monotonic() + _LATEST_SECONDS
        while not (decision := self._decision()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return not (decision == "leave" and self._part())

    def _decision(self) -> str:
        """What is decided, "" for nothing yet."""
        assert self._store is not None
        if self._interruption.asked:
            return self._store.compare_set(self._key, "", "leave").decode()
        return self._store.get(self._key).decode() if self._store.check([self._key]) else ""

    def _part(self) -> bool:
        """True, once all know that they leave, where the store goes with this process."""
        assert self._store is not None
        gone, deadline = self._store.add(f"{self._key}/gone", 1), time.monotonic() + _PARTING_SECONDS
        while self._keeps_store and gone < self._world and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            gone = self._store.add(f"{self._key}/gone", 0)
        return True
