"""Label Studio: a list of tasks with predictions, and a labeling configuration that fits them.

Formats: https://labelstud.io/guide/predictions and https://labelstud.io/tags/brushlabels. Brush masks are the RGBA
image of the mask, compressed by thi.ng's rle-pack: a stream of bits with a header (32 bits: number of values; 5: bits
of a value - 1; 4 times 4: bits of each of four kinds of lengths - 1) and blocks (1 bit: repeated value; 2: kind of
length; length - 1; the value).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import numpy as np

from maskwright.errors import MaskwrightError
from maskwright.results.formats.base import Run, ToolFiles, relative_name, round_score, source_of
from maskwright.results.formats.label_config import Control, ControlKind, write_config
from maskwright.results.json_list import JsonList
from maskwright.results.outlines import Crop, crop_segments, trace_polygons
from maskwright.results.own_files import check_replaceable
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.atomic_write import write_files_atomically

_LENGTH_BITS = (3, 4, 8, 16)
_OPAQUE = 255


class LabelStudioTasks(ToolFiles):
    """label_studio.json with brush masks, and label_config.xml.

    Images are named as local files below the folder of images: Label Studio serves them if
    LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT is that folder.
    """

    kind: ControlKind = "BrushLabels"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        labels = {category.name: category.name for category in run.categories}
        self._control = Control(self.kind, "segments", "image", labels)
        self._config = run.directory / "label_config.xml"
        path = run.directory / "label_studio.json"
        check_replaceable([path, self._config])
        self._document = JsonList(path, "[")

    def add(self, result: Segmentation, name: str) -> None:
        """Add the result of one image; see `ToolFiles.add`."""
        url = f"/data/local-files/?d={quote(relative_name(source_of(result), self.run.images))}"
        prediction = make_prediction(result, self._control, self.run.model)
        self._document.add({"predictions": [prediction], "data": {"image": url}})

    def finish(self) -> None:
        """Publish the tasks and write the labeling configuration."""
        self._document.end("]\n")
        self._document.publish()
        write_files_atomically({self._config: write_config(self.run.categories, self.kind).encode()})

    def discard(self) -> None:
        """Remove the document if it is not complete."""
        self._document.discard()


class LabelStudioPolygons(LabelStudioTasks):
    """The same files with a polygon for each connected part; holes are lost."""

    kind: ControlKind = "PolygonLabels"


def make_prediction(result: Segmentation, control: Control, model: str) -> dict[str, Any]:
    """Return the prediction for a task, with a region for each brush mask or polygon.

    Returns:
        model_version, result, with scores `score`, their mean, and, if there are segments of classes without a label,
        `unlabeled`, their number by class.
    """
    prediction: dict[str, Any] = {"model_version": f"maskwright {model}", "result": list(_regions(result, control))}
    if result.scores is not None and len(result):
        prediction["score"] = round(float(result.scores.mean()), 4)
    if unlabeled := Counter(name for name in result.names if name not in control.labels):
        prediction["unlabeled"] = dict(unlabeled)
    return prediction


def encode_brush(mask: np.ndarray) -> list[int]:
    """Return a mask (H, W) bool as the bytes of Label Studio's run-length encoding; pixels of the mask are 255.

    Raises:
        MaskwrightError: the mask has 2**30 pixels or more, which the format cannot count.
    """
    flat = mask.ravel()
    if flat.size >= 2**30:
        raise MaskwrightError(
            f"the image has {flat.size:,} pixels, but Label Studio's brush masks have fewer than {2**30:,}",
            remedy="use --format label-studio-polygons",
        )
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = 4 * np.diff(np.append(starts, flat.size))  # of R, G, B and alpha
    values = np.where(flat[starts], _OPAQUE, 0)
    lengths, values = _split_long(lengths, values)
    kinds = np.searchsorted([2**bits for bits in _LENGTH_BITS], lengths)
    length_bits = np.array(_LENGTH_BITS)[kinds]
    blocks = ((4 + kinds << length_bits) + lengths - 1 << 8) + values  # 1 bit "repeated", 2 the kind, length, 8 value
    header = [(4 * flat.size, 32), (7, 5), *((bits - 1, 4) for bits in _LENGTH_BITS)]
    numbers = np.concatenate([[number for number, _ in header], blocks])
    sizes = np.concatenate([[bits for _, bits in header], 3 + length_bits + 8])
    return _pack(numbers, sizes)


def _regions(result: Segmentation, control: Control) -> Iterator[dict[str, Any]]:
    values = _brushes if control.kind == "BrushLabels" else _polygons
    number = 0
    for index, crop in crop_segments(result):
        label = control.labels.get(result.names[index])
        for value in values(crop, result.size) if label is not None else ():
            number += 1
            yield _region(f"r{number}", control, value | {control.kind.lower(): [label]}, result, index)


def _brushes(crop: Crop, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    mask = np.zeros(size, dtype=bool)
    height, width = crop.mask.shape
    mask[crop.top : crop.top + height, crop.left : crop.left + width] = crop.mask
    yield {"format": "rle", "rle": encode_brush(mask)}


def _polygons(crop: Crop, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    height, width = size
    for polygon in trace_polygons(crop):
        yield {"points": (100 * polygon.points / (width, height)).round(6).tolist(), "closed": True}


def _region(number: str, control: Control, value: dict[str, Any], result: Segmentation, index: int) -> dict[str, Any]:
    height, width = map(int, result.size)
    region = {
        "id": number,
        "type": control.kind.lower(),
        "from_name": control.name,
        "to_name": control.to_name,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": value,
    }
    score = round_score(result, index)
    return region if score is None else region | {"score": score}


def _split_long(lengths: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split runs that are longer than the format allows."""
    longest = 2 ** _LENGTH_BITS[-1]
    pieces = -(-lengths // longest)
    split = np.full(pieces.sum(), longest)
    split[np.cumsum(pieces) - 1] = lengths - longest * (pieces - 1)
    return split, np.repeat(values, pieces)


def _pack(numbers: np.ndarray, sizes: np.ndarray) -> list[int]:
    """Return the bytes of numbers below 2**32, each written with its own count of bits, the highest bit first."""
    bits = np.unpackbits(numbers.astype(">u4").view(np.uint8)).reshape(-1, 32)
    return np.packbits(bits[np.arange(32) >= 32 - sizes[:, None]]).tolist()
