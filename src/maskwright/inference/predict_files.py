"""`maskwright predict`: find the images, segment them and write the results in the files that were asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from maskwright.data.images import warn
from maskwright.errors import MaskwrightError
from maskwright.inference.inputs import Source, find_sources, name_results
from maskwright.inference.predict_each import Summary, Write, predict_each, save_result
from maskwright.inference.predict_workers import choose_workers, make_job, predict_with_workers
from maskwright.inference.predictor import Predictor
from maskwright.results.formats.base import Run, common_folder
from maskwright.results.own_files import not_replaceable
from maskwright.results.save import result_files
from maskwright.results.submission import Benchmark, open_submission
from maskwright.runtime.atomic_write import remove_abandoned_files

if TYPE_CHECKING:
    from maskwright.results.formats.open import ToolFormat

logger = logging.getLogger(__name__)


def predict_files(
    predictor: Predictor,
    inputs: Sequence[str],
    output: Path,
    *,
    submission: Benchmark | None = None,
    format: ToolFormat | None = None,
    confidence: bool = False,
    column: str | None = None,
    workers: int | None = 1,
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
        workers: number of processes that divide the images and the cores; None chooses it by `choose_workers`. The
            others import the main module of the program, so a script must call this below `if __name__ == "__main__"`.
        on_image: called after each file, segmented or not, with the file and the total number of files.
        options: as for `Predictor.__call__`.

    Raises:
        DatasetError, ImageError: an input cannot be read, or matches nothing.
        MaskwrightError: the model has no classes for the task, an option is out of range, results cannot be written,
            the submission has no place for them, or several processes cannot run the model.
    """
    _check_outputs(submission, format, confidence)
    warn.forget()
    pipeline = predictor.pipeline(confidence=confidence, **options)
    sources = find_sources(inputs, output, column)
    names = name_results(sources)
    remove_abandoned_files(output)
    workers = choose_workers(predictor, pipeline.config, sources) if workers is None else min(workers, len(sources))

    def segment(checked: Iterable[MaskwrightError | None], write: Write, in_workers: bool = False) -> Summary:
        images = zip(sources, names, checked, strict=True)
        advance = None if on_image is None else lambda source: on_image(source, len(sources))
        if workers == 1:
            summary = predict_each(pipeline, images, write, advance)
        else:
            job = make_job(predictor, {"confidence": confidence, **options}, workers, write if in_workers else None)
            summary = predict_with_workers(job, pipeline, list(images), workers, write, advance)
        if hint := pipeline.hint():
            logger.warning("%s", hint)
        return summary

    if format is not None:
        from maskwright.results.formats.open import open_tool_files  # imports scipy.ndimage: 0.4 s

        paths = [Path(str(source)) for source in sources]
        run = Run(output, common_folder(paths), predictor.model.categories, predictor.name)
        with open_tool_files(format, run) as tool_files:
            return segment(tool_files.check_names(paths, names), lambda result, name, _: tool_files.add(result, name))
    if submission is None:
        files_of = partial(result_files, pipeline.config.task, output, confidence=confidence)
        checked = (not_replaceable(files_of(name)) for name in names)
        return segment(checked, partial(save_result, output), in_workers=True)
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
