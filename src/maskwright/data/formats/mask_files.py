"""One binary image per mask: of an object (Data Science Bowl 2018), or of a class.

Masks are below folders named like masks, as in ID/masks/*.png beside ID/images/ID.png, masks/IMAGE/*.png,
masks/IMAGE/CLASS/*.png, masks/CLASS/IMAGE/*.png, masks/CLASS/IMAGE.png or masks/IMAGE_1.png. A mask belongs to the
image whose name its path contains. The other folders name its class; without any, all are of the class "object". Masks
may overlap. Images without masks have no objects. For the task semantic, pixels without a mask are background.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import hotcoco.mask
import numpy as np

from maskwright.config.categories import category_entries
from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import resolve_classes
from maskwright.data.formats.coco_instance import Annotation, draw_target
from maskwright.data.formats.color_tables import color_codes
from maskwright.data.formats.detect_label_maps import FoundFiles, FoundSplit, all_names, split_by_lists
from maskwright.data.formats.folder_names import PlacedFile, place_files
from maskwright.data.formats.image_list import ImageList
from maskwright.data.formats.label_maps import require_same_size
from maskwright.data.formats.layouts import Detection, SplitSections, detected
from maskwright.data.formats.split_lists import read_listed
from maskwright.data.images.find import is_image_name
from maskwright.data.images.label_images import read_label_image
from maskwright.data.images.multichannel import read_image_size
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError, printable
from maskwright.structures.annotations import Target

_ONLY_CLASS, _BACKGROUND = "object", "background"
_NUMBERED = re.compile(r"[\W_]((mask|masks|label|seg|obj|object|instance)[\W_]?)?\d+$", re.IGNORECASE)  # after IMAGE
_WORD = re.compile(r"[^\W\d_]{3,}([\s_-][^\W\d_]+)*")  # CLASS of IMAGE/CLASS.png
_SAMPLED_MASKS = 50


class MaskFile(NamedTuple):
    """The mask of an object.

    Attributes:
        path: relative.
        image: name of its image.
        category: name of its class.
        is_of_class: its file is named like its image, so that it is the only one of its class in it.
    """

    path: str
    image: str
    category: str
    is_of_class: bool


class MaskSplit(NamedTuple):
    """The files of a split.

    Attributes:
        images: their paths, by name.
        masks: those that belong to an image.
        orphans: masks that belong to none, or not clearly to one.
    """

    images: dict[str, str]
    masks: list[MaskFile]
    orphans: list[str]


Files = list[tuple[str, File, list[tuple[File, str]]]]  # image id, image, its masks with the names of their classes


class MaskFilesReader:
    """Reader of masks, which are decoded when a target is asked for."""

    def __init__(
        self,
        entries: Files,
        labels: Mapping[str, int | None],
        background: int | None,
        split: Split,
    ):
        """Define the files.

        Args:
            entries: of each image.
            labels: label of each class; None for those that are not trained.
            background: label of the pixels without a mask; None if they have none.
            split: the split.
        """
        self.images, self._labels, self._background = ImageList(entries), labels, background
        self._problems, self._channels = split.problems, split.channels

    def has_object(self, index: int) -> bool:
        """Return whether an image has a mask, without reading any."""
        return any(self._labels[name] is not None for _, name in self.images.annotation(index))

    def target(self, index: int) -> Target:
        """Return one object per mask that is not empty, and the background.

        Raises:
            DatasetError: a mask is not binary, cannot be read, or has another size than the first.
            ImageError: the size of an image without masks cannot be read.
        """
        image_id, image, masks = self.images.entries[index]
        objects, covered = [], None
        for file, name in masks:
            mask = read_mask(file)
            if covered is None:
                covered = np.zeros_like(mask)
            require_same_size(mask, file, covered, masks[0][0])
            covered |= mask
            if not mask.any():
                self._problems.warning("an empty mask, which is dropped", where=file.name, remedy="remove the file")
            elif (label := self._labels[name]) is not None:
                objects.append(Annotation(file.name, label, False, None, None, _encode(mask)))
        if covered is None:
            covered = np.zeros(read_image_size(image, self._channels), dtype=bool)
        if self._background is not None:
            objects.append(Annotation(_BACKGROUND, self._background, False, None, None, _encode(~covered)))
        size = covered.shape[0], covered.shape[1]
        return draw_target(objects, size, image_id)[0]


def _encode(mask: np.ndarray) -> dict:
    return hotcoco.mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def read_mask(file: File) -> np.ndarray:
    """Return the pixels of an object, (H, W) bool: those that are not 0 or black.

    Raises:
        DatasetError: the file is damaged, or not binary.
    """
    pixels = read_label_image(file, allow_colors=True)
    values = color_codes(pixels) if pixels.ndim == 3 else pixels
    is_object = values != 0
    others = values[is_object]
    if len(others) and (others != others[0]).any():
        count = len(np.unique(values))
        raise DatasetError(
            f"has {count} values, expected two: 0 and another for the object (it may be blurred, or hold several "
            "objects)",
            where=file.name,
            remedy="export one binary image per object without smoothing, or use data.format=instance_maps (values "
            "number objects) or label_maps (values are classes)",
        )
    return is_object


def open_mask_files(split: Split) -> AnnotatedImages:
    """Open a split of images and masks, which are matched by the names of files and folders."""
    files, key, task = split.files, split.key, split.config.task
    images = split.root.folder(files.images or ".", f"{key}.images")
    masks = split.root.folder(files.annotations or ".", f"{key}.annotations")
    found = _find(images, masks, split.name)
    if files.list is not None:
        found = _select_listed(found, split.root.file(files.list, f"{key}.list"), f"{key}.list", split)
    if not found.images:
        raise DatasetError(f"no images with masks in {images}", where=f"{key}.images", remedy="correct the path")
    _report(found, masks, split)
    names = sorted({mask.category for mask in found.masks})
    listed = None
    if split.config.categories is None:
        names = _names_of_all_splits(split)
        background = [CategoryConfig(id=0, name=_BACKGROUND, is_thing=False)] if task == "semantic" else []
        listed = [*background, *(CategoryConfig(id=number, name=name) for number, name in enumerate(names, 1))]
    classes = resolve_classes(split, None, listed, str(masks))
    by_name = {entry.name.casefold(): classes.labels.get(entry.id) for entry in listed or _entries_of(split)}
    background = next((n for n, entry in enumerate(classes.categories) if entry.name.casefold() == _BACKGROUND), None)
    reader = MaskFilesReader(
        _files_of_images(found, images, masks),
        _labels_of_names(names, by_name, str(masks)),
        background if task == "semantic" else None,
        split,
    )
    return AnnotatedImages(classes.categories, task, reader)


def _entries_of(split: Split) -> Sequence[CategoryConfig]:
    return category_entries(split.config.categories) if split.config.categories is not None else ()


def _labels_of_names(names: Sequence[str], by_name: Mapping[str, int | None], where: str) -> dict[str, int | None]:
    """Return the label of each class; the class of masks without a name is the only one of the recipe's list."""
    named = [name for name in by_name if name != _BACKGROUND]
    if names == [_ONLY_CLASS] and len(named) == 1:
        return {_ONLY_CLASS: by_name[named[0]]}
    unknown = [name for name in names if name.casefold() not in by_name]
    if unknown:
        raise DatasetError(
            f"there are masks of the class '{printable(unknown[0])}', which is not in data.categories",
            where=where,
            remedy="add it, with ignore: true if it is not to be learned",
        )
    return {name: by_name[name.casefold()] for name in names}


def _files_of_images(found: MaskSplit, images: Folder, masks: Folder) -> Files:
    by_image: dict[str, list[tuple[File, str]]] = defaultdict(list)
    for mask, file in zip(found.masks, masks.files([mask.path for mask in found.masks]), strict=True):
        if file is not None:
            by_image[mask.image].append((file, mask.category))
    names = sorted(found.images)
    files = images.files([found.images[name] for name in names])
    return [(name, file, by_image[name]) for name, file in zip(names, files, strict=True) if file is not None]


def _find(images: Folder, masks: Folder, split: str) -> MaskSplit:
    """Return the files of a split that is not in other folders than these."""
    image_paths = [path for path in all_names(images) if is_image_name(path)]
    if str(images) == str(masks):
        found = find_masks(image_paths)
        return found.get(split) or found.get(None) or MaskSplit({}, [], [])
    placed = [PlacedFile(path, None, None, posixpath.splitext(path)[0], "", 0) for path in image_paths]
    files = [path for path in all_names(masks) if is_image_name(path)]
    return _match(placed, [PlacedFile(path, None, None, posixpath.splitext(path)[0], "", 0) for path in files])


def find_masks(paths: Sequence[str]) -> dict[str | None, MaskSplit]:
    """Return the images and masks of each split; of the split None those in folders that name no split.

    Raises:
        DatasetError: two images have the same name.
    """
    by_split: dict[str | None, tuple[list[PlacedFile], list[PlacedFile]]] = defaultdict(lambda: ([], []))
    placed = place_files(paths)
    has_image_folders = any(file.kind == "images" for file in placed)
    for file in placed:
        if file.kind == "labels":
            by_split[file.split][1].append(file)
        elif file.kind == "images" or not has_image_folders:
            by_split[file.split][0].append(file)
    return {split: _match(images, masks) for split, (images, masks) in by_split.items() if images and masks}


def _match(image_files: Sequence[PlacedFile], masks: Sequence[PlacedFile]) -> MaskSplit:
    """Match masks with the images whose names are those of one of their folders, or else of the files."""
    images: dict[str, str] = {}
    for file in image_files:
        if file.name in images:
            raise DatasetError(
                f"{images[file.name]} and {file.path} are both called '{file.name}'", remedy="remove one of them"
            )
        images[file.name] = file.path
    alone = _images_alone_in_folders(images)
    by_folder = [_match_folder(mask, images, alone) for mask in masks]
    by_file = [_match_file(mask, images) for mask in masks]
    count, other = (sum(match is not None for match in matches) for matches in (by_folder, by_file))
    folders = {match.image for match in by_folder if match}
    chosen = by_folder if count > other or (count == other and 2 * len(folders) >= len(images)) else by_file
    orphans = [mask.path for mask, match in zip(masks, chosen, strict=True) if match is None]
    return MaskSplit(images, _with_classes_of_files([match for match in chosen if match is not None]), orphans)


def _images_alone_in_folders(images: Iterable[str]) -> dict[str, str]:
    """Return the image in each folder that has just one."""
    folders: dict[str, list[str]] = defaultdict(list)
    for name in images:
        folders[name.rpartition("/")[0]].append(name)
    return {folder: names[0] for folder, names in folders.items() if folder and len(names) == 1}


def _match_folder(mask: PlacedFile, images: Mapping[str, str], alone: Mapping[str, str]) -> MaskFile | None:
    """Return the mask with the image whose name is the longest part of the path of its folder, if it is just one."""
    parts = mask.name.split("/")[:-1]
    for length in range(len(parts), 0, -1):
        found = {}
        for start in range(len(parts) - length + 1):
            name = "/".join(parts[start : start + length])
            if image := name if name in images else alone.get(name):
                found[image] = "/".join(parts[:start] + parts[start + length :])
        if found:
            image, category = next(iter(found.items()))
            return MaskFile(mask.path, image, category or _ONLY_CLASS, False) if len(found) == 1 else None
    return None


def _match_file(mask: PlacedFile, images: Mapping[str, str]) -> MaskFile | None:
    """Return the mask with the image whose name ends its path, but for a number after it."""
    parts = mask.name.split("/")
    for start in range(len(parts)):
        name, category = "/".join(parts[start:]), "/".join(parts[:start]) or _ONLY_CLASS
        if name in images:
            return MaskFile(mask.path, name, category, True)
        if image := _start_of_numbered(name, images):
            return MaskFile(mask.path, image, category, False)
    return None


def _start_of_numbered(name: str, images: Mapping[str, str]) -> str | None:
    """Return the image that a name like IMAGE_1 or IMAGE_mask_1 begins with."""
    starts = [match.start() for match in re.finditer(r"[\W_]", name)]
    return next((name[:start] for start in starts if name[:start] in images and _NUMBERED.match(name, start)), None)


def _with_classes_of_files(masks: list[MaskFile]) -> list[MaskFile]:
    """Take the names of files for classes, as in IMAGE/CLASS.png, if they are words that several images have."""
    stems = [mask.path.rpartition("/")[2].rpartition(".")[0] for mask in masks]
    if any(mask.is_of_class or mask.category != _ONLY_CLASS for mask in masks) or not all(map(_WORD.fullmatch, stems)):
        return masks
    images: dict[str, set[str]] = defaultdict(set)
    for mask, stem in zip(masks, stems, strict=True):
        images[stem].add(mask.image)
    if min(map(len, images.values()), default=0) < 2:
        return masks
    return [mask._replace(category=stem, is_of_class=True) for mask, stem in zip(masks, stems, strict=True)]


def _select_listed(found: MaskSplit, file: File, key: str, split: Split) -> MaskSplit:
    listed = read_listed(file, found.images)
    missing = [row.image for row, name in listed if name is None]
    if missing:
        error = DatasetError(
            f"{len(missing)} of {len(listed)} names in {file} are no images, the first is '{missing[0]}'",
            where=key,
            remedy="correct the list, or add the files",
        )
        split.problems.error(error, missing)
    kept = {name for _, name in listed if name is not None}
    images = {name: path for name, path in found.images.items() if name in kept}
    return MaskSplit(images, [mask for mask in found.masks if mask.image in kept], [])


def _names_of_all_splits(split: Split) -> list[str]:
    """Return the names of the classes in all splits, so that they have the same ids in each."""
    names: set[str] = set()
    for name in ("train", "val", "test"):
        files = getattr(split.config, name)
        if files is not None:
            images = split.root.folder(files.images or ".", f"data.{name}.images")
            masks = split.root.folder(files.annotations or ".", f"data.{name}.annotations")
            names |= {mask.category for mask in _find(images, masks, name).masks}
    return sorted(names)


def _report(found: MaskSplit, masks: Folder, split: Split) -> None:
    if found.orphans:
        split.problems.warning(
            f"{len(found.orphans)} masks belong to no image, or not clearly to one, and are not used, such as "
            f"{found.orphans[0]}",
            where=str(masks),
            remedy="name the image in the path of its masks",
            items=found.orphans,
        )
    empty = sorted(found.images.keys() - {mask.image for mask in found.masks})
    if empty:
        split.problems.warning(
            f"{len(empty)} of {len(found.images)} images have no masks, and so no objects, such as {empty[0]}",
            where=split.key,
            remedy="nothing to do if there are no objects in them",
            items=empty,
        )
    if split.config.task != "semantic" and found.masks and all(mask.is_of_class for mask in found.masks):
        split.problems.warning(
            "there is one mask for each class, which does not tell objects apart: all pixels of a class are one object "
            "in each image",
            where=split.key,
            remedy="use one mask per object, or the task semantic",
        )


def detect(root: Folder) -> Detection:
    """Detect folders of masks whose paths contain the names of images; the first masks must be binary.

    The task is semantic if each mask is named like its image, which makes it one of a class, else instance.
    """
    try:
        found = {
            split or "": files
            for split, files in find_masks([path for path in all_names(root) if is_image_name(path)]).items()
            if len(files.masks) > len(files.orphans)
        }
        if "" in found:
            unsplit = found.pop("")
            found = found if "train" in found else {**found, "train": unsplit}
        masks = [mask for files in found.values() for mask in files.masks]
        for file in root.files([mask.path for mask in masks[:: max(1, len(masks) // _SAMPLED_MASKS)]]):
            if file is not None:
                read_mask(file)
    except DatasetError as error:
        return Detection(mismatch=f"{error.where}: {error.found}" if error.where else error.found)
    if not masks:
        return Detection()
    is_semantic = all(mask.is_of_class for mask in masks)
    names = ", ".join(sorted({mask.category for mask in masks}))
    notes = [
        f"each mask is one {'class' if is_semantic else 'object'} of the image that its path names; classes: {names}"
    ]
    splits = {split: _found_split(files) for split, files in found.items()}
    divided = split_by_lists(root, FoundFiles(splits, {}, notes))
    sections: SplitSections = {split: entry.section for split, entry in divided.splits.items()}
    task = "semantic" if is_semantic else "instance"
    return Detection((detected(root.root, "mask_files", task, sections),), notes=tuple(divided.notes))


def _found_split(files: MaskSplit) -> FoundSplit:
    """Return a split whose folder is that around all images and masks."""
    masks = [mask.path for mask in files.masks]
    folder = posixpath.commonpath([f"./{posixpath.dirname(path)}" for path in (*files.images.values(), *masks)])
    folder = posixpath.normpath(folder)
    return FoundSplit({"images": folder, "annotations": folder}, files.images, masks)
