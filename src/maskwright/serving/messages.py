"""What the HTTP process and the model process say to each other, over a pipe."""

from __future__ import annotations

from typing import Any, NamedTuple

from maskwright.serving.options import RequestOptions

JSON, PNG = "application/json", "image/png"


class Job(NamedTuple):
    """An image to segment.

    Attributes:
        number: unique.
        model: name of the model.
        image: bytes of an image file.
        options: of the request.
        media_type: of the answer, `JSON` or `PNG`.
    """

    number: int
    model: str
    image: bytes
    options: RequestOptions
    media_type: str


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
        error: found, where and remedy.
        seconds: time spent in each stage: "decode", "wait", "segment", "encode".
        batch: images that were segmented together.
    """

    number: int
    status: int
    body: bytes = b""
    error: tuple[str, str, str] = ("", "", "")
    seconds: dict[str, float] = {}  # noqa: RUF012
    batch: int = 0
