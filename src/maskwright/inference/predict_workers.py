"""`maskwright predict` on a CPU in several processes, each with its share of the cores.

For small images one process cannot use two cores: each operator is too short to be divided among threads. This process
is one of the workers; the others start and load the model while it segments the first images.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from maskwright.config.schema import EvaluateConfig
from maskwright.data.images import warn
from maskwright.data.images.load import image_size
from maskwright.data.images.resize import network_size
from maskwright.data.storage.folders import File
from maskwright.data.storage.remote import is_url
from maskwright.errors import MaskwrightError
from maskwright.inference.exported_model import ExportedModel
from maskwright.inference.inputs import Source
from maskwright.inference.nothing_found import NothingFound, merge_all
from maskwright.inference.pipeline import Pipeline
from maskwright.inference.predict_each import LARGE, Summary, Write, predict_each
from maskwright.inference.predictor import Predictor
from maskwright.runtime.device import free_and_total_memory_gb, peak_memory_gb
from maskwright.runtime.process_pool import map_in_processes, take
from maskwright.structures.annotations import Task

_SMALL = 512 * 512  # pixels of the network's input, up to which processes are faster than threads
_SMALL_SHARE = 0.9  # of the images, from which on processes are used
_IMAGES_PER_WORKER = 50  # a worker takes seconds to start
_MOST_WORKERS = 8  # if the number is chosen here, because each has its own copy of the model
_SAMPLE = 64  # images whose size is read
_KILLED = 3  # processes over their first image, after which no more are started

Image = tuple[int, Source, str]  # number, image, name of its results


def choose_workers(predictor: Predictor, config: EvaluateConfig, sources: Sequence[Source]) -> int:
    """Return the number of processes for these images: one for each thread if there are many, mostly small, else 1.

    It depends on the images and the machine only, not on a measurement, so that the same command has the same results.
    """
    if _refusal(predictor) or any(isinstance(source, File) and is_url(source.name) for source in sources):
        return 1
    most = min(torch.get_num_threads(), len(sources) // _IMAGES_PER_WORKER, _MOST_WORKERS, 1 + _copies_that_fit())
    if most <= 1:
        return 1
    sample = [_is_small(source, config) for source in sources[:: -(-len(sources) // _SAMPLE)]]
    return most if sum(sample) >= _SMALL_SHARE * len(sample) else 1


def _refusal(predictor: Predictor) -> str | None:
    if predictor.device.type != "cpu":
        return f"the device is {predictor.device}"
    if isinstance(predictor.model, ExportedModel):
        return f"{predictor.checkpoint} is an exported file"
    if predictor.compiles:
        return "each would compile the model, with --compile"
    return None if predictor.checkpoint is not None else "the model is in memory only"


def _copies_that_fit() -> int:
    """Return how many more processes like this one fit into the free memory."""
    memory, own = free_and_total_memory_gb(torch.device("cpu")), peak_memory_gb(torch.device("cpu"))
    return int(memory[0] / own) if memory and own else _MOST_WORKERS


def _is_small(source: Source, config: EvaluateConfig) -> bool:
    size = _size(source)
    if config.tile_size is not None and max(size) > config.tile_size:
        return False
    inputs = [network_size(size, config, scale) for scale in config.scales] if all(size) else []
    if window := config.window_size:
        inputs = [(min(height, window[0]), min(width, window[1])) for height, width in inputs]
    return all(prod(shape) <= _SMALL for shape in inputs)


def _size(source: Source) -> tuple[int, int]:
    """Return (height, width) in pixels; (0, 0) for a file that cannot be read."""
    try:
        return image_size(source)
    except MaskwrightError:
        return 0, 0


@dataclass
class Outcome:
    """Outcome of one image.

    Attributes:
        number: of the image.
        process: that segmented it.
        failure: why it could not be segmented.
        result: arguments of `Write`, if this process is to write it.
        nothing_found: see `Pipeline.nothing_found`, over all images of the process.
        fatal: why no image can be done.
    """

    number: int
    process: int = 0
    failure: str | None = None
    result: tuple[Any, ...] | None = None
    nothing_found: dict[Task, NothingFound] = field(default_factory=dict)
    fatal: MaskwrightError | None = None


@dataclass
class PredictWorker:
    """Segments single images in its process, to which it is sent before its first call.

    Attributes:
        checkpoint, precision: as for `Predictor`.
        options: as for `Predictor.pipeline`.
        threads: of PyTorch.
        write: called with each result; None leaves that to the process that started the worker.
        large: held while an image is segmented beside which no other large one may be in memory.
        warning_flags: see `warn.share_flags`.
    """

    checkpoint: str | Path
    precision: str
    options: dict[str, Any]
    threads: int
    write: Write | None
    large: Any
    warning_flags: Any

    @cached_property
    def pipeline(self) -> Pipeline:
        """The pipeline of a new predictor."""
        torch.set_num_threads(self.threads)
        warn.share_flags(self.warning_flags)
        return Predictor(self.checkpoint, device="cpu", precision=self.precision).pipeline(**self.options)

    def __call__(self, image: Image) -> Outcome:
        """Segment an image; an error is part of the outcome."""
        number, source, name = image
        outcome = Outcome(number, os.getpid())
        results: list[tuple] = []
        try:
            with self.large if prod(_size(source)) > LARGE else contextlib.nullcontext():
                write = self.write or (lambda *arguments: results.append(arguments))
                summary = predict_each(self.pipeline, [(source, name, None)], write)
        except MaskwrightError as error:
            return Outcome(number, fatal=error)
        outcome.failure = next((reason for _, reason in summary.failures), None)
        outcome.result = next(iter(results), None)
        outcome.nothing_found = self.pipeline.nothing_found
        return outcome


def make_job(predictor: Predictor, options: dict[str, Any], workers: int, write: Write | None) -> PredictWorker:
    """Make the job of `workers` processes, which divide the threads of this one.

    Raises:
        MaskwrightError: several processes cannot run the model.
    """
    if reason := _refusal(predictor):
        raise MaskwrightError(f"is for checkpoints on a CPU, but {reason}", where=f"--workers {workers}")
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    assert predictor.checkpoint is not None  # refused above
    return PredictWorker(
        predictor.checkpoint, predictor.precision, options, threads, write, context.Lock(), warn.shared_flags()
    )


class _Outcomes:
    """Takes outcomes from several threads, and completes them in the order of the images."""

    def __init__(self, sources: Sequence[Source], write: Write, on_image: Callable[[Source], None] | None) -> None:
        self.summary = Summary()
        self.nothing_found: dict[int, dict[Task, NothingFound]] = {}
        self._sources, self._write, self._on_image = sources, write, on_image
        self._waiting: dict[int, Outcome] = {}
        self._next = 0
        self._lock = Lock()

    def add(self, outcome: Outcome) -> None:
        """Add the outcome of an image; raises MaskwrightError if no image can be done."""
        if outcome.fatal is not None:
            raise outcome.fatal
        with self._lock:
            self.nothing_found[outcome.process] = outcome.nothing_found
            self._waiting[outcome.number] = outcome
            while (complete := self._waiting.pop(self._next, None)) is not None:
                self._next += 1
                self._complete(complete)
            if self._on_image:
                self._on_image(self._sources[outcome.number])

    def _complete(self, outcome: Outcome) -> None:
        if outcome.failure is not None:
            self.summary.failures.append((self._sources[outcome.number], outcome.failure))
            return
        self.summary.done += 1
        if outcome.result is not None:
            self._write(*outcome.result)


def predict_with_workers(
    job: PredictWorker,
    pipeline: Pipeline,
    images: Sequence[tuple[Source, str, MaskwrightError | None]],
    workers: int,
    write: Write,
    on_image: Callable[[Source], None] | None = None,
) -> Summary:
    """Segment images as `predict_each` does, in this process and `workers - 1` others.

    An image over which a process was killed fails alone.

    Args:
        job: sent to the other processes.
        pipeline: used in this process.
        images: as for `predict_each`.
        workers: at least 2.
        write: called in the order of the images with the results that the job does not write.
        on_image: as for `predict_each`, in any order.

    Raises:
        MaskwrightError: a result cannot be written, or processes cannot even segment one image.
    """
    outcomes = _Outcomes([source for source, _, _ in images], write, on_image)
    queue: deque[Image] = deque()
    for number, (source, name, error) in enumerate(images):
        if error is None:
            queue.append((number, source, name))
        else:
            outcomes.add(Outcome(number, failure=str(error)))
    own = replace(job)
    own.pipeline = pipeline

    def run_others() -> None:
        killed = segmented = 0
        try:
            for outcome in map_in_processes(job, queue, workers - 1, _killed, batch_size=1, start_method="spawn"):
                outcomes.add(outcome)
                killed, segmented = killed + (not outcome.process), segmented + bool(outcome.process)
                if killed >= _KILLED and not segmented:
                    raise MaskwrightError(
                        f"{killed} processes were killed, each over its first image (out of memory?)",
                        where=f"--workers {workers}",
                        remedy="use fewer workers",
                    )
        finally:
            queue.clear()  # the error of one thread ends the other

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1) as side:
        others = side.submit(run_others)
        try:
            torch.set_num_threads(job.threads)
            while image := take(queue, 1):
                outcomes.add(own(image[0]))
        except BaseException:
            queue.clear()
            raise
        finally:
            torch.set_num_threads(threads)
    others.result()
    pipeline.nothing_found |= merge_all(outcomes.nothing_found.values())
    return outcomes.summary


def _killed(image: Image) -> Outcome:
    return Outcome(image[0], failure="its process was killed (out of memory?)")
