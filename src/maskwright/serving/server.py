"""The HTTP server: listens, answers until SIGTERM or SIGINT, and finishes the accepted requests."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import uuid

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from maskwright.errors import MaskwrightError
from maskwright.serving.app import create_app
from maskwright.serving.guard import MAX_HEADER_BYTES, SECURITY_HEADERS
from maskwright.serving.problem_details import Problem
from maskwright.serving.service_options import ServiceOptions
from maskwright.serving.supervisor import Supervisor

logger = logging.getLogger(__name__)

_HEADER_SECONDS = 10.0
_STALL_SECONDS = 20.0  # without progress of a client that reads its answer
_MAX_CONNECTIONS = 512  # in addition to those of accepted requests


class _TimeoutProtocol(H11Protocol):
    """HTTP/1.1 with timeouts for clients that do not send their headers, or do not read their answer."""

    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # ty: ignore[invalid-argument-type]
        self._restart()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._restart()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def _watch(self, unsent: int) -> None:
        """Abort the connection if nothing is sent within `_STALL_SECONDS`."""

        def check() -> None:
            left = self.transport.get_write_buffer_size()
            if left < unsent:
                self._watch(left)
            else:
                self.transport.abort()

        self._write_timer = self.loop.call_later(_STALL_SECONDS, check)

    def _stop_watching(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with problem details, like other errors."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            problem = Problem(400, "is not valid HTTP/1.1", where="request")
            answer = problem.response({"path": "", "state": {"request_id": uuid.uuid4().hex}})
            headers = [*answer.headers.items(), *SECURITY_HEADERS.items(), ("Connection", "close")]
            start = h11.Response(status_code=400, headers=headers, reason="Bad Request")
            for event in (start, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _restart(self) -> None:
        """Run the header timer between requests, and stop it during one."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEADER_SECONDS, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def serve(options: ServiceOptions) -> None:
    """Answer requests until SIGTERM or SIGINT.

    Raises:
        MaskwrightError: an option is wrong, the address cannot be used, or a model cannot be loaded.
    """
    options.check()
    failures: list[MaskwrightError] = []

    def end(supervisor: Supervisor) -> None:
        assert supervisor.failure is not None
        failures.append(supervisor.failure)
        server.should_exit = True

    listener = _listen(options)
    config = uvicorn.Config(
        create_app(options, end),
        http=_TimeoutProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        limit_concurrency=options.max_queue + _MAX_CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(2 * options.timeout)),
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    server = uvicorn.Server(config)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again after the accepted requests
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("listening on http://%s:%d, loading %s", shown, port, ", ".join(options.models))
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
    logger.info("finished all accepted requests")


def _listen(options: ServiceOptions) -> socket.socket:
    where = f"{options.host}:{options.port}"
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((options.host, options.port), family=family, backlog=128)
    except OSError as error:
        remedy = "choose another --host or --port"
        raise MaskwrightError(
            f"cannot listen: {str(error.strerror).partition(' (while ')[0]}", where=where, remedy=remedy
        ) from None
    listener.setblocking(False)
    return listener
