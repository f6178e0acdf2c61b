"""The routes of the service."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from maskwright import __version__
from maskwright.serving import metrics as prometheus
from maskwright.serving import problem_details
from maskwright.serving.guard import Guard
from maskwright.serving.inference_protocol import add_inference_protocol
from maskwright.serving.label_studio import add_label_studio
from maskwright.serving.messages import JSON, PNG
from maskwright.serving.page import add_page
from maskwright.serving.problem_details import Problem
from maskwright.serving.request_options import RequestOptions
from maskwright.serving.requests import check_answer, choose_media_type, read_request, wait_for_answer
from maskwright.serving.service_options import ServiceOptions
from maskwright.serving.supervisor import Supervisor

_NUMBER, _TEXT = {"type": "number"}, {"type": "string"}
_SEGMENT = {
    "type": "object",
    "properties": {
        "category_id": {"type": "integer"},
        "name": _TEXT,
        "score": {"type": ["number", "null"], "description": "0..1; null for semantic results"},
        "box": {
            "type": "array",
            "items": _NUMBER,
            "description": "x0, y0, x1, y1 in pixels; x1 and y1 are exclusive",
        },
        "area": {"type": "integer", "description": "in pixels"},
        "color": {"type": "array", "items": {"type": "integer"}, "description": "RGB of the overlay, 0..255"},
        "mask": {"type": "object", "description": "RLE of the COCO API: size is [height, width], counts is text"},
        "polygons": {"type": "array", "items": {"type": "array", "items": _NUMBER}, "description": "instead of mask"},
        "has_holes": {"type": "boolean", "description": "with polygons: whether they enclose other pixels"},
    },
}
_RESULT = {
    "type": "object",
    "properties": {
        "model": _TEXT,
        "size": {"type": "array", "items": {"type": "integer"}, "description": "height, width in pixels"},
        "task": {"enum": ["semantic", "instance", "panoptic"]},
        "segments": {"type": "array", "items": _SEGMENT},
    },
}
_RESULT_EXAMPLE = {
    "model": "street",
    "size": [2, 3],
    "task": "instance",
    "segments": [
        {
            "category_id": 3,
            "name": "car",
            "score": 0.91,
            "box": [0.0, 0.0, 2.0, 2.0],
            "area": 4,
            "color": [0, 125, 255],
            "mask": {"size": [2, 3], "counts": "042"},
        }
    ],
}
_PROBLEM_EXAMPLE = {
    "type": "about:blank",
    "title": "Unprocessable Content",
    "status": 422,
    "detail": "image: not an image; send an image file",
    "where": "image",
    "found": "not an image",
    "remedy": "send an image file",
    "request_id": "5f0c7a9e",
}
_PROBLEM = {
    "type": "object",
    "properties": {name: {"type": "integer"} if name == "status" else _TEXT for name in _PROBLEM_EXAMPLE},
}
_ERRORS = {
    401: "no token, or a wrong one",
    404: "no model of this name",
    406: "neither JSON nor PNG is accepted",
    408: "the body arrived too slowly",
    413: "the body is too large",
    415: "not an image",
    422: "the image or an option cannot be used",
    500: "the service failed",
    503: "the queue is full, or the service is ending; try again after Retry-After seconds",
    504: "no answer in time",
}


def create_app(options: ServiceOptions, on_failure: Callable[[Supervisor], None]) -> FastAPI:
    """Build the application; `on_failure` is called if the models cannot be loaded at the start."""
    metrics = prometheus.Metrics()
    supervisor = Supervisor(options, metrics, lambda: on_failure(supervisor))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        supervisor.start()
        yield
        supervisor.stop()

    app = FastAPI(title="maskwright", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_exception_handler(Problem, _answer_problem)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    _add_operations(app, supervisor, metrics)
    _add_models(app, supervisor, options)
    add_inference_protocol(app, supervisor, options)
    add_label_studio(app, supervisor, options)
    add_page(app)
    app.add_middleware(Guard, options=options, metrics=metrics)
    if options.allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allow_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    return app


def _add_operations(app: FastAPI, supervisor: Supervisor, metrics: prometheus.Metrics) -> None:
    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """Answer 200 while the service runs."""
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse, responses=_describe_errors(503))
    async def readyz() -> str:
        """Answer 200 if the models are loaded."""
        supervisor.check_ready()
        return "ready"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        """Return the metrics for Prometheus."""
        return Response(metrics.text(), media_type=prometheus.MEDIA_TYPE)


def _add_models(app: FastAPI, supervisor: Supervisor, options: ServiceOptions) -> None:
    @app.get("/v1/models", responses=_describe_errors(503))
    async def list_models() -> JSONResponse:
        """List the models, each with its task and classes."""
        return JSONResponse(supervisor.describe())

    @app.post(
        "/v1/models/{name}/segment",
        responses={200: _describe_result(), **_describe_errors(*_ERRORS)},
        openapi_extra={"parameters": _describe_query(), "requestBody": _describe_body()},
    )
    async def segment(name: str, request: Request) -> Response:
        """Segment an image. The answer is JSON or, with `Accept: image/png`, an overlay or a map of ids."""
        supervisor.check_name(name)
        media_type = choose_media_type(request.headers.get("accept"))
        supervisor.accept(request)
        image, chosen = await read_request(request, options)
        work = supervisor.segment(name, image, chosen, media_type)
        answer = check_answer(await wait_for_answer(request, work, options.timeout))
        return Response(answer.body, media_type=media_type, headers={"Vary": "Accept"})


async def _answer_problem(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, Problem)
    return problem.response(request.scope)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = Problem(error.status_code, error.detail, where="URL", headers=dict(error.headers or {}))
    return problem.response(request.scope)


def _describe_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries of errors."""
    content = {problem_details.MEDIA_TYPE: {"schema": _PROBLEM, "example": _PROBLEM_EXAMPLE}}
    return {status: {"description": _ERRORS[status], "content": content} for status in statuses}


def _describe_result() -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    content = {JSON: {"schema": _RESULT, "example": _RESULT_EXAMPLE}, PNG: binary}
    return {"description": "the segments", "content": content}


def _describe_options() -> dict[str, dict[str, Any]]:
    return RequestOptions.model_json_schema()["properties"]


def _describe_query() -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "query", "required": False, "description": schema.pop("description"), "schema": schema}
        for name, schema in _describe_options().items()
    ]


def _describe_body() -> dict[str, Any]:
    binary = {"type": "string", "format": "binary"}
    form = {"type": "object", "required": ["image"], "properties": {"image": binary, **_describe_options()}}
    return {
        "required": True,
        "content": {"multipart/form-data": {"schema": form}, "image/*": {"schema": binary}},
    }
