"""Label Studio: a list of tasks with predictions, and a labeling configuration that fits them.

Formats: https://labelstud.io/guide/predictions and https://labelstud.io/tags/brushlabels. Brush masks are the RGBA
image of the mask, compressed by thi.ng's rle-pack: a stream of bits with a header (32 bits: number of values; 5: bits
of a value - 1; 4 times 4: bits of each of four kinds of lengths - 1) and blocks (1 bit: repeated value; 2: kind of
length; length - 1; the value).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from maskwright.errors import MaskwrightError
from maskwright.results.formats.base import Run, ToolFiles, relative_name, round_score, source_of
from maskwright.results.json_list import JsonList
from maskwright.results.outlines import Crop, crop_segments, trace_polygons
from maskwright.results.own_files import XML_MARK, check_replaceable
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.atomic_write import write_files_atomically

_LENGTH_BITS = (3, 4, 8, 16)
_OPAQUE = 255


class LabelStudioTasks(ToolFiles):
    """label_studio.json with brush masks, and label_config.xml.

    Images are named as local files below the folder of images: Label Studio serves them if
    LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT is that folder.
    """

    control = "BrushLabels"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._config = run.directory / "label_config.xml"
        path = run.directory / "label_studio.json"
        check_replaceable([path, self._config])
        self._document = JsonList(path, "[")

    def add(self, result: Segmentation, name: str) -> None:
        """Add the result of one image; see `ToolFiles.add`."""
        url = f"/data/local-files/?d={quote(relative_name(source_of(result), self.run.images))}"
        prediction = {"model_version": f"maskwright {self.run.model}", "result": list(self._regions(result))}
        if result.scores is not None and len(result):
            prediction["score"] = round(float(result.scores.mean()), 4)
        self._document.add({"predictions": [prediction], "data": {"image": url}})

    def finish(self) -> None:
        """Publish the tasks and write the labeling configuration."""
        self._document.end("]\n")
        self._document.publish()
        write_files_atomically({self._config: labeling_config(self.run, self.control).encode()})

    def discard(self) -> None:
        """Remove the document if it is not complete."""
        self._document.discard()

    def _regions(self, result: Segmentation) -> Iterator[dict[str, Any]]:
        number = 0
        for index, crop in crop_segments(result):
            for value in self._values(crop, result.size):
                number += 1
                yield _region(f"r{number}", self.control.lower(), value, result, index)

    def _values(self, crop: Crop, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
        """Yield the values of the regions of a segment."""
        mask = np.zeros(size, dtype=bool)
        height, width = crop.mask.shape
        mask[crop.top : crop.top + height, crop.left : crop.left + width] = crop.mask
        yield {"format": "rle", "rle": encode_brush(mask)}


class LabelStudioPolygons(LabelStudioTasks):
    """The same files with a polygon for each connected part; holes are lost."""

    control = "PolygonLabels"

    def _values(self, crop: Crop, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
        height, width = size
        for polygon in trace_polygons(crop):
            yield {"points": (100 * polygon.points / (width, height)).round(6).tolist(), "closed": True}


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


def labeling_config(run: Run, control: str) -> str:
    """Return the labeling configuration with the classes and colors of the model."""
    labels = "".join(
        f'    <Label value={quoteattr(category.name)} background="#{bytes(category.color).hex()}"/>\n'
        for category in run.categories
    )
    image = '  <Image name="image" value="$image"/>\n'
    return f'{XML_MARK}<View>\n{image}  <{control} name="segments" toName="image">\n{labels}  </{control}>\n</View>\n'


def _region(number: str, kind: str, value: dict[str, Any], result: Segmentation, index: int) -> dict[str, Any]:
    height, width = map(int, result.size)
    region = {
        "id": number,
        "type": kind,
        "from_name": "segments",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": value | {kind: [result.names[index]]},
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
