"""`maskwright predict`: segment image files and write the results.

While the network runs on one image, the next one is read and the previous result is written, each in a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maskwright.data.images.load import find_images
from maskwright.data.images.tiled_tiff import ImageReader
from maskwright.errors import MaskwrightError
from maskwright.inference.pipeline import Pipeline
from maskwright.inference.predictor import Predictor, attach_image, open_input
from maskwright.inference.preprocess import Prepared, prepare
from maskwright.results.save import save, unique_names
from maskwright.results.segmentation import Segmentation
from maskwright.results.submission import Benchmark, open_submission
from maskwright.runtime.background import BackgroundWriter, prefetch

LARGE = 2**24  # pixels; nothing is read or written at the same time as a larger image, so memory holds only one

Write = Callable[[Segmentation, str, ImageReader], object]


@dataclass
class Summary:
    """What became of the files.

    Attributes:
        done: number of images that were segmented.
        failures: (file, reason) of those that could not be.
    """

    done: int = 0
    failures: list[tuple[Path, str]] = field(default_factory=list)


def predict_files(
    predictor: Predictor,
    inputs: Sequence[str],
    output: Path,
    *,
    submission: Benchmark | None = None,
    on_image: Callable[[Path, int], None] | None = None,
    **options: object,
) -> Summary:
    """Segment files, folders and globs, and write the files of `Segmentation.save` for each, or a benchmark's files.

    An image that cannot be read does not stop the others.

    Args:
        predictor: see `Predictor`.
        inputs: files, folders (searched recursively) and globs.
        output: folder of the results.
        submission: benchmark whose files are written (see `submission`); image ids are the names of the files.
        on_image: called after each file, segmented or not, with the file and the total number of files.
        options: as for `Predictor.__call__`.

    Raises:
        ImageError: an input matches nothing.
        MaskwrightError: the model has no classes for the task, an option is out of range, results cannot be written, or
            the submission has no place for them.
    """
    pipeline = predictor.pipeline(**options)
    paths = find_images(inputs)
    if submission is None:
        return _predict_each(pipeline, paths, lambda result, name, image: _save(result, name, image, output), on_image)
    with open_submission(submission, pipeline.config.task, output) as files:
        return _predict_each(pipeline, paths, lambda result, name, _: files.add(result, name), on_image)


def _predict_each(
    pipeline: Pipeline, paths: list[Path], write: Write, on_image: Callable[[Path, int], None] | None
) -> Summary:
    summary = Summary()
    read = (_read(path, name, pipeline) for path, name in zip(paths, unique_names(paths), strict=True))
    images = prefetch(read, lambda item: _is_large(item[1][2]))
    with BackgroundWriter() as writer:
        for result, (path, name, image) in pipeline.try_segment(images):
            if isinstance(result, MaskwrightError):
                summary.failures.append((path, str(result)))
            else:
                result.source = str(path)
                writer.submit(write, result, name, image)
                summary.done += 1
                if _is_large(image):
                    writer.flush()
            if on_image:
                on_image(path, len(paths))
    return summary


def _read(
    path: Path, name: str, pipeline: Pipeline
) -> tuple[Prepared | ImageReader | MaskwrightError, tuple[Path, str, ImageReader | None]]:
    try:
        image = open_input(path, pipeline)
        return prepare(image, pipeline.config), (path, name, image)
    except MaskwrightError as error:
        return error, (path, name, None)


def _save(result: Segmentation, name: str, image: ImageReader, output: Path) -> None:
    attach_image(result, image)
    save(result, output, name)


def _is_large(image: ImageReader | None) -> bool:
    return image is not None and image.size[0] * image.size[1] > LARGE
