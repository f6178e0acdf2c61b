"""One image of a data set, looked at from all sides: whether it can be read, what it shows, and what it is made of."""

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
from maskwright.data.pixel_statistics import channel_sums, colour_sums
from maskwright.data.problems import Problem, ProblemCollector
from maskwright.errors import MaskwrightError
from maskwright.results.draw import to_display_rgb
from maskwright.structures.annotations import Target
from maskwright.structures.id_maps import count_values

T = TypeVar("T")

THUMBNAIL = 16  # pixels of each side


class Picture(NamedTuple):
    """What a picture is made of.

    Attributes:
        size: (height, width) in pixels.
        channels: (3, C) float64: per channel the number of pixels, the sum of their values and that of their squares.
        checksum: CRC-32 of the pixels.
        thumbnail: (16, 16) uint8 gray.
    """

    size: tuple[int, int]
    channels: np.ndarray
    checksum: int
    thumbnail: np.ndarray

    @property
    def content(self) -> tuple[int, bytes, tuple[int, int]]:
        """Equal for equal pictures, whatever their files are; an accident is as good as impossible."""
        return self.checksum, self.thumbnail.tobytes(), self.size


class Objects(NamedTuple):
    """What is annotated in an image.

    Attributes:
        labels: (N,) int, 0..K-1.
        is_crowd: (N,) bool.
        areas: (N,) int, pixels.
        void: pixels without an object.
    """

    labels: np.ndarray
    is_crowd: np.ndarray
    areas: np.ndarray
    void: int


@dataclass(slots=True)
class Examination:
    """What one image turned out to be; small, since it travels between processes.

    Attributes:
        path: the picture's file.
        picture: None where it cannot be read.
        objects: None where the annotations cannot be read.
        problems: what is wrong.
        others: the objects that the annotations for other tasks have, in the order in which they were asked for.
    """

    path: str
    picture: Picture | None = None
    objects: Objects | None = None
    problems: list[Problem] = field(default_factory=list)
    others: list[Objects | None] = field(default_factory=list)


def examine(
    annotated: AnnotatedImages,
    index: int,
    reader_problems: ProblemCollector | None = None,
    others: Sequence[tuple[AnnotatedImages, int]] = (),
) -> Examination:
    """Read one image and its annotations; what is wrong with them becomes problems, never an exception.

    Args:
        annotated: the images of a split.
        index: of the image.
        reader_problems: what the reader was opened with; what it tells meanwhile is moved to the result.
        others: the same picture with its annotations for other tasks; it is not read again.
    """
    path, name = str(annotated.file(index)), f"image {annotated.image_id(index)}"
    result, problems = Examination(path), ProblemCollector()
    with _listening(problems, name):
        image = _tried(lambda: annotated.image(index), problems, name)
        if image is not None:
            result.picture = _describe_picture(image)
        result.objects, *result.others = (
            _objects(images, place, image, problems, name) for images, place in ((annotated, index), *others)
        )
    found = problems.problems + (reader_problems.drain() if reader_problems is not None else [])
    result.problems = list(dict.fromkeys(found))  # two tasks may meet the same broken file
    return result


def _objects(
    annotated: AnnotatedImages, index: int, image: np.ndarray | None, problems: ProblemCollector, name: str
) -> Objects | None:
    target = _tried(lambda: annotated.target(index), problems, name)
    if target is None:
        return None
    if image is not None:
        _tried(lambda: annotated.compare_sizes(index, image, target), problems, name)
    return _describe_objects(target)


def _tried(read: Callable[[], T], problems: ProblemCollector, name: str) -> T | None:
    try:
        return read()
    except MaskwrightError as error:
        problems.error(error, [name])
    except Exception as error:  # nothing that a file holds may end the check; this is ours to mend
        text = " ".join(str(error).split()) or type(error).__name__
        found = f"reading {name} fails with {type(error).__name__} ({text})"
        problems.error(MaskwrightError(found, remedy="please report it"))
    return None


@contextlib.contextmanager
def _listening(problems: ProblemCollector, name: str) -> Generator[None]:
    """What readers log meanwhile becomes problems."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: problems.warning(record.getMessage(), remedy="check the file", items=[name])
    logger = logging.getLogger("maskwright")
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


def _describe_picture(image: np.ndarray) -> Picture:
    colours = to_display_rgb(image)
    shown = Image.fromarray(colours)
    sums = colour_sums(shown) if colours is image else channel_sums(image)
    small = shown.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, reducing_gap=2.0)  # before gray: half the time
    return Picture(image.shape[:2], sums, zlib.crc32(image.data), np.asarray(small.convert("L")))


def _describe_objects(target: Target) -> Objects:
    ids = target.id_maps.numpy()
    counts = np.sum([count_values(layer, len(target) + 1) for layer in ids], axis=0)
    void = counts[0] if len(ids) == 1 else np.count_nonzero(~ids.any(0))
    return Objects(target.labels.numpy(), target.is_crowd.numpy(), counts[1:], int(void))
