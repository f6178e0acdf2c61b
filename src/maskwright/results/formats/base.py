"""Base of the files for annotation tools."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maskwright.errors import MaskwrightError
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category


@dataclass(frozen=True)
class Run:
    """The prediction whose results are written.

    Attributes:
        directory: folder of the files.
        images: folder that contains all images; image names in the files are relative to it.
        categories: the classes of the model.
        model: name of the model, for tools that show it.
    """

    directory: Path
    images: Path
    categories: tuple[Category, ...]
    model: str


class ToolFiles(ABC):
    """Files for one tool. Used as a context manager; a document of all images is published only if the block succeeds.

    Raises:
        MaskwrightError: the folder contains a file with the name of a result that maskwright did not write.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @abstractmethod
    def add(self, result: Segmentation, name: str) -> None:
        """Add the result of one image.

        Args:
            result: with `source`, the file of the image.
            name: unique name for files of this image.

        Raises:
            MaskwrightError: the folder is not writable.
        """

    def check_names(self, paths: Sequence[Path], names: Sequence[str]) -> list[MaskwrightError | None]:
        """Return for each image the reason why its result cannot be written, else None."""
        return [None] * len(paths)

    @abstractmethod
    def finish(self) -> None:
        """Complete and publish the files."""

    @abstractmethod
    def discard(self) -> None:
        """Remove what is not complete."""

    def __enter__(self) -> ToolFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.discard()


def source_of(result: Segmentation) -> Path:
    """Return the file of the image.

    Raises:
        ValueError: the result was not made from a file.
    """
    if result.source is None:
        raise ValueError("the result has no source; files for annotation tools name the image that was segmented")
    return Path(result.source)


def relative_name(path: Path, folder: Path) -> str:
    """Return the path from a folder to a file with / as separator; on another drive of Windows, the absolute path."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return Path(os.path.abspath(path)).as_posix()


def common_folder(paths: Sequence[Path]) -> Path:
    """Return the deepest folder that contains all files; on several drives of Windows, that of the first file."""
    parents = [os.path.abspath(path.parent) for path in paths]
    try:
        return Path(os.path.commonpath(parents))
    except ValueError:
        return Path(parents[0])


def round_score(result: Segmentation, index: int) -> float | None:
    """Return the score of a segment with four digits; None if the task has none."""
    return None if result.scores is None else round(float(result.scores[index]), 4)
