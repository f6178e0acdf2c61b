"""Saying where a run hangs: if nothing moves for a while, each process prints the stacks of all its threads.

Two watchmen, since a hang can hold everything else up: a thread of Python writes to standard error, and one of C, which
needs no lock of Python's, to `stalls/rank-N.txt` in the run's folder.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
import time
from pathlib import Path


class StallWatch:
    """Within it, `beat` must be called at least every `seconds`; None watches nothing.

    Args:
        run: folder of the run.
        rank: number of this process.
        seconds: without a beat, after which stacks are printed, once for each stall.
    """

    def __init__(self, run: Path, rank: int, seconds: int | None) -> None:
        self.file = run / "stalls" / f"rank-{rank}.txt"
        self.rank, self.seconds = rank, seconds
        self._beat = time.monotonic()
        self._told = False
        self._ended = threading.Event()

    def __enter__(self) -> StallWatch:
        if self.seconds:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._output = self.file.open("a", encoding="utf-8")
            self._thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)
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
        if not self.file.stat().st_size:
            self.file.unlink()
            with contextlib.suppress(OSError):  # the last process to leave removes the folder
                self.file.parent.rmdir()

    def beat(self) -> None:
        """Something has moved: a step is done, or an image scored."""
        if self.seconds:
            self._beat, self._told = time.monotonic(), False
            faulthandler.dump_traceback_later(self.seconds, file=self._output)

    def _watch(self) -> None:
        seconds = self.seconds or 0
        while not self._ended.wait(min(seconds / 4, 5)):
            if not self._told and time.monotonic() - self._beat >= seconds:
                self._told = True
                print_stacks(f"process {self.rank}: nothing has moved for {seconds} s; where its threads are:")


def print_stacks(title: str) -> None:
    """Write the stacks of all threads of this process to standard error."""
    sys.stderr.write(f"{title}\n")
    sys.stderr.flush()
    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
