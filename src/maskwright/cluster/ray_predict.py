"""`maskwright predict --engine ray`: the results of `predict_files`, by many workers.

The images are divided into chunks. A worker runs the loop of `predict_files` over a chunk: while the network runs on
one image, the next one is read and the previous result is written. So masks never leave the worker.

Unusual: a chunk whose worker died, or failed with an unexpected error, is run image by image, so that one image that
kills its process fails alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maskwright.cluster.ray_options import RayOptions
from maskwright.cluster.ray_session import ray_session
from maskwright.cluster.run_folder import RunFolder
from maskwright.errors import MaskwrightError, one_line
from maskwright.inference.exported_model import ExportedModel, open_model
from maskwright.inference.inputs import Source, find_sources, name_results
from maskwright.inference.nothing_found import NothingFound, first_hint, merge_all
from maskwright.inference.predict_each import Write, predict_each, save_result
from maskwright.inference.predictor import Predictor
from maskwright.models.segmenter import Segmenter
from maskwright.results.formats.parquet import ROWS_PER_SHARD, require_pyarrow, to_row, write_shard
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Task

logger = logging.getLogger(__name__)

_IMAGES_PER_CHUNK = 64
_CHUNKS_PER_WORKER = 4  # at least, so that all workers end at about the same time
_DEATHS = 2  # of workers over one image, after which it is given up

Image = tuple[int, Source, str]  # number, image, name of its results


@dataclass
class RaySummary:
    """Outcome of a prediction by workers.

    Attributes:
        done: number of images that were segmented.
        kept: number of images whose results were there already.
        failures: (image, reason) of images that could not be segmented.
        seconds: from the first image of the first worker to the last result.
    """

    done: int = 0
    kept: int = 0
    failures: list[tuple[Source, str]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class PredictJob:
    """What every worker gets.

    Attributes:
        model: on the CPU; or the path of an exported file.
        folder: of the results.
        options: as for `Predictor.pipeline`.
        directory: to which relative paths of images belong.
        device, precision, compile: as for `Predictor`.
        threads: of PyTorch.
    """

    model: Segmenter | Path
    folder: RunFolder
    options: dict[str, Any]
    directory: Path
    device: str | None
    precision: str
    compile: bool
    threads: int = 1

    def predictor(self) -> Predictor:
        """Return the predictor of a worker."""
        return Predictor(self.model, device=self.device, precision=self.precision, compile=self.compile)


@dataclass
class ChunkOutcome:
    """Outcome of a chunk.

    Attributes:
        done: numbers of the images that were segmented.
        failed: (number, reason) of the others.
        warnings: logged by the worker.
        started: when the worker began it, in seconds since 1970.
        worker: its name, for `nothing_found`.
        nothing_found: see `Pipeline.nothing_found`, over all chunks of the worker.
        fatal: why no image can be done; the other fields are then empty.
    """

    done: list[int] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    started: float = 0.0
    worker: str = ""
    nothing_found: dict[Task, NothingFound] = field(default_factory=dict)
    fatal: MaskwrightError | None = None


def predict_on_ray(
    checkpoint: str | Path,
    inputs: Sequence[str],
    output: Path,
    ray_options: RayOptions,
    *,
    as_parquet: bool = False,
    confidence: bool = False,
    column: str | None = None,
    device: str | None = None,
    precision: str = "fp32",
    compile: bool = False,
    on_image: Callable[[int, int], None] | None = None,
    **options: object,
) -> RaySummary:
    """Segment images by workers on Ray; write the files of `Segmentation.save`, or Parquet shards.

    A run that was stopped is resumed by the same call: images whose results are there are not segmented again. Images
    that cannot be read are listed in `failures.parquet` in the output folder, and are tried again by the next call.

    Args:
        checkpoint: see `Predictor`. A checkpoint is read here and sent to the workers; an exported file must be
            visible to them.
        inputs: see `find_sources`. Paths must be visible to the workers.
        output: folder of the results, on a disk that all machines share.
        ray_options: the cluster and its workers.
        as_parquet: write `results.formats.parquet`.
        confidence: also compute and write confidence maps.
        column: of lists of images.
        device: of the workers; see `Predictor`.
        precision: of the network.
        compile: see `Predictor`.
        on_image: called with the number of images that were finished, and of all that are to be done.
        options: as for `Predictor.__call__`.

    Raises:
        MaskwrightError: a file, option, address or machine cannot be used, results cannot be written, or images are
            missing from the outcomes.
    """
    require_pyarrow()
    model = open_model(checkpoint, "cpu")
    config = Predictor(model, device="cpu", precision=precision).pipeline(confidence=confidence, **options).config
    sources = find_sources(inputs, output, column)
    names = name_results(sources)
    folder = RunFolder(output.absolute(), config.task, as_parquet, confidence)
    settings = {"model": _digest(model), "precision": precision, "parquet": as_parquet, "confidence": confidence}
    settings |= config.model_dump(mode="json", exclude={"batch_size", "metrics", "max_images"})
    folder.open(settings, list(zip(names, map(str, sources), strict=True)))

    missing = [image for image in zip(range(len(sources)), sources, names, strict=True) if image[2] not in folder.done]
    refused = folder.refusals([name for _, _, name in missing])
    outcome = ChunkOutcome(failed=[(number, refused[name]) for number, _, name in missing if name in refused])
    todo = [image for image in missing if image[2] not in refused]
    if folder.done:
        logger.info("%d of %d images are done already", len(sources) - len(missing), len(sources))
    seconds = 0.0
    if todo:
        sent = Path(model.file.path).absolute() if isinstance(model, ExportedModel) else model
        job = PredictJob(sent, folder, {"confidence": confidence, **options}, Path.cwd(), device, precision, compile)
        seconds = _run(job, todo, ray_options, outcome, on_image)

    check_complete({number for number, _, _ in missing}, outcome.done, outcome.failed)
    failed = sorted(outcome.failed)
    folder.finish([(str(sources[number]), names[number], reason) for number, reason in failed])
    failures = [(sources[number], reason) for number, reason in failed]
    return RaySummary(len(outcome.done), len(sources) - len(missing), failures, seconds)


def _run(
    job: PredictJob,
    images: Sequence[Image],
    ray_options: RayOptions,
    total: ChunkOutcome,
    on_image: Callable[[int, int], None] | None,
) -> float:
    """Run the workers, add their outcomes to `total`, and return the seconds from the first image on."""
    starts: list[float] = []
    end = time.time()
    nothing_found: dict[str, dict[Task, NothingFound]] = {}
    warnings: set[str] = set()
    with ray_session(ray_options) as session:
        plan = session.plan(job.device)
        job = replace(job, threads=plan.threads)
        session.check_nodes([job.folder.record, *([job.model] if isinstance(job.model, Path) else [])])
        chunks = cut_chunks(images, plan.workers, ROWS_PER_SHARD if job.folder.as_parquet else _IMAGES_PER_CHUNK)
        logger.info("%d images; workers: %d, threads per worker: %d", len(images), plan.workers, plan.threads)
        for outcome in session.run(PredictWorker, job, chunks, plan):
            if outcome.fatal is not None:
                raise outcome.fatal
            total.done += outcome.done
            total.failed += outcome.failed
            starts.append(outcome.started)
            end = time.time()
            nothing_found[outcome.worker] = outcome.nothing_found
            for warning in outcome.warnings:
                _log_once(warning, warnings)
            if on_image:
                on_image(len(outcome.done) + len(outcome.failed), len(images))
    if hint := first_hint(merge_all(nothing_found.values())):
        logger.warning("%s", hint)
    return end - min(starts, default=end)


class PredictWorker:
    """Segments chunks of images in a worker process."""

    def __init__(self, job: PredictJob, count: Callable[[object, int], int]) -> None:
        self.job, self._count = job, count
        self._error: MaskwrightError | None = None
        torch.set_num_threads(job.threads)
        with suppress(OSError):  # without it, images with relative paths are not found, which their reasons say
            os.chdir(job.directory)
        try:
            self.pipeline = job.predictor().pipeline(**job.options)
        except MaskwrightError as error:
            self._error = error

    def __call__(self, number: int, images: list[Image]) -> ChunkOutcome:
        """Segment a chunk; `number` is that of the chunk."""
        if self._error is not None:
            return ChunkOutcome(fatal=self._error)
        started = time.time()
        with _CollectedWarnings() as collected:
            try:
                outcome = self._segment(number, images)
            except MaskwrightError as error:
                return ChunkOutcome(fatal=error)
        outcome.warnings, outcome.nothing_found = collected.messages, self.pipeline.nothing_found
        outcome.started, outcome.worker = started, _process_name()
        return outcome

    def _segment(self, chunk: int, images: list[Image]) -> ChunkOutcome:
        rows: list[dict[str, Any]] = []
        write = partial(_add_row, rows) if self.job.folder.as_parquet else partial(save_result, self.job.folder.output)
        outcome = None
        if self._count(("chunk", chunk), 1) == 1:
            try:
                outcome = self._try(images, write)
            except MaskwrightError:
                raise
            except Exception as error:  # of one image; found below
                rows.clear()
                logging.getLogger(__name__).debug("chunk %d: %s", chunk, error)
        outcome = outcome or self._one_by_one(images, write)
        if rows:
            write_shard(self.job.folder.shard(chunk), rows)
        return outcome

    def _one_by_one(self, images: list[Image], write: Write) -> ChunkOutcome:
        """Segment the images that are not done; one over which several workers died has failed."""
        outcome = ChunkOutcome()
        for image in images:
            number, _, name = image
            if self.job.folder.is_done(name):
                outcome.done.append(number)
                continue
            if self._count(("image", number), 1) > _DEATHS:
                outcome.failed.append((number, "its process was killed each time (out of memory?)"))
                continue
            try:
                one = self._try([image], write)
                outcome.done += one.done
                outcome.failed += one.failed
            except MaskwrightError:
                raise
            except Exception as error:
                outcome.failed.append((number, f"{type(error).__name__}: {one_line(error)}"))
            self._count(("image", number), -1)
        return outcome

    def _try(self, images: list[Image], write: Write) -> ChunkOutcome:
        summary = predict_each(self.pipeline, [(source, name, None) for _, source, name in images], write)
        reasons = {str(source): reason for source, reason in summary.failures}
        failed = [(number, reasons[str(source)]) for number, source, _ in images if str(source) in reasons]
        return ChunkOutcome([number for number, source, _ in images if str(source) not in reasons], failed)


class _CollectedWarnings(logging.Handler):
    """Collects the package's warnings in a worker, whose terminal nobody sees."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> _CollectedWarnings:
        logging.getLogger("maskwright").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("maskwright").removeHandler(self)


def cut_chunks(images: Sequence[Image], workers: int, largest: int) -> list[list[Image]]:
    """Cut images into chunks of equal size, the last one smaller."""
    size = max(1, min(largest, len(images) // (_CHUNKS_PER_WORKER * workers)))
    return [list(images[start : start + size]) for start in range(0, len(images), size)]


def check_complete(expected: set[int], done: Sequence[int], failed: Sequence[tuple[int, str]]) -> None:
    """Check that every image was done or has failed, and none twice.

    Raises:
        MaskwrightError: one is missing, or in both.
    """
    counted = [*done, *(number for number, _ in failed)]
    if set(counted) != expected or len(counted) != len(expected):
        raise MaskwrightError(
            f"of {len(expected)} images, {len(done)} are done and {len(failed)} have failed, which does not add up",
            remedy="run the same command again, which does what is missing",
        )


def _add_row(rows: list[dict[str, Any]], result: Segmentation, name: str, _: object) -> None:
    rows.append(to_row(result, name))


def _digest(model: Segmenter) -> str:
    """Return a digest of the weights and classes, or of an exported file."""
    if isinstance(model, ExportedModel):
        return hashlib.sha256(Path(model.file.path).read_bytes()).hexdigest()[:16]
    total = hashlib.sha256(repr(model.categories).encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def _process_name() -> str:
    return f"{platform.node()}-{os.getpid()}"


def _log_once(warning: str, logged: set[str]) -> None:
    """Log a warning, unless another worker had the same about another image."""
    kind = warning.partition(": ")[2] or warning
    if kind not in logged:
        logged.add(kind)
        logger.warning("%s", warning)
