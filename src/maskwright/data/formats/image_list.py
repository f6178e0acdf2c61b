"""Images of a split in compact storage, and the ways in which images are matched with annotation files."""

from __future__ import annotations

import pickle
import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from maskwright.data.formats.folder_names import without_meaning
from maskwright.data.formats.folder_pairs import pair_files
from maskwright.data.formats.split_lists import find_listed, read_list, read_listed
from maskwright.data.images.find import is_image_name
from maskwright.data.problems import ProblemHandler
from maskwright.data.storage.folders import File, Folder
from maskwright.data.storage.similar_names import SimilarNames, points_outside, relative_part
from maskwright.errors import DatasetError, printable

ImageAndLabel = tuple[str, File, File]  # image id, image, label image

_PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe")


class NamedFile(NamedTuple):
    """A file in a folder.

    Attributes:
        path: relative, with "/".
        name: that it is matched by: its path, or part of it, without file extension.
    """

    path: str
    name: str


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
    images: Folder,
    labels: Folder,
    key: str,
    problems: ProblemHandler,
    image_suffix: str = "",
    label_suffix: str = "",
    listed_in: File | None = None,
) -> list[ImageAndLabel]:
    """Match images with label images of the same name, sorted by image id: the relative path without suffixes.

    Args:
        images: folder of the images, searched recursively.
        labels: folder of the label images. If it is the same, the names of folders inside tell images and label images
            apart, or the suffixes, or else the file types: a.png is the label image of a.jpg.
        key: the split's key in the recipe, e.g. "data.train".
        problems: receives images without a label, and labels without an image.
        image_suffix: end of image names, before the file extension, that label names lack.
        label_suffix: end of label names that image names lack.
        listed_in: a list of the images that are used, see `read_list`; None uses all.

    Raises:
        DatasetError: no file has such a name, two have the same, or an image has no label.
    """
    if str(images) == str(labels):
        found = _files_in_one_folder(images, key, image_suffix, label_suffix, problems)
    else:
        found = _named_files(images, f"{key}.images"), _named_files(labels, f"{key}.annotations")
    image_names = _by_name(images, found[0], image_suffix, f"{key}.images", problems)
    label_names = _by_name(labels, found[1], label_suffix, f"{key}.annotations", problems)
    if not image_suffix and not label_suffix and not image_names.keys() & label_names.keys():
        image_names, label_names = _without_words(image_names, label_names, str(labels), problems)
    _rename_similar(image_names, label_names, str(labels), problems)
    if listed_in is not None:
        image_names = _select_listed(image_names, label_names, listed_in, str(images), key, problems)
    unlabeled = sorted(set(image_names) - set(label_names))
    if unlabeled:
        error = DatasetError(
            f"{len(unlabeled)} of {len(image_names)} images have no label in {labels}, the first is "
            f"{images}/{image_names[unlabeled[0]]}",
            where=f"{key}.annotations",
            remedy="names must be equal without data.image_suffix and data.label_suffix",
        )
        problems.error(error, [f"{images}/{image_names[name]}" for name in unlabeled])
    unused = sorted(set(label_names) - set(image_names))
    if unused and listed_in is None:
        problems.warning(
            f"{len(unused)} labels have no image and are not used",
            where=str(labels),
            remedy="add the images, or move the labels away",
            items=[f"{labels}/{label_names[name]}" for name in unused],
        )
    names = sorted(set(image_names) & set(label_names))
    files = images.files([image_names[name] for name in names]), labels.files([label_names[name] for name in names])
    return [(name, image, label) for name, image, label in zip(names, *files, strict=True) if image and label]


def _named_files(folder: Folder, key: str) -> list[NamedFile]:
    """Return the images below a folder with their paths without file extension."""
    found = folder.names()
    files = [file for file in found if is_image_name(file)]
    if not files:
        others = f", but {describe_files(found)}" if found else ""
        raise DatasetError(f"the folder {folder} has no images{others}", where=key, remedy="correct the path")
    return [NamedFile(file, PurePosixPath(file).with_suffix("").as_posix()) for file in files]


def describe_files(names: Iterable[str]) -> str:
    """Return the numbers of files of the most common types, such as "3 .json, 1 .txt"."""
    suffixes = Counter(PurePosixPath(name.lower()).suffix or "without a suffix" for name in names)
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(3))


def _files_in_one_folder(
    folder: Folder, key: str, image_suffix: str, label_suffix: str, problems: ProblemHandler
) -> tuple[list[NamedFile], list[NamedFile]]:
    """Return the images and the label images of a split that are in one folder."""
    files = _named_files(folder, f"{key}.images")
    pairs = pair_files([file.path for file in files])
    chosen = pairs.get(key.rpartition(".")[2]) or pairs.get(None)
    if chosen is not None:
        for place, count in chosen.unused:
            problems.warning(f"{count} images are not used", where=f"{folder}/{place}", remedy="move them away")
        images, labels = ([NamedFile(file.path, file.name) for file in kind] for kind in (chosen.images, chosen.labels))
        return images, labels
    if image_suffix or label_suffix:
        images = [file for file in files if not (label_suffix and file.name.endswith(label_suffix))]
        return images, files
    labels = labels_beside_photos([file.path for file in files])
    if not labels:
        raise DatasetError(
            f"no label images in {folder}: neither folders like images and masks, nor a.png beside a.jpg",
            where=f"{key}.annotations",
            remedy="name their folder, or set data.label_suffix to the end of their names",
        )
    problems.warning(
        f"{len(labels)} files have the name of a JPEG file and are taken for its label image, such as {min(labels)}",
        where=str(folder),
        remedy="nothing to do if they are label images",
    )
    return [file for file in files if file.path not in labels], [file for file in files if file.path in labels]


def labels_beside_photos(paths: Iterable[str]) -> set[str]:
    """Return those of the paths that have the name of a JPEG file in the same folder, and another file type."""
    parts = [posixpath.splitext(path) for path in paths]
    photos = {stem for stem, suffix in parts if suffix.lower() in _PHOTO_SUFFIXES}
    return {stem + suffix for stem, suffix in parts if stem in photos and suffix.lower() not in _PHOTO_SUFFIXES}


def _without_words(
    image_names: dict[str, str], label_names: dict[str, str], where: str, problems: ProblemHandler
) -> tuple[dict[str, str], dict[str, str]]:
    """Return both by names without words for kinds and splits, if these are unique and any are equal."""
    short_images, short_labels = (
        {without_meaning(name): path for name, path in names.items()} for names in (image_names, label_names)
    )
    common = sorted(short_images.keys() & short_labels.keys())
    if not common or len(short_images) < len(image_names) or len(short_labels) < len(label_names):
        return image_names, label_names
    problems.warning(
        f"{len(common)} labels are matched with images whose names differ in words like 'image', 'mask' or 'train': "
        f"{short_images[common[0]]} with {short_labels[common[0]]}",
        where=where,
        remedy="nothing to do if these belong together",
    )
    return short_images, short_labels


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


def _by_name(
    folder: Folder, files: Iterable[NamedFile], suffix: str, key: str, problems: ProblemHandler
) -> dict[str, str]:
    """Return the paths of files by their names without `suffix`."""
    by_name: dict[str, str] = {}
    for path, name in files:
        if not name.endswith(suffix):
            continue
        start, _, stem = name.rpartition("/")
        stem = stem.removesuffix(suffix) or stem
        name = f"{start}/{stem}" if start else stem
        with problems.skipping(f"{folder}/{path}"):
            if name in by_name:
                raise DatasetError(
                    f"{by_name[name]} and {path} are both called '{name}'", where=key, remedy="remove one of them"
                )
            by_name[name] = path
    if not by_name:
        raise DatasetError(
            f"no image in {folder} has a name that ends in '{suffix}'", where=key, remedy="correct the suffix"
        )
    return by_name


def _select_listed(
    image_names: dict[str, str],
    label_names: dict[str, str],
    file: File,
    images: str,
    key: str,
    problems: ProblemHandler,
) -> dict[str, str]:
    """Return the images in a list; a label that the list names beside an image becomes that of the image."""
    listed = read_listed(file, image_names)
    missing = [row.image for row, name in listed if name is None]
    if missing:
        error = DatasetError(
            f"{len(missing)} of {len(listed)} names in {file} are no images in {images}, the first is "
            f"'{printable(missing[0])}'",
            where=f"{key}.list",
            remedy="correct the list, or add the files",
        )
        problems.error(error, missing)
    named_labels = {name: row.label for row, name in listed if name and row.label}
    labels = find_listed(list(named_labels.values()), label_names)
    for name, label in zip(named_labels, labels, strict=True):
        if label is not None and label != name:
            label_names[name] = label_names[label]
    return {name: image_names[name] for _, name in listed if name is not None}


def read_pair_list(root: Folder, file: File, key: str, problems: ProblemHandler) -> list[ImageAndLabel]:
    """Read pairs of images and label images from a text file.

    Args:
        root: folder that the paths are relative to.
        file: see `read_list`.
        key: the list's key in the recipe, e.g. "data.train.list".
        problems: receives malformed lines, and files that do not exist.

    Raises:
        DatasetError: a line is malformed, the list is empty, or a file does not exist.
    """
    pairs: list[tuple[str, str]] = []
    for row in read_list(file):
        with problems.skipping(f"line {row.line}"):
            if row.label is None:
                raise DatasetError(
                    "expected '<image> <label>' (with a tab between names that have spaces)",
                    where=f"{file}, line {row.line}",
                    remedy=f"correct the line, or name the folders in {key.rpartition('.')[0]}.images and .annotations",
                )
            pairs.append((row.image, row.label))
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
