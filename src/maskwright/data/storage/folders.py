"""The files of a dataset in a folder, in an archive, or in a folder with archives; readers see no difference.

The files of an archive appear as if it had been extracted next to itself, but nothing is extracted. An archive is
indexed when a name that is not on disk is looked up; then the position of each of its files is known (see `archives`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from maskwright.data.storage.archives import (
    ArchiveEntry,
    is_archive,
    is_archive_name,
    list_entries,
    nesting_depth,
    read_entry,
)
from maskwright.data.storage.parquet import Cell, read_cell
from maskwright.data.storage.remote import is_url, read_url
from maskwright.errors import DatasetError, one_line

_MAX_NESTING = 3  # archives inside archives that are opened; some hostile ones contain themselves
_SEARCH_DEPTH = 2  # levels of folders below the root that are searched for a name


class File(NamedTuple):
    """A file of a dataset, or an image to predict.

    Attributes:
        name: its path or URL, for users; for a file in an archive the path of the archive, followed by the name inside.
        location: None for a file on disk or at a URL, its entry for a file in an archive, its cell for an image in a
            Parquet file, or the bytes themselves.
    """

    name: str
    location: ArchiveEntry | Cell | bytes | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def is_on_disk(self) -> bool:
        """Whether the name is the path of the file itself."""
        return self.location is None and not is_url(self.name)

    def read(self) -> bytes:
        """Return all bytes; the checksum of files in a zip is verified.

        Raises:
            DatasetError: the file is missing, or damaged in its archive.
        """
        if isinstance(self.location, bytes):
            return self.location
        if isinstance(self.location, Cell):
            return read_cell(self.location)
        if self.location is not None:
            return read_entry(self.location, self.name)
        if is_url(self.name):
            return read_url(self.name)
        try:
            return Path(self.name).read_bytes()
        except OSError as error:
            raise DatasetError(
                f"cannot be read ({one_line(error)})", where=self.name, remedy="check the path"
            ) from None


class ArchiveIndex:
    """The files in the archives of a dataset by name, as if each archive were extracted next to itself.

    Archives are found in the root folder and in the folders directly below it, or the root itself is one. They are
    opened on the first lookup.
    """

    def __init__(self, root: Path):
        """Define the root; nothing is opened yet."""
        self._root = root
        self._nested: list[tuple[str, File]] = []

    @functools.cached_property
    def archives(self) -> list[tuple[str, Path]]:
        """(prefix of the names in the archive, path of the archive) for each archive."""
        if not self._root.is_dir():
            return [("", self._root)]
        found = []
        for folder in (self._root, *sorted(path for path in self._root.iterdir() if path.is_dir())):
            prefix = "" if folder == self._root else f"{folder.name}/"
            with os.scandir(folder) as entries:
                files = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
                names = sorted(filter(is_archive_name, files))
            found += [(prefix, folder / name) for name in names]
        return found

    @functools.cached_property
    def _files(self) -> dict[str, File]:
        files: dict[str, File] = {}
        for prefix, path in self.archives:
            self._add(files, prefix, File(str(path)))
        return files

    @functools.cached_property
    def _folders(self) -> set[str]:
        folders: set[str] = set()
        for parent in {posixpath.dirname(name) for name in self._files}:
            while parent and parent not in folders:
                folders.add(parent)
                parent = posixpath.dirname(parent)
        return folders

    def file(self, name: str) -> File | None:
        """Return the file with this name, or None."""
        while name not in self._files and self._open_nested(name):
            pass
        return self._files.get(name)

    def has_folder(self, name: str) -> bool:
        """Return True if there is a file below a folder with this name."""
        while name not in self._folders and self._open_nested(name):
            pass
        return name in self._folders or not name

    def below(self, prefix: str) -> list[str]:
        """Return the names of all files below a prefix, relative to it."""
        return [name[len(prefix) :] for name in self._files if name.startswith(prefix)]

    def folders(self, prefix: str) -> set[str]:
        """Return the names of the folders directly below a prefix."""
        return {name[len(prefix) :].partition("/")[0] for name in self._folders if name.startswith(prefix)} - {""}

    def _open_nested(self, name: str) -> bool:
        """Index one more nested archive that could contain the name; return False if there is none left."""
        for i, (prefix, file) in enumerate(self._nested):
            if name.startswith(prefix) or prefix.startswith(f"{name}/"):
                del self._nested[i]
                self._add(self._files, prefix, file)
                self.__dict__.pop("_folders", None)
                return True
        return False

    def _add(self, files: dict[str, File], prefix: str, archive: File) -> None:
        location = archive.location if isinstance(archive.location, ArchiveEntry) else archive.name
        for name, entry in list_entries(location, archive.name):
            file = File(f"{archive.name}/{name}", entry)
            if is_archive_name(name) and nesting_depth(entry) <= _MAX_NESTING:
                folder = posixpath.dirname(prefix + name)
                self._nested.append((f"{folder}/" if folder else "", file))
            else:
                files[prefix + name] = file


Found = TypeVar("Found", File, "Folder")


@dataclass(frozen=True)
class Folder:
    """A folder of a dataset. Files on disk take precedence over files in archives with the same name.

    Attributes:
        root: folder or archive of the dataset.
        index: its archives.
        path: of this folder, relative to the root: "" or "a/b".
    """

    root: Path
    index: ArchiveIndex
    path: str = ""

    def __str__(self) -> str:
        return str(self.root / self.path)

    @property
    def disk(self) -> Path | None:
        """The folder on disk, or None."""
        path = self.root / self.path
        return path if path.is_dir() else None

    def find_file(self, name: str) -> File | None:
        """Return the file with this relative name, or None."""
        path = self.root / self.path / name
        return File(str(path)) if path.is_file() else self.index.file(self._joined(name))

    def find_folder(self, name: str) -> Folder | None:
        """Return the folder with this relative name, or None. An archive on disk counts as a folder."""
        path, relative = self.root / self.path / name, self._joined(name)
        if is_archive(path) or (path.is_dir() and Path(name).is_absolute()):
            return open_folder(path)
        return Folder(self.root, self.index, relative) if path.is_dir() or self.index.has_folder(relative) else None

    def file(self, name: str, key: str) -> File:
        """Return the file with this relative name, here or up to two levels down (many archives have a top folder).

        Args:
            name: relative to this folder.
            key: the recipe key that errors name.

        Raises:
            DatasetError: there is none, or more than one.
        """
        return self._search(name, key, Folder.find_file, "file")

    def folder(self, name: str, key: str) -> Folder:
        """Return the folder with this relative name, here or up to two levels down; see `file`."""
        return self._search(name, key, Folder.find_folder, "folder")

    def folder_containing(self, name: str, key: str) -> Folder:
        """Return the folder that contains a file with this name, this one or up to two levels down; see `file`."""
        return self._search(name, key, lambda folder, name: folder if folder.find_file(name) else None, "file")

    def names(self) -> list[str]:
        """Return the relative names of all files here and below, sorted, without hidden files and folders."""
        names = _visible([] if self.disk is None else walk_files(self.disk))
        if all(map(is_archive_name, names)):  # on disk are only archives, if anything
            names += _visible(self.index.below(f"{self.path}/" if self.path else ""))
        return sorted(names)

    def file_names(self) -> list[str]:
        """Return the names of the files directly in this folder, sorted, without hidden ones."""
        disk = self.disk
        names = {entry.name for entry in os.scandir(disk) if entry.is_file()} if disk else set()
        names |= {name for name in self.index.below(f"{self.path}/" if self.path else "") if "/" not in name}
        return sorted(name for name in names if not name.startswith("."))

    def folders(self) -> list[str]:
        """Return the names of the folders directly in this one, on disk or in archives, without hidden ones."""
        disk = self.disk
        names = {entry.name for entry in os.scandir(disk) if entry.is_dir()} if disk else set()
        names |= self.index.folders(f"{self.path}/" if self.path else "")
        return sorted(name for name in names if not name.startswith("."))

    def files(self, names: Iterable[str]) -> list[File | None]:
        """Return the file for each relative name, or None; every folder on disk is listed only once."""
        disk = self.disk
        if disk is None:
            return [self.index.file(self._joined(name)) for name in names]
        listings: dict[str, set[str]] = {}
        found = []
        for name in names:
            path = os.path.join(disk, name)
            parent, base = os.path.split(path)
            if parent not in listings:
                listings[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
            found.append(File(path) if base in listings[parent] else self.index.file(self._joined(name)))
        return found

    def _joined(self, name: str) -> str:
        joined = posixpath.normpath(posixpath.join(self.path, name.replace(os.sep, "/")))
        return "" if joined == "." else joined

    def _search(self, name: str, key: str, find: Callable[[Folder, str], Found | None], kind: str) -> Found:
        level: list[Folder] = [self]
        for _ in range(_SEARCH_DEPTH + 1):
            found = [match for folder in level if (match := find(folder, name)) is not None]
            if len(found) > 1:
                raise DatasetError(
                    f"'{name}' is in {self} more than once: {found[0]} and {found[1]}",
                    where=key,
                    remedy="include its folder in the name",
                )
            if found:
                return found[0]
            level = [child for folder in level for part in folder.folders() if (child := folder.find_folder(part))]
        archives = [path.name for _, path in self.index.archives if path != self.root]
        searched = f" or in the archives {', '.join(archives[:5])}" if archives else ""
        raise DatasetError(f"no {kind} {self.root / self.path / name}{searched}", where=key, remedy="correct the path")


def _visible(names: Iterable[str]) -> list[str]:
    """Return the names that neither are nor contain those of hidden files and folders."""
    return [name for name in names if not name.startswith(".") and "/." not in name]


def open_folder(root: Path, key: str = "data.root") -> Folder:
    """Open a dataset: a folder, an archive, or a folder with archives.

    Args:
        root: its path.
        key: the recipe key that errors name.

    Raises:
        DatasetError: there is neither a folder nor an archive.
    """
    if not root.is_dir() and not is_archive(root):
        raise DatasetError(f"no folder or archive (.zip, .tar, .tar.gz) {root}", where=key, remedy="correct the path")
    return Folder(root, ArchiveIndex(root))


def walk_files(folder: Path) -> Iterator[str]:
    """Yield the relative names of all files below a folder; symlinks are followed, each real folder is read once.

    Named pipes, sockets and devices are skipped: reading a pipe would wait forever. Broken symlinks are not.
    """
    visited = set()
    pending = [(str(folder), "")]
    while pending:
        path, below = pending.pop()
        real = os.path.realpath(path)
        if real in visited:
            continue
        visited.add(real)
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    pending.append((entry.path, f"{below}{entry.name}/"))
                elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                    yield f"{below}{entry.name}"
