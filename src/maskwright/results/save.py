"""Write the result for one image as files: overlay, label PNG, panoptic PNG and JSON."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import PIL.Image

from maskwright.errors import MaskwrightError
from maskwright.results.coco import instance_results, panoptic_annotation, panoptic_image
from maskwright.results.own_files import check_replaceable, png_mark
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.atomic_write import write_files_atomically
from maskwright.structures.category import Task


def save(segmentation: Segmentation, directory: str | Path, name: str | None = None) -> list[Path]:
    """Write a result as files; those of an earlier result with the same name are replaced, other files never.

    - `NAME_overlay.png`, if the image is known.
    - `NAME_confidence.png`, if the result has a confidence map: 8-bit gray, 255 times `Segmentation.confidence`.
    - semantic: `NAME_labels.png`, see `label_image`.
    - panoptic: `NAME_panoptic.png`, in which R + 256 G + 65536 B is the segment's id and 0 is none, and `NAME.json`,
      one annotation of the COCO panoptic format, with scores.
    - instance: `NAME.json`, a COCO results list. It contains boxes, so pycocotools would split by box area instead of
      mask area; `results.submission` writes files for evaluation.

    Args:
        segmentation: the result.
        directory: created if it does not exist.
        name: name of the files; default: that of the image file, or "image". See `unique_names` for many files.

    Raises:
        MaskwrightError: the folder is not writable, a file not written by maskwright has the name of a result, or a
            category id does not fit into a label PNG.
        ValueError: the name contains a folder.
    """
    name = name or (Path(segmentation.source).stem if segmentation.source else "image")
    if PurePath(name).name != name:
        raise ValueError(f"name '{name}' must be a file name without a folder")
    contents: dict[str, bytes] = {}
    if segmentation.image is not None:
        contents[f"{name}_overlay.png"] = encode_png(segmentation.overlay())
    if segmentation.confidence is not None:
        contents[f"{name}_confidence.png"] = encode_png(confidence_image(segmentation))
    match segmentation.task:
        case "semantic":
            contents[f"{name}_labels.png"] = encode_png(label_image(segmentation))
        case "panoptic":
            file_name = f"{name}_panoptic.png"
            contents[file_name] = encode_png(panoptic_image(segmentation))
            contents[f"{name}.json"] = _encode_json(panoptic_annotation(segmentation, name, file_name))
        case "instance":
            contents[f"{name}.json"] = _encode_json(instance_results(segmentation, name))
    files = {Path(directory) / file: content for file, content in contents.items()}
    check_replaceable(files)
    write_files_atomically(files)
    return list(files)


def result_files(task: Task, directory: Path, name: str, confidence: bool = False) -> list[Path]:
    """Return the files that `save` may write for a result."""
    kinds = {
        "semantic": ("_labels.png",),
        "panoptic": ("_panoptic.png", ".json"),
        "instance": (".json",),
    }
    extra = ("_confidence.png",) if confidence else ()
    return [directory / f"{name}{ending}" for ending in ("_overlay.png", *extra, *kinds[task])]


def label_image(segmentation: Segmentation) -> PIL.Image.Image:
    """Return a semantic result as a grayscale image of `Category.id`.

    It has 8 bits, with 255 for pixels without a class, if all ids are below 255; otherwise 16 bits, with 65535. That
    depends on the categories only, so all images of a run have the same format.

    Raises:
        MaskwrightError: an id is negative or above 65534.
        ValueError: the result is not semantic.
    """
    if segmentation.label_map is None:
        raise ValueError(f"a label image needs a semantic result, found {segmentation.task}")
    ids = np.array([category.id for category in segmentation.categories], dtype=np.int64)
    invalid = ids[(ids < 0) | (ids > 65534)]
    if invalid.size:
        raise MaskwrightError(
            f"category id {invalid[0]} does not fit into a label PNG, expected 0..65534",
            remedy="give the categories smaller ids, or use Segmentation.to_json",
        )
    dtype = np.uint8 if ids.max(initial=0) < 255 else np.uint16
    no_class = np.iinfo(dtype).max
    return PIL.Image.fromarray(segmentation.map_labels(np.append(ids, no_class).astype(dtype)))


def confidence_image(segmentation: Segmentation) -> PIL.Image.Image:
    """Return the confidence map as an 8-bit grayscale image: 0 is 0, 255 is 1.

    Raises:
        ValueError: the result has no confidence map.
    """
    if segmentation.confidence is None:
        raise ValueError("the result has no confidence map; predict with confidence=True")
    gray = np.empty(segmentation.size, dtype=np.uint8)
    for row, values in zip(gray, segmentation.confidence, strict=True):  # a float copy of the map might be large
        row[:] = np.rint(255 * values)
    return PIL.Image.fromarray(gray)


def encode_png(image: PIL.Image.Image) -> bytes:
    """Return the bytes of a PNG file, with the mark of our results."""
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=3, pnginfo=png_mark())
    return buffer.getvalue()


def unique_names(files: Iterable[str | Path]) -> list[str]:
    """Return a name for the results of each file, all different even if case is ignored.

    It is the file's stem if that is unique; otherwise the folders below the common one are added ("left__0001"), then
    the suffix ("left__0001_png"), and finally a number.
    """
    paths = [Path(os.path.abspath(file)) for file in files]
    levels = zip(*(path.parent.parts for path in paths), strict=False)
    depth = len(list(takewhile(lambda parts: len(set(parts)) == 1, levels)))
    names = [path.stem for path in paths]
    with_folders = ["__".join((*path.parent.parts[depth:], path.stem)) for path in paths]
    with_suffix = ["__".join(path.parts[depth:]).replace(".", "_") for path in paths]
    for longer_names in (with_folders, with_suffix):
        count = Counter(name.casefold() for name in names)
        names = [
            longer if count[name.casefold()] > 1 else name for name, longer in zip(names, longer_names, strict=True)
        ]
    taken: set[str] = set()
    return [_add_number(name, taken) for name in names]


def _add_number(name: str, taken: set[str]) -> str:
    """Make a name unique, and add it to the taken ones."""
    unique, number = name, 1
    while unique.casefold() in taken:
        number += 1
        unique = f"{name}_{number}"
    taken.add(unique.casefold())
    return unique


def _encode_json(value: Any) -> bytes:
    return f"{json.dumps(value)}\n".encode()
