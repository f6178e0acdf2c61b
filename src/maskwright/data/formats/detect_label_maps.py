"""Detection of images and their label images: by the names of folders and files, and by lists."""

from __future__ import annotations

import contextlib
import itertools
import posixpath
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from maskwright.data.formats.detect_classes import are_object_numbers, classes_of_sample, read_sample
from maskwright.data.formats.folder_names import place_files
from maskwright.data.formats.folder_pairs import (
    PairedFiles,
    folders_of_pairs,
    pair_files,
    suffix_pairs,
    unpaired_kinds,
)
from maskwright.data.formats.image_list import describe_files, labels_beside_photos
from maskwright.data.formats.layouts import Detection, SplitSections, detected
from maskwright.data.formats.split_lists import read_list, read_listed, split_of_list
from maskwright.data.images.find import is_image_name
from maskwright.data.storage.folders import Folder
from maskwright.errors import DatasetError

# Ends of the names of images, and of label images in the folder of their images.
_SUFFIXES = tuple(
    itertools.product(
        ("", "_sat", "_image", "_img"),
        ("_mask", "_masks", "_label", "_labels", "_seg", "_gt", "_segmentation", "_1stHO", "_cp_masks"),
    )
)
_SAMPLED_LABELS = 200  # of each split, to detect the classes
_VIDEO_FRAME = re.compile(r"(?:^|/)(?:JPEGImages|Annotations)/(?:[^/]+/){1,2}\d{5}\.(?:jpg|png)$")
_MAX_LISTS = 20  # that are opened


class FoundSplit(NamedTuple):
    """The files of a split.

    Attributes:
        section: of the recipe.
        images: paths of the images, by name.
        labels: paths of the label images.
    """

    section: dict[str, str]
    images: dict[str, str]
    labels: list[str]


class FoundFiles(NamedTuple):
    """The files of a dataset.

    Attributes:
        splits: by name.
        keys: of the recipe's `data` section.
        notes: see `Detection`.
    """

    splits: dict[str, FoundSplit]
    keys: dict[str, Any]
    notes: list[str]


def detect(root: Folder) -> Detection:
    """Detect images and label images in folders of any usual names, see `folder_names`, or in one folder.

    Without folders for the splits, lists like train.txt or train.csv define them. The classes are those of a table of
    colors beside the folders, or a built-in list whose colors are in the label images, or else the values or colors
    that occur in the first 200 label images of each split, with 255 ignored unless there are only 0 and 255. Label
    images whose values number objects are instance maps.
    """
    paths = [name for name in all_names(root) if is_image_name(name)]
    found = _pairs_by_folders(paths) or _pairs_in_one_folder(paths) or _pairs_in_lists(root)
    if found is None:
        return Detection(mismatch=_mismatch(root, paths))
    found = split_by_lists(root, found)
    return _with_classes(root, found)


def all_names(root: Folder) -> list[str]:
    """Return the relative names of all files on disk and in archives, sorted, without hidden ones."""
    names = {*root.names(), *root.index.below(f"{root.path}/" if root.path else "")}
    return sorted(name for name in names if not name.startswith(".") and "/." not in name)


def _pairs_by_folders(paths: list[str]) -> FoundFiles | None:
    pairs = {split or "": found for split, found in pair_files(paths).items()}
    notes = []
    if "" in pairs:
        unsplit = pairs.pop("")
        if "train" in pairs:
            notes.append(f"{len(unsplit.images)} images outside the folders of the splits are not used")
        else:
            pairs["train"] = unsplit
    if not pairs:
        return None
    for split, count in _unlabeled_splits(paths, pairs).items():
        notes.append(f"{split}: {count} images have no label images and are not used")
    suffixes = {(found.image_suffix, found.label_suffix) for found in pairs.values()}
    keys = dict(zip(("image_suffix", "label_suffix"), suffixes.pop(), strict=True)) if len(suffixes) == 1 else {}
    splits = {}
    for split, found in pairs.items():
        images, labels = folders_of_pairs(found, paths)
        section = {"images": images or ".", "annotations": labels or "."}
        by_name = {file.name.removesuffix(keys.get("image_suffix", "")): file.path for file in found.images}
        splits[split] = FoundSplit(section, by_name, [file.path for file in found.labels])
        notes += [f"{count} images in {folder or '.'} are not used" for folder, count in found.unused]
        if images == labels:
            notes.append(_note_on_parts(found))
    return FoundFiles(splits, {key: value for key, value in keys.items() if value}, notes)


def _unlabeled_splits(paths: list[str], found: Mapping[str, PairedFiles]) -> Counter[str]:
    """Return the number of images in folders of the splits that were not found."""
    files = place_files(paths)
    return Counter(file.split for file in files if file.split and file.split not in found and file.kind != "labels")


def _note_on_parts(pairs: PairedFiles) -> str:
    """Say which folders are joined."""
    folders = sorted({file.path.rpartition("/")[0] for file in (*pairs.images, *pairs.labels)})
    shown = ", ".join(folder or "." for folder in folders[:4]) + (", ..." if len(folders) > 4 else "")
    return f"{len(folders)} folders are one split, the names of which tell images and label images apart: {shown}"


def _pairs_in_one_folder(paths: list[str]) -> FoundFiles | None:
    """Find a.jpg beside a_mask.png, or beside a.png."""
    by_split: dict[str, list[str]] = {}
    for file in place_files([path for path in paths if not path.rpartition("/")[2].startswith("ADE_")]):
        by_split.setdefault(file.split or "", []).append(
            file.path
        )  # names of ADE20K's own, whose colors are no classes
    if "" in by_split:
        unsplit = by_split.pop("")
        by_split = by_split or {"train": unsplit}
    stems = {split: {posixpath.splitext(path)[0] for path in files} for split, files in by_split.items()}
    suffixes = suffix_pairs(stems, _SUFFIXES)
    splits: dict[str, FoundSplit] = {}
    notes = []
    for split, files in by_split.items():
        image_suffix, label_suffix = suffixes or ("", "")
        if suffixes is not None:
            labels = {path for path in files if posixpath.splitext(path)[0].endswith(label_suffix)}
        else:
            labels = labels_beside_photos(files)
            notes.append(f"{split}: {len(labels)} files are label images because a JPEG file has the same name")
        images = {posixpath.splitext(path)[0].removesuffix(image_suffix): path for path in files if path not in labels}
        if not labels or 2 * len(labels) < len(images):
            return None
        folder = posixpath.normpath(posixpath.commonpath([f"./{posixpath.dirname(path)}" for path in files]))
        splits[split] = FoundSplit({"images": folder, "annotations": folder}, images, sorted(labels))
    if not splits:
        return None
    keys = {"image_suffix": suffixes[0], "label_suffix": suffixes[1]} if suffixes else {}
    return FoundFiles(splits, keys, notes)


def _pairs_in_lists(root: Folder) -> FoundFiles | None:
    """Find lists of '<image> <label>', which exist in the root."""
    splits: dict[str, FoundSplit] = {}
    for split, path in _lists(root):
        with contextlib.suppress(DatasetError):
            rows = read_list(root.file(path, "list"))
            pairs = [(row.image, row.label) for row in rows if row.label is not None]
            files = root.files([name for pair in pairs[:_SAMPLED_LABELS] for name in pair])
            if split not in splits and len(pairs) == len(rows) and all(files):
                images = {image: image for image, _ in pairs}
                splits[split] = FoundSplit({"list": path}, images, [label for _, label in pairs])
    return FoundFiles(splits, {}, []) if splits else None


def _lists(root: Folder) -> list[tuple[str, str]]:
    """Return (split, path) of the files that are called like lists of a split, those at the top first."""
    found = [(split, name) for name in all_names(root) if (split := split_of_list(name))]
    return sorted(found, key=lambda entry: ("trainval" in entry[1].lower(), entry[1].count("/"), entry[1]))[:_MAX_LISTS]


def split_by_lists(root: Folder, found: FoundFiles) -> FoundFiles:
    """Divide a dataset whose folders are those of one split by lists, if there are any."""
    if set(found.splits) != {"train"} or "list" in found.splits["train"].section:
        return found
    whole, notes = found.splits["train"], list(found.notes)
    splits: dict[str, FoundSplit] = {}
    for split, path in _lists(root):
        try:
            listed = [name for _, name in read_listed(root.file(path, "list"), whole.images)]
        except DatasetError as error:
            notes.append(f"{path} is not used: {error.found}")
            continue
        names = {name for name in listed if name is not None}
        if not names:
            notes.append(
                f"{path} is not used: none of its {len(listed)} entries is the name of an image or a folder of images"
            )
        elif split in splits:
            notes.append(f"{path} is not used, but {splits[split].section['list']}")
        else:
            images = {name: whole.images[name] for name in sorted(names)}
            splits[split] = FoundSplit({**whole.section, "list": path}, images, whole.labels)
    if "train" not in splits:
        unused = [
            f"{entry.section['list']} is not used, as no list names the training images" for entry in splits.values()
        ]
        return found._replace(notes=[*notes, *unused])
    if len(splits) == 1 and len(splits["train"].images) == len(whole.images):
        return found._replace(notes=notes)
    if unlisted := len(whole.images) - len(set().union(*(entry.images for entry in splits.values()))):
        notes.append(f"{unlisted} images are in no list and are not used")
    return FoundFiles(splits, found.keys, notes)


def _mismatch(root: Folder, paths: list[str]) -> str:
    """Say why no pairs were found in folders of the usual names."""
    unpaired = unpaired_kinds(paths)
    if unpaired is not None:
        image, label = unpaired.images[0].path, unpaired.labels[0].path
        return f"no label image has the name of an image (such as {image} and {label})"
    kinds = {file.kind: file for file in place_files(paths)}
    if "labels" in kinds:
        return f"there are label images such as {kinds['labels'].path}, but no images"
    others = [file for file in place_files(all_names(root)) if not is_image_name(file.path)]
    for kind, noun in (("labels", "label images"), ("images", "images")):
        folder = next((posixpath.dirname(file.path) for file in others if file.kind == kind), None)
        if folder is not None and kind not in kinds:
            found = describe_files(file.path for file in others if posixpath.dirname(file.path) == folder)
            hint = "; YOLO needs a data.yaml with the names of the classes" if ".txt" in found else ""
            return f"the folder {folder} has no {noun}, but {found}{hint}"
    if "images" in kinds:
        folder = kinds["images"].path.rpartition("/")[0]
        return f"there is a folder {folder}, but none of label images (labels, annotations, masks, gt, target, ...)"
    return ""


def _is_video(found: FoundFiles) -> bool:
    """Return whether the folders are those of DAVIS and YouTube-VOS, whose values number the objects of a clip."""
    paths = [path for split in found.splits.values() for path in (*split.images.values(), *split.labels)]
    return all(_VIDEO_FRAME.search(path) for path in paths)


def _with_classes(root: Folder, found: FoundFiles) -> Detection:
    """Return the data section with the classes of the label images, or that of instance maps."""
    notes = list(found.notes)
    labels = dict.fromkeys(tuple(split.labels[:_SAMPLED_LABELS]) for split in found.splits.values())
    sections: SplitSections = {split: entry.section for split, entry in found.splits.items()}
    paths = [path for paths in labels for path in paths]
    try:
        sample = read_sample(root, paths)
        is_video = _is_video(found)
        if is_video or are_object_numbers(sample):
            reason = f"the {sample.kind} of the label images number objects"
            reason += ", as the folders are those of DAVIS and YouTube-VOS" if is_video else ""
            notes.append(
                f"{reason}, so each is one object, all of the class 'object'; if they are classes, name "
                "data.format=label_maps and data.categories in a recipe"
            )
            config = detected(root.root, "instance_maps", "instance", sections, **found.keys)
            return Detection((config,), notes=tuple(notes))
        keys = classes_of_sample(root, paths, sample, notes)
    except DatasetError as error:
        return Detection(mismatch=error.found)
    config = detected(root.root, "label_maps", "semantic", sections, **keys, **found.keys)
    return Detection((config,), notes=tuple(notes))
