"""Work in a background thread: prefetch and deferred calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

Item = TypeVar("Item")


def ahead(items: Iterable[Item], alone: Callable[[Item], bool] = lambda _: False) -> Iterator[Item]:
    """The items; while one is used, the next one is made in a background thread.

    No more than one waits, so memory stays flat. An exception comes out where the item would.

    Args:
        items: taken one after the other.
        alone: whether nothing is to be made while an item is used, because it is so large.
    """
    end = object()
    iterator = iter(items)
    pool = ThreadPoolExecutor(1)
    following = pool.submit(next, iterator, end)
    try:
        while (item := following.result()) is not end:
            if large := alone(cast(Item, item)):
                yield cast(Item, item)
            following = pool.submit(next, iterator, end)
            if not large:
                yield cast(Item, item)
            del item
    finally:
        del following  # else an exception and this frame hold each other, and with them all that the items hold
        pool.shutdown(cancel_futures=True)


class Behind:
    """Calls that are made in a background thread, in order. At most one waits, so memory stays flat.

    An exception of a call comes out of a later one, or at the end of the `with` block.
    """

    def __enter__(self) -> Behind:
        self._pool = ThreadPoolExecutor(1)
        self._calls: deque[Future] = deque()
        return self

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Have the function called, as soon as the call before the last one is done."""
        while len(self._calls) > 1:
            self._calls.popleft().result()
        self._calls.append(self._pool.submit(function, *arguments))

    def finish(self) -> None:
        """Wait until all calls are done."""
        while self._calls:
            self._calls.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self.finish()
