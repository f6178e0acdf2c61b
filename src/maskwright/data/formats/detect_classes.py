"""Detection of the classes of label images: from tables beside them, or the values and colors in a sample of them."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
from maskwright.data.images.label_images import read_label_image
from maskwright.data.storage.folders import Folder
from maskwright.errors import DatasetError

_EDGE_SAMPLE = 20  # label images, to find values that were added on edges
_MIN_COLORS, _MAX_COLORS = 3, 256  # to take a built-in list for granted; of painted label images
_USUAL_LEVELS = frozenset((0, 64, 127, 128, 192, 255))  # of red, green and blue in the palettes of annotation tools
_VOID, _NO_DATA = 255, 65535
_MAX_VALUES = 100  # of one image, to take values for classes
_MIN_COUNTED, _MIN_UNSHARED = 8, 20  # values that are 1, 2, 3, ..., or that no two images share, to number objects
_MIN_FILLED = 0.8  # of 1, 2, 3, ..., the values of an image that number objects
_MIN_LARGEST_PART = 0.9  # of an object's pixels; the rest are stray ones
_MIN_SINGLE_AREAS = 0.7  # of the values that number objects
_MIN_EQUAL_NEIGHBORS = 0.6  # of neighboring pixels that are not 0, for values to number objects, not levels of gray
_LOVEDA_CLASSES = 7


def find_classes(root: Folder, labels: Sequence[str], notes: list[str]) -> dict[str, object]:
    """Return `categories` and `ignore_values` of a data section, and add what is guessed to `notes`.

    Args:
        root: the dataset.
        labels: label images, all of which are read.
        notes: see `Detection`.

    Raises:
        DatasetError: none can be read, or they have values that interpolation or compression added.
    """
    return classes_of_sample(root, labels, read_sample(root, labels), notes)


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


def read_sample(root: Folder, labels: Sequence[str]) -> LabelSample:
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
    if added or (sample.is_painted and len(sample.colors) > _MAX_COLORS and not are_object_numbers(sample)):
        raise DatasetError(_edge_mismatch(folder, added, count, sample.is_painted))
    if sample.is_painted and sample.values:
        raise DatasetError(f"some label images in {folder} are painted in colors, and others have values")
    return sample


def classes_of_sample(root: Folder, labels: Sequence[str], sample: LabelSample, notes: list[str]) -> dict[str, object]:
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


def are_object_numbers(sample: LabelSample) -> bool:
    """Return whether the values number objects: they are no classes, and no levels of gray."""
    return _are_no_classes(sample) and min(sample.values, default=0) >= 0 and _are_areas(sample)


def _are_no_classes(sample: LabelSample) -> bool:
    """Return whether values seem to number the objects of each image, or of all images, or to be levels of gray.

    Those of an image are then very many; or 1, 2, 3, ... up to another number, of which some may be missing if they
    are many; or values that no other image has. Nearly all are one area then, whereas a class is often in several.
    """
    used = [values for values in sample.values_of_images if values]
    if any(len(values) > _MAX_VALUES for values in used):
        return True
    distinct = set().union(*used)
    if len(distinct) < _MIN_COUNTED:
        return False
    are_many = len(distinct) >= _MIN_UNSHARED
    filled = _MIN_FILLED if are_many else 1.0  # objects that were deleted leave gaps
    is_counted = all(len(values) >= filled * max(values) for values in used)
    if len(used) < 2:
        are_numbers = is_counted and are_many
    else:
        is_counted = is_counted and len({len(values) for values in used}) > 1
        are_numbers = is_counted or (are_many and len(distinct) == sum(map(len, used)))
    return are_numbers and (not _are_areas(sample) or _share_of_single_areas(sample) > _MIN_SINGLE_AREAS)


def _are_areas(sample: LabelSample) -> bool:
    """Return whether neighboring pixels have mostly the same value, other than those of levels of gray."""
    equal = differing = 0
    for _, numbers in sample.images:
        left, right = numbers[:, :-1], numbers[:, 1:]
        is_object = (left != 0) & (right != 0)
        equal += np.count_nonzero(is_object & (left == right))
        differing += np.count_nonzero(is_object & (left != right))
    return bool(equal > _MIN_EQUAL_NEIGHBORS * (equal + differing))


def _share_of_single_areas(sample: LabelSample) -> float:
    """Return the share of the values of all images but 0 and 255 whose pixels are one area, but for small parts."""
    import scipy.ndimage  # takes 0.3 s, and few datasets need it

    single = count = 0
    for _, numbers in sample.images:
        values, ranks = np.unique(numbers, return_inverse=True)
        ranks = ranks.reshape(numbers.shape)
        for rank, box in enumerate(scipy.ndimage.find_objects(ranks + 1)):
            if values[rank] in (0, _VOID):
                continue
            parts, _ = scipy.ndimage.label(ranks[box] == rank, np.ones((3, 3)))
            areas = np.bincount(parts.ravel())[1:]
            single += areas.max() >= _MIN_LARGEST_PART * areas.sum()
            count += 1
    return single / count if count else 0.0


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
