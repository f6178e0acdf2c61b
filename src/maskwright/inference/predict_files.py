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
from maskwright.errors import MaskwrightError
from maskwright.inference.inputs import find_inputs
from maskwright.inference.pipeline import Pipeline
from maskwright.inference.predictor import Predictor, attach_image, open_input
from maskwright.inference.preprocess import Prepared
from maskwright.results.formats.base import Run, common_folder
from maskwright.results.formats.open import ToolFormat, open_tool_files
from maskwright.results.own_files import check_replaceable
from maskwright.results.save import result_files, save, unique_names
from maskwright.results.segmentation import Segmentation
from maskwright.results.submission import Benchmark, open_submission
from maskwright.runtime.background import BackgroundWriter, prefetch

logger = logging.getLogger(__name__)

LARGE = 2**24  # pixels; nothing is read or written at the same time as a larger image, so memory holds only one

Write = Callable[[Segmentation, str, ImageReader], object]


@dataclass
class Summary:
    """Outcome of a prediction over files.

    Attributes:
        done: number of images that were segmented.
        failures: (file, reason) of images that could not be segmented.
    """

    done: int = 0
    failures: list[tuple[Path, str]] = field(default_factory=list)


def predict_files(
    predictor: Predictor,
    inputs: Sequence[str],
    output: Path,
    *,
    submission: Benchmark | None = None,
    format: ToolFormat | None = None,
    confidence: bool = False,
    on_image: Callable[[Path, int], None] | None = None,
    **options: object,
) -> Summary:
    """Segment files, folders and globs; write the files of `Segmentation.save`, or those of a benchmark or tool.

    An image that cannot be read, or whose results would overwrite a file that maskwright did not write, does not stop
    the others. Results of earlier predictions are skipped, and so is the output folder if it is below an input folder.

    Args:
        predictor: see `Predictor`.
        inputs: files, folders (searched recursively) and globs.
        output: folder of the results.
        submission: benchmark whose files are written (see `submission`); image ids are the names of the files.
        format: annotation tool whose files are written (see `results.formats`).
        confidence: also compute and write confidence maps; neither for a submission nor for a tool.
        on_image: called after each file, segmented or not, with the file and the total number of files.
        options: as for `Predictor.__call__`.

    Raises:
        ImageError: an input matches nothing.
        MaskwrightError: the model has no classes for the task, an option is out of range, results cannot be written, or
            the submission has no place for them.
    """
    _check_outputs(submission, format, confidence)
    forget()
    pipeline = predictor.pipeline(confidence=confidence, **options)
    paths = find_inputs(inputs, output)
    names = unique_names(paths)
    if format is not None:
        run = Run(output, common_folder(paths), predictor.model.categories, predictor.name)
        with open_tool_files(format, run) as tool_files:
            return _predict_each(
                pipeline,
                zip(paths, names, tool_files.check_names(paths, names), strict=True),
                len(paths),
                lambda result, name, _: tool_files.add(result, name),
                on_image,
            )
    if submission is None:
        files_of = partial(result_files, pipeline.config.task, output, confidence=confidence)
        return _predict_each(
            pipeline,
            zip(paths, names, map(lambda name: _not_replaceable(files_of(name)), names), strict=True),
            len(paths),
            lambda result, name, image: _save(result, name, image, output),
            on_image,
        )
    with open_submission(submission, pipeline.config.task, output) as files:
        return _predict_each(
            pipeline,
            zip(paths, names, files.check_names(names), strict=True),
            len(paths),
            lambda result, name, _: files.add(result, name),
            on_image,
        )


def _check_outputs(submission: Benchmark | None, format: ToolFormat | None, confidence: bool) -> None:
    if submission is not None and format is not None:
        raise MaskwrightError(
            "--submission and --format both choose the files to write", remedy="leave one of them out"
        )
    chosen = format if submission is None else submission
    if chosen is not None and confidence:
        kind = "submission format" if submission else "format"
        raise MaskwrightError(f"the {kind} of {chosen} has no confidence maps", remedy="leave --confidence out")


def _not_replaceable(files: list[Path]) -> MaskwrightError | None:
    try:
        check_replaceable(files)
    except MaskwrightError as error:
        return error
    return None


def _predict_each(
    pipeline: Pipeline,
    images: Iterable[tuple[Path, str, MaskwrightError | None]],
    count: int,
    write: Write,
    on_image: Callable[[Path, int], None] | None,
) -> Summary:
    """Segment and write the images; record those that come with an error as failed."""
    summary = Summary()
    read = (
        _read(path, name, pipeline) if error is None else (error, (path, name, None)) for path, name, error in images
    )
    with BackgroundWriter() as writer:
        for result, (path, name, image) in pipeline.try_segment(prefetch(read, lambda item: is_large(item[1][2]))):
            if isinstance(result, MaskwrightError):
                summary.failures.append((path, str(result)))
            else:
                result.source = str(path)
                writer.submit(write, result, name, image)
                summary.done += 1
                if is_large(image):
                    writer.flush()
            if on_image:
                on_image(path, count)
    if hint := pipeline.hint():
        logger.warning("%s", hint)
    return summary


def _read(
    path: Path, name: str, pipeline: Pipeline
) -> tuple[Prepared | ImageReader | MaskwrightError, tuple[Path, str, ImageReader | None]]:
    try:
        image = open_input(path, pipeline)
        return pipeline.prepare(image), (path, name, image)
    except MaskwrightError as error:
        return error, (path, name, None)


def _save(result: Segmentation, name: str, image: ImageReader, output: Path) -> None:
    attach_image(result, image)
    save(result, output, name)


def is_large(image: ImageReader | None) -> bool:
    """Return True if nothing else may be in memory beside the image."""
    return image is not None and image.size[0] * image.size[1] > LARGE
