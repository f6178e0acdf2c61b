"""Atomic writes: whenever the process is killed, a file or folder is either complete or absent.

Everything is written beside its destination under a hidden name that ends with `.partial`, and renamed once complete.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from os import fsencode, fsync
from pathlib import Path
from typing import IO

from maskwright.errors import MaskwrightError, one_line

try:
    from safetensors import SafetensorError
except ImportError:  # in maskwright-runtime, which writes no weights
    SafetensorError = OSError

_MAX_NAME_BYTES = 220  # file systems allow 255, and the hidden name is longer
_SHORTENED = 50  # characters, of up to 4 bytes


def write_file_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with the path of a temporary file, flush that file to disk, and rename it to `path`.

    Raises:
        MaskwrightError: the disk is full, or the folder is not writable.
    """
    with _replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
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
        write(temporary)
        for file in temporary.iterdir():
            file.chmod(mode)
            _flush_to_disk(file)


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
                    self._file = self.partial.open("xb")
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
    return path.with_name(f".{name}.{uuid.uuid4().hex[:8] if suffix is None else suffix}.partial")


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
            yield temporary
            temporary.replace(path)
    finally:
        remove(temporary)


def _flush_to_disk(file: Path) -> None:
    with file.open("rb+") as opened:
        fsync(opened.fileno())
