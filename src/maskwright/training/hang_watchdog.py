"""Hang detection: each process prints the stacks of all its threads after a while without progress.

There are two watchdogs, because a hang can block other threads too: a Python thread writes to standard error, and a C
thread of `faulthandler`, which does not need the GIL, writes to `stalls/rank-N.txt` in the run's folder.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
import time
from pathlib import Path


class HangWatchdog:
    """Expect a call of `beat` at least every `seconds` inside the `with` block; None disables the watchdog.

    Args:
        run: the run's folder.
        rank: index of this process.
        seconds: time without a beat after which stacks are printed, once per hang.
    """

    def __init__(self, run: Path, rank: int, seconds: int | None) -> None:
        self.file = run / "stalls" / f"rank-{rank}.txt"
        self.rank, self.seconds = rank, seconds
        self._last_beat = time.monotonic()
        self._reported = False
        self._ended = threading.Event()

    def __enter__(self) -> HangWatchdog:
        if self.seconds:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._output = self.file.open("a", encoding="utf-8")
            self._thread = threading.Thread(target=self._watch, name="hang watchdog", daemon=True)
            self._thread.start()
            self.beat()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.seconds:
            return
        faulthandler.cancel_dump_traceback_later()
        self._ended.set()
        self._thread.join()
        self._output.close()
        with contextlib.suppress(OSError):  # the last process removes the folder; somebody may have removed the run's
            if not self.file.stat().st_size:
                self.file.unlink()
                self.file.parent.rmdir()

    def beat(self) -> None:
        """Record progress: a finished step or a scored image."""
        if self.seconds:
            self._last_beat, self._reported = time.monotonic(), False
            faulthandler.dump_traceback_later(self.seconds, file=self._output)

    def _watch(self) -> None:
        seconds = self.seconds or 0
        while not self._ended.wait(min(seconds / 4, 5)):
            if not self._reported and time.monotonic() - self._last_beat >= seconds:
                self._reported = True
                sys.stderr.write(f"process {self.rank}: no progress for {seconds} s; stacks of all threads:\n")
                sys.stderr.flush()
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
