"""Work in a background thread: prefetching and writing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(items: Iterable[Item], is_large: Callable[[Item], bool] = lambda _: False) -> Iterator[Item]:
    """Iterate over items and prepare the next one in a background thread while the current one is in use.

    Only one item is prefetched, so memory use stays constant. An exception is raised where its item would have come.

    Args:
        items: consumed in order.
        is_large: true for an item so large that the next one must not be prepared while it is in use.
    """
    end = object()
    iterator = iter(items)
    pool = ThreadPoolExecutor(1)
    upcoming = pool.submit(next, iterator, end)
    try:
        while (item := upcoming.result()) is not end:
            if large := is_large(cast(Item, item)):
                yield cast(Item, item)
            upcoming = pool.submit(next, iterator, end)
            if not large:
                yield cast(Item, item)
            del item
    finally:
        del upcoming  # an exception in it refers to this frame: a cycle that would keep the items alive
        pool.shutdown(cancel_futures=True)


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], count: int) -> Iterator[Result]:
    """Yield `function(item)` in order, with up to `count` calls running or finished ahead of their use, in threads."""
    pool = ThreadPoolExecutor(count)
    calls: deque[Future[Result]] = deque()
    try:
        for item in items:
            calls.append(pool.submit(function, item))
            if len(calls) == count:
                yield calls.popleft().result()
        while calls:
            yield calls.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class BackgroundWriter:
    """Run calls in order in a background thread; at most one call is queued, so memory use stays constant.

    An exception in a call is raised by a later `submit`, or at the end of the `with` block.
    """

    def __enter__(self) -> BackgroundWriter:
        self._pool = ThreadPoolExecutor(1)
        self._calls: deque[Future] = deque()
        return self

    def submit(self, function: Callable[..., object], *arguments: object) -> None:
        """Queue a call, after waiting for the queue to be empty."""
        while len(self._calls) > 1:
            self._calls.popleft().result()
        self._calls.append(self._pool.submit(function, *arguments))

    def flush(self) -> None:
        """Wait until every call has finished."""
        while self._calls:
            self._calls.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self.flush()
