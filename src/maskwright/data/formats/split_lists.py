"""Lists of the images of a split: train.txt with one name per line, or train.csv with a column of images."""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from maskwright.data.formats.folder_names import read_name
from maskwright.data.images.find import is_image_name
from maskwright.data.storage.folders import File
from maskwright.data.storage.similar_names import SimilarNames
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError, printable

_IMAGE_COLUMNS = ("file", "filename", "file_name", "id", "image_id", "imageid", "name", "path")
_LIST_WORDS = ("list", "lists", "id", "ids", "split", "names", "name", "pairs", "file")


class ListedImage(NamedTuple):
    """An entry of a list.

    Attributes:
        image: name or path of the image, with or without file extension.
        label: that of its label image; None if the list does not name it.
        line: its number, from 1.
    """

    image: str
    label: str | None
    line: int


def split_of_list(path: str) -> str | None:
    """Return the split that a file named like train.txt, val_list.txt or test_ids.csv lists; None for others."""
    stem, suffix = posixpath.splitext(posixpath.basename(path))
    if suffix.lower() not in (".txt", ".csv"):
        return None
    words = read_name(stem)
    return words.split if all(word in _LIST_WORDS for word in words.rest.split("_") if word) else None


def read_list(file: File) -> list[ListedImage]:
    """Read a list of images.

    Args:
        file: a .csv with a header that names a column of images, and maybe one of label images; or lines of an image
            name, or of '<image> <label>', with a tab between names that have spaces. Further columns are ignored.

    Raises:
        DatasetError: the list is empty or malformed.
    """
    text = read_text(file)
    rows = _csv_rows(text, file) if file.name.lower().endswith(".csv") else _text_rows(text)
    if not rows:
        raise DatasetError("is empty, expected one image name per line", where=file.name, remedy="add names")
    return rows


def _csv_rows(text: str, file: File) -> list[ListedImage]:
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    try:
        reader = csv.reader(text.splitlines(), delimiter=delimiter)
        rows = [([cell.strip() for cell in row], reader.line_num) for row in reader]
    except csv.Error as error:
        raise DatasetError(f"not a CSV file ({error})", where=file.name, remedy="write it again") from None
    rows = [(row, line) for row, line in rows if any(row)]
    if not rows:
        return []
    header = rows[0][0]
    image, label = _columns(header)
    if image is not None:
        rows = rows[1:]
    elif is_image_name(header[0]):  # no header
        image, label = 0, 1 if len(header) > 1 and is_image_name(header[1]) else None
    else:
        names = printable(", ".join(header[:8]))
        raise DatasetError(f"no column is called 'image' (found: {names})", where=file.name, remedy="rename one")
    width = max(image, label or 0) + 1
    if short := next((line for row, line in rows if len(row) < width), None):
        raise DatasetError("has fewer columns than the header", where=f"{file}, line {short}", remedy="correct it")
    return [_entry(row[image], row[label] if label is not None else None, line) for row, line in rows]


def _entry(image: str, label: str | None, line: int) -> ListedImage:
    """Return an entry of a list, which may have been written on Windows."""
    return ListedImage(image.replace("\\", "/"), label and label.replace("\\", "/"), line)


def _columns(header: Sequence[str]) -> tuple[int | None, int | None]:
    """Return the columns of images and of label images."""
    kinds = [read_name(name).kind for name in header]
    label = kinds.index("labels") if "labels" in kinds else None
    usual = (number for number, name in enumerate(header) if name.casefold() in _IMAGE_COLUMNS)
    return kinds.index("images") if "images" in kinds else next(usual, None), label


def _text_rows(text: str) -> list[ListedImage]:
    rows = []
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line:
            continue
        parts = line.split("\t") if "\t" in line else line.split()
        is_pair = len(parts) == 2 and is_image_name(parts[1])
        image, label = (parts[0].strip(), parts[1].strip()) if is_pair else (line, None)
        rows.append(_entry(image, label, number))
    return rows


def read_listed(file: File, paths: Mapping[str, str]) -> list[tuple[ListedImage, str | None]]:
    """Read a list and return its entries, each with the name of its image, None if there is no such image.

    An entry that names a folder, such as a clip of DAVIS, means all images in it.

    Args:
        file: see `read_list`.
        paths: the path of each image by its name, both relative.

    Raises:
        DatasetError: the list is empty or malformed.
    """
    rows = read_list(file)
    names = find_listed([row.image for row in rows], paths)
    folders = _images_by_folder(paths) if None in names else {}
    found = []
    for row, name in zip(rows, names, strict=True):
        inside = folders.get(row.image.strip("/"), []) if name is None and row.label is None else []
        found += [(row, image) for image in inside] or [(row, name)]
    return found


def _images_by_folder(paths: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names of the images in each folder, by all ends of its path (c, b/c and a/b/c) that no other has."""
    images: dict[str, list[str]] = {}
    for name, path in paths.items():
        images.setdefault(posixpath.dirname(path), []).append(name)
    owners: dict[str, str | None] = {}
    for folder in images:
        parts = folder.split("/")
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            owners[end] = None if end in owners else folder
    owners |= {folder: folder for folder in images}
    return {end: images[folder] for end, folder in owners.items() if folder}


def find_listed(listed: Sequence[str], paths: Mapping[str, str]) -> list[str | None]:
    """Return the name that each entry of a list stands for, None for none.

    Args:
        listed: names or paths, with or without extension, with or without further columns.
        paths: the path of each name, both relative.
    """
    by_stem = {posixpath.splitext(path)[0]: name for name, path in paths.items()}
    known = by_stem | {name: name for name in paths}
    similar_names, similar_paths = SimilarNames(paths), SimilarNames(by_stem)
    found = []
    for entry in listed:
        candidates = _candidates(entry)
        name = next((known[candidate] for candidate in candidates if candidate in known), None)
        for candidate in candidates if name is None else ():
            path = similar_paths.find(candidate)
            name = similar_names.find(candidate) or (by_stem[path] if path else None)
            if name is not None:
                break
        found.append(name)
    return found


def _candidates(entry: str) -> list[str]:
    """Return the names that an entry may mean: the line or its first column, without file extension or as it is."""
    columns = list(dict.fromkeys([entry, *entry.split()[:1]]))
    return [posixpath.splitext(name)[0] for name in columns if is_image_name(name)] + columns
