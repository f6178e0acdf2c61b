"""Many small pieces of work over processes, none of which can stop the others, not even by ending its process."""

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

_PER_TASK = 8  # pieces handed over together
_AHEAD = 4  # tasks per process that wait for it

_function: Callable[..., Any] | None = None


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(function: Callable[[T], R], pieces: Sequence[T], workers: int, on_death: Callable[[T], R]) -> Iterator[R]:
    """The results of `function` for all pieces, as they are ready.

    Args:
        function: called in `workers` processes with what it held when they were started; raises nothing.
        pieces: small, since they are sent.
        workers: 0 or 1 calls the function here.
        on_death: the result for a piece whose process was ended by it (killed by the system, or by a decoder).
    """
    if workers <= 1:
        yield from map(function, pieces)
        return
    waiting = [list(pieces[start : start + _PER_TASK]) for start in range(0, len(pieces), _PER_TASK)][::-1]
    while waiting:
        lost: list[T] = []
        for results, failed in _run(function, waiting, workers):
            yield from results
            lost += failed
        for piece in lost:  # one of them ended the process: each gets one of its own
            done = list(_run(function, [[piece]], 1))
            yield from done[0][0] if done[0][0] else [on_death(piece)]


def _run(function: Callable[[T], R], waiting: list[list[T]], workers: int) -> Iterator[tuple[list[R], list[T]]]:
    """(results, lost pieces) of tasks taken from the end of `waiting`, until it is empty or a process dies."""
    with ProcessPoolExecutor(workers, _context(), initializer=_start, initargs=(function,)) as pool:
        running = {}
        while waiting or running:
            while waiting and len(running) < workers * _AHEAD:
                task = waiting.pop()
                try:
                    running[pool.submit(_work, task)] = task
                except BrokenProcessPool:
                    waiting.append(task)
                    if not running:  # not a piece, but the pool itself
                        raise
                    break
            broken = False
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    yield future.result(), []
                except BrokenProcessPool:
                    broken = True
                    yield [], task
            if broken:
                yield [], [piece for task in running.values() for piece in task]
                return


def _context():
    """Processes are forked where that is usual, as in the loader: they use one thread, and wait for none of ours."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)


def _start(function: Callable[..., Any]) -> None:
    global _function
    torch.set_num_threads(1)
    _function = function


def _work(task: list[Any]) -> list[Any]:
    assert _function is not None  # _start has set it
    return [_function(piece) for piece in task]
