"""A process pool that survives crashes: an item that kills its process does not stop the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait as wait_for_end
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_BATCHES_PER_WORKER = 2  # submitted at a time

_function: Callable[..., Any] | None = None  # in a worker


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_unordered(
    function: Callable[[T], R], items: Sequence[T], workers: int, on_crash: Callable[[T], R]
) -> Iterator[R]:
    """Yield the results of `function` for all items as they are completed; see `map_in_processes`.

    With 0 or 1 workers the function is called in this process. On Linux processes are forked, as in the data loader,
    where they need none of our threads.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    method = "fork" if sys.platform == "linux" else None
    yield from map_in_processes(function, deque(items), workers, on_crash, batch_size=8, start_method=method)


def map_in_processes(
    function: Callable[[T], R],
    queue: deque[T],
    workers: int,
    on_crash: Callable[[T], R],
    *,
    batch_size: int,
    start_method: str | None,
) -> Iterator[R]:
    """Yield the results of `function` for the items of a queue as they are completed.

    The processes leave Ctrl-C to this one, and end with it, however it ends.

    Args:
        function: called in `workers` processes, with its state at their start; must not raise.
        queue: emptied from the left; this process may take items, too. They must be small, since they are sent.
        workers: number of processes.
        on_crash: gives the result for an item that killed its process (out of memory, or a decoder that crashed).
        batch_size: items sent together.
        start_method: see `multiprocessing.get_context`.
    """
    while queue:
        lost: list[T] = []
        for results, lost_items in _run_pool(function, queue, workers, batch_size, start_method):
            yield from results
            lost += lost_items
        for item in lost:  # one of them killed its process, so each gets a process of its own
            done = list(_run_pool(function, deque([item]), 1, 1, start_method))
            yield from done[0][0] if done[0][0] else [on_crash(item)]


def _run_pool(
    function: Callable[[T], R], queue: deque[T], workers: int, batch_size: int, start_method: str | None
) -> Iterator[tuple[list[R], list[T]]]:
    """Yield (results, lost items) of batches taken from the left, until the queue is empty or a process dies."""
    context = multiprocessing.get_context(start_method)
    with ProcessPoolExecutor(workers, context, initializer=_initialize, initargs=(function,)) as pool:
        try:
            yield from _run_batches(pool, queue, workers, batch_size)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run_batches(
    pool: ProcessPoolExecutor, queue: deque[T], workers: int, batch_size: int
) -> Iterator[tuple[list[R], list[T]]]:
    running = {}
    while True:
        while len(running) < workers * _BATCHES_PER_WORKER and (batch := take(queue, batch_size)):
            try:
                with _blocked_interrupt():
                    running[pool.submit(_run_batch, batch)] = batch
            except BrokenProcessPool:
                queue.extendleft(reversed(batch))
                if not running:  # the pool itself is broken, not by an item
                    raise
                break
        if not running:
            return
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


def take(queue: deque[T], count: int) -> list[T]:
    """Take up to `count` items from the left of a queue that others take from, too."""
    batch: list[T] = []
    with suppress(IndexError):
        while len(batch) < count:
            batch.append(queue.popleft())
    return batch


@contextmanager
def _blocked_interrupt() -> Generator[None]:
    """Block SIGINT in this thread, so that processes that it starts never receive it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _initialize(function: Callable[..., Any]) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _function = function


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    wait_for_end([parent.sentinel])
    os._exit(1)


def _run_batch(batch: list[Any]) -> list[Any]:
    assert _function is not None  # set by _initialize
    return [_function(item) for item in batch]
