"""SIGTERM and SIGHUP end a command like Ctrl-C does: what it has not finished writing is removed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def exit_when_terminated() -> Generator[None]:
    """Inside the `with` block, SIGTERM and SIGHUP raise SystemExit with the status that shells report for them.

    A signal that is ignored (`nohup`) or has a handler already is left alone. Forked processes end at once, as without
    this. Only the main thread can set handlers; in others, nothing changes.
    """
    process = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        sys.exit(128 + number)

    changed = []
    try:
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, leave)
                changed.append(number)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
