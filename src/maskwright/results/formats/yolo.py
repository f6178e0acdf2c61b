"""YOLO segmentation: data.yaml with class names, and a text file of polygons for each image.

Format: https://docs.ultralytics.com/datasets/segment/.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml

from maskwright.errors import MaskwrightError
from maskwright.results.formats.base import Run, ToolFiles, relative_name, source_of
from maskwright.results.outlines import Polygon, crop_segments, trace_polygons
from maskwright.results.own_files import TEXT_MARK, check_replaceable
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.atomic_write import partial_path, remove, write_errors, write_files_atomically

logger = logging.getLogger(__name__)


class YoloFiles(ToolFiles):
    """data.yaml, and labels/NAME.txt with a line for each connected part; class numbers start at 0.

    Text files carry no mark of ours and annotators edit them, so `labels` must not exist. It is written under a hidden
    name and renamed when all images are done.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._yaml, self._labels = run.directory / "data.yaml", run.directory / "labels"
        check_replaceable([self._yaml])
        if self._labels.exists() and not (self._labels.is_dir() and not any(self._labels.iterdir())):
            raise MaskwrightError(
                "exists, and labels are never replaced",
                where=self._labels,
                remedy="choose another output folder, or move it",
            )
        self._partial = partial_path(self._labels)
        self._with_holes = 0

    def check_names(self, paths: Sequence[Path], names: Sequence[str]) -> list[MaskwrightError | None]:
        """Return an error for images whose labels would have the same name (a.jpg and a.png)."""
        first: dict[str, Path] = {}
        found = []
        for path in paths:
            other = first.setdefault(self._label_name(path).casefold(), path)
            found.append(None if other is path else _same_labels(path, other))
        return found

    def add(self, result: Segmentation, name: str) -> None:
        """Add the result of one image; see `ToolFiles.add`."""
        lines = []
        for index, crop in crop_segments(result):
            polygons = trace_polygons(crop)
            lines += [label_line(int(result.labels[index]), polygon, result.size) for polygon in polygons]
            self._with_holes += any(polygon.has_hole for polygon in polygons)
        path = self._partial / self._label_name(source_of(result))
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines), encoding="utf-8")

    def finish(self) -> None:
        """Rename the folder of labels, write data.yaml, and warn if holes were filled."""
        with write_errors(self._labels):
            self._partial.mkdir(parents=True, exist_ok=True)
            if self._labels.exists():
                self._labels.rmdir()
            self._partial.rename(self._labels)
        write_files_atomically({self._yaml: _data_yaml([category.name for category in self.run.categories])})
        if self._with_holes:
            logger.warning(
                "%s: %d segments have holes, which are filled: YOLO stores outlines only",
                self._labels,
                self._with_holes,
            )

    def discard(self) -> None:
        """Remove labels that are not complete."""
        remove(self._partial)

    def _label_name(self, path: Path) -> str:
        name = PurePosixPath(relative_name(path, self.run.images))
        return name.with_suffix(".txt").as_posix()


def label_line(label: int, polygon: Polygon, size: tuple[int, int]) -> str:
    """Return "class x y x y ..." in fractions of width and height."""
    fractions = polygon.points / (size[1], size[0])
    return " ".join([str(label), *(f"{fraction:.7f}" for fraction in fractions.ravel())]) + "\n"


def _data_yaml(names: list[str]) -> bytes:
    """Without `path`, which Ultralytics would search in its own folder of datasets."""
    content = {"train": "images", "val": "images", "names": dict(enumerate(names))}
    return (TEXT_MARK + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)).encode()


def _same_labels(path: Path, other: Path) -> MaskwrightError:
    return MaskwrightError(
        f"its labels would have the name of those of {other}", where=path, remedy="rename one of them"
    )
