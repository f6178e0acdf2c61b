"""The model process as the HTTP process manages it: a bounded queue of jobs, and a restart after a crash."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from starlette.requests import Request

from maskwright.errors import MaskwrightError
from maskwright.serving.messages import Answer, Cancel, Control, Job, LoadingFailed, Ready, Tensors
from maskwright.serving.metrics import Metrics
from maskwright.serving.problem_details import Problem
from maskwright.serving.request_options import RequestOptions
from maskwright.serving.service_options import ServiceOptions

logger = logging.getLogger(__name__)

_MAX_PAUSE = 30.0  # max seconds between restarts
_WINDOW = 2  # batches in the model process: one is segmented while the next is decoded


class _Child:
    """A model process, with a thread for sending and one for receiving, so that the event loop never blocks."""

    def __init__(self, options: ServiceOptions) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, options), daemon=True)
        self.process.start()
        theirs.close()
        self.sender = ThreadPoolExecutor(1)

    def send(self, message: Job | Cancel) -> None:
        self.sender.submit(self._send, message)

    def _send(self, message: Job | Cancel) -> None:
        with contextlib.suppress(OSError):  # the process has ended; the receiving thread handles that
            self.connection.send(message)

    def receive(self, on_message: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        """Call `on_message` with each message, and `on_end` after the last one, from another thread."""

        def loop() -> None:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    on_message(self.connection.recv())
            on_end()

        threading.Thread(target=loop, daemon=True).start()


class Supervisor:
    """Queues accepted requests, and runs the process that answers them.

    All methods must be called from the event loop's thread. `on_failure` is called if the models cannot be loaded at
    the start; `failure` has the reason.
    """

    def __init__(self, options: ServiceOptions, metrics: Metrics, on_failure: Callable[[], None]) -> None:
        self._options, self._metrics, self._on_failure = options, metrics, on_failure
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Job] = {}
        self._sent: set[int] = set()
        self._futures: dict[int, asyncio.Future[Answer]] = {}
        self._accepted = 0
        self._child: _Child | None = None
        self._ready: Ready | None = None
        self._was_ready, self._pause, self._stopping = False, 0.0, False
        self._models: dict[str, dict[str, Any]] = {}
        self.failure: MaskwrightError | None = None
        metrics.queue_limit.set(options.max_queue)

    @property
    def is_ready(self) -> bool:
        """Whether the models are loaded and requests are accepted."""
        return self._ready is not None and not self._stopping

    def start(self) -> None:
        """Start the model process."""
        if self._stopping:
            return
        self._loop = asyncio.get_running_loop()
        child = self._child = _Child(self._options)
        self._sent = set()
        child.receive(
            lambda message: self._call(self._on_message, child, message), lambda: self._call(self._on_end, child)
        )

    def stop(self) -> None:
        """Kill the model process, after the last answer."""
        self._stopping = True
        if (child := self._child) is not None:
            child.process.kill()
            child.process.join()
            child.sender.shutdown(cancel_futures=True)

    def accept(self, request: Request) -> None:
        """Accept a request before its body is read; it counts as accepted until its answer is sent.

        Raises:
            Problem: the queue is full.
        """
        if self._accepted >= self._options.max_queue:
            raise Problem(
                503,
                f"{self._accepted} requests are waiting, and --max-queue allows no more",
                where="queue",
                remedy="try again later",
                headers={"Retry-After": "1"},
            )
        self._count(1)
        request.state.finish.callback(self._count, -1)

    def _count(self, change: int) -> None:
        self._accepted += change
        self._metrics.queue.set(self._accepted)

    def check_name(self, model: str) -> None:
        """Raise a Problem if there is no such model."""
        if model not in self._options.models:
            raise Problem(404, "no model of this name", where="model", remedy="GET /v1/models lists them")

    def describe(self, model: str | None = None) -> dict[str, Any]:
        """Return the description of a model for clients, or of all models by name.

        Raises:
            Problem: there is no such model, or the models are not loaded.
        """
        if model is not None:
            self.check_name(model)
        if not self._models:
            raise _not_ready()
        return self._models if model is None else self._models[model]

    def check_ready(self) -> None:
        """Raise a Problem unless the models are loaded and requests are accepted."""
        if not self.is_ready:
            raise _not_ready()

    async def segment(
        self, model: str, body: bytes, options: RequestOptions, answer: str | Tensors | Control
    ) -> Answer:
        """Return the answer to a job (see `Job`); cancelling the task cancels the job.

        Raises:
            Problem: the model process crashed.
        """
        job = Job(next(self._numbers), model, body, options, answer)
        future = self._futures[job.number] = asyncio.get_running_loop().create_future()
        self._waiting[job.number] = job
        self._send_waiting()
        try:
            return await future
        finally:
            del self._futures[job.number]
            if self._waiting.pop(job.number, None) is None and job.number in self._sent and self._child is not None:
                self._child.send(Cancel(job.number))

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function in the event loop's thread, unless the loop has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _send_waiting(self) -> None:
        """Send as many jobs as the model process should have."""
        if self._ready is None or self._child is None:
            return
        while self._waiting and len(self._sent) < _WINDOW * self._ready.max_batch:
            number = next(iter(self._waiting))
            self._sent.add(number)
            self._child.send(self._waiting.pop(number))

    def _on_message(self, child: _Child, message: Answer | Ready | LoadingFailed) -> None:
        if child is not self._child:
            return
        match message:
            case Answer():
                self._sent.discard(message.number)
                future = self._futures.get(message.number)
                if future is not None and not future.done():
                    self._metrics.add(message)
                    future.set_result(message)
            case Ready():
                self._ready, self._was_ready, self._pause = message, True, 0.0
                self._models = message.models
                self._metrics.ready.set(1)
                logger.info("ready")
            case LoadingFailed():
                if self._was_ready:  # else the command ends with this message
                    logger.error("%s", message.message)
                self.failure = MaskwrightError(message.message)
        self._send_waiting()

    def _on_end(self, child: _Child) -> None:
        """Fail the jobs of the ended process, and start a new one."""
        if child is not self._child or self._stopping:
            return
        child.process.join()
        child.sender.shutdown(wait=False, cancel_futures=True)
        self._child = self._ready = None
        self._metrics.ready.set(0)
        if not self._was_ready:
            self.failure = self.failure or MaskwrightError(
                f"the model process ended with status {child.process.exitcode} before the models were loaded"
            )
            self._on_failure()
            return
        self._metrics.crashes.inc()
        logger.error("the model process ended with status %s; restarting it", child.process.exitcode)
        for number in self._sent & self._futures.keys():
            if not self._futures[number].done():
                problem = Problem(500, "the model process ended", remedy="try again; report the image if it repeats")
                self._futures[number].set_exception(problem)
        self._sent = set()
        self._loop.call_later(self._pause, self.start)
        self._pause = min(_MAX_PAUSE, 2 * self._pause + 1)


def _not_ready() -> Problem:
    return Problem(503, "the models are not loaded", where="service", headers={"Retry-After": "1"})


def _run(connection: Connection, options: ServiceOptions) -> None:
    """Run the model process; only it imports torch."""
    from maskwright.serving.model_process import run

    run(connection, options)
