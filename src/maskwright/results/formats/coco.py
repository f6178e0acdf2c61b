"""One COCO dataset with all results: for tools that read COCO, for FiftyOne, and for CVAT.

Format: https://cocodataset.org/#format-data, with scores as in COCO's results.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from maskwright.results.formats.base import Run, ToolFiles, relative_name, round_score, source_of
from maskwright.results.json_list import JsonList
from maskwright.results.outlines import Crop, crop_segments, split_parts
from maskwright.results.own_files import COCO_MARK, check_replaceable
from maskwright.results.rle import encode_runs, find_runs
from maskwright.results.segmentation import Segmentation


class CocoDataset(ToolFiles):
    """coco.json: an annotation with RLE mask, area, box and score for each segment. Category ids are the model's."""

    file = "coco.json"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        path = run.directory / self.file
        check_replaceable([path])
        self._document = JsonList(path, f'{COCO_MARK}{json.dumps(run.model)}}},\n"annotations": [')
        self._images: list[dict[str, Any]] = []
        self._count = 0

    def add(self, result: Segmentation, name: str) -> None:
        """Add the result of one image; see `ToolFiles.add`."""
        height, width = map(int, result.size)
        image_id = len(self._images) + 1
        for index, crop in self._masks(result):
            self._count += 1
            category = self._category_id(result.labels[index])
            annotation = {"id": self._count, "image_id": image_id, "category_id": category}
            self._document.add(annotation | _describe(crop, (height, width)) | self._extra(result, index))
        self._images.append({"id": image_id, "file_name": self._image_name(result), "height": height, "width": width})

    def finish(self) -> None:
        """Write the images and categories, and publish the document."""
        kinds = [
            {"id": self._category_id(label), "name": category.name, "supercategory": category.group or ""}
            for label, category in enumerate(self.run.categories)
        ]
        self._document.end(f'],\n"images": {json.dumps(self._images)},\n"categories": {json.dumps(kinds)}}}\n')
        self._document.publish()

    def discard(self) -> None:
        """Remove the document if it is not complete."""
        self._document.discard()

    def _masks(self, result: Segmentation) -> Iterator[tuple[int, Crop]]:
        """Yield the masks to write, each with the index of its segment."""
        return crop_segments(result)

    def _category_id(self, label: int) -> int:
        return self.run.categories[label].id

    def _image_name(self, result: Segmentation) -> str:
        return relative_name(source_of(result), self.run.images)

    def _extra(self, result: Segmentation, index: int) -> dict[str, Any]:
        score = round_score(result, index)
        return {} if score is None else {"score": score}


class FiftyOneDataset(CocoDataset):
    """labels.json for `fiftyone.types.COCODetectionDataset`, which finds images by absolute paths in any folder."""

    file = "labels.json"

    def _image_name(self, result: Segmentation) -> str:
        return os.path.abspath(source_of(result))


class CvatDataset(CocoDataset):
    """cvat.json for CVAT's import of "COCO 1.0": an annotation per connected part, and categories with ids from 1.

    CVAT has no place for scores, and fails to import annotations of several parts (cvat-ai/cvat#7458).
    """

    file = "cvat.json"

    def _masks(self, result: Segmentation) -> Iterator[tuple[int, Crop]]:
        return ((index, part) for index, crop in crop_segments(result) for part in split_parts(crop))

    def _category_id(self, label: int) -> int:
        return int(label) + 1

    def _extra(self, result: Segmentation, index: int) -> dict[str, Any]:
        return {}


def _describe(crop: Crop, size: tuple[int, int]) -> dict[str, Any]:
    """Return mask, area in pixels and box (x, y, width, height in pixels) of an annotation."""
    height, width = crop.mask.shape
    return {
        "segmentation": encode_runs(find_runs(crop.mask, crop.top, crop.left, size[0]), size),
        "area": int(np.count_nonzero(crop.mask)),
        "bbox": [crop.left, crop.top, width, height],
        "iscrowd": 0,
    }
