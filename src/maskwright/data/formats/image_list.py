"""Images of a split in compact storage, and the ways in which images are matched with annotation files."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Sequence
from pathlib import PurePath, PurePosixPath
from typing import Any

import numpy as np

from maskwright.data.images.load import is_image_name
from maskwright.data.problems import ProblemHandler
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError

ImageAndLabel = tuple[str, File, File]  # image id, image, label image


class PackedList:
    """A read-only list of Python values in one block of bytes.

    Worker processes share the block with their parent. They would copy a list of objects page by page, because even
    reading a Python object writes its reference count: gigabytes for the annotations of COCO.
    """

    def __init__(self, values: Iterable[Any]):
        self._pack([pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL) for value in values])

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
        """Drop all values except these."""
        self._pack([self._bytes(index).tobytes() for index in indices])


class ImageList:
    """The images of a split in order.

    Attributes:
        entries: (image id, image file, annotation) of each image; the reader decides what the annotation is.
    """

    def __init__(self, entries: Iterable[tuple[int | str, File, Any]]):
        self.entries = PackedList(entries)

    def __len__(self) -> int:
        return len(self.entries)

    def image_id(self, index: int) -> int | str:
        """Return the image's id in the annotations."""
        return self.entries[index][0]

    def file(self, index: int) -> File:
        """Return the image file."""
        return self.entries[index][1]

    def annotation(self, index: int) -> Any:
        """Return what the reader stored for the image."""
        return self.entries[index][2]

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all images except these."""
        self.entries.keep(indices)


def pair_by_name(
    images: Folder, labels: Folder, key: str, problems: ProblemHandler, image_suffix: str = "", label_suffix: str = ""
) -> list[ImageAndLabel]:
    """Match images with label images of the same name, sorted by image id: the relative path without suffixes.

    Args:
        images: folder of the images, searched recursively.
        labels: folder of the label images; may be the same.
        key: the split's key in the recipe, e.g. "data.train".
        problems: receives images without a label, and labels without an image.
        image_suffix: end of image names, before the file extension, that label names lack.
        label_suffix: end of label names that image names lack.

    Raises:
        DatasetError: no file has such a name, two have the same, or an image has no label.
    """
    other_suffix = label_suffix if str(images) == str(labels) else ""
    image_names = _by_name(images, image_suffix, f"{key}.images", other_suffix, problems)
    label_names = _by_name(labels, label_suffix, f"{key}.annotations", "", problems)
    unlabelled = sorted(set(image_names) - set(label_names))
    if unlabelled:
        error = DatasetError(
            f"{len(unlabelled)} of {len(image_names)} images have no label in {labels}, the first is "
            f"{images}/{image_names[unlabelled[0]]}",
            where=f"{key}.annotations",
            remedy="names must be equal without data.image_suffix and data.label_suffix",
        )
        problems.error(error, [f"{images}/{image_names[name]}" for name in unlabelled])
    unused = sorted(set(label_names) - set(image_names))
    if unused:
        problems.warning(
            f"{len(unused)} labels have no image and are not used",
            where=str(labels),
            remedy="add the images, or move the labels away",
            items=[f"{labels}/{label_names[name]}" for name in unused],
        )
    names = sorted(set(image_names) & set(label_names))
    files = images.files([image_names[name] for name in names]), labels.files([label_names[name] for name in names])
    return [(name, image, label) for name, image, label in zip(names, *files, strict=True) if image and label]


def _by_name(folder: Folder, suffix: str, key: str, other_suffix: str, problems: ProblemHandler) -> dict[str, str]:
    """Return image names below a folder by their path without file extension and `suffix`."""
    by_name: dict[str, str] = {}
    files = [file for file in folder.names() if is_image_name(file)]
    if not files:
        raise DatasetError(f"the folder {folder} has no images", where=key, remedy="correct the path")
    for file in files:
        path = PurePosixPath(file)
        if not path.stem.endswith(suffix) or (other_suffix and path.stem.endswith(other_suffix)):
            continue
        name = path.with_name(path.stem.removesuffix(suffix) or path.name).as_posix()
        with problems.skipping(f"{folder}/{file}"):
            if name in by_name:
                raise DatasetError(
                    f"{by_name[name]} and {file} are both called '{name}'", where=key, remedy="remove one of them"
                )
            by_name[name] = file
    if not by_name:
        raise DatasetError(
            f"no image in {folder} has a name that ends in '{suffix}'", where=key, remedy="correct the suffix"
        )
    return by_name


def read_pair_list(root: Folder, file: File, key: str, problems: ProblemHandler) -> list[ImageAndLabel]:
    """Read pairs of images and label images from a text file.

    Args:
        root: folder that the paths are relative to.
        file: has lines of '<image> <label>', with a tab between names that have spaces.
        key: the list's key in the recipe, e.g. "data.train.list".
        problems: receives malformed lines, and files that do not exist.

    Raises:
        DatasetError: a line is malformed, the list is empty, or a file does not exist.
    """
    pairs = []
    for number, line in enumerate(file.read().decode("utf-8-sig").splitlines(), 1):
        parts = line.split("\t") if "\t" in line else line.split()
        if not parts:
            continue
        with problems.skipping(f"line {number}"):
            if len(parts) != 2:
                raise DatasetError(
                    f"found {len(parts)} names, expected '<image> <label>' (with a tab between names that have spaces)",
                    where=f"{file}, line {number}",
                    remedy="correct the line",
                )
            pairs.append(tuple(inside_folder(part, file) for part in parts))
    if not pairs:
        raise DatasetError(
            f"{file} is empty, expected lines of '<image> <label>'", where=key, remedy="add lines, or name another list"
        )
    files = find_all(root, [name for names in pairs for name in names], key, file, problems)
    ids = [PurePosixPath(image).with_suffix("").as_posix() for image, _ in pairs]
    return list(zip(ids, files[::2], files[1::2], strict=True))


def find_all(folder: Folder, names: Sequence[str], key: str, named_in: File, problems: ProblemHandler) -> list[File]:
    """Return the files of these names; report all that do not exist as one DatasetError."""
    found = folder.files(names)
    files = [file or File(f"{folder}/{name}") for file, name in zip(found, names, strict=True)]
    missing = [file.name for file, existing in zip(files, found, strict=True) if existing is None]
    if missing:
        error = DatasetError(
            f"{len(missing)} of {len(found)} files named in {named_in} do not exist, the first is {missing[0]}",
            where=key,
            remedy="correct the folder, or add the files",
        )
        problems.error(error, missing)
    return files


def inside_folder(name: str, named_in: File) -> str:
    """Return a relative file name, or raise a DatasetError if it points outside its folder."""
    path = PurePath(os.path.normpath(name))
    if path.is_absolute() or path.parts[:1] == ("..",):
        raise DatasetError(
            f"the file name '{name}' points outside its folder",
            where=named_in.name,
            remedy="use names relative to the folder",
        )
    return name
