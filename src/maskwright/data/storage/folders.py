"""Where a data set lies: in a folder, in an archive, or in a folder that holds archives; the readers need not know.

An archive counts as if it had been unpacked where it lies, but it never is. It is indexed when something is looked for
that the disk has not, and each of its files is then known by the place of its bytes: `archives` has the rest.
"""

from __future__ import annotations

import functools
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from maskwright.data.storage.archives import Span, extract, is_archive, is_archive_name, members
from maskwright.errors import DatasetError

_SEARCH_DEPTH = 2  # folders below the root in which a name is looked for that is not where it is expected


class File(NamedTuple):
    """One file of a data set.

    Attributes:
        name: for people: its path, which for a file in an archive goes on behind the archive's name.
        place: None for a file on disk; the place of its bytes in an archive; or the bytes themselves.
    """

    name: str
    place: Span | bytes | None = None

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """All bytes; those in a zip are checked.

        Raises:
            DatasetError: the file is absent, or damaged in its archive; names the file.
        """
        if isinstance(self.place, bytes):
            return self.place
        try:
            return Path(self.name).read_bytes() if self.place is None else extract(self.place, self.name)
        except OSError as error:
            raise DatasetError(f"{self.name}: cannot be read ({error.strerror or error}); check the path") from None


class ArchiveIndex:
    """The files of the archives of a data set by their names, as if they had been unpacked where they lie.

    Archives are those in the root folder and in folders directly below it, or the root itself. They are opened when
    something is first looked for in them.
    """

    def __init__(self, root: Path):
        """Of the archives at a root; opens nothing yet."""
        self._root = root
        self._nested: list[tuple[str, File]] = []

    @functools.cached_property
    def archives(self) -> list[tuple[str, Path]]:
        """(Where the names in it begin, archive) pairs."""
        if not self._root.is_dir():
            return [("", self._root)]
        found = []
        for folder in (self._root, *sorted(path for path in self._root.iterdir() if path.is_dir())):
            prefix = "" if folder == self._root else f"{folder.name}/"
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries if is_archive_name(entry.name) and entry.is_file())
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
        """The file of this name, if there is one."""
        while name not in self._files and self._open_nested(name):
            pass
        return self._files.get(name)

    def has_folder(self, name: str) -> bool:
        """Whether a file lies below a folder of this name."""
        while name not in self._folders and self._open_nested(name):
            pass
        return name in self._folders or not name

    def below(self, prefix: str) -> list[str]:
        """Names of all files below, relative to it."""
        return [name[len(prefix) :] for name in self._files if name.startswith(prefix)]

    def folders(self, prefix: str) -> set[str]:
        """Names of the folders directly below."""
        return {name[len(prefix) :].partition("/")[0] for name in self._folders if name.startswith(prefix)} - {""}

    def _open_nested(self, wanted: str) -> bool:
        """Index an archive inside an archive that could hold what is wanted; False when there is none left."""
        for number, (prefix, file) in enumerate(self._nested):
            if wanted.startswith(prefix) or prefix.startswith(f"{wanted}/"):
                del self._nested[number]
                self._add(self._files, prefix, file)
                self.__dict__.pop("_folders", None)
                return True
        return False

    def _add(self, files: dict[str, File], prefix: str, archive: File) -> None:
        place = archive.place if isinstance(archive.place, Span) else archive.name
        for name, span in members(place, archive.name):
            file = File(f"{archive.name}/{name}", span)
            if is_archive_name(name):
                folder = posixpath.dirname(prefix + name)
                self._nested.append((f"{folder}/" if folder else "", file))
            else:
                files[prefix + name] = file


Found = TypeVar("Found", File, "Folder")


@dataclass(frozen=True)
class Folder:
    """A folder of a data set. What lies on disk hides what archives have under the same name.

    Attributes:
        root: the data set's folder or archive.
        index: its archives.
        path: of the folder below the root: "" or "a/b".
    """

    root: Path
    index: ArchiveIndex
    path: str = ""

    def __str__(self) -> str:
        return str(self.root / self.path)

    @property
    def disk(self) -> Path | None:
        """The folder on disk, where it is there."""
        place = self.root / self.path
        return place if place.is_dir() else None

    def find_file(self, name: str) -> File | None:
        """The file of this relative name, if there is one."""
        path = self.root / self.path / name
        return File(str(path)) if path.is_file() else self.index.file(self._joined(name))

    def find_folder(self, name: str) -> Folder | None:
        """The folder of this relative name, if there is one; the name of an archive on disk gives what it holds."""
        path, inside = self.root / self.path / name, self._joined(name)
        if is_archive(path) or (path.is_dir() and Path(name).is_absolute()):
            return open_folder(path)
        return Folder(self.root, self.index, inside) if path.is_dir() or self.index.has_folder(inside) else None

    def file(self, name: str, key: str) -> File:
        """The file of this relative name, here or up to two folders down (archives often have one on top of all).

        Raises:
            DatasetError: there is none, or more than one; the message begins with `key`, a key of the recipe.
        """
        return self._search(name, key, Folder.find_file, "file")

    def folder(self, name: str, key: str) -> Folder:
        """The folder of this relative name; found as `file` is."""
        return self._search(name, key, Folder.find_folder, "folder")

    def holding(self, name: str, key: str) -> Folder:
        """The folder that has a file of this name, this one or one up to two folders down; as `file`."""
        return self._search(name, key, lambda folder, name: folder if folder.find_file(name) else None, "file")

    def names(self) -> list[str]:
        """Relative names of all files here and below, sorted; hidden files and folders are left out."""
        disk = self.disk
        names = self.index.below(f"{self.path}/" if self.path else "") if disk is None else _walk(disk)
        return sorted(name for name in names if not name.startswith(".") and "/." not in name)

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, on disk or in archives, without hidden ones."""
        disk = self.disk
        names = {entry.name for entry in os.scandir(disk) if entry.is_dir()} if disk else set()
        names |= self.index.folders(f"{self.path}/" if self.path else "")
        return sorted(name for name in names if not name.startswith("."))

    def files(self, names: Iterable[str]) -> list[File | None]:
        """The files of these relative names, each None where there is none; lists each folder on disk once."""
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

    def _search(self, name: str, key: str, find: Callable[[Folder, str], Found | None], what: str) -> Found:
        level: list[Folder] = [self]
        for _ in range(_SEARCH_DEPTH + 1):
            found = [match for folder in level if (match := find(folder, name)) is not None]
            if len(found) > 1:
                raise DatasetError(
                    f"{key}: '{name}' is in {self} twice: {found[0]} and {found[1]}; name its folder too"
                )
            if found:
                return found[0]
            level = [child for folder in level for part in folder.folders() if (child := folder.find_folder(part))]
        archives = [path.name for _, path in self.index.archives if path != self.root]
        note = f" or in the archives {', '.join(archives[:5])}" if archives else ""
        raise DatasetError(f"{key}: no {what} {self.root / self.path / name}{note}; correct the path")


def open_folder(root: Path, key: str = "data.root") -> Folder:
    """The data set at a root: a folder, an archive, or a folder that holds archives.

    Raises:
        DatasetError: there is neither a folder nor an archive; the message begins with `key`.
    """
    if not root.is_dir() and not is_archive(root):
        raise DatasetError(f"{key}: no folder or archive (.zip, .tar, .tar.gz) {root}; correct the path")
    return Folder(root, ArchiveIndex(root))


def _walk(folder: Path) -> Iterator[str]:
    """Relative names of all files below; links to folders are followed, each real folder is entered once."""
    entered = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        below = Path(parent).relative_to(folder).as_posix()
        yield from (file if below == "." else f"{below}/{file}" for file in files)
