"""Prefetching and background writing: order, how much is in flight, and where exceptions are raised."""

import threading
import time

import pytest

from maskwright.errors import ImageError, MaskwrightError
from maskwright.runtime.background import BackgroundWriter, prefetch


def counting(made, count=5):
    """Yield 0, 1, 2, ... and record in `made` what was produced."""
    for number in range(count):
        made.append(number)
        yield number


def test_items_are_in_order_and_one_is_prefetched():
    made = []
    for number in prefetch(counting(made)):
        time.sleep(0.02)
        assert made == list(range(min(number + 2, 5)))


def test_nothing_is_prefetched_while_a_large_item_is_in_use():
    made = []
    for number in prefetch(counting(made), is_large=lambda item: item == 2):
        time.sleep(0.02)
        assert made == list(range(min(number + (1 if number == 2 else 2), 5)))


def test_an_exception_is_raised_in_place_of_its_item():
    def items():
        yield 1
        raise ImageError("broken")

    stream = prefetch(items())
    assert next(stream) == 1
    with pytest.raises(ImageError, match="broken"):
        next(stream)


def test_closing_the_iterator_ends_its_thread():
    before = threading.active_count()
    stream = prefetch(iter(range(100)))
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


def test_calls_run_in_order_and_at_most_one_is_queued():
    done, waiting = [], 0
    with BackgroundWriter() as writer:
        for number in range(10):
            writer.submit(lambda number=number: time.sleep(0.005) or done.append(number))
            waiting = max(waiting, number + 1 - len(done))
    assert done == list(range(10))
    assert waiting <= 2


def test_an_exception_of_a_call_is_raised_when_the_block_ends():
    def fail():
        raise MaskwrightError("disk full")

    with pytest.raises(MaskwrightError, match="disk full"), BackgroundWriter() as writer:
        writer.submit(fail)


def test_an_exception_in_the_block_cancels_queued_calls():
    done = []

    def interrupted():
        with BackgroundWriter() as writer:
            for number in range(2):
                writer.submit(lambda number=number: time.sleep(0.05) or done.append(number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [0]
