"""The images of a split: a compact store of rows, and how pictures find the files that annotate them."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from maskwright.data.formats.coco import find_all, inside
from maskwright.data.images.load import is_image_name
from maskwright.data.problems import ProblemHandler
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError


class PackedRows:
    """A read-only list of Python values kept as one block of bytes.

    Worker processes share the block with their parent. A list of objects would be copied into each of them bit by bit,
    since looking at a Python object writes its reference count: gigabytes for the annotations of COCO.
    """

    def __init__(self, rows: Iterable[Any]):
        self._pack([pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL) for row in rows])

    def _pack(self, parts: Sequence[bytes]) -> None:
        self._ends = np.cumsum([0, *map(len, parts)])
        self._block = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        return pickle.loads(self._bytes(index).data)

    def _bytes(self, index: int) -> np.ndarray:
        return self._block[self._ends[index] : self._ends[index + 1]]

    def keep(self, indices: Sequence[int]) -> None:
        """Leave out all rows but these."""
        self._pack([self._bytes(index).tobytes() for index in indices])


class ImageList:
    """The images of a split in order: what each is called, its picture, and what its reader knows of it."""

    def __init__(self, rows: Iterable[tuple[int | str, File, Any]]):
        """Of (image id, picture, anything that can be pickled)."""
        self.rows = PackedRows(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def image_id(self, index: int) -> int | str:
        """What the annotations call the image."""
        return self.rows[index][0]

    def file(self, index: int) -> File:
        """Its picture."""
        return self.rows[index][1]

    def annotation(self, index: int) -> Any:
        """What its reader knows of it."""
        return self.rows[index][2]

    def keep(self, indices: Sequence[int]) -> None:
        """Leave out all images but these."""
        self.rows.keep(indices)


Row = tuple[str, File, File]


def pair(
    images: Folder, labels: Folder, key: str, problems: ProblemHandler, image_suffix: str = "", label_suffix: str = ""
) -> list[Row]:
    """(image id, picture, label) of each picture, sorted by image id: its relative path without suffixes.

    Args:
        images: folder of the pictures, searched recursively.
        labels: folder of the labels; may be the same.
        key: the split's in the recipe, e.g. "data.train".
        problems: hears of pictures without a label, and of labels without a picture.
        image_suffix: end of picture names, before the file's own suffix, that labels do not have.
        label_suffix: end of label names that pictures do not have.

    Raises:
        DatasetError: no file has such a name, two have the same, or a picture has no label.
    """
    other_suffix = label_suffix if str(images) == str(labels) else ""
    pictures = _by_name(images, image_suffix, f"{key}.images", other_suffix, problems)
    truths = _by_name(labels, label_suffix, f"{key}.annotations", "", problems)
    without = sorted(set(pictures) - set(truths))
    if without:
        error = DatasetError(
            f"{key}.annotations: {len(without)} of {len(pictures)} pictures have no label in {labels}, the first is "
            f"{images}/{pictures[without[0]]}; names must agree after removing data.image_suffix and data.label_suffix"
        )
        problems.error(error, [f"{images}/{pictures[name]}" for name in without])
    unused = sorted(set(truths) - set(pictures))
    if unused:
        problems.warning(
            f"{labels}: {len(unused)} labels have no picture and are not used; fetch the pictures, or move the labels",
            [f"{labels}/{truths[name]}" for name in unused],
        )
    names = sorted(set(pictures) & set(truths))
    files = images.files([pictures[name] for name in names]), labels.files([truths[name] for name in names])
    return [(name, picture, truth) for name, picture, truth in zip(names, *files, strict=True) if picture and truth]


def _by_name(folder: Folder, suffix: str, key: str, other_suffix: str, problems: ProblemHandler) -> dict[str, str]:
    """Names of pictures below a folder by what is left of them without the file's suffix and `suffix`."""
    named: dict[str, str] = {}
    files = [file for file in folder.names() if is_image_name(file)]
    if not files:
        raise DatasetError(f"{key}: the folder {folder} holds no picture; correct the path")
    for file in files:
        path = PurePosixPath(file)
        if not path.stem.endswith(suffix) or (other_suffix and path.stem.endswith(other_suffix)):
            continue
        name = path.with_name(path.stem.removesuffix(suffix) or path.name).as_posix()
        with problems.skipping(f"{folder}/{file}"):
            if name in named:
                raise DatasetError(f"{key}: {named[name]} and {file} are both called '{name}'; remove one of them")
            named[name] = file
    if not named:
        raise DatasetError(f"{key}: no picture in {folder} has a name that ends in '{suffix}'; correct the suffix")
    return named


def read_list(root: Folder, file: File, key: str, problems: ProblemHandler) -> list[Row]:
    """(image id, picture, label) of each line of a text file.

    Args:
        root: what the paths are relative to.
        file: has lines of '<image> <label>', with a tab between names that have spaces.
        key: the list's in the recipe, e.g. "data.train.list".
        problems: hears of lines that are no pair, and of files that do not exist.

    Raises:
        DatasetError: a line is no pair, there is none, or a file does not exist.
    """
    pairs = []
    for number, line in enumerate(file.read().decode("utf-8-sig").splitlines(), 1):
        parts = line.split("\t") if "\t" in line else line.split()
        if not parts:
            continue
        with problems.skipping(f"line {number}"):
            if len(parts) != 2:
                raise DatasetError(
                    f"{file}, line {number}: found {len(parts)} names, expected '<image> <label>' "
                    "(with a tab between names that have spaces); mend the line"
                )
            pairs.append(tuple(inside(part, file) for part in parts))
    if not pairs:
        raise DatasetError(f"{key}: {file} is empty; expected lines of '<image> <label>'")
    files = find_all(root, [name for names in pairs for name in names], key, file, problems)
    ids = [PurePosixPath(picture).with_suffix("").as_posix() for picture, _ in pairs]
    return list(zip(ids, files[::2], files[1::2], strict=True))
