"""Middleware for every request: id, token, security headers, one log line; errors reveal nothing about the server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from datetime import UTC, datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maskwright.serving.metrics import Metrics
from maskwright.serving.problem_details import Problem
from maskwright.serving.service_options import ServiceOptions

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16 * 1024  # including the URL
_PROBES = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
_DRAIN_SECONDS = 2.0


class Guard:
    """The outermost layer of the service."""

    def __init__(self, app: ASGIApp, options: ServiceOptions, metrics: Metrics) -> None:
        self._app, self._options, self._metrics = app, options, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # the server drops the body
            scope = {**scope, "method": "GET"}
        exchange = _Exchange(scope, receive, send)
        try:
            _check_header_size(scope)
            _check_framing(exchange.headers)
            self._check(scope["path"], exchange.headers)
            await self._app(scope, exchange.receive, exchange.send)
        except Problem as problem:
            await problem.response(scope)(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            pass
        except Exception:
            logger.exception("request %s failed", exchange.request_id)
            if not exchange.status:
                problem = Problem(500, "the service failed", remedy="report the request id")
                await problem.response(scope)(scope, exchange.receive, exchange.send)
        finally:
            exchange.finish()
            self._log(scope, exchange)

    def _check(self, path: str, headers: Headers) -> None:
        """Check the token or, without one, the Host header, which stops DNS rebinding."""
        token = self._options.token
        if token is None:
            host = re.sub(r":\d+$", "", headers.get("host", ""))
            known = ("localhost", "127.0.0.1", "[::1]", self._options.host)
            if not self._options.allow_open and host not in known:
                raise Problem(
                    403, "not a host name of the service", where="Host", remedy="use localhost, or set a token"
                )
        elif not _is_public(path) and not _is_equal(_read_token(headers.get("authorization", "")), token):
            raise Problem(
                401,
                "no token, or a wrong one",
                where="Authorization",
                remedy="send 'Authorization: Bearer TOKEN'",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _log(self, scope: Scope, exchange: _Exchange) -> None:
        route = getattr(scope.get("route"), "path", "other")
        status = exchange.status or 499  # the client disconnected
        self._metrics.requests.labels(route, status).inc()
        if scope["path"] in _PROBES:
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": exchange.request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(time.monotonic() - exchange.start, 4),
        }
        logger.info("%s", json.dumps(line))


class _Exchange:
    """One request and its answer.

    Attributes:
        headers: of the request.
        request_id: the client's X-Request-ID if it is short ASCII, else a new one.
        status: of the answer; 0 before it begins.

    `scope["state"]` has `request_id`, and `finish`, an ExitStack that is closed when the answer has been sent.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.headers, self.start, self.status = Headers(scope=scope), time.monotonic(), 0
        given = self.headers.get("x-request-id", "")
        self.request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.request_id
        scope["state"]["finish"] = self._finish = contextlib.ExitStack()
        self._body_ended = False

    def finish(self) -> None:
        """Release what the request holds until its answer is sent."""
        self._finish.close()

    async def receive(self) -> Message:
        message = await self._receive()
        self._body_ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                await self._drain()
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self.request_id
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            message = {"type": "http.response.body"}  # waits until nearly all of the body has been sent
        await self._send(message)

    async def _drain(self) -> None:
        """Discard the rest of a refused body for two seconds: many clients read the answer only after sending it."""
        if "content-length" not in self.headers and "transfer-encoding" not in self.headers:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self._body_ended:
                    await self.receive()


def _is_public(path: str) -> bool:
    """Return whether a path needs no token: the probes, and the files of the page."""
    return path in (*_PROBES, "/") or path.startswith("/page/")


def _check_header_size(scope: Scope) -> None:
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > MAX_HEADER_BYTES:
        raise Problem(431, f"more than {MAX_HEADER_BYTES:,} bytes", where="headers", remedy="send fewer headers")


def _check_framing(headers: Headers) -> None:
    """Refuse a body with two lengths, which allows request smuggling behind a proxy (RFC 9112, section 6.1)."""
    if "content-length" in headers and "transfer-encoding" in headers:
        close = {"Connection": "close"}
        found, remedy = "sent together with Content-Length", "send one of them"
        raise Problem(400, found, where="Transfer-Encoding", remedy=remedy, headers=close)


def _read_token(authorization: str) -> str:
    """Return the bearer token, or the password of HTTP basic authentication, which Label Studio sends."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return credentials
    try:
        return (
            base64.b64decode(credentials, validate=True).decode().partition(":")[2] if scheme.lower() == "basic" else ""
        )
    except ValueError:
        return ""


def _is_equal(given: str, expected: str) -> bool:
    """Compare in constant time."""
    digests = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in (given, expected))
    return hmac.compare_digest(*digests)
