"""The model process: decodes images, segments those of one size together, and encodes the answers.

Three threads: one receives jobs, one decodes, and the main one runs the network and encodes. Requests that have the
same model, options and image size after resizing share a forward pass; nothing is padded to a common size, because
padding changes results.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, get_args

from maskwright.data.images.load import ImageSource, load_image
from maskwright.data.images.multichannel import load_channels
from maskwright.data.images.tiled_tiff import ArrayImage, ImageReader
from maskwright.errors import MaskwrightError
from maskwright.inference.pipeline import Pipeline
from maskwright.inference.predictor import Predictor, attach_image
from maskwright.inference.preprocess import Prepared
from maskwright.results.segmentation import Segmentation
from maskwright.serving.encode import encode
from maskwright.serving.messages import Answer, Cancel, Job, LoadingFailed, Ready, Tensors
from maskwright.serving.service_options import ServiceOptions
from maskwright.serving.tensors import InferenceRequest, read_inference, write_inference
from maskwright.structures.category import Task

logger = logging.getLogger(__name__)

_ACCELERATOR_BATCH = 8
_THRESHOLDS = ("object_threshold", "overlap_threshold", "score_threshold", "top_k")
_NAME = "image"  # of every image in errors; the client knows which one it sent


def run(connection: Connection, options: ServiceOptions) -> None:
    """Load the models, and answer jobs until the HTTP process closes the connection."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the HTTP process decides when to end
        signal.signal(number, signal.SIG_IGN)
    try:
        predictors = {
            name: Predictor(source, device=options.device, precision=options.precision)
            for name, source in options.models.items()
        }
    except MaskwrightError as error:
        connection.send(LoadingFailed(str(error)))
        return
    device = next(iter(predictors.values())).device
    max_batch = options.max_batch or (1 if device.type == "cpu" else _ACCELERATOR_BATCH)
    connection.send(Ready({name: _describe(predictor) for name, predictor in predictors.items()}, max_batch))
    ModelProcess(connection, predictors, options, max_batch).run()


class Decoded(NamedTuple):
    """A job whose images are decoded and resized.

    Attributes:
        job: the request.
        pipeline: for the model and options of the job.
        images: prepared, or to be segmented in tiles; several only for a job with tensors.
        inference: of a job with tensors.
        key: jobs with equal keys share a forward pass.
        seconds: time of decoding.
        since: `time.monotonic` when it was decoded.
    """

    job: Job
    pipeline: Pipeline
    images: list[Prepared | ImageReader]
    inference: InferenceRequest | None
    key: tuple[Any, ...]
    seconds: float
    since: float


class ModelProcess:
    """Decodes, segments and answers jobs."""

    def __init__(
        self, connection: Connection, predictors: dict[str, Predictor], options: ServiceOptions, max_batch: int
    ) -> None:
        self._connection, self._predictors, self._options = connection, predictors, options
        self._max_batch = max_batch
        self._decoded: deque[Decoded] = deque()
        self._changed = threading.Condition()
        self._cancelled: set[int] = set()
        self._unfinished: set[int] = set()
        self._sending = threading.Lock()
        self._closed = False

    def run(self) -> None:
        """Answer jobs until the other end of the connection is closed."""
        threading.Thread(target=self._receive, daemon=True).start()
        with contextlib.suppress(BrokenPipeError):
            while not self._closed:
                batch = [item for item in self._next_batch() if not self._drop(item.job.number)]
                if batch:
                    self._segment(batch)

    def _receive(self) -> None:
        """Pass jobs on to the decoding thread."""
        decoder = ThreadPoolExecutor(1)
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = self._connection.recv()
                with self._changed:
                    if isinstance(message, Job):
                        self._unfinished.add(message.number)
                        decoder.submit(self._decode, message)
                    elif isinstance(message, Cancel) and message.number in self._unfinished:
                        self._cancelled.add(message.number)
        decoder.shutdown(wait=False, cancel_futures=True)
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _drop(self, number: int) -> bool:
        """Return whether a job was cancelled; if so, forget it."""
        with self._changed:
            if number not in self._cancelled:
                return False
            self._cancelled.discard(number)
            self._unfinished.discard(number)
        self._send(Answer(number, 499))
        return True

    def _decode(self, job: Job) -> None:
        """Decode and resize the images of a job; runs in the decoding thread."""
        if self._drop(job.number):
            return
        try:
            item = self._prepare(job)
        except Exception as error:
            self._fail(job, error, "the image could not be decoded")
            return
        with self._changed:
            self._decoded.append(item)
            self._changed.notify()

    def _prepare(self, job: Job) -> Decoded:
        start = time.monotonic()
        predictor = self._predictors[job.model]
        inference, options, sources = None, job.options, [job.body]
        if isinstance(job.answer, Tensors):
            channels = _channels(predictor)
            inference = read_inference(job.body, job.answer.header_bytes, channels, self._options.max_pixels)
            options, sources = inference.options, inference.images
        pipeline = predictor.pipeline(**options.prediction())
        pipeline.batch_size = self._max_batch
        images = [pipeline.prepare(self._load(source, predictor)) for source in sources]
        sizes = [tuple(scale.shape for scale in image.scales) for image in images if isinstance(image, Prepared)]
        together = tuple(sizes) if len(sizes) == len(images) else job.number
        key = (job.model, tuple(sorted(options.prediction().items())), together)
        now = time.monotonic()
        return Decoded(job._replace(body=b""), pipeline, images, inference, key, now - start, now)

    def _load(self, image: ImageSource, predictor: Predictor) -> ArrayImage:
        channels, limit = predictor.model.config.channels, self._options.max_pixels
        if channels is None:
            return ArrayImage(load_image(image, max_pixels=limit, name=_NAME))
        return ArrayImage(load_channels(image, channels, max_pixels=limit, name=_NAME))

    def _next_batch(self) -> list[Decoded]:
        """Wait for a job, and a little longer for others that can share its forward pass."""
        with self._changed:
            self._changed.wait_for(lambda: self._decoded or self._closed)
            if self._closed:
                return []
            key = self._decoded[0].key
            last = self._decoded[0].since + self._options.max_wait_ms / 1000
            while self._count(key) < self._max_batch and (left := last - time.monotonic()) > 0:
                self._changed.wait(left)
            batch = [item for item in self._decoded if item.key == key][: self._max_batch]
            chosen = {item.job.number for item in batch}
            self._decoded = deque(item for item in self._decoded if item.job.number not in chosen)
            return batch

    def _count(self, key: tuple[Any, ...]) -> int:
        return sum(item.key == key for item in self._decoded)

    def _segment(self, batch: list[Decoded]) -> None:
        """Segment and answer the jobs; if the batch fails, retry them one by one."""
        start = time.monotonic()
        try:
            pairs = [(image, item) for item in batch for image in item.images]
            results = [result for result, _ in batch[0].pipeline.segment(pairs)]
        except Exception as error:
            if len(batch) > 1:
                for item in batch:
                    self._segment([item])
            else:
                self._fail(batch[0].job, error, "the image could not be segmented")
            return
        seconds = time.monotonic() - start
        remaining = iter(results)
        for item in batch:
            stages = {"decode": item.seconds, "wait": start - item.since, "segment": seconds}
            self._answer(list(itertools.islice(remaining, len(item.images))), item, stages, len(results))

    def _answer(self, results: list[Segmentation], item: Decoded, seconds: dict[str, float], batch: int) -> None:
        start, job = time.monotonic(), item.job
        try:
            body, headers = _encode(results, item)
        except Exception as error:
            self._fail(job, error, "the result could not be encoded")
            return
        seconds["encode"] = time.monotonic() - start
        self._finish(Answer(job.number, 200, body, headers, seconds=seconds, batch=batch))

    def _fail(self, job: Job, error: Exception, unexpected: str) -> None:
        """Answer with an error, which names the model but not its file; of other exceptions it has no details."""
        status = 422
        if not isinstance(error, MaskwrightError):
            logger.error("%s", unexpected, exc_info=error)
            status, error = 500, MaskwrightError(unexpected)
        source = self._options.models[job.model]
        texts = [error.found, error.where, error.remedy]
        for path in (os.path.realpath(source), os.path.abspath(source), source):
            texts = [text.replace(path, job.model) if path else text for text in texts]
        self._finish(Answer(job.number, status, error=MaskwrightError(texts[0], where=texts[1], remedy=texts[2])))

    def _finish(self, answer: Answer) -> None:
        with self._changed:
            self._unfinished.discard(answer.number)
            self._cancelled.discard(answer.number)
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        with self._sending:
            self._connection.send(answer)


def _encode(results: list[Segmentation], item: Decoded) -> tuple[bytes, dict[str, str]]:
    """Return the body of an answer, and headers."""
    if item.inference is not None:
        return write_inference(results, item.inference, item.job.model)
    (result,), (image,) = results, item.images
    if not isinstance(image, Prepared):
        attach_image(result, image)
    return encode(result, item.job), {}


def _channels(predictor: Predictor) -> int:
    return predictor.model.config.channels or 3


def _describe(predictor: Predictor) -> dict[str, Any]:
    """Describe a model for clients."""
    categories = [
        {"id": category.id, "name": category.name, "is_thing": category.is_thing, "color": category.color}
        for category in predictor.model.categories
    ]
    settings = predictor.settings
    thresholds = {name: getattr(settings, name) for name in _THRESHOLDS}
    tasks = [task for task in get_args(Task) if _can_do(predictor, task)]
    described = {"task": settings.task, "tasks": tasks, "channels": _channels(predictor)}
    return {**described, **thresholds, "categories": categories}


def _can_do(predictor: Predictor, task: Task) -> bool:
    try:
        predictor.model.check_task(task)
    except MaskwrightError:
        return False
    return True
