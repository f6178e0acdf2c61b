"""Files in zip and tar archives by the place of their bytes, read without unpacking anything.

A place is a few numbers. It can be kept for a million files and handed to any process, which opens the archive when it
first reads from it; reading does not move a position that processes could share.

Unusual here: an archive may lie in an archive (COCO's panoptic PNGs come so), and a tar may be compressed as a whole.
Such a stream is decompressed once to learn what it holds, and the state of the decompressor is kept every so often, so
that reading a file goes on from the nearest state before it.
"""

from __future__ import annotations

import bz2
import functools
import io
import os
import struct
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from maskwright.errors import DatasetError

_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_KINDS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflate", zipfile.ZIP_BZIP2: "bzip2"}
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_LARGEST_EXTRA = 1024  # bytes read along with the local header for its file name and extra fields
_BOMB_SIZE, _BOMB_FACTOR = 64 << 20, 250  # no real file of this size shrinks that much
_MARKS, _SMALLEST_GAP, _CHUNK = 1024, 1 << 20, 1 << 18


class Span(NamedTuple):
    """The place of a file's bytes.

    Attributes:
        archive: the archive's path, or its own place where it lies in another archive.
        start: of the local header (zip) or of the data (tar), in bytes.
        packed: stored bytes.
        size: bytes after decompression.
        kind: "stored", "deflate", "bzip2" or "unreadable" for files of a zip, "tar" for those of a tar.
        checksum: CRC-32 of a file of a zip.
    """

    archive: str | Span
    start: int
    packed: int
    size: int
    kind: str
    checksum: int = 0


def is_archive_name(name: str) -> bool:
    """Whether a file of this name is taken for an archive; hidden files are not."""
    return name.lower().endswith(_SUFFIXES) and not PurePosixPath(name).name.startswith(".")


def is_archive(path: Path) -> bool:
    """Whether there is an archive at this path."""
    return is_archive_name(path.name) and path.is_file()


def members(archive: str | Span, name: str) -> Iterator[tuple[str, Span]]:
    """Names (with "/", relative) and places of the files in an archive; what macOS adds is left out.

    Args:
        archive: its path, or its place in another archive.
        name: what errors call it; its ending says what it is.

    Raises:
        DatasetError: the archive is absent, damaged, or no archive.
    """
    if isinstance(archive, str):
        _forget_if_changed(archive)
    listed = _zip_members if name.lower().endswith(".zip") else _tar_members
    try:
        for member, span in listed(archive):
            if "\\" in member or member.startswith(("./", "/")):
                member = PurePosixPath(member.replace("\\", "/").lstrip("/")).as_posix()
            if not member.startswith("__MACOSX/"):
                yield member, span
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DatasetError(f"{name}: no readable archive ({reason}); fetch the file again") from None


def extract(span: Span, name: str) -> bytes:
    """The bytes of a file.

    Raises:
        DatasetError: they are damaged, encrypted, or so few for what they claim to become that it is no real file;
            the message begins with `name`.
    """
    if span.kind == "unreadable":
        raise DatasetError(f"{name}: is encrypted or packed in an unusual way; unpack the archive and pack it plainly")
    if span.size > _BOMB_SIZE and span.size > _BOMB_FACTOR * span.packed:
        raise DatasetError(f"{name}: {span.packed:,} bytes claim to be {span.size:,}; not unpacked, check the archive")
    try:
        data = _unpacked(span)
    except (zlib.error, OSError, ValueError, EOFError) as error:
        raise _damaged(name, str(error)) from None
    if len(data) != span.size:
        raise _damaged(name, f"{len(data):,} of {span.size:,} bytes")
    if span.kind != "tar" and zlib.crc32(data) != span.checksum:
        raise _damaged(name, "wrong checksum")
    return data


def _damaged(name: str, reason: str) -> DatasetError:
    return DatasetError(f"{name}: damaged in its archive ({reason}), or the archive has changed; fetch it again")


def _unpacked(span: Span) -> bytes:
    match span.kind:
        case "tar":
            return _read(span.archive, span.start, span.size)
        case "stored":
            return _stored(span)
        case "deflate":
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(_stored(span), max(span.size, 1))
        case _:
            return bz2.BZ2Decompressor().decompress(_stored(span), max(span.size, 1))


def _stored(span: Span) -> bytes:
    """The bytes of a file of a zip as they are stored; header and data come in one read."""
    data = _read(span.archive, span.start, _LOCAL_HEADER.size + _LARGEST_EXTRA + span.packed)
    start = _data_offset(data)
    if start + span.packed <= len(data):
        return data[start : start + span.packed]
    return _read(span.archive, span.start + start, span.packed)


def _data_offset(header: bytes) -> int:
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
        raise ValueError("no header where the index has one")
    *_, name_length, extra_length = _LOCAL_HEADER.unpack_from(header)
    return _LOCAL_HEADER.size + name_length + extra_length


def _read(archive: str | Span, start: int, size: int) -> bytes:
    """Bytes of an archive on disk or in another archive, as if it were not compressed; fewer where it ends."""
    if isinstance(archive, str):
        return _stream(archive).read(start, size) if _is_gzip(archive) else _pread(archive, start, size)
    if archive.kind in ("stored", "tar"):
        return _read(archive.archive, _data_start(archive) + start, max(0, min(size, archive.size - start)))
    return _stream(archive).read(start, size)


def _is_gzip(path: str) -> bool:
    return path.lower().endswith((".gz", ".tgz"))


@functools.lru_cache(maxsize=64)
def _data_start(span: Span) -> int:
    if span.kind == "tar":
        return span.start
    return span.start + _data_offset(_read(span.archive, span.start, _LOCAL_HEADER.size))


_opened: dict[str, int] = {}  # descriptors of this process and, as reading moves no position, of those it forks


def _pread(path: str, start: int, size: int) -> bytes:
    if not hasattr(os, "pread"):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)
    if path not in _opened:
        _opened[path] = os.open(path, os.O_RDONLY)
    parts = []
    while size > 0 and (part := os.pread(_opened[path], size, start)):
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _forget_if_changed(path: str) -> None:
    """Close an archive that was opened before and has been replaced since."""
    if path in _opened and not os.path.samestat(os.fstat(_opened[path]), os.stat(path)):
        os.close(_opened.pop(path))
        _stream.cache_clear()
        _data_start.cache_clear()


class _Mark(NamedTuple):
    """A place in a compressed stream: decompressed bytes before it, compressed ones, and the decompressor there."""

    position: int
    consumed: int
    state: Any

    def copy(self) -> _Mark:
        return self._replace(state=self.state.copy())


class _Stream:
    """A compressed stream that can be read from any position."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, bits: int):
        """Decompress it once. `read(start, size)` gives its compressed bytes, `size` in all; `bits` is zlib's wbits."""
        self._read, self._bits = read, bits
        gap = max(_SMALLEST_GAP, size // _MARKS)
        first = _Mark(0, 0, zlib.decompressobj(bits))
        self._marks, last = [first.copy()], first
        for last, _ in self._blocks(first):
            if last.position - self._marks[-1].position >= gap:
                self._marks.append(last.copy())
        if not last.state.eof:
            raise EOFError("it is cut off")
        self.length = last.position

    def read(self, start: int, size: int) -> bytes:
        """Decompressed bytes from `start`; fewer where the stream ends."""
        parts, end = [], start + size
        mark = self._marks[bisect_right(self._marks, start, key=lambda mark: mark.position) - 1]
        for after, block in self._blocks(mark.copy()):
            begin = after.position - len(block)
            parts.append(block[max(0, start - begin) : end - begin])
            if after.position >= end:
                break
        return b"".join(parts)

    def _blocks(self, mark: _Mark) -> Iterator[tuple[_Mark, bytes]]:
        """(The place behind it, decompressed block) from a mark on, whose state moves along."""
        position, consumed, state = mark
        while compressed := self._read(consumed, _CHUNK):
            if state.eof:  # a gzip file may be several, one behind the other, and end with zeros
                if self._bits < 0 or not compressed.strip(b"\0"):
                    return
                state = zlib.decompressobj(self._bits)
            while compressed and not state.eof:
                block = state.decompress(compressed, _CHUNK)
                rest = state.unused_data if state.eof else state.unconsumed_tail
                consumed += len(compressed) - len(rest)
                position += len(block)
                compressed = state.unconsumed_tail
                yield _Mark(position, consumed, state), block


@functools.lru_cache(maxsize=16)
def _stream(archive: str | Span) -> _Stream:
    if isinstance(archive, str):
        size = os.path.getsize(archive)
        return _Stream(functools.partial(_pread, archive), size, zlib.MAX_WBITS | 16)
    start = _data_start(archive)

    def read(offset: int, size: int) -> bytes:
        return _read(archive.archive, start + offset, min(size, archive.packed - offset))

    return _Stream(read, archive.packed, -zlib.MAX_WBITS)


class _Reader(io.RawIOBase):
    """An archive as a file object, for the libraries that know how to list it."""

    def __init__(self, archive: str | Span):
        self._archive, self._position = archive, 0
        if isinstance(archive, Span):
            self._length = archive.size
        else:
            self._length = _stream(archive).length if _is_gzip(archive) else os.path.getsize(archive)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def readinto(self, buffer) -> int:
        data = _read(self._archive, self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _zip_members(archive: str | Span) -> Iterator[tuple[str, Span]]:
    with zipfile.ZipFile(io.BufferedReader(_Reader(archive))) as listing:
        for info in listing.infolist():
            if not info.is_dir():
                kind = "unreadable" if info.flag_bits & 1 else _KINDS.get(info.compress_type, "unreadable")
                place = (info.header_offset, info.compress_size, info.file_size, kind, info.CRC)
                yield info.filename, Span(archive, *place)


def _tar_members(archive: str | Span) -> Iterator[tuple[str, Span]]:
    with tarfile.open(fileobj=io.BufferedReader(_Reader(archive)), mode="r:") as listing:
        for info in listing:
            if info.isreg() and not info.issparse():
                yield info.name, Span(archive, info.offset_data, info.size, info.size, "tar")
