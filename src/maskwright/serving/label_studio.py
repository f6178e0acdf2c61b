"""The routes that Label Studio calls on a model backend.

Protocol: https://labelstud.io/guide/ml_create. Label Studio asks for `health` and `setup` when the backend is
connected, and before it sends tasks to `predict`. Nothing is stored: each request has the labeling config. Images are
never downloaded; they are embedded in the task, or in a folder that the operator configured.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import os
import stat
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from maskwright.errors import MaskwrightError, one_line, printable, printable_list
from maskwright.results.formats.label_config import Control, read_control
from maskwright.serving.messages import JSON
from maskwright.serving.problem_details import Problem
from maskwright.serving.request_options import RequestOptions
from maskwright.serving.requests import read_body, wait_for_answer
from maskwright.serving.service_options import ServiceOptions
from maskwright.serving.supervisor import Supervisor

logger = logging.getLogger(__name__)

_MAX_TASKS = 1000  # of a request
_MAX_NODES = 2**20  # lists and objects in the JSON of a request
_AT_ONCE = 8  # tasks of a request that are processed concurrently


def add_label_studio(app: FastAPI, supervisor: Supervisor, options: ServiceOptions) -> None:
    """Add the routes to a service, under /label-studio/NAME and, if there is one model, under /label-studio."""
    backend = _Backend(supervisor, options)
    prefixes = ["/label-studio/{name}"] + (["/label-studio"] if len(options.models) == 1 else [])
    for prefix in prefixes:
        app.add_api_route(f"{prefix}/health", backend.health, methods=["GET"])
        app.add_api_route(f"{prefix}/setup", backend.setup, methods=["POST"])
        app.add_api_route(f"{prefix}/predict", backend.predict, methods=["POST"])


class _Backend:
    def __init__(self, supervisor: Supervisor, options: ServiceOptions) -> None:
        self._supervisor, self._options = supervisor, options

    async def health(self, request: Request) -> dict[str, str]:
        """Answer 200 if the model is loaded."""
        self._supervisor.describe(self._model(request))
        self._supervisor.check_ready()
        return {"status": "UP"}

    async def setup(self, request: Request) -> dict[str, str]:
        """Check the labeling config, and return the version of the model."""
        name = self._model(request)
        categories = self._supervisor.describe(name)["categories"]
        control = _read_control((await self._read(request)).get("schema"))
        unlabeled = [category["name"] for category in categories if category["name"] not in control.labels]
        if len(unlabeled) == len(categories):
            raise Problem(
                422,
                f"no label of {printable(control.name)} has the name of a class of the model",
                where="the labeling config",
                remedy=f"add labels for {printable_list(unlabeled)}, or name classes in predicted_values",
            )
        if unlabeled:
            logger.warning("Label Studio's labeling config has no labels for %s", printable_list(unlabeled))
        return {"model_version": f"maskwright {name}"}

    async def predict(self, request: Request) -> Response:
        """Segment the images of tasks."""
        name = self._model(request)
        self._supervisor.describe(name)
        self._supervisor.accept(request)
        control, urls = _read_tasks(await self._read(request))
        predictions = await wait_for_answer(request, self._predict(name, urls, control), self._options.timeout)
        version = json.dumps(f"maskwright {name}").encode()
        body = b'{"results": [%b], "model_version": %b}' % (b", ".join(predictions), version)
        return Response(body, media_type=JSON)

    async def _predict(self, name: str, urls: list[str | None], control: Control) -> list[bytes]:
        """Return a prediction per image, as JSON; a failed image gets an empty result and its error.

        Raises:
            Problem: no image has a prediction, or the model process crashed.
        """
        limit = asyncio.Semaphore(_AT_ONCE)

        async def predict(url: str | None) -> bytes | MaskwrightError:
            async with limit:
                try:
                    image = await asyncio.to_thread(_read_image, url, control.image_key, self._options)
                except MaskwrightError as error:
                    return error
                answer = await self._supervisor.segment(name, image, RequestOptions(), control)
            return answer.error or answer.body

        predictions = await asyncio.gather(*map(predict, urls))
        errors = [prediction for prediction in predictions if isinstance(prediction, MaskwrightError)]
        if len(errors) == len(urls):
            raise Problem.of(422, errors[0])
        if errors:
            logger.warning("%d of %d Label Studio tasks failed; the first: %s", len(errors), len(urls), errors[0])
        return [_as_json(prediction) for prediction in predictions]

    def _model(self, request: Request) -> str:
        return request.path_params.get("name") or next(iter(self._options.models))

    async def _read(self, request: Request) -> dict[str, Any]:
        body = await read_body(request, self._options)
        if body.count(b"{") + body.count(b"[") > _MAX_NODES:  # parsed, they need far more memory
            raise Problem(413, f"more than {_MAX_NODES:,} lists and objects", where="body")
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise Problem(400, "is not valid JSON", where="body") from None
        if not isinstance(document, dict):
            raise Problem(400, "expected a JSON object", where="body")
        return document


def _read_tasks(document: dict[str, Any]) -> tuple[Control, list[str | None]]:
    """Return the control that shows predictions, and the URL of each task's image, None for a task without one."""
    control, tasks = _read_control(document.get("label_config")), document.get("tasks")
    if not isinstance(tasks, list) or not 1 <= len(tasks) <= _MAX_TASKS:
        raise Problem(422, f"expected a list of 1 to {_MAX_TASKS:,} tasks", where="tasks")
    data = [task.get("data") if isinstance(task, dict) else None for task in tasks]
    urls = [fields.get(control.image_key) if isinstance(fields, dict) else None for fields in data]
    return control, [url if isinstance(url, str) else None for url in urls]


def _read_control(config: Any) -> Control:
    if not isinstance(config, str):
        raise Problem(422, "is missing", where="the labeling config")
    try:
        return read_control(config)
    except MaskwrightError as error:
        raise Problem.of(422, error) from None


def _as_json(prediction: bytes | MaskwrightError) -> bytes:
    if isinstance(prediction, bytes):
        return prediction
    return json.dumps({"result": [], "error": str(prediction)}).encode()


def _read_image(url: str | None, key: str, options: ServiceOptions) -> bytes:
    """Return the bytes of an image.

    Raises:
        MaskwrightError: it is missing, or must not be read.
    """
    if url is None:
        raise MaskwrightError(f"has no image '{printable(key)}' in its data", where="task")
    if url.startswith("data:"):
        return _decode_data_url(url, options.max_bytes)
    return _read_file(_locate(url, options), printable(url), options.max_bytes)


def _decode_data_url(url: str, max_bytes: int) -> bytes:
    header, _, text = url.partition(",")
    if not header.endswith(";base64"):
        raise MaskwrightError("expected data:image/...;base64,...", where="task")
    try:
        image = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MaskwrightError("the image is not valid base64", where="task") from None
    if len(image) > max_bytes:
        raise MaskwrightError(f"the image has more than {max_bytes:,} bytes", where="task")
    return image


def _locate(url: str, options: ServiceOptions) -> Path:
    """Return the file that a Label Studio URL refers to, in one of the operator's folders.

    Raises:
        MaskwrightError: it is another kind of URL, its folder is not configured, or it points outside that folder.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise MaskwrightError("is not a URL", where=printable(url)) from None
    folder, relative, flag = None, "", ""
    if not parts.scheme and not parts.netloc and parts.path.rstrip("/") == "/data/local-files":
        folder, relative, flag = options.label_studio_files, parse_qs(parts.query).get("d", [""])[-1], "files"
    elif not parts.scheme and not parts.netloc and parts.path.startswith("/data/upload/"):
        folder, relative, flag = options.label_studio_media, unquote(parts.path.removeprefix("/data/")), "media"
    else:
        raise MaskwrightError(
            "URLs are not downloaded",
            where=printable(url),
            remedy="use local files or uploads of Label Studio, or data:image/...;base64,...",
        )
    if folder is None:
        raise MaskwrightError(
            "the service does not know this folder", where=printable(url), remedy=f"start it with --label-studio-{flag}"
        )
    root = Path(os.path.realpath(folder))
    try:
        path = Path(os.path.realpath(root / relative.lstrip("/")))
    except ValueError:  # a null character
        raise MaskwrightError("is not a path", where=printable(url)) from None
    if root not in path.parents:
        raise MaskwrightError(f"is outside the folder of --label-studio-{flag}", where=printable(url))
    return path


def _read_file(path: Path, name: str, max_bytes: int) -> bytes:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise MaskwrightError("is not a regular file", where=name)
            image = file.read(max_bytes + 1)
    except OSError as error:
        raise MaskwrightError(one_line(error), where=name) from None
    if len(image) > max_bytes:
        raise MaskwrightError(f"has more than {max_bytes:,} bytes", where=name)
    return image


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without blocking, even a named pipe that has no writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
