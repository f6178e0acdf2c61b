"""YOLO segmentation: data.yaml with class names, and one text file of polygons per image.

A line is "class x y x y ...", in fractions of width and height, as COCO polygons are converted for YOLO; masks are
drawn as pycocotools draws such polygons. YOLOv7 puts the box of the polygon in front of it. Text files are stored with
`labels` in place of `images` in the path of the image, or beside the image. An image without one has no object.
"""

from __future__ import annotations

import functools
import math
import posixpath
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from maskwright.config.safe_yaml import load_yaml
from maskwright.config.schema import CategoryConfig
from maskwright.data.formats.base import AnnotatedImages, Split
from maskwright.data.formats.classes import resolve_classes
from maskwright.data.formats.coco_instance import Annotation, draw_target
from maskwright.data.formats.image_list import ImageList, find_all
from maskwright.data.formats.layouts import SPLIT_NAMES, Detection, detected, search_file, split_of_folder
from maskwright.data.images.find import is_image_name
from maskwright.data.images.multichannel import read_image_size
from maskwright.data.storage.folders import File, Folder, open_folder
from maskwright.data.storage.similar_names import SimilarNames, points_outside, relative_part
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError, printable
from maskwright.structures.annotations import Target

_OUTSIDE_TOLERANCE = 0.01  # of a side; some tools round beyond the border
_CLASS_LIST = "classes.txt"  # one name a line
_DESCRIPTIONS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml", _CLASS_LIST)
_OTHER_TEXTS = (_CLASS_LIST, "labels.txt", "README.txt", "notes.txt")  # which tools write beside the labels
_BOX_TOLERANCE, _EXACT_BOX_TOLERANCE = 0.05, 0.005  # of the longer side of a box


class YoloReader:
    """Reader of YOLO polygons."""

    def __init__(self, entries: list[tuple[str, File, File | None]], labels: dict[int, int | None], split: Split):
        """Each entry is (image id, image, text file if there is one); `labels` maps class numbers to labels."""
        self.images, self._labels = ImageList(entries), labels
        self._problems, self._channels = split.problems, split.channels

    def target(self, index: int) -> Target:
        """Return all objects; those that cover no pixel are dropped with a warning.

        Raises:
            DatasetError: a line is not a polygon, or has a class that does not exist.
            ImageError: the size of the image cannot be read.
        """
        image_id, image, file = self.images.entries[index]
        height, width = read_image_size(image, self._channels)
        objects = [] if file is None else self._read_objects(file, height, width)
        target, dropped, _ = draw_target(objects, (height, width), image_id)
        for line in dropped:
            self._problems.warning(
                f"the polygon of {line} covers no pixel and is dropped",
                where=str(file),
                remedy="remove it",
                items=[str(line)],
            )
        return target

    def _read_objects(self, file: File, height: int, width: int) -> list[Annotation]:
        lines = read_text(file).splitlines()
        objects = []
        parsed = [
            (number, *_parse_line(line, f"{file}, line {number}"))
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
        with_box = _lines_with_box({number: fractions for number, _, fractions in parsed})
        if with_box:
            self._problems.warning(
                f"the first four values of {len(with_box)} of {len(parsed)} lines are the box of the polygon (as in "
                "YOLOv7) and are dropped",
                where=file.name,
                items=[f"line {number}" for number in sorted(with_box)],
            )
        for number, category, fractions in parsed:
            if category not in self._labels:
                raise DatasetError(
                    f"class {category}, but data.yaml has {len(self._labels)} names, numbered from 0",
                    where=f"{file}, line {number}",
                    remedy="correct one of them",
                )
            label = self._labels[category]
            if label is not None:
                points = fractions[4:] if number in with_box else fractions
                polygon = [fraction * (height if i % 2 else width) for i, fraction in enumerate(points)]
                objects.append(Annotation(f"line {number}", label, False, None, None, [polygon]))
        return objects


def _parse_line(line: str, where: str) -> tuple[int, list[float]]:
    """Return (class number, polygon)."""
    try:
        category, *fractions = (float(part) for part in line.split())
    except ValueError:
        raise DatasetError("is not 'class x y x y ...' in numbers", where=where, remedy="correct the line") from None
    if len(fractions) == 4:
        raise DatasetError(
            "a box (4 values after the class), but masks need polygons", where=where, remedy="export segmentation"
        )
    if len(fractions) < 6 or len(fractions) % 2 or category != int(category):
        raise DatasetError(
            f"{len(fractions)} values after the class {category:g}, expected x and y of at least three points (an odd "
            "number may end with a score, which predictions have)",
            where=where,
            remedy="correct the line",
        )
    if not all(map(math.isfinite, fractions)):
        raise DatasetError("has NaN or infinite values", where=where, remedy="correct the line")
    if min(fractions) < -_OUTSIDE_TOLERANCE or max(fractions) > 1 + _OUTSIDE_TOLERANCE:
        farthest = max(fractions, key=lambda fraction: abs(fraction - 0.5))
        raise DatasetError(
            f"{farthest:g} is outside 0..1",
            where=where,
            remedy="divide x by the width and y by the height of the image",
        )
    return int(category), [min(max(fraction, 0.0), 1.0) for fraction in fractions]


def _lines_with_box(lines: dict[int, list[float]]) -> set[int]:
    """Return the numbers of the lines that begin with the box of their polygon: exactly, or all of them roughly."""
    if all(_begins_with_box(fractions, _BOX_TOLERANCE) for fractions in lines.values()):
        return set(lines)
    return {number for number, fractions in lines.items() if _begins_with_box(fractions, _EXACT_BOX_TOLERANCE)}


def _begins_with_box(fractions: list[float], tolerance: float) -> bool:
    """Return whether the first four numbers are the box of the polygon after them: center and size, or corners.

    Args:
        fractions: the values of a line after the class.
        tolerance: as a fraction of the longer side of the box.
    """
    polygon = fractions[4:]
    if len(polygon) < 6:
        return False
    left, right, top, bottom = min(polygon[::2]), max(polygon[::2]), min(polygon[1::2]), max(polygon[1::2])
    sizes = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    limit = tolerance * max(sizes[2:])
    return any(
        all(abs(value - expected) <= limit for value, expected in zip(fractions[:4], box, strict=True))
        for box in (sizes, (left, top, right, bottom))
    )


def open_yolo(split: Split) -> AnnotatedImages:
    """Open the images that the recipe or data.yaml names for the split."""
    path = PurePosixPath(split.config.root)
    name = path.name if path.suffix in (".yaml", ".yml") else _description_name(split.root)
    home = split.root.folder_containing(name, "data.root")
    file = home.file(name, "data.root")
    description = _read_description(file, home)
    base = _base_folder(description, home)
    names = _image_names(split, description, file, base)
    images = find_all(base, names, f"{split.key}.images", file, split.problems, allow_absolute=True)
    names = [_existing_name(name, image, base) for name, image in zip(names, images, strict=True)]
    ids = [PurePosixPath(name).with_suffix("").as_posix() for name in names]
    _report_equal_names(split, names)
    texts = _find_texts(split, base, names)
    classes = resolve_classes(split, None, _classes(description, file), str(file))
    entries = list(zip(ids, images, texts, strict=True))
    return AnnotatedImages(classes.categories, split.config.task, YoloReader(entries, classes.json_labels, split))


def _report_equal_names(split: Split, names: list[str]) -> None:
    """Report images such as a.jpg and a.png, which have the same text file."""
    by_stem: dict[str, str] = {}
    for name in names:
        first = by_stem.setdefault(posixpath.splitext(name)[0], name)
        if first != name:
            error = DatasetError(
                f"{first} and {name} have the same text file", where=f"{split.key}.images", remedy="remove one of them"
            )
            split.problems.error(error, [name])


def _existing_name(name: str, image: File, base: Folder) -> str:
    """Return the name of an image relative to the base folder, where it was found under another one than stated."""
    start = f"{base}/"
    return image.name.removeprefix(start) if image.name.startswith(start) else name


def _find_texts(split: Split, base: Folder, names: list[str]) -> list[File | None]:
    """Return the text file of each image, None if it has none; report images and text files without the other."""
    key, problems = f"{split.key}.annotations", split.problems
    labels_folder = functools.cache(lambda folder: _labels_folder(base, folder))
    expected = [_text_name(name, split.files.annotations, labels_folder) for name in names]
    texts = base.files(expected)
    without = {i for i, text in enumerate(texts) if text is None}
    spare = _texts_without_image(base, names, expected)
    similar = _similar_texts({i: expected[i] for i in sorted(without)}, spare)
    for i, text in similar.items():
        texts[i] = base.find_file(text)
    beside = {i: str(PurePosixPath(names[i]).with_suffix(".txt")) for i in sorted(without - set(similar))}
    for i, text in zip(beside, base.files(beside.values()), strict=True):
        texts[i] = text

    def report(items: list[str], found: str, remedy: str) -> None:
        if items:
            problems.warning(f"{len(items)} {found}: {items[0]}", where=key, remedy=remedy, items=items)

    if not any(texts):
        raise DatasetError(
            f"none of {len(names)} images in {base} has a text file",
            where=key,
            remedy=f"they are expected like {expected[0]}",
        )
    report(
        [f"{names[i]} with {text}" for i, text in similar.items()],
        "text files are matched with images of similar names",
        "nothing to do if these belong together",
    )
    report(
        [names[i] for i in beside if texts[i] is not None and beside[i] != expected[i]],
        "images have their text files beside them, not in a folder labels",
        "nothing to do if these are their objects",
    )
    report(
        [names[i] for i in beside if texts[i] is None],
        f"of {len(names)} images have no text file and count as images without objects",
        "add text files with the names of the images, unless these show no object",
    )
    report(
        sorted(posixpath.join(folder, name) for folder, files in spare.items() for name in files),
        "text files have no image and are not used",
        "add the images, or move the text files away",
    )
    return texts


def _texts_without_image(base: Folder, names: list[str], expected: list[str]) -> dict[str, set[str]]:
    """Return the text files of each folder of labels that belong to no image of the corresponding folder of images."""
    folders: dict[str, set[str]] = {}
    for name, text in zip(names, expected, strict=True):
        folders.setdefault(posixpath.dirname(text), set()).add(posixpath.dirname(name))
    spare = {}
    for labels, images in folders.items():
        texts = {name for name in _files_of(base, labels) if name.lower().endswith(".txt")} - set(_OTHER_TEXTS)
        stems = {
            PurePosixPath(name).stem for folder in images for name in _files_of(base, folder) if is_image_name(name)
        }
        spare[labels] = {name for name in texts if PurePosixPath(name).stem not in stems or not name.endswith(".txt")}
    return spare


def _files_of(base: Folder, name: str) -> list[str]:
    """Return the names of the files directly in a folder."""
    folder = base.find_folder(name) if name else base
    return [] if folder is None else [file for file in folder.names() if "/" not in file]


def _similar_texts(expected: dict[int, str], spare: dict[str, set[str]]) -> dict[int, str]:
    """Return the text files with similar names as expected, each once; those are taken out of `spare`."""
    similar = {folder: SimilarNames(files) for folder, files in spare.items()}
    found = {}
    for i, path in expected.items():
        folder, name = posixpath.split(path)
        if (match := similar[folder].find(name)) in spare[folder]:
            spare[folder].discard(match)
            found[i] = posixpath.join(folder, match)
    return found


def _description_name(root: Folder) -> str:
    """Return the file of the dataset that names classes: data.yaml, a file with a similar name, or classes.txt."""
    return next((name for name in _DESCRIPTIONS if search_file(root, name)), _DESCRIPTIONS[0])


def _read_description(file: File, home: Folder) -> dict[str, Any]:
    """Read data.yaml, with its keys in lower case, or make the same of classes.txt.

    Raises:
        DatasetError: it is not valid YAML, or has no names of classes.
    """
    if file.name.endswith(_CLASS_LIST):
        return _describe_folders(file, home)
    try:
        document = load_yaml(read_text(file), as_texts=True)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise DatasetError(f"not valid YAML{line} ({reason})", where=file.name, remedy="correct the file") from None
    values = document.items() if isinstance(document, dict) else ()
    by_key = {str(key).casefold(): value for key, value in values if value not in ("", "~", "null")}
    names = by_key.get("names")
    if not isinstance(names, list | dict) or not names:
        found = f"has '{printable(names)}' as 'names'" if names else "has no 'names' of classes"
        remedy = "write a list of class names, like names: [cat, dog]"
        raise DatasetError(f"{found}, expected a list such as [cat, dog]", where=file.name, remedy=remedy)
    return by_key


def _describe_folders(file: File, home: Folder) -> dict[str, Any]:
    """Return the names in classes.txt, and the folders of the splits beside it: images, or those in it."""
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    images = home.find_folder("images")
    parts = images.folders() if images is not None else []
    splits = {split: f"images/{part}" for part in parts if (split := split_of_folder(part))}
    return {"names": names, **(splits or {"train": "images"})}


def _base_folder(description: dict[str, Any], home: Folder) -> Folder:
    """Return the folder that paths in data.yaml are relative to: its `path`, if that exists, else its own.

    Of a path on another machine, its end is tried.
    """
    path = str(description.get("path") or ".")
    parts = relative_part(path).split("/")
    ends = ["/".join(parts[i:]) for i in range(len(parts))]
    return next((found for name in (path, *ends) if (found := home.find_folder(name))), home)


def _split_entry(description: dict[str, Any], split: str) -> Any:
    """Return what data.yaml names for a split, under any usual key; None if there is nothing."""
    return next((description[key] for key in SPLIT_NAMES[split] if description.get(key)), None)


def _classes(description: dict[str, Any], file: File) -> tuple[CategoryConfig, ...]:
    names = description["names"]
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    try:
        return tuple(CategoryConfig(id=int(number), name=str(name)) for number, name in pairs)
    except (TypeError, ValueError):
        raise DatasetError(
            "'names' is neither a list nor a mapping from numbers to names", where=file.name, remedy="correct the file"
        ) from None


def _image_names(split: Split, description: dict[str, Any], file: File, base: Folder) -> list[str]:
    """Return the names of the split's images, relative to the base folder or absolute."""
    named = split.files.images or _split_entry(description, split.name)
    if named is None:
        raise DatasetError(
            f"has no '{split.name}' ({_found_keys(description)})",
            where=file.name,
            remedy="name the folder of the split there",
        )
    entries = named if isinstance(named, list) else [named]
    names = [name for entry in entries for name in _expand(str(entry), base, f"{split.key}.images")]
    if not names:
        raise DatasetError(
            f"no image in '{printable(named)}', which it names for '{split.name}'",
            where=file.name,
            remedy="correct the path",
        )
    return sorted(dict.fromkeys(names))


def _found_keys(description: dict[str, Any]) -> str:
    return f"found: {printable(', '.join(map(str, description)))}"


def _expand(entry: str, base: Folder, key: str) -> list[str]:
    """Return the names of the images in a folder, or in a text file that lists them.

    Some tools write "../train/images" for a folder beside data.yaml, and Ultralytics reads it as such. Of a path that
    does not exist, as one of another machine, the longest end that exists is used.
    """
    for name in _places(entry):
        if name.endswith(".txt") and (list_file := base.find_file(name)):
            lines = [line.strip() for line in read_text(list_file).splitlines()]
            return [posixpath.normpath(posixpath.join(posixpath.dirname(name), line)) for line in lines if line]
        if (folder := base.find_folder(name)) is not None:
            return [posixpath.join(name, file) for file in folder.names() if is_image_name(file)]
    raise DatasetError(f"no folder or list '{printable(entry)}' in {base}", where=key, remedy="correct data.yaml")


def _places(entry: str) -> list[str]:
    """Return where a path of data.yaml may be, relative to the base folder or absolute, in the order of trial."""
    path = entry.replace("\\", "/")
    places = [posixpath.normpath(path)] if posixpath.isabs(path) or not points_outside(path) else []
    parts = relative_part(entry).split("/")
    return list(dict.fromkeys(places + ["/".join(parts[i:]) for i in range(len(parts))]))


def _text_name(image_name: str, labels: str | None, labels_folder: Callable[[str], str]) -> str:
    """Return the text file of an image: in the folder that the recipe names, or that of the folder of images."""
    folder, name = posixpath.split(f"{posixpath.splitext(image_name)[0]}.txt")
    return posixpath.join(labels or labels_folder(folder), name)


def _labels_folder(base: Folder, images: str) -> str:
    """Return a folder of images with `labels` in place of the last `images`, in the case that exists."""
    parts = images.split("/")
    position = next((i for i in reversed(range(len(parts))) if parts[i].lower() == "images"), None)
    if position is None:
        return images
    found = ["/".join((*parts[:position], name, *parts[position + 1 :])) for name in ("labels", "Labels", "LABELS")]
    return next((name for name in found if base.find_folder(name)), found[0])


def detect(root: Folder) -> Detection:
    """Detect data.yaml, or classes.txt beside images and text files (Label Studio)."""
    name = _description_name(root)
    file = search_file(root, name)
    if file is None:
        return Detection()
    home = root.folder_containing(name, "")
    if name == _CLASS_LIST:
        labels = home.find_folder("labels")
        if labels is None or home.find_folder("images") is None or not all(map(_is_text, labels.names() or [""])):
            return Detection()
    return _detect_description(file, home, root.root)


def _is_text(name: str) -> bool:
    return name.lower().endswith(".txt")


def detect_file(path: Path) -> Detection:
    """Detect a YAML file of any name."""
    home = open_folder(path.parent)
    return _detect_description(home.file(path.name, ""), home, path)


def _detect_description(file: File, home: Folder, root: Path) -> Detection:
    name = PurePosixPath(file.name).name
    try:
        description = _read_description(file, home)
    except DatasetError as error:
        return Detection(mismatch=f"{name}: {error.found}")
    splits = {split: {} if _split_entry(description, split) else None for split in SPLIT_NAMES}
    if not any(value is not None for value in splits.values()):
        return Detection(mismatch=f"{name} has no train, val or test ({_found_keys(description)})")
    return Detection((detected(root, "yolo", "instance", splits),))
