"""Images of a split in compact storage, and the ways in which images are matched with annotation files."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from maskwright.data.images.load import is_image_name
from maskwright.data.problems import ProblemHandler
from maskwright.data.storage.folders import File, Folder
from maskwright.data.storage.similar_names import SimilarNames, points_outside, relative_part
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError, printable

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
    _rename_similar(image_names, label_names, str(labels), problems)
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


def _rename_similar(
    image_names: dict[str, str], label_names: dict[str, str], where: str, problems: ProblemHandler
) -> None:
    """Call labels as the images whose names they resemble, each once, in other case or Unicode form."""
    similar = SimilarNames(label_names.keys() - image_names.keys())
    matches = {name: match for name in image_names.keys() - label_names.keys() if (match := similar.find(name))}
    counts = Counter(matches.values())
    matches = {name: match for name, match in sorted(matches.items()) if counts[match] == 1}
    for name, match in matches.items():
        label_names[name] = label_names.pop(match)
    if matches:
        name, match = next(iter(matches.items()))
        problems.warning(
            f"{len(matches)} labels are matched with images of similar names: {image_names[name]} with "
            f"{label_names[name]}",
            where=where,
            remedy="nothing to do if these belong together",
            items=list(matches.values()),
        )


def _by_name(folder: Folder, suffix: str, key: str, other_suffix: str, problems: ProblemHandler) -> dict[str, str]:
    """Return image names below a folder by their path without file extension and `suffix`."""
    by_name: dict[str, str] = {}
    found = folder.names()
    files = [file for file in found if is_image_name(file)]
    if not files:
        suffixes = Counter(PurePosixPath(file).suffix for file in found).most_common(3)
        others = f", but {', '.join(f'{count} {suffix}' for suffix, count in suffixes)}" if found else ""
        raise DatasetError(f"the folder {folder} has no images{others}", where=key, remedy="correct the path")
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
    for number, line in enumerate(read_text(file).splitlines(), 1):
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
            pairs.append(tuple(parts))
    if not pairs:
        raise DatasetError(
            f"{file} is empty, expected lines of '<image> <label>'", where=key, remedy="add lines, or name another list"
        )
    files = find_all(root, [name for names in pairs for name in names], key, file, problems)
    ids = [PurePosixPath(image).with_suffix("").as_posix() for image, _ in pairs]
    return list(zip(ids, files[::2], files[1::2], strict=True))


def find_all(
    folder: Folder,
    names: Sequence[str],
    key: str,
    named_in: File,
    problems: ProblemHandler,
    *,
    allow_absolute: bool = False,
) -> list[File]:
    """Return the files of these names; report all that do not exist as one DatasetError.

    Names that do not exist as they are written are matched with similar ones (see `SimilarNames`), with a warning.

    Args:
        folder: folder that the names are relative to.
        names: the names.
        key: the recipe key of the folder.
        named_in: the file that has the names.
        problems: receives the problems; files that do not exist are returned nevertheless.
        allow_absolute: accept names outside the folder that exist; they are never read otherwise.
    """
    inside = [allow_absolute or not points_outside(name) for name in names]
    written = [name if is_inside else relative_part(name) for name, is_inside in zip(names, inside, strict=True)]
    found = folder.files(written)
    for i, is_inside in enumerate(inside):
        if not is_inside:
            found[i] = None  # to be matched with a warning
    if None in found:
        _add_similar(found, folder, names, named_in, problems)
    files = [file or File(f"{folder}/{name}") for file, name in zip(found, written, strict=True)]
    missing = [i for i, file in enumerate(found) if file is None]
    for name in dict.fromkeys(names[i] for i in missing if not inside[i]):
        error = DatasetError(
            f"the file name '{printable(name)}' points outside its folder",
            where=named_in.name,
            remedy="use names relative to the folder",
        )
        problems.error(error, [name])
    absent = [files[i].name for i in missing if inside[i]]
    if absent:
        error = DatasetError(
            f"{len(absent)} of {len(found)} files named in {named_in} do not exist, the first is {absent[0]}",
            where=key,
            remedy="correct the folder, or add the files",
        )
        problems.error(error, absent)
    return files


def _add_similar(
    found: list[File | None], folder: Folder, names: Sequence[str], named_in: File, problems: ProblemHandler
) -> None:
    """Fill in the files that are None with those of similar names, which no other name refers to."""
    similar = SimilarNames(folder.names())
    matches = {i: match for i, file in enumerate(found) if file is None and (match := similar.find(names[i]))}
    files = dict(zip(matches, folder.files(matches.values()), strict=True))
    names_of_file: dict[str, set[str]] = {}
    for name, file in zip(names, found, strict=True):
        if file is not None:
            names_of_file.setdefault(file.name, set()).add(name)
    for i, file in files.items():
        names_of_file.setdefault(str(file), set()).add(names[i])
    accepted = {i: file for i, file in files.items() if file is not None and len(names_of_file[file.name]) == 1}
    for i, file in accepted.items():
        found[i] = file
    if accepted:
        first = next(iter(accepted))
        problems.warning(
            f"{len(accepted)} of {len(names)} file names do not exist as they are written and are matched with similar "
            f"ones: '{printable(names[first])}' with '{matches[first]}'",
            where=named_in.name,
            remedy="nothing to do if these are the right files",
            items=[names[i] for i in accepted],
        )
