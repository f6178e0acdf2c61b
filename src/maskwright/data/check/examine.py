"""Examination of one image and its annotations: what they hold, and what is wrong with them."""

from __future__ import annotations

import contextlib
import logging
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.images.warn import logging_each
from maskwright.data.pixel_statistics import channel_sums, rgb_sums
from maskwright.data.problems import Problem, ProblemCollector
from maskwright.errors import MaskwrightError, one_line, printable
from maskwright.results.draw import to_display_rgb
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import count_values

T = TypeVar("T")

THUMBNAIL_SIZE = 16  # pixels of each side


class PixelContent(NamedTuple):
    """The pixels of an image, summarized.

    Attributes:
        size: (height, width) in pixels.
        channel_sums: (3, C) float64: number of pixels, sum of values, and sum of squares of each channel.
        checksum: CRC-32 of the pixels.
        thumbnail: (16, 16) uint8 gray.
    """

    size: tuple[int, int]
    channel_sums: np.ndarray
    checksum: int
    thumbnail: np.ndarray

    @property
    def fingerprint(self) -> tuple[int, bytes, tuple[int, int]]:
        """Return a value that is equal for equal pixels, in any file format, and practically only for them."""
        return self.checksum, self.thumbnail.tobytes(), self.size


class ObjectSummary(NamedTuple):
    """The annotated objects of an image.

    Attributes:
        labels: (N,) int, 0..K-1.
        is_crowd: (N,) bool.
        areas: (N,) int, pixels.
        void: number of pixels without an object.
    """

    labels: np.ndarray
    is_crowd: np.ndarray
    areas: np.ndarray
    void: int


@dataclass(slots=True)
class ExaminedImage:
    """The result for one image; small, since it is sent between processes.

    Attributes:
        path: the image file.
        pixels: None if the image cannot be read.
        objects: None if the annotations cannot be read.
        problems: problems of the image and its annotations.
        other_objects: objects in the annotations for other tasks, in the order of the request.
    """

    path: str
    pixels: PixelContent | None = None
    objects: ObjectSummary | None = None
    problems: list[Problem] = field(default_factory=list)
    other_objects: list[ObjectSummary | None] = field(default_factory=list)


def examine_image(
    annotated: AnnotatedImages,
    index: int,
    reader_problems: ProblemCollector | None = None,
    other_tasks: Sequence[tuple[AnnotatedImages, int]] = (),
) -> ExaminedImage:
    """Read one image and its annotations; errors become problems and are never raised.

    Args:
        annotated: the images of a split.
        index: index of the image.
        reader_problems: the collector that the reader was opened with; its problems are moved to the result.
        other_tasks: the same image with its annotations for other tasks; it is read once.
    """
    path, name = str(annotated.file(index)), f"image {annotated.image_id(index)}"
    result, problems = ExaminedImage(path), ProblemCollector()
    with _collect_log_records(problems, name):
        image = _try(lambda: annotated.image(index), problems, name)
        if image is not None:
            result.pixels = _summarize_pixels(image)
        result.objects, *result.other_objects = (
            _examine_objects(images, position, image, problems, name)
            for images, position in ((annotated, index), *other_tasks)
        )
    found = problems.problems + (reader_problems.drain() if reader_problems is not None else [])
    result.problems = list(dict.fromkeys(found))  # two tasks may read the same damaged file
    return result


def _examine_objects(
    annotated: AnnotatedImages, index: int, image: np.ndarray | None, problems: ProblemCollector, name: str
) -> ObjectSummary | None:
    target = _try(lambda: annotated.target(index), problems, name)
    if target is None:
        return None
    if image is not None:
        _try(lambda: annotated.compare_sizes(index, image, target), problems, name)
    return _summarize_objects(target)


def _try(read: Callable[[], T], problems: ProblemCollector, name: str) -> T | None:
    with collecting_errors(problems, name):
        return read()
    return None


@contextlib.contextmanager
def collecting_errors(problems: ProblemCollector, name: str) -> Generator[None]:
    """Add an error that is raised inside to the problems, and continue after the block.

    Nothing in a file may end the check, so this includes errors that are bugs of ours.
    """
    try:
        yield
    except MaskwrightError as error:
        problems.error(error, [name])
    except Exception as error:
        found = f"reading {name} fails with {type(error).__name__} ({printable(one_line(error))})"
        problems.error(MaskwrightError(found, remedy="please report it"))


@contextlib.contextmanager
def _collect_log_records(problems: ProblemCollector, name: str) -> Generator[None]:
    """Turn warnings that readers log, as "FILE: text", into problems."""

    def emit(record: logging.LogRecord) -> None:
        where = str(record.args[0]) if isinstance(record.args, tuple) and record.msg.startswith("%s: ") else ""
        found, _, remedy = record.getMessage().removeprefix(f"{where}: ").rpartition("; ")
        problems.warning(found or remedy, where=where, remedy=remedy if found else "check the file", items=[name])

    handler = logging.Handler(logging.WARNING)
    handler.emit = emit
    logger = logging.getLogger("maskwright")
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with logging_each():
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def _summarize_pixels(image: np.ndarray) -> PixelContent:
    rgb = to_display_rgb(image)
    displayed = Image.fromarray(rgb)
    sums = rgb_sums(displayed) if rgb is image else channel_sums(image)
    size = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    small = displayed.resize(size, Image.Resampling.BOX, reducing_gap=2.0)  # before gray: half the time
    return PixelContent(image.shape[:2], sums, zlib.crc32(image.data), np.asarray(small.convert("L")))


def _summarize_objects(target: Target) -> ObjectSummary:
    ids = target.id_maps.numpy()
    counts = np.sum([count_values(layer, len(target) + 1) for layer in ids], axis=0)
    void = counts[0] if len(ids) == 1 else np.count_nonzero(~ids.any(0))
    return ObjectSummary(target.labels.numpy(), target.is_crowd.numpy(), counts[1:], int(void))
