"""Atomic writes: whenever the process is killed, a file or folder is either complete or absent.

Everything is written beside its destination under a hidden name that ends with `.partial`, and renamed once complete.
A killed process (SIGKILL, power failure) leaves that; the next write to the same destination removes it.
"""

from __future__ import annotations

import glob
import os
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from os import fsencode, fsync
from pathlib import Path
from typing import IO

from maskwright.errors import MaskwrightError, one_line

try:
    from safetensors import SafetensorError
except ImportError:  # in maskwright-runtime, which writes no weights
    SafetensorError = OSError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

_MAX_NAME_BYTES = 220  # file systems allow 255, and the hidden name is longer
_SHORTENED = 50  # characters, of up to 4 bytes
_UNIQUE_LENGTH = 8
_MOMENT_SECONDS = 1  # longer than from the creation of a file to its lock
_SMALL_FILE_SECONDS = 60  # longer than the write of a file that is not locked


def write_file_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with the path of a temporary file, flush that file to disk, and rename it to `path`.

    Raises:
        MaskwrightError: the disk is full, or the folder is not writable.
    """
    with _replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        with _locked(temporary):
            write(temporary)
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
            _flush_to_disk(temporary)


def write_files_atomically(contents: dict[Path, bytes]) -> None:
    """Write several small files: if one of them cannot be written, none is replaced.

    The files are not flushed to disk one by one, which would slow down prediction: they survive a killed process, but
    not a power failure.

    Raises:
        MaskwrightError: the disk is full, or a folder is not writable.
    """
    temporaries = {path: partial_path(path) for path in contents}
    try:
        for path, temporary in temporaries.items():
            with write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(contents[path])
        for path, temporary in temporaries.items():
            with write_errors(path):
                temporary.replace(path)
    finally:
        for temporary in temporaries.values():
            remove(temporary)


def write_folder_atomically(folder: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with the path of an empty temporary folder, flush its files, and rename it to `folder`.

    Args:
        folder: absent or empty.
        write: fills the folder; makes no subfolders.

    Raises:
        MaskwrightError: the disk is full, or the parent folder is not writable.
    """
    with _replacing(folder) as temporary:
        temporary.mkdir()
        mode = temporary.stat().st_mode & 0o666
        with _locked(temporary):
            write(temporary)
            for file in temporary.iterdir():
                file.chmod(mode)
                _flush_to_disk(file)


@contextmanager
def temporary_folder(path: Path) -> Generator[Path]:
    """Yield a new hidden folder beside `path`, from which the block renames what it has completed; the rest is removed.

    Raises:
        MaskwrightError: the disk is full, or the parent folder is not writable.
    """
    temporary = partial_path(path)
    try:
        with write_errors(path):
            remove_abandoned(path)
            temporary.mkdir(parents=True)
            with _locked(temporary):
                yield temporary
    finally:
        remove(temporary)


class AtomicFile:
    """A file that is written piece by piece and gets its final name only when `publish` is called.

    Args:
        path: the final name.

    Attributes:
        partial: the name while it is being written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = partial_path(path)
        self._file: IO[bytes] | None = None

    @contextmanager
    def writing(self) -> Generator[IO[bytes]]:
        """Yield the open file, created on first use; an error discards it.

        Raises:
            MaskwrightError: the disk is full, or the folder is not writable.
        """
        try:
            with write_errors(self.path):
                if self._file is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    remove_abandoned(self.path)
                    self._file = self.partial.open("xb")
                    _lock(self._file.fileno())
                yield self._file
        except MaskwrightError:
            self.discard()
            raise

    def publish(self) -> None:
        """Close the file and give it its final name."""
        with self.writing() as file:
            file.close()
            self.partial.replace(self.path)

    def discard(self) -> None:
        """Close the file and remove it."""
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        remove(self.partial)


def partial_path(path: Path, suffix: str | None = None) -> Path:
    """Return the hidden name beside `path` that is used during the write; unique unless a suffix is given."""
    name = path.name if len(fsencode(path.name)) <= _MAX_NAME_BYTES else path.name[:_SHORTENED]
    return path.with_name(f".{name}.{uuid.uuid4().hex[:_UNIQUE_LENGTH] if suffix is None else suffix}.partial")


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes have left of earlier writes to `path`. A process that is still writing has a lock.

    Where files cannot be locked, nothing is removed.
    """
    start = glob.escape(partial_path(path, "").name.removesuffix(".partial"))
    _remove_unlocked(path.parent.glob(f"{start}{'?' * _UNIQUE_LENGTH}.partial"), _MOMENT_SECONDS)


def remove_abandoned_files(folder: Path) -> None:
    """Remove what killed processes have left of files in `folder`, which may also hold small ones that have no lock."""
    _remove_unlocked((path for path in folder.glob(".*.partial") if path.is_file()), _SMALL_FILE_SECONDS)


def _remove_unlocked(paths: Iterable[Path], min_age_seconds: float) -> None:
    for path in paths:
        with suppress(OSError), _locked(path) as locked:
            if locked and time.time() - path.stat().st_mtime >= min_age_seconds:
                remove(path)


@contextmanager
def _locked(path: Path) -> Generator[bool]:
    """Lock a file or folder inside the block; yield False if that is not possible."""
    if fcntl is None:
        yield False
        return
    file = os.open(path, os.O_RDONLY)
    try:
        yield _lock(file)
    finally:
        os.close(file)


def _lock(file: int) -> bool:
    """Lock an open file until it is closed; return False if another process has it, or the file system has no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return fcntl is not None


@contextmanager
def write_errors(path: Path) -> Generator[None]:
    """Turn errors of the operating system and of safetensors into a MaskwrightError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, one_line(error)) from None


def cannot_write(path: Path, reason: str) -> MaskwrightError:
    """Return the error for a file or folder that cannot be written."""
    return MaskwrightError(
        f"cannot be written: {reason}", where=path, remedy="free up disk space or choose another folder"
    )


def remove(path: Path) -> None:
    """Remove a file or folder if it exists; failures are ignored."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


@contextmanager
def _replacing(path: Path) -> Generator[Path]:
    """Yield a temporary name that replaces `path` if the block succeeds, and is removed if it fails."""
    temporary = partial_path(path)
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(path)
            yield temporary
            temporary.replace(path)
    finally:
        remove(temporary)


def _flush_to_disk(file: Path) -> None:
    with file.open("rb+") as opened:
        fsync(opened.fileno())
