"""The options of the service, which the operator sets, and of one request, which the client sets."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maskwright.errors import MaskwrightError, printable

MAX_PIXELS = 178_956_970  # the largest image that maskwright decodes as a whole

_SUFFIXES = (".safetensors", ".onnx", ".xml", ".pkl", ".pth", ".pt", ".bin")

_ANSWER_OPTIONS = ("masks", "png")

Fraction = Annotated[float, Field(ge=0, le=1)]


class RequestOptions(BaseModel):
    """Options of one request, from form fields or the query string; the defaults are the model's own settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["semantic", "instance", "panoptic"] | None = Field(None, description="kind of results")
    object_threshold: Fraction | None = Field(None, description="min class score of a panoptic segment")
    overlap_threshold: Fraction | None = Field(
        None, description="min visible fraction of a panoptic segment's mask; segments below it are dropped"
    )
    score_threshold: Fraction | None = Field(None, description="min score of an instance")
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="max instances")
    masks: Literal["rle", "polygons"] = Field(
        "rle",
        description="for JSON: rle is exact; polygons are the outlines of connected parts, each x0, y0, x1, y1, ..., "
        "and has_holes is true if they enclose pixels outside the segment",
    )
    png: Literal["overlay", "ids"] = Field(
        "overlay",
        description="for Accept: image/png: the segments drawn over the image; or a gray image, 8 bits up to 255 "
        "segments and 16 bits beyond, in which 0 is no segment and n the n-th segment of the JSON answer",
    )

    def prediction(self) -> dict[str, Any]:
        """Return the given options, for `Predictor.pipeline`."""
        return self.model_dump(exclude=set(_ANSWER_OPTIONS), exclude_none=True)


def parse_options(values: Mapping[str, Any], *, drawing: bool = True) -> RequestOptions:
    """Return the options of a request.

    Args:
        values: texts, or values of JSON.
        drawing: also accept the options of JSON and PNG answers.

    Raises:
        MaskwrightError: an option is unknown or out of range.
    """
    known = [name for name in RequestOptions.model_fields if drawing or name not in _ANSWER_OPTIONS]
    for name in values:
        if name not in known:
            remedy = f"use one of {', '.join(known)}"
            raise MaskwrightError("unknown option", where=printable(name), remedy=remedy)
    try:
        return RequestOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = printable(".".join(map(str, first["loc"])))
        raise MaskwrightError(f"{first['msg']}, found '{printable(first['input'])}'", where=where) from None


@dataclass(frozen=True)
class ServiceOptions:
    """Options of the service.

    Attributes:
        models: file, folder or published model, by the name in the URL.
        host: address to listen on.
        port: 0 is any free port.
        device: None is the machine's accelerator.
        precision: "fp32", "bf16" or "fp16".
        max_batch: images per forward pass; None is 1 on a CPU and 8 on an accelerator.
        max_wait_ms: time for which an image waits for others of its size, in milliseconds.
        max_queue: requests that are accepted and not answered yet; beyond it, 503.
        max_pixels: of an image, height x width.
        max_bytes: of a request's body.
        timeout: seconds within which a body must have arrived, and its answer must be ready.
        token: clients must send it; None is no token.
        allow_open: listen on any address without a token.
        allow_origin: origins of web pages that may use the service.
        label_studio_files: folder that Label Studio serves as local files; None is none.
        label_studio_media: folder of Label Studio's uploads, in which `upload` is; None is none.
    """

    models: dict[str, str]
    host: str = "127.0.0.1"
    port: int = 8000
    device: str | None = None
    precision: str = "fp32"
    max_batch: int | None = None
    max_wait_ms: float = 5.0
    max_queue: int = 64
    max_pixels: int = 2**25
    max_bytes: int = 32 * 2**20
    timeout: float = 60.0
    token: str | None = field(default=None, repr=False)
    allow_open: bool = False
    allow_origin: tuple[str, ...] = ()
    label_studio_files: str | None = None
    label_studio_media: str | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check(self) -> None:
        """Check values and security.

        Raises:
            MaskwrightError: a value is out of range, or the service would be open to other machines without a token.
        """
        smallest = {"max_batch": 1, "max_wait_ms": 0, "max_queue": 1, "max_pixels": 1, "max_bytes": 1, "port": 0}
        for name, limit in smallest.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise MaskwrightError(f"found {value}, expected at least {limit}", where=_flag(name))
        if self.port > 65535:
            raise MaskwrightError(f"found {self.port}, expected 0..65535", where="--port")
        if self.timeout <= 0:
            raise MaskwrightError(f"found {self.timeout:g}, expected more than 0", where="--timeout")
        for name in ("label_studio_files", "label_studio_media"):
            folder = getattr(self, name)
            if folder is not None and not os.path.isdir(folder):
                raise MaskwrightError(f"{folder} is not a folder", where=_flag(name))
        if self.max_pixels > MAX_PIXELS:
            raise MaskwrightError(f"found {self.max_pixels:,}, expected at most {MAX_PIXELS:,}", where="--max-pixels")
        if self.token is not None and (not self.token.isascii() or not self.token.isprintable() or not self.token):
            raise MaskwrightError("is empty, or has characters other than printable ASCII", where="--token")
        if not self.is_loopback and self.token is None and not self.allow_open:
            raise MaskwrightError(
                f"{self.host} can be reached from other machines, and there is no token",
                where="--host",
                remedy="set MASKWRIGHT_TOKEN or --token, or add --no-token to let anybody use the service",
            )


def name_models(models: tuple[str, ...]) -> dict[str, str]:
    """Return the source of each model by its name: NAME=SOURCE, or a source whose name is its stem.

    Raises:
        MaskwrightError: there is no model, two have one name, or a name does not fit into a URL.
    """
    if not models:
        raise MaskwrightError("no model to serve", remedy="name checkpoints, as FILE or NAME=FILE")
    named: dict[str, str] = {}
    for item in models:
        name, separator, source = item.partition("=")
        if not separator or Path(item).exists():
            name, source = _stem(item), item
        if not name.isascii() or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise MaskwrightError(
                "a model's name may have only letters, digits, '-', '_' and '.'", where=item, remedy="use NAME=FILE"
            )
        if name in named:
            raise MaskwrightError(f"two models have the name {name}", where=item, remedy="use NAME=FILE")
        named[name] = source
    return named


def _stem(source: str) -> str:
    """Return the name without the suffix of a weight file or an exported file."""
    path = Path(source)
    return path.stem if path.suffix in _SUFFIXES else path.name


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
