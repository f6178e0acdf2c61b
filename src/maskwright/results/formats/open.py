"""The formats by name."""

from __future__ import annotations

from typing import Literal

from maskwright.results.formats.base import Run, ToolFiles
from maskwright.results.formats.coco import CocoDataset, CvatDataset, FiftyOneDataset
from maskwright.results.formats.label_studio import LabelStudioPolygons, LabelStudioTasks
from maskwright.results.formats.labelme import LabelmeFiles
from maskwright.results.formats.parquet import ParquetShards
from maskwright.results.formats.yolo import YoloFiles

ToolFormat = Literal["coco", "cvat", "fiftyone", "label-studio", "label-studio-polygons", "labelme", "parquet", "yolo"]


def open_tool_files(name: ToolFormat, run: Run) -> ToolFiles:
    """Start the files for a tool.

    Raises:
        MaskwrightError: the folder contains a file with the name of a result that maskwright did not write.
    """
    kinds: dict[ToolFormat, type[ToolFiles]] = {
        "coco": CocoDataset,
        "cvat": CvatDataset,
        "fiftyone": FiftyOneDataset,
        "label-studio": LabelStudioTasks,
        "label-studio-polygons": LabelStudioPolygons,
        "labelme": LabelmeFiles,
        "parquet": ParquetShards,
        "yolo": YoloFiles,
    }
    return kinds[name](run)
