"""Errors of the service as problem details of RFC 9457: where, what was found, and the remedy."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        found: what was found, and what was expected in its place.
        where: the field, header or object concerned.
        remedy: what to do.
        headers: further headers of the answer.
    """

    def __init__(
        self, status: int, found: str, *, where: str = "", remedy: str = "", headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(found)
        self.status, self.found, self.where, self.remedy = status, found, where, remedy
        self.headers = headers

    def response(self, scope: Scope) -> JSONResponse:
        """Return the answer to a request; clients of the Open Inference Protocol look for `error`."""
        place = f"{self.where}: " if self.where else ""
        content: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": f"{place}{self.found}" + (f"; {self.remedy}" if self.remedy else ""),
            "where": self.where,
            "found": self.found,
            "remedy": self.remedy,
            "request_id": scope["state"]["request_id"],
        }
        if scope["path"].startswith("/v2"):
            content["error"] = content["detail"]
        return JSONResponse(content, self.status, self.headers, MEDIA_TYPE)
