"""What one result becomes in files: JSON with run-length masks, label PNGs, and the entries of COCO's result files.

Formats: https://cocodataset.org/#format-results. What is unusual: every file appears whole or not at all, and there are
names for images that are called the same in different folders.
"""

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
from maskwright.results.rle import areas, boxes, encode_segmentation
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.atomic_write import write_files_atomically
from maskwright.structures.annotations import Category


def to_json(segmentation: Segmentation) -> dict[str, Any]:
    """A description that `json.dumps` takes.

    Returns:
        size: [height, width] in pixels.
        task: "semantic", "instance" or "panoptic".
        segments: a list with, for each one, `category_id` (`Category.id`), `name`, `score` (null for semantic), `box`
            (x0, y0, x1, y1 in pixels, x1 and y1 exclusive), `area` in pixels, and `mask`, an RLE of the COCO API.
    """
    rles = encode_segmentation(segmentation)
    corners = boxes(rles)
    corners[:, 2:] += corners[:, :2]
    columns = (_categories(segmentation), _scores(segmentation), corners.tolist(), _whole(areas(rles)), rles)
    segments = [
        {"category_id": category.id, "name": category.name, "score": score, "box": box, "area": area, "mask": rle}
        for category, score, box, area, rle in zip(*columns, strict=True)
    ]
    return {"size": list(map(int, segmentation.size)), "task": segmentation.task, "segments": segments}


def save(segmentation: Segmentation, directory: str | Path, name: str | None = None) -> list[Path]:
    """Write a result as files; files of the same name are replaced.

    - `NAME_overlay.png`, where the image is known.
    - semantic: `NAME_labels.png`, see `label_image`.
    - panoptic: `NAME_panoptic.png`, whose R + 256 G + 65536 B is the segment's id, 0 for none, and `NAME.json`, one
      annotation of the COCO panoptic format, with scores.
    - instance: `NAME.json`, a COCO results list. It holds boxes: pycocotools then takes the area of the box for that of
      the mask when it splits by size. `submission` writes files for evaluation.

    Args:
        segmentation: the result.
        directory: made where it is absent.
        name: of the files; by default that of the image file, or "image". For many files, see `unique_names`.

    Raises:
        MaskwrightError: the folder cannot be written to, or a category id does not fit a label PNG.
        ValueError: the name holds a folder.
    """
    name = name or (Path(segmentation.source).stem if segmentation.source else "image")
    if PurePath(name).name != name:
        raise ValueError(f"name '{name}' must be a file name without a folder")
    contents: dict[str, bytes] = {}
    if segmentation.image is not None:
        contents[f"{name}_overlay.png"] = encode_png(segmentation.overlay())
    match segmentation.task:
        case "semantic":
            contents[f"{name}_labels.png"] = encode_png(label_image(segmentation))
        case "panoptic":
            picture = f"{name}_panoptic.png"
            contents[picture] = encode_png(panoptic_image(segmentation))
            contents[f"{name}.json"] = _json(panoptic_annotation(segmentation, name, picture))
        case "instance":
            contents[f"{name}.json"] = _json(instance_results(segmentation, name))
    folder = Path(directory)
    files = {folder / file: content for file, content in contents.items()}
    write_files_atomically(files)
    return list(files)


def label_image(segmentation: Segmentation) -> PIL.Image.Image:
    """A semantic result as a gray picture of `Category.id`, lossless.

    8 bits with 255 for "nothing" where all ids are below 255, otherwise 16 bits with 65535; that depends on the
    categories only, so all pictures of a run are alike.

    Raises:
        MaskwrightError: an id is negative or above 65534.
        ValueError: the result is not semantic.
    """
    if segmentation.label_map is None:
        raise ValueError(f"a label picture needs a semantic result, found {segmentation.task}")
    ids = np.array([category.id for category in segmentation.categories], dtype=np.int64)
    outside = ids[(ids < 0) | (ids > 65534)]
    if outside.size:
        raise MaskwrightError(
            f"category id {outside[0]} does not fit a label picture, expected 0..65534; "
            "give the categories smaller ids, or use to_json"
        )
    depth = np.uint8 if ids.max(initial=0) < 255 else np.uint16
    nothing = np.iinfo(depth).max
    return PIL.Image.fromarray(segmentation.map_labels(np.append(ids, nothing).astype(depth)))


def panoptic_image(segmentation: Segmentation) -> PIL.Image.Image:
    """A panoptic result as an RGB picture: R + 256 G + 65536 B is the segment's number from 1 on, 0 is none.

    Raises:
        ValueError: the result is not panoptic.
    """
    if segmentation.segment_map is None:
        raise ValueError(f"an id picture needs a panoptic result, found {segmentation.task}")
    numbers = segmentation.segment_map.astype("<u4", order="C")
    return PIL.Image.fromarray(numbers.view(np.uint8).reshape(*segmentation.size, 4)[..., :3].copy())


def panoptic_annotation(segmentation: Segmentation, image_id: int | str, file_name: str) -> dict[str, Any]:
    """One entry of "annotations" in the COCO panoptic format, for the picture that `panoptic_image` gives.

    Segments without a pixel are left out, as evaluators refuse them. `bbox` is x, y, width, height in pixels.
    """
    rles = encode_segmentation(segmentation)
    columns = (_categories(segmentation), _scores(segmentation), _whole(boxes(rles)), _whole(areas(rles)))
    segments = [
        {
            "id": number,
            "category_id": category.id,
            "isthing": int(category.is_thing),
            "iscrowd": 0,
            "area": area,
            "bbox": box,
            "score": score,
        }
        for number, (category, score, box, area) in enumerate(zip(*columns, strict=True), 1)
        if area
    ]
    return {"image_id": image_id, "file_name": file_name, "segments_info": segments}


def instance_results(segmentation: Segmentation, image_id: int | str) -> list[dict[str, Any]]:
    """The instances as a COCO results list; `bbox` is x, y, width, height in pixels."""
    rles = encode_segmentation(segmentation)
    columns = (_categories(segmentation), _scores(segmentation), boxes(rles).tolist(), rles)
    return [
        {"image_id": image_id, "category_id": category.id, "score": score, "bbox": box, "segmentation": rle}
        for category, score, box, rle in zip(*columns, strict=True)
    ]


def unique_names(files: Iterable[str | Path]) -> list[str]:
    """A name for the results of each file, all different, also where upper and lower case are one.

    The file's name without suffix where that is enough; otherwise with its folders below the common one
    ("left__0001"), then with its suffix too ("left__0001_png"), and at last with a number.
    """
    paths = [Path(os.path.abspath(file)) for file in files]
    levels = zip(*(path.parent.parts for path in paths), strict=False)
    depth = len(list(takewhile(lambda parts: len(set(parts)) == 1, levels)))
    names = [path.stem for path in paths]
    with_folders = ["__".join((*path.parent.parts[depth:], path.stem)) for path in paths]
    with_suffix = ["__".join(path.parts[depth:]).replace(".", "_") for path in paths]
    for longer in (with_folders, with_suffix):
        count = Counter(name.casefold() for name in names)
        names = [other if count[name.casefold()] > 1 else name for name, other in zip(names, longer, strict=True)]
    taken: set[str] = set()
    return [_claim(name, taken) for name in names]


def _categories(segmentation: Segmentation) -> list[Category]:
    return [segmentation.categories[label] for label in segmentation.labels.tolist()]


def _scores(segmentation: Segmentation) -> list[float | None]:
    return [None] * len(segmentation) if segmentation.scores is None else segmentation.scores.tolist()


def _whole(values: np.ndarray) -> list:
    return values.astype(np.int64).tolist()


def _claim(name: str, taken: set[str]) -> str:
    free, number = name, 1
    while free.casefold() in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free.casefold())
    return free


def encode_png(picture: PIL.Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "png", compress_level=3)
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return f"{json.dumps(value)}\n".encode()
