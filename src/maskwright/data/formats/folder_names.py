"""The words in the names of folders and files that say which split and which kind of image they hold.

`train_images`, `img_train`, `Train/Images`, `imagesTr` and `2_Ortho_RGB` are folders of images; `train_masks`,
`lab_train`, `labelsTr`, `ISIC2018_Training_GroundTruth` and `5_Labels_all` are folders of label images.
"""

from __future__ import annotations

import functools
import itertools
import posixpath
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}

Kind = Literal["images", "labels"]

# The most usual words first: they are preferred where a dataset has several folders of one kind.
_IMAGE_WORDS = (
    *("images", "image", "imgs", "img", "jpegimages", "rgb", "photos", "photo", "pictures", "input", "inputs"),
    *("ortho", "original", "originals", "sat", "satellite", "frames", "top", "x"),
)
_LABEL_WORDS = (
    *("manual", "labels", "annotations", "masks", "annot", "label", "mask", "gt", "ann", "groundtruth", "truth"),
    *("segmentation", "segmentations", "semantic", "annotation", "annots", "lab", "labs", "lbl", "gts", "seg", "sem"),
    *("parsing", "trimaps", "trimap", "target", "targets", "segmentationclass", "segmentationclasspng", "y"),
)
_SPLIT_WORDS = {word: split for split, words in SPLIT_NAMES.items() for word in words} | {"trainval": "train"}
_SHORT_SPLIT_WORDS = {"tr": "train", "te": "test", "ts": "test"}  # beside other words only
_COLOR_WORDS = frozenset({"rgb", "color", "colors", "colored", "colormaps", "colormap"})  # label images to look at
_FILLERS = frozenset(
    {
        "all",
        "and",
        "class",
        "data",
        "dataset",
        "dir",
        "dirs",
        "files",
        "folder",
        "folders",
        "for",
        "ground",
        "k",
        "of",
        "set",
    }
    | {"sets", "stage", "the", "png", "pngs", "jpg", "jpgs", "jpeg", "tif", "tiff", "tiffs", "bmp", "gif", "npy"}
)
_LETTERS = ("x", "y")  # words for kinds, but not beside words without a meaning
_SEPARATORS = re.compile(r"[\W_]+")
_PARTS = re.compile(r"\d+(?:st|nd|rd|th)(?![a-z])|\d+|[A-Z]+(?![a-z])|[^\W\d_][^\W\d_A-Z]*")
_PAINTED_RANK, _REST_RANK, _OTHER_RANK = 100, 200, 1000


class NameWords(NamedTuple):
    """The meaning of the name of a folder or file.

    Attributes:
        kind: of the images in it; None if it does not say so.
        split: that they belong to; None if it does not say so.
        meaning: the words that say so, joined.
        rest: the other words, joined.
        rank: lower for more usual names of the kind.
    """

    kind: Kind | None
    split: str | None
    meaning: str
    rest: str
    rank: int


class PlacedFile(NamedTuple):
    """A file with the meaning of the folders that it is in.

    Attributes:
        path: relative, with "/".
        kind: as in `NameWords`, by the innermost folder that says so.
        split: as in `NameWords`, by the innermost folder that says so.
        name: its path without the words for kinds and splits, and without file extension.
        place: the words of its folders that name a kind or a split.
        rank: of its kind.
    """

    path: str
    kind: Kind | None
    split: str | None
    name: str
    place: str
    rank: int


@functools.lru_cache(64)
def read_name(name: str, keep_numbers: bool = True) -> NameWords:
    """Return the meaning of a name.

    Args:
        name: of a folder or file, without extension.
        keep_numbers: whether numbers belong to the rest, as in images_256 beside images_512, but not in 2_Ortho_RGB.
    """
    words = _words(name)
    has_meaning = [_has_meaning(word, words, keep_numbers) for word in words]
    meaning = "_".join(itertools.compress(words, has_meaning))
    rest = "_".join(word for word, known in zip(words, has_meaning, strict=True) if not known)
    usable = [word for word in words if word not in _LETTERS] if rest else words
    labels = [_LABEL_WORDS.index(word) for word in usable if word in _LABEL_WORDS]
    images = [_IMAGE_WORDS.index(word) for word in usable if word in _IMAGE_WORDS]
    kind: Kind | None = "labels" if labels else "images" if images else None
    if labels and images and "and" in words:  # a folder around both
        kind = None
    splits = {split for word in words if (split := _split_of_word(word, words))}
    split = "train" if splits == {"train", "val"} else splits.pop() if len(splits) == 1 else None
    rank = min(labels or images, default=_OTHER_RANK) + (_REST_RANK if rest else 0)
    rank += _PAINTED_RANK if labels and _COLOR_WORDS.intersection(words) else 0
    return NameWords(kind, split, meaning, rest, rank)


def place_files(paths: Sequence[str], keep_numbers: bool = True) -> list[PlacedFile]:
    """Return the files with the meaning of their folders.

    A folder like uavid_train names a split if there is another like uavid_val.

    Args:
        paths: relative paths.
        keep_numbers: see `read_name`.
    """
    folders = {path.rpartition("/")[0] for path in paths}
    names = {name for folder in folders for name in folder.split("/") if name}
    splits_of_rest: dict[str, set[str]] = {}
    for name in names:
        words = read_name(name)
        if words.split and words.kind is None and not words.rest.replace("_", "").isdigit():
            splits_of_rest.setdefault(words.rest, set()).add(words.split)
    split_rests = {rest for rest, splits in splits_of_rest.items() if len(splits) > 1} | {""}
    placed = {folder: _place_folder(folder, split_rests, keep_numbers) for folder in folders}
    files = []
    for path in paths:
        kind, split, name, place, rank = placed[path.rpartition("/")[0]]
        stem = posixpath.splitext(posixpath.basename(path))[0]
        files.append(PlacedFile(path, kind, split, f"{name}/{stem}" if name else stem, place, rank))
    return files


def _place_folder(
    folder: str, split_rests: set[str], keep_numbers: bool
) -> tuple[Kind | None, str | None, str, str, int]:
    """Return (kind, split, name, place, rank) of the files in a folder."""
    kind: Kind | None = None
    split, rank, names, places = None, _OTHER_RANK, [], []
    for part in filter(None, folder.split("/")):
        words = read_name(part, keep_numbers)
        names_split = words.split is not None and (words.kind is not None or read_name(part).rest in split_rests)
        if words.kind is None and not names_split:
            if words.rest or words.split or not _FILLERS.intersection(_words(part)):
                names.append(part)
            continue
        if words.kind is not None or words.split != split:  # train/images/collage-train is in the place train/images
            places.append(words.meaning)
        if words.rest:
            names.append(words.rest)
        if words.split is not None:
            split = words.split
        if words.kind is not None and (kind is None or words.rank < _REST_RANK or rank >= _REST_RANK):
            kind, rank = words.kind, words.rank
    return kind, split, "/".join(names), "/".join(places), rank


def without_meaning(name: str) -> str:
    """Return the last part of a path without words for kinds and splits: 21 of 21_manual1 and 21_training.

    The name is unchanged if nothing else would remain.
    """
    folder, _, stem = name.rpartition("/")
    words = _words(stem)
    kept = [word for word in words if word.isdigit() or not _has_meaning(word, words, keep_numbers=True)]
    while kept and _is_numbered_kind(words, kept):
        kept.pop()
    joined = "_".join(kept) or stem
    return f"{folder}/{joined}" if folder else joined


def _is_numbered_kind(words: Sequence[str], kept: Sequence[str]) -> bool:
    """Return whether the last word is the number of a kind, as in manual1, and not the only one."""
    return len(kept) > 1 and kept[-1].isdigit() and words[-1] == kept[-1] and words[-2] in _LABEL_WORDS


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case: those between separators, else those of CamelCase."""
    words = []
    for piece in filter(None, _SEPARATORS.split(name)):
        folded = piece.casefold()
        if _is_known(folded):
            words.append(folded)
        elif folded.startswith("stage") and folded[5:].isdigit():
            words.append("stage")
        elif folded.endswith("annot"):
            words += [folded.removesuffix("annot"), "annot"]
        else:
            words += [part.casefold() for part in _PARTS.findall(piece)]
    return words


def _is_known(word: str) -> bool:
    return word in _IMAGE_WORDS or word in _LABEL_WORDS or word in _SPLIT_WORDS or word in _FILLERS


def _has_meaning(word: str, words: Sequence[str], keep_numbers: bool) -> bool:
    if word.isdigit():
        return not keep_numbers
    if word[0].isdigit():  # 1st
        return True
    is_color = word in _COLOR_WORDS and any(other in _LABEL_WORDS for other in words)
    return _is_known(word) or is_color or _split_of_word(word, words) is not None


def _split_of_word(word: str, words: Sequence[str]) -> str | None:
    return _SPLIT_WORDS.get(word) or (_SHORT_SPLIT_WORDS.get(word) if len(words) > 1 else None)
