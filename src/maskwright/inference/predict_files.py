"""`maskwright predict`: segment image files and write the results.

While the network runs on one image, the next one is read and the previous result is written, each in a thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from maskwright.data.images.tiled_tiff import ImageReader
from maskwright.data.images.warn import forget
from maskwright.data.storage.folders import File
from maskwright.data.storage.remote import is_url
from maskwright.errors import MaskwrightError
from maskwright.inference.inputs import Source, find_sources, name_results
from maskwright.inference.pipeline import Pipeline
from maskwright.inference.predictor import Predictor, attach_image, open_input
from maskwright.inference.preprocess import Prepared
from maskwright.results.formats.base import Run, common_folder
from maskwright.results.formats.open import ToolFormat, open_tool_files
from maskwright.results.own_files import not_replaceable
from maskwright.results.save import result_files, save
from maskwright.results.segmentation import Segmentation
from maskwright.results.submission import Benchmark, open_submission
from maskwright.runtime.atomic_write import remove_abandoned_files
from maskwright.runtime.background import BackgroundWriter, map_ahead, prefetch

logger = logging.getLogger(__name__)

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


def predict_files(
    predictor: Predictor,
    inputs: Sequence[str],
    output: Path,
    *,
    submission: Benchmark | None = None,
    format: ToolFormat | None = None,
    confidence: bool = False,
    column: str | None = None,
    on_image: Callable[[Source, int], None] | None = None,
    **options: object,
) -> Summary:
    """Segment images and write the files of `Segmentation.save`, or those of a benchmark or tool.

    An image that cannot be read, or whose results would overwrite a file that maskwright did not write, does not stop
    the others. Results of earlier predictions are skipped, and so is the output folder if it is below an input folder.

    Args:
        predictor: see `Predictor`.
        inputs: see `find_sources`; folders are searched recursively.
        output: folder of the results.
        submission: benchmark whose files are written (see `submission`); image ids are the names of the files.
        format: annotation tool whose files are written (see `results.formats`).
        confidence: also compute and write confidence maps; neither for a submission nor for a tool other than parquet.
        column: of lists of images; see `read_image_table`.
        on_image: called after each file, segmented or not, with the file and the total number of files.
        options: as for `Predictor.__call__`.

    Raises:
        DatasetError, ImageError: an input cannot be read, or matches nothing.
        MaskwrightError: the model has no classes for the task, an option is out of range, results cannot be written, or
            the submission has no place for them.
    """
    _check_outputs(submission, format, confidence)
    forget()
    pipeline = predictor.pipeline(confidence=confidence, **options)
    sources = find_sources(inputs, output, column)
    names = name_results(sources)
    remove_abandoned_files(output)

    def segment(checked: Iterable[MaskwrightError | None], write: Write) -> Summary:
        images = zip(sources, names, checked, strict=True)
        advance = None if on_image is None else lambda source: on_image(source, len(sources))
        summary = predict_each(pipeline, images, write, advance)
        if hint := pipeline.hint():
            logger.warning("%s", hint)
        return summary

    if format is not None:
        paths = [Path(str(source)) for source in sources]
        run = Run(output, common_folder(paths), predictor.model.categories, predictor.name)
        with open_tool_files(format, run) as tool_files:
            return segment(tool_files.check_names(paths, names), lambda result, name, _: tool_files.add(result, name))
    if submission is None:
        files_of = partial(result_files, pipeline.config.task, output, confidence=confidence)
        return segment((not_replaceable(files_of(name)) for name in names), partial(save_result, output))
    with open_submission(submission, pipeline.config.task, output) as files:
        return segment(files.check_names(names), lambda result, name, _: files.add(result, name))


def _check_outputs(submission: Benchmark | None, format: ToolFormat | None, confidence: bool) -> None:
    if submission is not None and format is not None:
        raise MaskwrightError(
            "--submission and --format both choose the files to write", remedy="leave one of them out"
        )
    chosen = format if submission is None else submission
    if chosen not in (None, "parquet") and confidence:
        kind = "submission format" if submission else "format"
        raise MaskwrightError(f"the {kind} of {chosen} has no confidence maps", remedy="leave --confidence out")


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
