"""The loop of `maskwright predict`: segment images one after the other and write the results.

While the network runs on one image, the next one is read and the previous result is written, each in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from maskwright.data.images.tiled_tiff import ImageReader
from maskwright.data.storage.folders import File
from maskwright.data.storage.remote import is_url
from maskwright.errors import MaskwrightError
from maskwright.inference.inputs import Source
from maskwright.inference.pipeline import Pipeline
from maskwright.inference.predictor import attach_image, open_input
from maskwright.inference.preprocess import Prepared
from maskwright.results.save import save
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.background import BackgroundWriter, map_ahead, prefetch

LARGE = 2**24  # pixels; nothing is read or written at the same time as a larger image, so memory holds only one
FETCHES = 8  # files at URLs that are read at once, because storage services answer slowly and in parallel

Write = Callable[[Segmentation, str, ImageReader], object]


@dataclass
class Summary:
    """Outcome of a prediction over files.

    Attributes:
        done: number of images that were segmented.
        failures: (image, reason) of images that could not be segmented.
    """

    done: int = 0
    failures: list[tuple[Source, str]] = field(default_factory=list)


def predict_each(
    pipeline: Pipeline,
    images: Iterable[tuple[Source, str, MaskwrightError | None]],
    write: Write,
    on_image: Callable[[Source], None] | None = None,
) -> Summary:
    """Segment images and write the results; record those that come with an error as failed.

    Args:
        pipeline: of a predictor.
        images: each with the name of its results, and with the error if they cannot be written.
        write: called with each result, its name and the image, in a background thread.
        on_image: called after each image, segmented or not.

    Raises:
        MaskwrightError: a result cannot be written.
    """
    summary = Summary()
    read = (_read(*image, pipeline) for image in map_ahead(_fetch, images, FETCHES))
    with BackgroundWriter() as writer:
        for result, (source, name, image) in pipeline.try_segment(prefetch(read, lambda item: is_large(item[1][2]))):
            if isinstance(result, MaskwrightError):
                summary.failures.append((source, str(result)))
            else:
                result.source = str(source)
                writer.submit(write, result, name, image)
                summary.done += 1
                if is_large(image):
                    writer.flush()
            if on_image:
                on_image(source)
    return summary


Fetched = tuple[Source, str, Source | MaskwrightError]  # image, name of its results, its content or the error


def _fetch(image: tuple[Source, str, MaskwrightError | None]) -> Fetched:
    """Read the bytes of a file at a URL; other files are read where they are decoded."""
    source, name, error = image
    if error is not None:
        return source, name, error
    if isinstance(source, File) and is_url(source.name):
        try:
            return source, name, File(source.name, source.read())
        except MaskwrightError as problem:
            return source, name, problem
    return source, name, source


def _read(
    source: Source, name: str, content: Source | MaskwrightError, pipeline: Pipeline
) -> tuple[Prepared | ImageReader | MaskwrightError, tuple[Source, str, ImageReader | None]]:
    if isinstance(content, MaskwrightError):
        return content, (source, name, None)
    try:
        image = open_input(content, pipeline)
        return pipeline.prepare(image), (source, name, image)
    except MaskwrightError as error:
        return error, (source, name, None)


def save_result(output: Path, result: Segmentation, name: str, image: ImageReader) -> None:
    """Write the files of `Segmentation.save`."""
    attach_image(result, image)
    save(result, output, name)


def is_large(image: ImageReader | None) -> bool:
    """Return True if nothing else may be in memory beside the image."""
    return image is not None and image.size[0] * image.size[1] > LARGE
