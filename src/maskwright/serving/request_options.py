"""The options of one request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maskwright.errors import MaskwrightError, printable

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
