"""The routes of the Open Inference Protocol (KServe V2), which clients of Triton and KServe use."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from maskwright import __version__
from maskwright.errors import printable
from maskwright.serving.messages import Tensors
from maskwright.serving.problem_details import Problem
from maskwright.serving.request_options import RequestOptions
from maskwright.serving.requests import check_answer, read_body, wait_for_answer
from maskwright.serving.service_options import ServiceOptions
from maskwright.serving.supervisor import Supervisor
from maskwright.serving.tensors import HEADER_LENGTH, describe_tensors


def add_inference_protocol(app: FastAPI, supervisor: Supervisor, options: ServiceOptions) -> None:
    """Add the routes to a service."""

    @app.get("/v2")
    async def server_metadata() -> dict[str, Any]:
        """Return the name and the version of the service."""
        return {"name": "maskwright", "version": __version__, "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Answer 200 while the service runs."""
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready() -> dict[str, bool]:
        """Answer 200 if the models are loaded."""
        supervisor.check_ready()
        return {"ready": True}

    @app.get("/v2/models/{name}/ready")
    async def model_ready(name: str) -> dict[str, Any]:
        """Answer 200 if the model is loaded."""
        supervisor.describe(name)
        supervisor.check_ready()
        return {"name": name, "ready": True}

    @app.get("/v2/models/{name}")
    async def model_metadata(name: str) -> dict[str, Any]:
        """Return the tensors of the model for its own task, and its classes; a label is the index of a class."""
        model = supervisor.describe(name)
        tensors = describe_tensors(model["task"], model["channels"])
        parameters = {"task": model["task"], "categories": model["categories"]}
        return {"name": name, "versions": [], "platform": "maskwright", **tensors, "parameters": parameters}

    @app.post("/v2/models/{name}/infer")
    async def infer(name: str, request: Request) -> Response:
        """Segment a tensor of one or several images."""
        supervisor.describe(name)
        supervisor.accept(request)
        header_bytes = _header_length(request)
        body = await read_body(request, options)
        if header_bytes is not None and header_bytes > len(body):
            raise Problem(400, f"{header_bytes:,}, but the body has {len(body):,} bytes", where=HEADER_LENGTH)
        work = supervisor.segment(name, body, RequestOptions(), Tensors(header_bytes))
        answer = check_answer(await wait_for_answer(request, work, options.timeout))
        return Response(answer.body, headers=answer.headers)


def _header_length(request: Request) -> int | None:
    value = request.headers.get(HEADER_LENGTH)
    if value is not None and not (value.isascii() and value.isdecimal() and len(value) < 12):
        raise Problem(400, f"found '{printable(value)}', expected a number of bytes", where=HEADER_LENGTH)
    return None if value is None else int(value)
