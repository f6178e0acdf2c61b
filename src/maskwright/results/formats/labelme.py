"""labelme: a JSON file for each image.

Format: https://labelme.io/docs and the files that labelme 5 saves. `points` are pixels; a shape of type "mask" has the
first and last pixel of its box as points and a PNG of the box.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from maskwright.errors import MaskwrightError
from maskwright.results.formats.base import ToolFiles, relative_name, round_score, source_of
from maskwright.results.outlines import Crop, crop_segments, trace_polygons
from maskwright.results.own_files import LABELME_MARK, check_replaceable, not_replaceable
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.atomic_write import write_files_atomically

_VERSION = "5.5.0"  # of the format; older labelme has no masks


class LabelmeFiles(ToolFiles):
    """NAME.json with a polygon for each connected part; segments with holes are masks, so nothing is lost.

    A file that was saved by labelme since is not replaced, because labelme moves our mark to the end.
    """

    def check_names(self, paths: Sequence[Path], names: Sequence[str]) -> list[MaskwrightError | None]:
        """Return an error for each image whose file exists and was not written by us."""
        return [not_replaceable([self._path(name)]) for name in names]

    def add(self, result: Segmentation, name: str) -> None:
        """Write the file of one image; see `ToolFiles.add`."""
        path = self._path(name)
        check_replaceable([path])
        height, width = map(int, result.size)
        content = {
            "version": _VERSION,
            "flags": {},
            "shapes": [shape for index, crop in crop_segments(result) for shape in _shapes(result, index, crop)],
            "imagePath": relative_name(source_of(result), self.run.directory),
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        write_files_atomically({path: f"{LABELME_MARK}{json.dumps(content)[1:]}\n".encode()})

    def finish(self) -> None:
        """Do nothing: the files are complete."""

    def discard(self) -> None:
        """Do nothing: the files are complete."""

    def _path(self, name: str) -> Path:
        return self.run.directory / f"{name}.json"


def _shapes(result: Segmentation, index: int, crop: Crop) -> Iterator[dict[str, Any]]:
    score = round_score(result, index)
    common = {"label": result.names[index], "description": "" if score is None else f"score {score}", "flags": {}}
    polygons = trace_polygons(crop)
    if any(polygon.has_hole for polygon in polygons):
        height, width = crop.mask.shape
        box = [[crop.left, crop.top], [crop.left + width - 1, crop.top + height - 1]]
        yield common | {"points": box, "group_id": None, "shape_type": "mask", "mask": _encode_mask(crop)}
        return
    group = index + 1 if len(polygons) > 1 else None
    for polygon in polygons:
        yield common | {"points": polygon.points.tolist(), "group_id": group, "shape_type": "polygon", "mask": None}


def _encode_mask(crop: Crop) -> str:
    buffer = io.BytesIO()
    PIL.Image.fromarray(crop.mask).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
