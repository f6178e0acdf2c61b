"""Pairs of images and label images that are found by the names of their folders, see `folder_names`."""

from __future__ import annotations

import bisect
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from maskwright.data.formats.folder_names import PlacedFile, place_files, read_name, without_meaning
from maskwright.data.storage.similar_names import comparable

_TRIED_SUFFIXES = 8  # of the names that are most like one


class PairedFiles(NamedTuple):
    """The images and label images of one split.

    Attributes:
        images: the files of images.
        labels: the files of label images, whose names are those of the images without the suffixes.
        image_suffix: end of the names of images only.
        label_suffix: end of the names of label images only.
        unused: folders with files of either kind that are not used, and the number of these files.
    """

    images: tuple[PlacedFile, ...]
    labels: tuple[PlacedFile, ...]
    image_suffix: str = ""
    label_suffix: str = ""
    unused: tuple[tuple[str, int], ...] = ()


class NoPairs(NamedTuple):
    """Images and label images whose names have nothing in common.

    Attributes:
        images: files of images.
        labels: files of label images.
    """

    images: tuple[PlacedFile, ...]
    labels: tuple[PlacedFile, ...]


def pair_files(paths: Sequence[str]) -> dict[str | None, PairedFiles]:
    """Return the pairs of each split; of the split None those in folders that name no split.

    Args:
        paths: relative paths of images.
    """
    for keep_numbers in (True, False):
        placed = place_files(paths, keep_numbers)
        if not keep_numbers and len({file[1:] for file in placed}) < len(placed):
            break  # the numbers tell files apart
        by_split: dict[str | None, list[PlacedFile]] = defaultdict(list)
        for file in placed:
            by_split[file.split].append(file)
        paired = {split: found for split, files in by_split.items() if (found := _pair_split(files))}
        if paired:
            return paired
    return {}


def unpaired_kinds(paths: Sequence[str]) -> NoPairs | None:
    """Return the files in folders of images, or else in those without a meaning, and those in folders of label images.

    None if there are not both.
    """
    files = place_files(paths, keep_numbers=False)
    labels = tuple(file for file in files if file.kind == "labels")
    images = tuple(file for file in files if file.kind == "images")
    images = images or tuple(file for file in files if file.kind is None)
    return NoPairs(images, labels) if images and labels else None


def _pair_split(files: Iterable[PlacedFile]) -> PairedFiles | None:
    places: dict[str | None, dict[str, list[PlacedFile]]] = {"images": {}, "labels": {}, None: {}}
    for file in files:
        places[file.kind].setdefault(file.place, []).append(file)
    images, labels = places["images"] or places[None], places["labels"]
    candidates = [(ours, theirs) for ours in images.values() for theirs in labels.values()]
    candidates.sort(key=lambda pair: (pair[0][0].rank, pair[1][0].rank))
    for match in (_match_equal, _match_suffixes, _match_words):
        matched = [(found, ours, theirs) for ours, theirs in candidates if (found := match(ours, theirs))]
        if matched:
            chosen, ours, theirs = matched[0]
            rest = [place for place in (*images.values(), *labels.values()) if place not in (ours, theirs)]
            unused = tuple((_common_folder(place), len(place)) for place in rest)
            return chosen._replace(unused=unused)
    return None


def _match_equal(images: Sequence[PlacedFile], labels: Sequence[PlacedFile]) -> PairedFiles | None:
    names = {comparable(file.name) for file in images}
    common = names & {comparable(file.name) for file in labels}
    return PairedFiles(tuple(images), tuple(labels)) if _are_enough(len(common), images, labels) else None


def _match_suffixes(images: Sequence[PlacedFile], labels: Sequence[PlacedFile]) -> PairedFiles | None:
    """Match names that differ in one end of all images, and one of all label images, such as _sat and _mask."""
    image_names, label_names = sorted(file.name for file in images), sorted(file.name for file in labels)
    for image in (image_names[0], image_names[-1]):
        for label in _nearest(image, label_names):
            start = posixpath.commonprefix([image, label])
            start = start.rstrip("_-. ") or start
            ends = image[len(start) :], label[len(start) :]
            if start and not start.endswith("/") and not any("/" in end for end in ends):
                bases = {name.removesuffix(ends[0]) for name in image_names if name.endswith(ends[0])}
                ours = {name.removesuffix(ends[1]) for name in label_names if name.endswith(ends[1])}
                if len(ours) == len(label_names) and _are_enough(len(bases & ours), images, labels):
                    return PairedFiles(tuple(images), tuple(labels), *ends)
    return None


def _nearest(name: str, others: Sequence[str]) -> list[str]:
    """Return those of the sorted names that begin most like `name`, the shortest first."""
    position = bisect.bisect_left(others, name)
    near = others[max(0, position - _TRIED_SUFFIXES) : position + _TRIED_SUFFIXES]
    return sorted(near, key=lambda other: (-len(posixpath.commonprefix([name, other])), len(other)))[:_TRIED_SUFFIXES]


def _match_words(images: Sequence[PlacedFile], labels: Sequence[PlacedFile]) -> PairedFiles | None:
    """Match names that differ in words for kinds and splits, such as img_1 and mask_1, or 21_test and 21_manual1."""
    image_names = Counter(without_meaning(file.name) for file in images)
    label_names = Counter(without_meaning(file.name) for file in labels)
    common = len(image_names.keys() & label_names.keys())
    is_unique = max(image_names.values()) == max(label_names.values()) == 1
    if is_unique and _are_enough(common, images, labels):
        return PairedFiles(tuple(images), tuple(labels))
    return None


def _are_enough(common: int, images: Sequence[PlacedFile], labels: Sequence[PlacedFile]) -> bool:
    """Return whether so many pairs are half of the images, or of the label images."""
    return common > 0 and 2 * common >= min(len(images), len(labels))


def folders_of_pairs(pairs: PairedFiles, paths: Sequence[str]) -> tuple[str, str]:
    """Return the folders of the images and of the label images of a split.

    Both are the same folder where names of folders inside say which files are images and which are labels.

    Args:
        pairs: the split.
        paths: of all images of the dataset.
    """
    images, labels = _common_folder(pairs.images), _common_folder(pairs.labels)
    inside = {
        folder: sum(path.startswith(f"{folder}/") if folder else True for path in paths) for folder in (images, labels)
    }
    is_apart = not f"{images}/".startswith(f"{labels}/") and not f"{labels}/".startswith(f"{images}/")
    is_apart = is_apart and bool(images) and bool(labels)
    is_alone = inside[images] == len(pairs.images) and inside[labels] == len(pairs.labels)
    if is_apart and is_alone and _names_within(pairs.images, images) and _names_within(pairs.labels, labels):
        return images, labels
    common = _common_folder((*pairs.images, *pairs.labels))
    return common, common


def _names_within(files: Sequence[PlacedFile], folder: str) -> bool:
    """Return whether the name of each file, without what all have in common, is its path in the folder."""
    start = {file.name.removesuffix(posixpath.splitext(file.path[len(folder) + 1 :])[0]) for file in files}
    return len(start) == 1


def _common_folder(files: Iterable[PlacedFile]) -> str:
    """Return the innermost folder of all files, up to the last part that names a kind or a split, if there is one."""
    folders = [posixpath.dirname(file.path) for file in files]
    parts = posixpath.commonpath(folders).split("/") if all(folders) else []
    parts = [part for part in parts if part]
    named = [n for n, part in enumerate(parts, 1) if (words := read_name(part, False)).kind or words.split]
    return "/".join(parts[: named[-1]] if named else parts)


def suffix_pairs(names: Mapping[str, set[str]], suffixes: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """Return the suffixes of images and label images that are in one folder, such as a.jpg and a_mask.png.

    Args:
        names: of the files of each split, without file extension.
        suffixes: to be tried, of images and label images.
    """
    for image, label in suffixes:
        if names and all(_has_pairs(stems, image, label) for stems in names.values()):
            return image, label
    return None


def _has_pairs(names: set[str], image_suffix: str, label_suffix: str) -> bool:
    """Return whether at least half of the names, and at least one, are those of label images of others."""
    labels = [name for name in names if name.endswith(label_suffix)]
    pairs = [name for name in labels if name.removesuffix(label_suffix) + image_suffix in names]
    return len(pairs) > 0 and 2 * len(pairs) >= len(labels)
