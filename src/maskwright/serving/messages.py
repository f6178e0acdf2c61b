"""What the HTTP process and the model process say to each other, over a pipe."""

from __future__ import annotations

from typing import Any, NamedTuple

from maskwright.results.formats.label_config import Control
from maskwright.serving.options import RequestOptions

JSON, PNG = "application/json", "image/png"


class Tensors(NamedTuple):
    """The answer has the tensors of the Open Inference Protocol; so has the body of the job.

    Attributes:
        header_bytes: length of the JSON at the start of the body, before binary tensors; None is the whole body.
    """

    header_bytes: int | None


class Job(NamedTuple):
    """What to segment.

    Attributes:
        number: unique.
        model: name of the model.
        body: bytes of an image file, or those of a request with tensors.
        options: of the request; for tensors, they are in the body.
        answer: kind of the answer: `JSON`, `PNG`, tensors, or regions for a control of Label Studio.
    """

    number: int
    model: str
    body: bytes
    options: RequestOptions
    answer: str | Tensors | Control


class Cancel(NamedTuple):
    """The answer of a job is not wanted any more."""

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
    """The answer of a job.

    Attributes:
        number: of the job.
        status: HTTP status; 200 comes with a body, others with an error.
        body: of the answer.
        headers: of the answer.
        error: found, where and remedy.
        seconds: time spent in each stage: "decode", "wait", "segment", "encode".
        batch: images that were segmented together.
    """

    number: int
    status: int
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012
    error: tuple[str, str, str] = ("", "", "")
    seconds: dict[str, float] = {}  # noqa: RUF012
    batch: int = 0


__all__ = ["JSON", "PNG", "Answer", "Cancel", "Control", "Job", "LoadingFailed", "Ready", "Tensors"]
