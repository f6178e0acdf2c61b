"""A lock on the folder of a run, so that two trainings cannot write into it at once.

The operating system releases the lock when the process ends, however it ends. Data loading processes do not inherit it.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

from maskwright.errors import MaskwrightError, one_line, printable
from maskwright.runtime.atomic_write import cannot_write

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_locked: set[Path] = set()  # by this process, which the operating system would let lock them twice


class RunLock:
    """Lock a run's folder from `acquire` to the end of the `with` block.

    Args:
        folder: of the run; created if it does not exist, and removed again if it is empty in the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder.resolve() / LOCK_NAME
        self._file: int | None = None
        self._created: list[Path] = []

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # while it is locked, so that nobody else can have locked it; Windows keeps it
                if self._is_in_place():
                    self.path.unlink()
            os.close(self._file)
            self._file = None
            _locked.discard(self.path)
        with suppress(OSError):
            for folder in self._created:
                folder.rmdir()

    def acquire(self) -> None:
        """Lock the folder. Where files cannot be locked, a warning is logged.

        Raises:
            MaskwrightError: another training has locked it, or it cannot be created.
        """
        if self.path in _locked:
            raise self._held("this process")
        self._create_folder()
        while self._file is None:
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError:
                return  # not writable: the first write, if there is one, gives the reason
            try:
                _lock(file)
            except OSError as error:
                owner = _read_owner(file)
                os.close(file)
                if error.errno in _HELD:
                    raise self._held(owner) from None
                logger.warning("%s cannot be locked (%s); do not train into it twice", self.folder, one_line(error))
                return
            self._file = file
            if not self._is_in_place():  # the training before has just removed it
                os.close(file)
                self._file = None
        _locked.add(self.path)
        with suppress(OSError):
            os.ftruncate(self._file, 0)
            os.write(self._file, f"process {os.getpid()} on {platform.node()}".encode())

    def check(self) -> None:
        """Check that the folder is still the one that was locked.

        Raises:
            MaskwrightError: it was removed or replaced.
        """
        if self._file is not None and not self._is_in_place():
            raise MaskwrightError(
                "the folder of this run was removed or replaced during training",
                where=self.folder,
                remedy="start the run again, and keep its folder until it has finished",
            )

    def _is_in_place(self) -> bool:
        assert self._file is not None
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except OSError:
            return False

    def _create_folder(self) -> None:
        folder = self.path.parent
        self._created = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, one_line(error)) from None

    def _held(self, owner: str) -> MaskwrightError:
        return MaskwrightError(
            f"another training writes into this folder ({owner})",
            where=self.folder,
            remedy="wait until it ends, or choose another --output",
        )


def _lock(file: int) -> None:
    """Lock a file without waiting.

    Raises:
        OSError: it is locked, or cannot be locked.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        return
    try:
        import fcntl
    except ImportError:
        logger.warning("this system has no file locks; make sure that no other training writes into the same folder")
        return
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _read_owner(file: int) -> str:
    with suppress(OSError):
        if text := os.read(file, 200).decode("utf-8", "replace"):
            return printable(text)
    return "its owner is not known"
