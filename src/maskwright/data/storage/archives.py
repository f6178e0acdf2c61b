"""Reading of files in zip and tar archives without extracting them.

An entry is identified by the position of its bytes. Such positions are small enough to keep for a million files, and
can be sent to any process, which opens the archive on its first read. Reads do not use a shared file position.

An archive at a URL is not downloaded: each read asks for a range of its bytes.

Unusual: an archive may be inside another (as the panoptic PNGs of COCO are), and a tar may be compressed as
a whole. Such a stream is decompressed once to list its entries, and the state of the decompressor is saved at regular
intervals, so that a read starts at the nearest saved state.
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

from maskwright.data.storage.remote import is_url, read_url, url_size
from maskwright.errors import DatasetError, one_line

_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_ZIP_COMPRESSIONS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflate", zipfile.ZIP_BZIP2: "bzip2"}
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_EXTRA_BYTES = 1024  # read along with the local header for the file name and the extra fields
_BOMB_BYTES, _BOMB_RATIO = 64 << 20, 250  # no real file of this size has such a compression ratio
_MAX_TAR_HEADER_BYTES = 1 << 20  # of one file: its long name and its extended attributes
_MAX_ACCESS_POINTS, _MIN_DISTANCE, _CHUNK_BYTES = 1024, 1 << 20, 1 << 18


class ArchiveEntry(NamedTuple):
    """The position of a file in an archive.

    Attributes:
        archive: path of the archive, or its own entry if it is inside another archive.
        start: of the local header (zip) or of the data (tar), in bytes.
        compressed_size: in bytes.
        size: after decompression, in bytes.
        compression: "stored", "deflate", "bzip2" or "unsupported" in a zip, "tar" in a tar.
        checksum: CRC-32, in a zip.
    """

    archive: str | ArchiveEntry
    start: int
    compressed_size: int
    size: int
    compression: str
    checksum: int = 0


def is_archive_name(name: str) -> bool:
    """Return True if a file with this name counts as an archive; hidden files do not."""
    return name.lower().endswith(_SUFFIXES) and not PurePosixPath(name).name.startswith(".")


def nesting_depth(archive: str | ArchiveEntry) -> int:
    """Return the number of archives that a file is in."""
    return 0 if isinstance(archive, str) else 1 + nesting_depth(archive.archive)


def is_archive(path: Path) -> bool:
    """Return True if the path is an archive."""
    return is_archive_name(path.name) and path.is_file()


def list_entries(archive: str | ArchiveEntry, name: str) -> Iterator[tuple[str, ArchiveEntry]]:
    """Yield the relative name (with "/") and the entry of each file in an archive, without the files that macOS adds.

    Args:
        archive: its path or URL, or its entry in another archive.
        name: name used in errors; its suffix decides the format.

    Raises:
        DatasetError: the archive is missing, damaged, or not an archive.
    """
    if isinstance(archive, str) and not is_url(archive):
        _close_if_replaced(archive)
    list_archive = _list_zip if name.lower().endswith(".zip") else _list_tar
    try:
        for path, entry in list_archive(archive):
            if "\\" in path or path.startswith(("./", "/")):
                path = PurePosixPath(path.replace("\\", "/").lstrip("/")).as_posix()
            if not path.startswith("__MACOSX/"):
                yield path, entry
    except (
        *(zipfile.BadZipFile, tarfile.TarError, zlib.error, struct.error),
        *(EOFError, LookupError, NotImplementedError, OSError, OverflowError, RecursionError, ValueError),
    ) as error:
        raise DatasetError(
            f"cannot be read as an archive ({one_line(error)})", where=name, remedy="download the file again"
        ) from None


def read_entry(entry: ArchiveEntry, name: str) -> bytes:
    """Return the bytes of a file.

    Args:
        entry: of `list_entries`.
        name: name of the file in errors.

    Raises:
        DatasetError: the file is damaged, encrypted, or a decompression bomb.
    """
    if entry.compression == "unsupported":
        raise DatasetError(
            "encrypted, or an unsupported compression",
            where=name,
            remedy="extract the archive and pack it with deflate",
        )
    if _is_bomb(entry.size, stored := _bytes_on_disk(entry)):
        raise DatasetError(
            f"{stored:,} bytes claim to be {entry.size:,} after decompression", where=name, remedy="check the archive"
        )
    try:
        data = _decompress(entry)
    except (zlib.error, OSError, ValueError, EOFError, OverflowError, struct.error) as error:
        raise _damaged(name, str(error)) from None
    if len(data) != entry.size:
        raise _damaged(name, f"{len(data):,} of {entry.size:,} bytes")
    if entry.compression != "tar" and zlib.crc32(data) != entry.checksum:
        raise _damaged(name, "wrong checksum")
    return data


def _is_bomb(size: int, stored: int) -> bool:
    """Return True if decompressed data is too large to be real, given the size of what it is decompressed from."""
    return size > _BOMB_BYTES and size > _BOMB_RATIO * stored


def _bytes_on_disk(archive: str | ArchiveEntry) -> int:
    """Return an upper limit of the bytes on disk from which an archive, or a file in archives, is decompressed."""
    if isinstance(archive, str):
        return _file_size(archive)
    return min(archive.compressed_size, _bytes_on_disk(archive.archive))


def _damaged(name: str, reason: str) -> DatasetError:
    return DatasetError(
        f"damaged in its archive ({reason}), or the archive has changed", where=name, remedy="download it again"
    )


def _decompress(entry: ArchiveEntry) -> bytes:
    match entry.compression:
        case "tar":
            return _read(entry.archive, entry.start, entry.size)
        case "stored":
            return _stored(entry)
        case "deflate":
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(_stored(entry), max(entry.size, 1))
        case _:
            return bz2.BZ2Decompressor().decompress(_stored(entry), max(entry.size, 1))


def _stored(entry: ArchiveEntry) -> bytes:
    """Return the stored bytes of a file in a zip; header and data are read at once."""
    data = _read(entry.archive, entry.start, _LOCAL_HEADER.size + _EXTRA_BYTES + entry.compressed_size)
    start = _data_offset(data)
    if start + entry.compressed_size <= len(data):
        return data[start : start + entry.compressed_size]
    return _read(entry.archive, entry.start + start, entry.compressed_size)


def _data_offset(header: bytes) -> int:
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
        raise ValueError("no local header at the position in the directory")
    *_, name_length, extra_length = _LOCAL_HEADER.unpack_from(header)
    return _LOCAL_HEADER.size + name_length + extra_length


def _read(archive: str | ArchiveEntry, start: int, size: int) -> bytes:
    """Return decompressed bytes of an archive on disk or in another archive; fewer at its end."""
    if isinstance(archive, str):
        return _stream(archive).read(start, size) if _is_gzip(archive) else _pread(archive, start, size)
    if archive.compression in ("stored", "tar"):
        return _read(archive.archive, _data_start(archive) + start, max(0, min(size, archive.size - start)))
    return _stream(archive).read(start, size)


def _is_gzip(path: str) -> bool:
    return path.lower().endswith((".gz", ".tgz"))


@functools.lru_cache(maxsize=64)
def _data_start(entry: ArchiveEntry) -> int:
    if entry.compression == "tar":
        return entry.start
    return entry.start + _data_offset(_read(entry.archive, entry.start, _LOCAL_HEADER.size))


_opened: dict[
    str, int
] = {}  # file descriptors; also valid in forked processes, because pread does not use the file position


def _file_size(path: str) -> int:
    return url_size(path) if is_url(path) else os.path.getsize(path)


def _pread(path: str, start: int, size: int) -> bytes:
    if is_url(path):
        return read_url(path, start, start + size) if size else b""
    if not hasattr(os, "pread"):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(_existing(file.fileno(), start, size))
    if path not in _opened:
        _opened[path] = os.open(path, os.O_RDONLY)
    size = _existing(_opened[path], start, size)
    parts = []
    while size > 0 and (part := os.pread(_opened[path], size, start)):
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _existing(file: int, start: int, size: int) -> int:
    """Limit a size to what the file has, because memory is allocated for the size that is asked for."""
    return max(0, min(size, os.fstat(file).st_size - start))


def _close_if_replaced(path: str) -> None:
    """Close an open archive whose file has been replaced."""
    if path in _opened and not os.path.samestat(os.fstat(_opened[path]), os.stat(path)):
        os.close(_opened.pop(path))
        _stream.cache_clear()
        _data_start.cache_clear()


class _AccessPoint(NamedTuple):
    """A position in a compressed stream.

    Attributes:
        position: number of decompressed bytes before it.
        consumed: number of compressed bytes before it.
        decompressor: its state at that position.
    """

    position: int
    consumed: int
    decompressor: Any

    def copy(self) -> _AccessPoint:
        return self._replace(decompressor=self.decompressor.copy())


class _SeekableStream:
    """A compressed stream that can be read from any position."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, wbits: int):
        """Decompress the stream once to collect access points.

        Args:
            read: returns compressed bytes for a start and a number of bytes.
            size: number of bytes on disk that the stream is decompressed from.
            wbits: format of the stream, see zlib.

        Raises:
            EOFError: the stream is truncated.
            ValueError: it is a decompression bomb.
        """
        self._read, self._wbits = read, wbits
        distance = _MIN_DISTANCE
        start = point = _AccessPoint(0, 0, zlib.decompressobj(wbits))
        self._points = [start.copy()]
        for point, _ in self._decompress_from(start):
            if _is_bomb(point.position, min(point.consumed, size)):
                raise ValueError(f"{point.consumed:,} bytes become more than {point.position - 1:,} by decompression")
            if point.position - self._points[-1].position >= distance:
                self._points.append(point.copy())
            if len(self._points) > _MAX_ACCESS_POINTS:
                self._points, distance = self._points[::2], 2 * distance
        if not point.decompressor.eof:
            raise EOFError("truncated")
        self.length = point.position

    def read(self, start: int, size: int) -> bytes:
        """Return decompressed bytes from `start`; fewer at the end of the stream."""
        blocks, end = [], start + size
        nearest = self._points[bisect_right(self._points, start, key=lambda point: point.position) - 1]
        for after, block in self._decompress_from(nearest.copy()):
            block_start = after.position - len(block)
            blocks.append(block[max(0, start - block_start) : end - block_start])
            if after.position >= end:
                break
        return b"".join(blocks)

    def _decompress_from(self, point: _AccessPoint) -> Iterator[tuple[_AccessPoint, bytes]]:
        """Yield each decompressed block with the access point after it; consumes the decompressor of `point`."""
        position, consumed, decompressor = point
        while compressed := self._read(consumed, _CHUNK_BYTES):
            if decompressor.eof:  # gzip files may be concatenated, and be padded with zeros
                if self._wbits < 0 or not compressed.strip(b"\0"):
                    return
                decompressor = zlib.decompressobj(self._wbits)
            while compressed and not decompressor.eof:
                block = decompressor.decompress(compressed, _CHUNK_BYTES)
                rest = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
                consumed += len(compressed) - len(rest)
                position += len(block)
                compressed = decompressor.unconsumed_tail
                yield _AccessPoint(position, consumed, decompressor), block


@functools.lru_cache(maxsize=16)
def _stream(archive: str | ArchiveEntry) -> _SeekableStream:
    if isinstance(archive, str):
        size = _file_size(archive)
        return _SeekableStream(functools.partial(_pread, archive), size, zlib.MAX_WBITS | 16)
    start = _data_start(archive)

    def read(offset: int, size: int) -> bytes:
        return _read(archive.archive, start + offset, min(size, archive.compressed_size - offset))

    return _SeekableStream(read, _bytes_on_disk(archive), -zlib.MAX_WBITS)


class _ArchiveFile(io.RawIOBase):
    """An archive as a file object, for `zipfile` and `tarfile`."""

    def __init__(self, archive: str | ArchiveEntry):
        self._archive, self._position = archive, 0
        if isinstance(archive, ArchiveEntry):
            self.length = archive.size
        else:
            self.length = _stream(archive).length if _is_gzip(archive) else _file_size(archive)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.length)[whence]
        return self._position

    def readinto(self, buffer) -> int:
        data = _read(self._archive, self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _BufferedArchive(io.BufferedReader):
    """An archive as a buffered file object, which never allocates the size that a false header claims.

    Args:
        archive: its path or entry.
        max_bytes: max size of one read; more is an error.
    """

    def __init__(self, archive: str | ArchiveEntry, max_bytes: int | None = None) -> None:
        file = _ArchiveFile(archive)
        super().__init__(file)
        self._length, self._max_bytes = file.length, max_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._length - self.tell())
        if self._max_bytes is not None and not 0 <= (size or 0) <= self._max_bytes:
            raise ValueError(f"a header of {size:,} bytes")
        return super().read(left if size is None or size < 0 else min(size, left))


def _list_zip(archive: str | ArchiveEntry) -> Iterator[tuple[str, ArchiveEntry]]:
    with zipfile.ZipFile(_BufferedArchive(archive)) as file:
        for info in file.infolist():
            if info.is_dir():
                continue
            is_encrypted = bool(info.flag_bits & 1)
            compression = "unsupported" if is_encrypted else _ZIP_COMPRESSIONS.get(info.compress_type, "unsupported")
            yield (
                info.filename,
                ArchiveEntry(archive, info.header_offset, info.compress_size, info.file_size, compression, info.CRC),
            )


def _list_tar(archive: str | ArchiveEntry) -> Iterator[tuple[str, ArchiveEntry]]:
    end = 0
    with tarfile.open(fileobj=_BufferedArchive(archive, _MAX_TAR_HEADER_BYTES), mode="r:") as file:
        for info in file:
            if info.size < 0 or info.offset_data <= end:
                raise ValueError(f"a file of {info.size:,} bytes")
            end = info.offset_data
            if info.isreg() and not info.issparse():
                yield info.name, ArchiveEntry(archive, info.offset_data, info.size, info.size, "tar")
