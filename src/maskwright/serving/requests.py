"""Read the image and options of a request, with limits on bytes, parts and time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from maskwright.errors import MaskwrightError, printable
from maskwright.serving.messages import JSON, PNG, Answer
from maskwright.serving.problem_details import Problem
from maskwright.serving.request_options import RequestOptions, parse_options
from maskwright.serving.service_options import ServiceOptions

Result = TypeVar("Result")

_FORM = "multipart/form-data"
_BYTES = ("", "application/octet-stream", "application/x-www-form-urlencoded")  # the last is what curl sends
_MAX_FIELD_BYTES = 1024
_FORM_BYTES = 16 * 1024  # of a form, without its image


class _InMemoryParser(MultiPartParser):
    """A parser that writes no temporary files; the size of the body is already limited."""

    spool_max_size = 0  # SpooledTemporaryFile: never rolled over


async def read_request(request: Request, options: ServiceOptions) -> tuple[bytes, RequestOptions]:
    """Return the bytes of the image, and the options of the query and the form.

    Raises:
        Problem: the body is too large, too slow, of another type, or an option is wrong.
        ClientDisconnect: the client disconnected.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != _FORM and kind not in _BYTES and not kind.startswith("image/"):
        raise Problem(
            415,
            f"found '{printable(kind)}', expected {_FORM}, image/* or application/octet-stream",
            where="Content-Type",
            remedy="send the image itself; the service does not download URLs",
        )
    body = await read_body(request, options, _FORM_BYTES if kind == _FORM else 0)
    image, fields = await _parse_form(request.headers, body) if kind == _FORM else (body, [])
    if not image:
        raise Problem(422, "no image was sent", where="image", remedy="send it as the body or as the field 'image'")
    if len(image) > options.max_bytes:
        raise _too_large(options.max_bytes)
    return image, _parse_options([*request.query_params.multi_items(), *fields])


def choose_media_type(accept: str | None) -> str:
    """Return the type of the answer that an Accept header prefers, `JSON` or `PNG`.

    Raises:
        Problem: it accepts neither.
    """
    qualities = {}
    for item in (accept or "*/*").split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = next((value[2:] for value in parameters if value.startswith("q=")), "1")
        try:
            qualities[kind] = float(quality)
        except ValueError:
            qualities[kind] = 0.0
    best = max((JSON, PNG), key=lambda kind: _quality(qualities, kind))  # JSON if both are equal
    if not _quality(qualities, best) > 0:
        raise Problem(406, f"found '{printable(accept)}', expected {JSON} or {PNG}", where="Accept")
    return best


def _quality(qualities: Mapping[str, float], kind: str) -> float:
    patterns = (kind, f"{kind.partition('/')[0]}/*", "*/*")
    return next((qualities[pattern] for pattern in patterns if pattern in qualities), 0.0)


async def read_body(request: Request, options: ServiceOptions, extra: int = 0) -> bytes:
    """Return the body; one that is too large is refused, before it is read if it declares its length.

    Args:
        request: its body has not been read yet.
        options: the limits.
        extra: bytes beyond `max_bytes` that are allowed.

    Raises:
        Problem: it is too large, too slow, or compressed.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        found = f"found '{printable(encoding)}', but compressed bodies are not read"
        raise Problem(415, found, where="Content-Encoding", remedy="send the body uncompressed")
    limit = options.max_bytes + extra
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(options.timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {options.timeout:g} s", where="body") from None
    return bytes(body)


def _too_large(limit: int) -> Problem:
    return Problem(413, f"more than {limit:,} bytes", where="body", remedy="send a smaller or compressed image")


async def _parse_form(headers: Headers, body: bytes) -> tuple[bytes, list[tuple[str, str]]]:
    """Return the image and the other fields of a form."""

    async def stream() -> AsyncIterator[bytes]:
        yield body
        yield b""

    parser = _InMemoryParser(
        headers,
        stream(),  # ty: ignore[invalid-argument-type]
        max_files=1,
        max_fields=len(RequestOptions.model_fields),
        max_part_size=_MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Problem(400, printable(error.message), where="form") from None
    except (KeyError, ValueError, UnicodeError, LookupError):
        raise Problem(400, "the form is damaged", where="form") from None
    image, fields = b"", []
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            fields.append((name, value))
        elif name == "image":
            image = await value.read()
        else:
            raise Problem(422, f"unknown file '{printable(name)}', expected 'image'", where="form")
    await form.close()
    return image, fields


def _parse_options(items: Iterable[tuple[str, str]]) -> RequestOptions:
    values: dict[str, str] = {}
    for name, value in items:
        if name in values:
            raise Problem(422, "is given twice", where=printable(name), remedy="give it once")
        values[name] = value
    try:
        return parse_options(values)
    except MaskwrightError as error:
        raise Problem.of(422, error) from None


async def wait_for_answer(request: Request, work: Coroutine[Any, Any, Result], timeout: float) -> Result:
    """Return the result of `work`, which is cancelled if the client disconnects or the timeout expires.

    Raises:
        Problem: the timeout expired, or the model process crashed.
        ClientDisconnect: the client disconnected.
    """
    answer, left = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        done, _ = await asyncio.wait((answer, left), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if answer in done:
            return answer.result()
        if left in done:
            raise ClientDisconnect
        raise Problem(504, f"no answer within {timeout:g} s", where="service", remedy="try again later")
    finally:
        for task in (answer, left):
            task.cancel()


def check_answer(answer: Answer) -> Answer:
    """Return an answer, or raise the Problem that it holds."""
    if answer.error is not None:
        raise Problem.of(answer.status, answer.error)
    return answer


async def _wait_for_disconnect(request: Request) -> None:
    """Return when the client has disconnected; called after its body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
