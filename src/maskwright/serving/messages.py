"""Messages between the HTTP process and the model process, sent over a pipe."""

from __future__ import annotations

from typing import Any, NamedTuple

from maskwright.errors import MaskwrightError
from maskwright.results.formats.label_config import Control
from maskwright.serving.request_options import RequestOptions

JSON, PNG = "application/json", "image/png"


class Tensors(NamedTuple):
    """The kind of answer to a job whose body, like its answer, has tensors of the Open Inference Protocol.

    Attributes:
        header_bytes: length of the JSON at the start of the body, before binary tensors; None is the whole body.
    """

    header_bytes: int | None


class Job(NamedTuple):
    """A request to segment.

    Attributes:
        number: unique.
        model: name of the model.
        body: bytes of an image file, or of a request with tensors.
        options: of the request; with tensors, the body has them.
        answer: kind of the answer: `JSON`, `PNG`, tensors, or regions for a control of Label Studio.
    """

    number: int
    model: str
    body: bytes
    options: RequestOptions
    answer: str | Tensors | Control


class Cancel(NamedTuple):
    """The answer to a job is no longer needed."""

    number: int


class Ready(NamedTuple):
    """The models are loaded.

    Attributes:
        models: `describe` of each model by its name.
        max_batch: images per forward pass.
    """

    models: dict[str, dict[str, Any]]
    max_batch: int


class LoadingFailed(NamedTuple):
    """A model cannot be loaded."""

    message: str


class Answer(NamedTuple):
    """The answer to a job.

    Attributes:
        number: of the job.
        status: HTTP status.
        body: empty if there is an error.
        headers: of the answer.
        error: None if the job succeeded.
        seconds: time spent in each stage: "decode", "wait", "segment", "encode".
        batch: number of images that were segmented together.
    """

    number: int
    status: int
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012
    error: MaskwrightError | None = None
    seconds: dict[str, float] = {}  # noqa: RUF012
    batch: int = 0


__all__ = ["JSON", "PNG", "Answer", "Cancel", "Control", "Job", "LoadingFailed", "Ready", "Tensors"]
