"""Graceful preemption: on SIGTERM, which schedulers send before they kill a job, a run saves its state and exits.

The exit status is 75, `EX_TEMPFAIL` of sysexits.h: "try again later". It differs from 143, which shells and schedulers
report for a process that SIGTERM killed before it saved anything, and from 1, an error.
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

_BUSY_POLL_SECONDS = 1.0  # between two looks at the store while there is work to do
_IDLE_POLL_SECONDS = 0.05  # the same while waiting
_BARRIER_TIMEOUT_SECONDS = 1800.0
_EXIT_TIMEOUT_SECONDS = 20.0  # for which the process that hosts the store waits for the others to read it

_barrier_numbers = itertools.count()  # unique keys: a store may serve several runs


class PreemptionHandler:
    """Inside the `with` block, SIGTERM sets `requested` instead of ending the process.

    Signal handlers can only be set in the main thread; in other threads SIGTERM keeps its meaning.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous_handler: Any = None
        self._pending: Callable[[], Tensor] | None = None

    def __enter__(self) -> PreemptionHandler:
        try:
            self._previous_handler = signal.signal(signal.SIGTERM, self._request)
        except ValueError:  # not the main thread
            self._previous_handler = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def should_stop(self, accelerator: Accelerator) -> bool:
        """Return whether the run must stop: the same answer in all processes, which call this after each step.

        Several processes learn of a request one step later, so that none waits for its device here.
        """
        if accelerator.num_processes == 1:
            return self.requested
        previous = self._pending
        requested = to_device(torch.tensor(float(self.requested)), accelerator.device)
        self._pending = start_copy_to_host(accelerator.reduce(requested, "sum"))
        return previous is not None and previous().item() > 0

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


class PreemptibleBarrier:
    """A barrier that all processes pass, or that all abandon because one of them was preempted on its way there.

    The outcome is decided once, in the key-value store that the processes share: the last process to arrive writes
    "passed"; a process that is preempted earlier writes "preempted". No process waits for another before the barrier,
    and no device is involved.

    Args:
        accelerator: all processes of the run must create the same barriers in the same order.
        preemption: of this process.
    """

    def __init__(self, accelerator: Accelerator, preemption: PreemptionHandler) -> None:
        self._key, self._preemption = f"maskwright/barrier-{next(_barrier_numbers)}", preemption
        self._store, self._world = shared_store(accelerator), accelerator.num_processes
        self._hosts_store = accelerator.process_index == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._last_poll = -_BUSY_POLL_SECONDS

    def is_abandoned(self) -> bool:
        """Return whether all processes must stop; cheap enough to be called after each image on the way."""
        if self._store is None:
            return self._preemption.requested
        now = time.monotonic()
        if not self._preemption.requested and now - self._last_poll < _BUSY_POLL_SECONDS:
            return False
        self._last_poll = now
        return self._outcome() == "preempted" and self._acknowledge()

    def wait(self) -> bool:
        """Wait for the other processes; return whether the barrier was passed, else all processes must stop.

        Also True after half an hour: a process that has not arrived by then is dead, and the next collective call
        reports it.
        """
        if self._store is None:
            return True
        if self._store.add(f"{self._key}/arrived", 1) == self._world:
            self._store.compare_set(self._key, "", "passed")
        deadline = time.monotonic() + _BARRIER_TIMEOUT_SECONDS
        while not (outcome := self._outcome()) and time.monotonic() < deadline:
            time.sleep(_IDLE_POLL_SECONDS)
        return not (outcome == "preempted" and self._acknowledge())

    def _outcome(self) -> str:
        """Return "passed", "preempted", or "" while it is open."""
        assert self._store is not None
        if self._preemption.requested:
            return self._store.compare_set(self._key, "", "preempted").decode()
        return self._store.get(self._key).decode() if self._store.check([self._key]) else ""

    def _acknowledge(self) -> bool:
        """Return True; in the process whose exit removes the store, once all others have read the outcome."""
        assert self._store is not None
        count, deadline = self._store.add(f"{self._key}/acknowledged", 1), time.monotonic() + _EXIT_TIMEOUT_SECONDS
        while self._hosts_store and count < self._world and time.monotonic() < deadline:
            time.sleep(_IDLE_POLL_SECONDS)
            count = self._store.add(f"{self._key}/acknowledged", 0)
        return True
