"""What the two COCO formats share: a strictly read json and its list of images.

Unusual here: everything that can be checked without opening a picture is checked when the file is opened, because
pycocotools accepts most broken files in silence and training would fail, or quietly suffer, hours later.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from maskwright.data.problems import ProblemHandler
from maskwright.data.storage.folders import File, Folder
from maskwright.errors import DatasetError


class ImageEntry(NamedTuple):
    """One image of a COCO json.

    Attributes:
        image_id: its id there.
        name: of its file below the folder of the pictures.
        height: in pixels, as stated.
        width: in pixels, as stated.
    """

    image_id: int | str
    name: str
    height: int
    width: int


def read_json(path: File, key: str) -> dict:
    """A COCO json. A byte order mark is accepted, NaN and Infinity are not.

    Raises:
        DatasetError: the file cannot be read, is not JSON, or has no list of images; `key` is the recipe's for it.
    """
    constants: list[str] = []
    try:
        document = json.loads(path.read().decode("utf-8-sig"), parse_constant=lambda c: constants.append(c) or 0)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DatasetError(
            f"{path}: no valid JSON at {where} ({error.msg}); it may be cut off, fetch it again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: no valid JSON ({error}); export the file again") from None
    if constants:
        raise DatasetError(
            f"{path}: {_place_of_constant(path)} {constants[0]}, which is no number in JSON; mend the file"
        )
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise DatasetError(f"{path}: expected a COCO json with a list of 'images', found none; check {key}")
    return document


def read_images(document: dict, where: File, problems: ProblemHandler) -> list[ImageEntry]:
    """The images of a json, in its order; whether their files exist is not asked.

    Raises:
        DatasetError: a field is missing or malformed, an id occurs twice, or a file name leads out of its folder.
    """
    entries, ids = [], set()
    for number, image in enumerate(document["images"]):
        with problems.skipping(f"image {entry_id(image, number)}"):
            entry = _image(image, where, number)
            if entry.image_id in ids:
                raise DatasetError(f"{where}: more than one image has the id {entry.image_id!r}; give each its own")
            ids.add(entry.image_id)
            entries.append(entry)
    return entries


def _image(image: Any, where: File, number: int) -> ImageEntry:
    image_id, name = field(image, "id", (int, str), where, number), field(image, "file_name", str, where, number)
    height, width = (field(image, side, int, where, number) for side in ("height", "width"))
    if min(height, width) < 1:
        raise DatasetError(f"{where}: image {image_id} has {height} x {width} pixels; correct height and width")
    return ImageEntry(image_id, inside(name, where), height, width)


def entry_id(entry: Any, number: int, name: str = "id") -> Any:
    """What messages call an entry: its id, or else its place in the list."""
    return entry.get(name, f"number {number}") if isinstance(entry, dict) else f"number {number}"


def field(entry: Any, name: str, types: type | tuple[type, ...], where: File, number: int | str) -> Any:
    """A field that must be there and have one of the types."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, types) or isinstance(value, bool):
        wanted = " or ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
        raise DatasetError(
            f"{where}: entry {number} ({str(entry)[:60]}) has {str(value)[:60]!r} as {name!r}, expected {wanted}; "
            "mend the file"
        )
    return value


def inside(name: str, where: File) -> str:
    """The name, refused where it leads out of its folder."""
    parts = PurePath(os.path.normpath(name))
    if parts.is_absolute() or parts.parts[:1] == ("..",):
        raise DatasetError(f"{where}: the file name '{name}' leads out of its folder; use names relative to that")
    return name


def find_all(folder: Folder, names: Sequence[str], key: str, named_in: File, problems: ProblemHandler) -> list[File]:
    """The files of these names; one DatasetError counts those that do not exist, if there are any."""
    found = folder.files(names)
    files = [file or File(f"{folder}/{name}") for file, name in zip(found, names, strict=True)]
    missing = [file.name for file, there in zip(files, found, strict=True) if there is None]
    if missing:
        text = (
            f"{key}: {len(missing)} of {len(found)} files named in {named_in} do not exist, the first is {missing[0]}"
        )
        problems.error(DatasetError(f"{text}; correct the folder or fetch the files"), missing)
    return files


def _place_of_constant(path: File) -> str:
    """Who has the first NaN or Infinity, as the beginning of a sentence."""
    document = json.loads(path.read().decode("utf-8-sig"))
    parts = document.items() if isinstance(document, dict) else ()
    for entry in (entry for _, entries in parts if isinstance(entries, list) for entry in entries):
        if isinstance(entry, dict):
            for name, value in entry.items():
                if re.search("NaN|Infinity", json.dumps(value)):
                    return f"the entry with id {entry.get('id')!r} has in its {name!r} a"
    return "the file has a"
