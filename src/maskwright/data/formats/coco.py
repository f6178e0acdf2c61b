"""What the two COCO formats share: a strictly read json, its list of images, and a compact store of rows.

Unusual here: everything that can be checked without opening a picture is checked when the file is opened, because
pycocotools accepts most broken files in silence and training would fail, or quietly suffer, hours later.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from maskwright.errors import DatasetError


class ImageEntry(NamedTuple):
    """One image of a COCO json.

    Attributes:
        image_id: its id there.
        path: its file.
        height: in pixels, as stated.
        width: in pixels, as stated.
    """

    image_id: int | str
    path: str
    height: int
    width: int


class PackedRows:
    """A read-only list of Python values kept as one block of bytes.

    Worker processes share the block with their parent. A list of objects would be copied into each of them bit by bit,
    since looking at a Python object writes its reference count: gigabytes for the annotations of COCO.
    """

    def __init__(self, rows: Iterable[Any]):
        parts = [pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL) for row in rows]
        self._ends = np.cumsum([0, *map(len, parts)])
        self._block = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        start, end = self._ends[index], self._ends[index + 1]
        return pickle.loads(self._block[start:end].data)


def read_json(path: Path, key: str) -> dict:
    """A COCO json. A byte order mark is accepted, NaN and Infinity are not.

    Raises:
        DatasetError: the file is missing (the message names the recipe's key), is not JSON, or has no list of images.
    """
    if not path.is_file():
        raise DatasetError(f"{key}: no file {path}; correct the path")
    try:
        document = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_refuse)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DatasetError(
            f"{path}: no valid JSON at {where} ({error.msg}); it may be cut off, fetch it again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: no valid JSON ({error}); export the file again") from None
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise DatasetError(f"{path}: expected a COCO json with a list of 'images', found none; check {key}")
    return document


def read_images(document: dict, where: Path, folder: Path) -> list[ImageEntry]:
    """The images of a json, in its order; whether their files exist is not asked.

    Raises:
        DatasetError: a field is missing or malformed, an id occurs twice, or a file name leads out of the folder.
    """
    entries, ids = [], set()
    for number, image in enumerate(document["images"]):
        image_id, name = field(image, "id", (int, str), where, number), field(image, "file_name", str, where, number)
        height, width = (field(image, side, int, where, number) for side in ("height", "width"))
        if min(height, width) < 1:
            raise DatasetError(f"{where}: image {image_id} has {height} x {width} pixels; correct height and width")
        if image_id in ids:
            raise DatasetError(f"{where}: more than one image has the id {image_id!r}; give each its own")
        ids.add(image_id)
        entries.append(ImageEntry(image_id, str(inside(folder, name, where)), height, width))
    return entries


def field(entry: Any, name: str, types: type | tuple[type, ...], where: Path, number: int | str) -> Any:
    """A field that must be there and have one of the types."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, types) or isinstance(value, bool):
        wanted = " or ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
        raise DatasetError(
            f"{where}: entry {number} ({str(entry)[:60]}) has {str(value)[:60]!r} as {name!r}, expected {wanted}; "
            "mend the file"
        )
    return value


def inside(folder: Path, name: str, where: Path) -> Path:
    """`folder / name`, refused where that leads out of the folder."""
    parts = PurePath(os.path.normpath(name))
    if parts.is_absolute() or parts.parts[:1] == ("..",):
        raise DatasetError(f"{where}: the file name '{name}' leads out of {folder}; use names relative to that folder")
    return folder / name


def check_files(paths: list[str], key: str, named_in: Path) -> None:
    """Raise a DatasetError that counts the files that do not exist, if there are any; lists each folder once."""
    listings: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listings[folder]:
            missing.append(path)
    if missing:
        raise DatasetError(
            f"{key}: {len(missing)} of {len(paths)} files named in {named_in} do not exist, the first is {missing[0]}; "
            "correct the folder or fetch the files"
        )


def _refuse(constant: str):
    raise ValueError(f"it contains {constant}, which is not JSON and no number")
