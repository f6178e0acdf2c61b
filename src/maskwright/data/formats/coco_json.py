"""COCO JSON files: strict reading, their list of images, and the detection of datasets that consist of them.

Everything that can be checked without opening an image is checked when the file is opened. pycocotools accepts most
broken files silently, and training would then fail, or learn the wrong thing, hours later.
"""

from __future__ import annotations

import itertools
import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskwright.config.categories import parse_flag
from maskwright.config.schema import DataConfig
from maskwright.data.formats.base import Split
from maskwright.data.formats.classes import ClassMapping, resolve_classes
from maskwright.data.formats.layouts import SPLIT_NAMES, Detection, detected, folders_below
from maskwright.data.images.find import is_image_name
from maskwright.data.images.label_images import read_panoptic_png
from maskwright.data.images.safe_pillow import MAX_PIXELS
from maskwright.data.problems import ProblemHandler, RaiseFirst
from maskwright.data.storage.folders import File, Folder, open_folder
from maskwright.data.storage.similar_names import SimilarNames, points_outside
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError, RecipeError, printable
from maskwright.structures.annotations import Task

logger = logging.getLogger(__name__)

_WITHOUT_MASKS = ("captions_", "person_keypoints_", "image_info_", "stuff_")  # other files of COCO's own
_SAMPLED_NAMES, _SEARCH_DEPTH, _IMAGE_SEARCH_DEPTH = 20, 3, 3
_MAX_JSON_FILES = 50  # in one folder, to be opened
# Words in the name of a JSON that name its split, such as trainval, minival2014, test-dev.
_WORDS = {
    "train": re.compile("(mini)?train(ing|val)?"),
    "val": re.compile("(mini)?val(id|idation)?|eval(uation)?"),
    "test": re.compile("test(ing|dev)?"),
}


class ImageEntry(NamedTuple):
    """One image of a COCO JSON.

    Attributes:
        image_id: its id in the file.
        name: path of the image file, relative to the image folder.
        height: in pixels, as the file states it.
        width: in pixels, as the file states it.
    """

    image_id: int | str
    name: str
    height: int
    width: int


class CocoSplit(NamedTuple):
    """A split whose annotations are a COCO JSON.

    Attributes:
        document: the content of the file.
        file: the file.
        images: folder of the images.
        key: the split's key in the recipe, e.g. "data.train".
        classes: its classes.
        labels: category id -> label; None for classes that the task does not train.
        problems: receives problems, now and when images are read.
        task: the recipe's task.
        crowds: the recipe's `data.crowds`.
    """

    document: dict
    file: File
    images: Folder
    key: str
    classes: ClassMapping
    labels: dict[int, int | None]
    problems: ProblemHandler
    task: Task
    crowds: str


def open_json(split: Split, default: str | None = None) -> CocoSplit:
    """Open the JSON of a split; `default` is the built-in list of classes that it may have."""
    key = split.key
    file = split.root.file(require_key(split.files.annotations, f"{key}.annotations"), f"{key}.annotations")
    document = read_json(file, f"{key}.annotations")
    classes = resolve_classes(split, default, _categories(document, file), str(file))
    images = split.root.folder(require_key(split.files.images, f"{key}.images"), f"{key}.images")
    labels, config = classes.json_labels, split.config
    return CocoSplit(document, file, images, key, classes, labels, split.problems, config.task, config.crowds)


def _categories(document: dict, file: File) -> list:
    categories = document.get("categories")
    return [] if categories is None else require_field(document, "categories", list, file, "of the file")


def require_key(value: str | None, key: str) -> str:
    """Return the value of a recipe key, or raise a RecipeError if it is missing."""
    if value is None:
        raise RecipeError("is missing", where=key, remedy="add it to the recipe")
    return value


def read_json(file: File, key: str) -> dict:
    """Read a COCO JSON. A byte order mark is accepted; NaN and Infinity are not.

    Raises:
        DatasetError: the file cannot be read, is not JSON, or has no list of images; `key` is its key in the recipe.
    """
    document = _parse(file)
    if not _lists_images(document):
        raise DatasetError("has no list of 'images', expected a COCO JSON", where=file.name, remedy=f"check {key}")
    return document


def _parse(file: File) -> Any:
    constants: list[str] = []
    try:
        document = json.loads(read_text(file), parse_constant=lambda c: constants.append(c) or 0)
    except json.JSONDecodeError as error:
        found = f"not valid JSON, line {error.lineno}, column {error.colno} ({error.msg})"
        raise DatasetError(found, where=file.name, remedy="it may be truncated; copy or download it again") from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"not valid JSON ({error})", where=file.name, remedy="export the file again") from None
    if constants:
        raise DatasetError(
            f"{_entry_with_constant(file)} {constants[0]}, which is not valid JSON",
            where=file.name,
            remedy="correct the file",
        )
    return document


def _lists_images(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("images"), list)


def read_images(document: dict, file: File, problems: ProblemHandler) -> list[ImageEntry]:
    """Return the images of a JSON, in its order; does not check whether the files exist.

    Raises:
        DatasetError: a field is missing or malformed, an id occurs twice, or a file name points outside its folder.
    """
    entries, ids = [], set()
    for position, image in enumerate(document["images"]):
        with problems.skipping(f"image {entry_id(image, position)}"):
            entry = _image_entry(image, file, position)
            if entry.image_id in ids:
                raise DatasetError(
                    f"more than one image has the id {entry.image_id!r}", where=file.name, remedy="make ids unique"
                )
            ids.add(entry.image_id)
            entries.append(entry)
    return entries


def _image_entry(image: Any, file: File, position: int) -> ImageEntry:
    image_id = require_field(image, "id", (int, str), file, position)
    named = image if "file_name" in image else image | {"file_name": _name_in_url(image)}
    name = require_field(named, "file_name", str, file, position)
    height, width = (whole_number(image, side, file, position) for side in ("height", "width"))
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise DatasetError(
            f"image {image_id} has {printable(height)} x {printable(width)} pixels, expected 1 to {MAX_PIXELS:,}",
            where=file.name,
            remedy="correct height and width",
        )
    return ImageEntry(image_id, name, height, width)


def _name_in_url(image: dict) -> str | None:
    """Return the folder and name of an image that has only a URL, as in LVIS: train2017/000000000001.jpg."""
    url = image.get("coco_url")
    return "/".join(url.split("/")[-2:]) if isinstance(url, str) else None


def entry_id(entry: Any, position: int, name: str = "id") -> Any:
    """Return the id of an entry for messages, or else its position in the list."""
    return entry.get(name, f"number {position}") if isinstance(entry, dict) else f"number {position}"


def require_field(entry: Any, name: str, types: type | tuple[type, ...], file: File, position: int | str) -> Any:
    """Return a field of an entry, or raise a DatasetError if it is missing or of another type.

    A whole number may be written as 7.0, as tools based on tables do.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    expects_integer = int in types if isinstance(types, tuple) else types is int
    if isinstance(value, float) and value.is_integer() and expects_integer:
        value = int(value)
    if not isinstance(value, types) or isinstance(value, bool):
        expected = " or ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
        raise DatasetError(
            f"entry {position} ({str(entry)[:60]}) has {str(value)[:60]!r} as {name!r}, expected {expected}",
            where=file.name,
            remedy="correct the file",
        )
    return value


def whole_number(entry: Any, name: str, file: File, position: int | str) -> int:
    """Return a field that is a whole number; raise as `require_field`."""
    return require_field(entry, name, int, file, position)


def read_crowd_flag(entry: Any, crowds: str) -> bool:
    """Return whether an annotation is a crowd region, as the recipe's `data.crowds` reads it.

    Raises:
        DatasetError: "iscrowd" is neither 0 nor 1; the text continues "annotation 7 ...".
    """
    value = entry.get("iscrowd")
    flag = False if value is None else parse_flag(value)
    if flag is None:
        raise DatasetError(f"has {printable(value)!r} as 'iscrowd', expected 0 or 1")
    return flag and crowds == "ignore"


def report_crowds(split: CocoSplit, num_objects: int, num_crowds: int, noun: str = "annotations") -> None:
    """Report annotations that are all crowd regions: nothing could be learned from them."""
    if not num_crowds or num_objects or split.task == "semantic":
        return
    found = (
        f"all {num_crowds} {noun} are crowd regions (iscrowd 1), which are not trained on; CVAT writes that for every "
        "brush mask"
    )
    remedy = "set data.crowds=objects to read them as objects, or iscrowd to 0"
    if split.key == "data.train":
        split.problems.error(DatasetError(found, where=split.file.name, remedy=remedy))
    else:
        split.problems.warning(found, where=split.file.name, remedy=remedy)


def _entry_with_constant(file: File) -> str:
    """Describe the first entry with NaN or Infinity, as the beginning of a sentence."""
    document = json.loads(read_text(file))
    lists = [value for value in document.values() if isinstance(value, list)] if isinstance(document, dict) else []
    for entry in (entry for entries in lists for entry in entries if isinstance(entry, dict)):
        for name, value in entry.items():
            if re.search("NaN|Infinity", json.dumps(value)):
                return f"the entry with id {entry.get('id')!r} has in its {name!r} a"
    return "the file has a"


def detect(root: Folder) -> Detection:
    """Detect COCO JSON files of any name, at the top or up to two folders down, with images anywhere near.

    A file belongs to the split that its name, or else that of its folder, contains.
    """
    splits: dict[str, dict[str, dict[str, str]]] = {}
    mismatch = ""
    for folder in folders_below(root, _SEARCH_DEPTH):
        for name in _json_names(folder):
            path = f"{folder.path}/{name}" if folder.path else name
            try:
                document = _parse(folder.file(name, ""))
                if not _lists_images(document):
                    continue
                section = _split_section(document, folder.file(name, ""), path, root)
            except DatasetError as error:
                section = error.found
            if isinstance(section, str):
                mismatch = mismatch or f"{path}: {section}"
            else:
                _add_split(splits.setdefault(section[0], {}), _split_name(path), section[1])
    configs = [_detected(root, format, splits[format]) for format in sorted(splits, reverse=True)]  # panoptic first
    return Detection(tuple(configs), mismatch)


def _add_split(splits: dict[str, dict[str, str]], name: str, section: dict[str, str]) -> None:
    """Add a split, unless another JSON is its annotations already."""
    first = splits.setdefault(name, section)
    if first is not section:
        logger.warning(
            "%s is not used, because %s is the annotations of '%s' already; merge them, or name one in a recipe",
            section["annotations"],
            first["annotations"],
            name,
        )


def _json_names(folder: Folder) -> list[str]:
    """Return the JSON files directly in a folder that may list images; a folder with many has one for each image."""
    names = [name for name in folder.file_names() if name.lower().endswith(".json")]
    names = [name for name in names if not name.startswith(_WITHOUT_MASKS)]
    return names if len(names) <= _MAX_JSON_FILES else []


def detect_file(path: Path) -> Detection:
    """Detect a single COCO JSON as one split, which its file name names ("train" if it does not).

    Images are searched beside the file and one folder up.

    Raises:
        DatasetError: the file is not a COCO JSON.
    """
    file = File(str(path))
    document = read_json(file, "the annotations")
    reason = ""
    for allow_similar, folder in itertools.product((False, True), (path.parent, path.parent.parent)):
        root = open_folder(folder)
        try:
            section = _split_section(document, file, path.relative_to(folder).as_posix(), root, allow_similar)
        except DatasetError:
            if folder == path.parent:
                raise
            continue  # a damaged archive one folder up has nothing to do with the file
        if not isinstance(section, str):
            split_name = _split_name("/".join((*path.parent.parts[-2:], path.stem)))
            return Detection((_detected(root, section[0], {split_name: section[1]}),))
        reason = section
    return Detection(mismatch=f"{reason}, neither beside it nor up to {_SEARCH_DEPTH} folders below the one above")


def _detected(root: Folder, format: str, splits: dict[str, dict[str, str]]) -> DataConfig:
    return detected(root.root, format, "panoptic" if format == "coco_panoptic" else "instance", splits)


def _split_section(
    document: dict, file: File, path: str, root: Folder, allow_similar: bool = True
) -> tuple[str, dict[str, str]] | str:
    """Return (format, split section) of a COCO JSON whose images are below `root`, else the reason there is none."""
    annotations = document.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else {}
    masks = None
    if isinstance(first, dict) and "segments_info" in first:
        masks = root.find_folder(path.removesuffix(".json")) or _folder_of_masks(root, first, posixpath.dirname(path))
    sample = [entry for entry in document["images"][:_SAMPLED_NAMES] if isinstance(entry, dict)]
    names = [entry.get("file_name") or _name_in_url(entry) for entry in sample]
    images = _folder_of_images(root, names, masks, path, allow_similar)
    if images is None:
        entries = read_images(document, file, RaiseFirst())
        return f"its images are not found, the first is {entries[0].name}" if entries else "it lists no images"
    if isinstance(first, dict) and "segments_info" in first and masks is None:
        return f"its panoptic PNGs are not found, the first is {first.get('file_name')}"
    section = {"images": images.path or ".", "annotations": path}
    return ("coco_panoptic", section | {"masks": masks.path or "."}) if masks else ("coco_instance", section)


def _folder_of_masks(root: Folder, annotation: dict, home: str) -> Folder | None:
    """Return the folder with the PNG of an annotation.

    Images may have the same names as PNGs, so one with the ids of the segments is preferred; and of these, one below
    the folder of the JSON.
    """
    name, segments = annotation.get("file_name"), annotation["segments_info"]
    if not isinstance(name, str):
        return None
    candidates = [folder for folder in folders_below(root, _IMAGE_SEARCH_DEPTH) if folder.find_file(name)]
    candidates.sort(key=lambda folder: not _is_below(folder.path, home))
    ids = {segment.get("id") for segment in segments if isinstance(segment, dict)} if segments else set()
    for folder in candidates:
        try:
            if ids & set(np.unique(read_panoptic_png(folder.file(name, ""))).tolist()):
                return folder
        except DatasetError:
            continue
    return next(iter(candidates), None)


def _folder_of_images(
    root: Folder, names: list, masks: Folder | None, json_path: str, allow_similar: bool
) -> Folder | None:
    """Return the folder at or below `root`, other than that of the masks, that has most of these files.

    Of equal ones, that nearest to the JSON is taken, as several splits may have images of the same names. Names of
    other systems may be found by their ends, see `SimilarNames`.
    """
    names = [name for name in names if isinstance(name, str)]
    inside = [name for name in names if not points_outside(name)]
    home = posixpath.dirname(json_path)
    candidates = []
    for folder in folders_below(root, _IMAGE_SEARCH_DEPTH):
        if masks is None or folder.path != masks.path:
            count = sum(folder.find_file(name) is not None for name in inside)
            candidates.append((count, folder.path == home, _is_below(folder.path, home), folder))
    count, *_, best = max(candidates, key=lambda candidate: candidate[:3], default=(0, None))
    if count:
        return best
    if not allow_similar:
        return None
    similar = SimilarNames(name for name in root.names() if is_image_name(name) and not _is_in(name, masks))
    found = [match for name in names if (match := similar.find(name))]
    return root.find_folder(posixpath.dirname(found[0]) or ".") if found else None


def _is_in(name: str, folder: Folder | None) -> bool:
    return folder is not None and posixpath.dirname(name) == folder.path


def _is_below(path: str, home: str) -> bool:
    return not home or path == home or path.startswith(f"{home}/")


def _split_name(path: str) -> str:
    """Return the split that the name of a JSON contains, or else the nearest of its folders that is called so."""
    name, *folders = path.lower().split("/")[::-1]
    words = re.findall("[a-z]+", name)
    named = next((split for word in words for split in ("train", "val", "test") if _WORDS[split].fullmatch(word)), None)
    of_folders = (split for folder in folders for split, names in SPLIT_NAMES.items() if folder in names)
    return named or next(of_folders, "train")
