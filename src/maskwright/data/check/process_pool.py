"""A process pool that survives crashes: an item that kills its process does not stop the others."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_BATCH_SIZE = 8  # items sent together
_BATCHES_PER_WORKER = 4  # submitted at a time

_function: Callable[..., Any] | None = None  # in a worker


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_unordered(
    function: Callable[[T], R], items: Sequence[T], workers: int, on_crash: Callable[[T], R]
) -> Iterator[R]:
    """Yield the results of `function` for all items as they are completed.

    Args:
        function: called in `workers` processes, with its state at their start; must not raise.
        items: must be small, since they are sent to the processes.
        workers: number of processes; 0 or 1 calls the function in this one.
        on_crash: gives the result for an item that killed its process (out of memory, or a decoder that crashed).
    """
    if workers <= 1:
        yield from map(function, items)
        return
    batches = [list(items[start : start + _BATCH_SIZE]) for start in range(0, len(items), _BATCH_SIZE)][::-1]
    while batches:
        lost: list[T] = []
        for results, lost_items in _run_pool(function, batches, workers):
            yield from results
            lost += lost_items
        for item in lost:  # one of them killed its process, so each gets a process of its own
            done = list(_run_pool(function, [[item]], 1))
            yield from done[0][0] if done[0][0] else [on_crash(item)]


def _run_pool(function: Callable[[T], R], batches: list[list[T]], workers: int) -> Iterator[tuple[list[R], list[T]]]:
    """Yield (results, lost items) of batches taken from the end of the list, until it is empty or a process dies."""
    with ProcessPoolExecutor(workers, _context(), initializer=_initialize, initargs=(function,)) as pool:
        running = {}
        while batches or running:
            while batches and len(running) < workers * _BATCHES_PER_WORKER:
                batch = batches.pop()
                try:
                    running[pool.submit(_run_batch, batch)] = batch
                except BrokenProcessPool:
                    batches.append(batch)
                    if not running:  # the pool itself is broken, not by an item
                        raise
                    break
            broken = False
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                batch = running.pop(future)
                try:
                    yield future.result(), []
                except BrokenProcessPool:
                    broken = True
                    yield [], batch
            if broken:
                yield [], [item for batch in running.values() for item in batch]
                return


def _context():
    """Return the context: fork on Linux, as in the data loader, where workers need none of our threads."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)


def _initialize(function: Callable[..., Any]) -> None:
    global _function
    torch.set_num_threads(1)
    _function = function


def _run_batch(batch: list[Any]) -> list[Any]:
    assert _function is not None  # set by _initialize
    return [_function(item) for item in batch]
