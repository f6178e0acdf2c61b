"""Detection of label images: by the names of folders and files, and by lists; and of their classes."""

from __future__ import annotations

import contextlib
import itertools
import posixpath
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from maskwright.config.categories import category_entries, category_list_names
from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.color_tables import (
    color_codes,
    color_of,
    colors_of_classes,
    read_color_table,
    read_value_table,
)
from maskwright.data.formats.edge_values import find_added_values
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
from maskwright.data.formats.split_lists import find_listed, read_list, split_of_list
from maskwright.data.images.find import is_image_name
from maskwright.data.images.label_images import read_label_image
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
_EDGE_SAMPLE = 20  # of these, to find values that were added on edges
_MIN_COLORS, _MAX_COLORS = 3, 256  # to take a built-in list for granted; of painted label images
_USUAL_LEVELS = frozenset((0, 64, 127, 128, 192, 255))  # of red, green and blue in the palettes of annotation tools
_VOID, _NO_DATA = 255, 65535
_MAX_VALUES = 100  # of one image, to take values for classes
_MIN_COUNTED, _MIN_UNSHARED = 8, 20  # values that are 1, 2, 3, ..., or that no two images share, to number objects
_MIN_EQUAL_NEIGHBORS = 0.6  # of neighboring pixels that are not 0, for values to number objects, not levels of gray
_MAX_LISTS = 20  # that are opened
_LOVEDA_CLASSES = 7


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
            listed = find_listed([row.image for row in read_list(root.file(path, "list"))], whole.images)
        except DatasetError as error:
            notes.append(f"{path} is not used: {error.found}")
            continue
        names = {name for name in listed if name is not None}
        if not names:
            notes.append(f"{path} is not used: none of its {len(listed)} entries is the name of an image")
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


def _with_classes(root: Folder, found: FoundFiles) -> Detection:
    """Return the data section with the classes of the label images, or that of instance maps."""
    notes = list(found.notes)
    labels = dict.fromkeys(tuple(split.labels[:_SAMPLED_LABELS]) for split in found.splits.values())
    sections: SplitSections = {split: entry.section for split, entry in found.splits.items()}
    paths = [path for paths in labels for path in paths]
    try:
        sample = _read_sample(root, paths)
        if _are_object_numbers(sample):
            notes.append(
                f"the {sample.kind} of the label images number objects, so each is one object, all of the class "
                "'object'; if they are classes, name data.format=label_maps and data.categories in a recipe"
            )
            config = detected(root.root, "instance_maps", "instance", sections, **found.keys)
            return Detection((config,), notes=tuple(notes))
        keys = _classes_of_sample(root, paths, sample, notes)
    except DatasetError as error:
        return Detection(mismatch=error.found)
    config = detected(root.root, "label_maps", "semantic", sections, **keys, **found.keys)
    return Detection((config,), notes=tuple(notes))


def find_classes(root: Folder, labels: Sequence[str], notes: list[str]) -> dict[str, object]:
    """Return `categories` and `ignore_values` of a data section, and add what is guessed to `notes`.

    Args:
        root: the dataset.
        labels: label images, all of which are read.
        notes: see `Detection`.

    Raises:
        DatasetError: none can be read, or they have values that interpolation or compression added.
    """
    return _classes_of_sample(root, labels, _read_sample(root, labels), notes)


class LabelSample(NamedTuple):
    """What occurs in a sample of label images.

    Attributes:
        values: of gray label images.
        colors: of the others, as codes.
        values_of_images: the values or codes of each image but for 0 and 255.
        images: some label images (H, W) or (H, W, 3), each with one number (H, W) for each of its values or colors.
    """

    values: set[int]
    colors: set[int]
    values_of_images: list[set[int]]
    images: list[tuple[np.ndarray, np.ndarray]]

    @property
    def is_painted(self) -> bool:
        """Whether there are colors other than gray."""
        return any(len(set(color_of(code))) > 1 for code in self.colors)

    @property
    def kind(self) -> str:
        """What to call the values in a message."""
        return "colors" if self.is_painted else "values"


def _read_sample(root: Folder, labels: Sequence[str]) -> LabelSample:
    """Read label images; those that cannot be read are left out, and reported when all files are read.

    Raises:
        DatasetError: none can be read; some are painted and others are not; or they have values that interpolation or
            compression added.
    """
    sample = LabelSample(set(), set(), [], [])
    first_error = ""
    for file in filter(None, root.files(labels)):
        try:
            image = read_label_image(file, allow_colors=True)
        except DatasetError as error:
            first_error = first_error or f"{error.where or file}: {error.found}"
            continue
        numbers = color_codes(image) if image.ndim == 3 else image
        present = set(np.unique(numbers).tolist())
        (sample.colors if image.ndim == 3 else sample.values).update(present)
        sample.values_of_images.append(present - {0, _VOID})
        if len(sample.images) < _EDGE_SAMPLE:
            sample.images.append((image, numbers))
    if not sample.values and not sample.colors:
        raise DatasetError(first_error)
    folder = posixpath.dirname(labels[0])
    added, count = find_added_values(sample.images)
    if added or (sample.is_painted and len(sample.colors) > _MAX_COLORS and not _are_object_numbers(sample)):
        raise DatasetError(_edge_mismatch(folder, added, count, sample.is_painted))
    if sample.is_painted and sample.values:
        raise DatasetError(f"some label images in {folder} are painted in colors, and others have values")
    return sample


def _classes_of_sample(root: Folder, labels: Sequence[str], sample: LabelSample, notes: list[str]) -> dict[str, object]:
    """Return what `find_classes` returns.

    Raises:
        DatasetError: the values number objects or are levels of gray; or two tables of classes differ.
    """
    if _are_no_classes(sample):
        raise DatasetError(
            f"the {len(sample.values | sample.colors)} {sample.kind} in {posixpath.dirname(labels[0])} seem to number "
            "objects or to be levels of gray, not classes; write one binary image per object (masks/IMAGE/1.png) or a "
            "COCO JSON, or list the classes in a recipe"
        )
    if sample.is_painted:
        return _color_classes(_read_tables(root, labels, _table_around), sample.colors, notes)
    values = sample.values | {code & 255 for code in sample.colors}
    listed = _read_tables(root, labels, read_value_table)
    if values - {_VOID} and values - {_VOID} <= {entry.id for entry in listed}:
        return {"categories": listed, "ignore_values": (_VOID,)}
    return _published_classes(labels, values, notes) or _value_classes(values, notes)


def _read_tables(
    root: Folder, labels: Sequence[str], read: Callable[[Folder], tuple[CategoryConfig, ...]]
) -> tuple[CategoryConfig, ...]:
    """Return the classes in a table beside the label images of each split; empty if there is none.

    Raises:
        DatasetError: two tables differ.
    """
    folders = dict.fromkeys(posixpath.dirname(label) for label in labels)
    tables = {path: table for path in folders if (table := read(Folder(root.root, root.index, path)))}
    first = next(iter(tables), "")
    if other := next((path for path, table in tables.items() if table != tables[first]), None):
        raise DatasetError(
            f"the tables of classes for {first or 'the folder'} and {other} differ; export all splits together"
        )
    return tables.get(first, ())


def _edge_mismatch(folder: str, added: list[int], count: int, is_painted: bool) -> str:
    kind = "colors" if is_painted else "values"
    found = f"{len(added)} of {count} {kind}" if added else f"{count} {kind}"
    return (
        f"the label images in {folder} have {found} that are only on edges between others, as after resizing with "
        "interpolation or lossy compression (JPEG); export them again with nearest-neighbor resizing, as PNG"
    )


def _published_classes(labels: Sequence[str], values: set[int], notes: list[str]) -> dict[str, object]:
    """Return the class list of LoveDA, if its folders are there: Train/Urban/masks_png and so on."""
    folders = {label.rpartition("/")[0].casefold() for label in labels}
    areas = {area for folder in folders for area in ("urban", "rural") if f"/{area}/masks_png" in f"/{folder}"}
    if areas != {"urban", "rural"} or max(values) > _LOVEDA_CLASSES:
        return {}
    notes.append("classes are those of LoveDA, as its folders have the published names; 0 (no data) is ignored")
    return {"categories": "loveda"}


def _are_object_numbers(sample: LabelSample) -> bool:
    """Return whether the values number objects: they are no classes, and their pixels are areas of one value each.

    Levels of gray differ from pixel to pixel.
    """
    if not _are_no_classes(sample) or min(sample.values, default=0) < 0:
        return False
    equal = differing = 0
    for _, numbers in sample.images:
        left, right = numbers[:, :-1], numbers[:, 1:]
        is_object = (left != 0) & (right != 0)
        equal += np.count_nonzero(is_object & (left == right))
        differing += np.count_nonzero(is_object & (left != right))
    return bool(equal > _MIN_EQUAL_NEIGHBORS * (equal + differing))


def _are_no_classes(sample: LabelSample) -> bool:
    """Return whether values seem to number the objects of each image, or of all images, or to be levels of gray.

    Those of an image are then 1, 2, 3, ... up to another number, or values that no other image has, or very many.
    """
    used = [values for values in sample.values_of_images if values]
    if any(len(values) > _MAX_VALUES for values in used):
        return True
    distinct = set().union(*used)
    if len(distinct) < _MIN_COUNTED:
        return False
    is_counted = all(max(values) == len(values) for values in used)
    if len(used) < 2:
        return is_counted and len(distinct) >= _MIN_UNSHARED
    is_counted = is_counted and len({len(values) for values in used}) > 1
    return is_counted or (len(distinct) >= _MIN_UNSHARED and len(distinct) == sum(map(len, used)))


def _value_classes(values: set[int], notes: list[str]) -> dict[str, object]:
    """Return one class for each value."""
    if len(values) == 1:
        notes.append(f"label images have only the value {min(values)}, so that there is one class")
    if values == {0, _VOID}:
        notes.append("label images have only the values 0 and 255, so 255 is a class and not ignored")
        void: set[int] = set()
    else:
        void = {_VOID}
    if _NO_DATA in values:
        notes.append(f"{_NO_DATA} is ignored")
        void.add(_NO_DATA)
    ignored = {value for value in values if value < 0} | void
    ids = sorted(values - ignored) or [0]
    categories = tuple(CategoryConfig(id=value, name=f"class {value}", is_thing=False) for value in ids)
    return {"categories": categories, "ignore_values": tuple(sorted(ignored, reverse=True))}


def _color_classes(table: Sequence[CategoryConfig], codes: set[int], notes: list[str]) -> dict[str, object]:
    """Return the classes of painted label images: those of a table, of the only built-in list that fits, or colors."""
    colors = {color_of(code) for code in codes}
    if any(entry.color for entry in table):
        return {"categories": tuple(entry.model_copy(update={"is_thing": False}) for entry in table)}
    palettes = {name: set(colors_of_classes(category_entries(name))) for name in category_list_names()}
    lists = [name for name, palette in palettes.items() if colors <= palette]
    is_distinctive = any(not _USUAL_LEVELS.issuperset(color) for color in colors)
    if (
        len(lists) == 1
        and len(colors) >= _MIN_COLORS
        and (is_distinctive or 2 * len(colors) >= len(palettes[lists[0]]))
    ):
        notes.append(f"classes are those of the built-in list '{lists[0]}', which alone has all {len(colors)} colors")
        return {"categories": lists[0]}
    named = [
        CategoryConfig(id=i, name=f"color {color}", is_thing=False, color=color)
        for i, color in enumerate(sorted(colors))
    ]
    return {"categories": tuple(named)}


def _table_around(folder: Folder) -> tuple[CategoryConfig, ...]:
    """Return the classes in a table of colors in the folder or one around it, see `read_color_table`; empty if none."""
    path = folder.path
    while True:
        table = read_color_table(Folder(folder.root, folder.index, path))
        if table is not None or not path:
            return table or ()
        path = path.rpartition("/")[0]
