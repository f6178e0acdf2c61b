"""Errors of the service as problem details of RFC 9457: where, what was found, and the remedy."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

from maskwright.errors import MaskwrightError

MEDIA_TYPE = "application/problem+json"


class Problem(MaskwrightError):
    """A request that is answered with an error: a MaskwrightError with an HTTP status and, if needed, headers."""

    def __init__(
        self, status: int, found: str, *, where: str = "", remedy: str = "", headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(found, where=where, remedy=remedy)
        self.status, self.headers = status, headers

    @classmethod
    def of(cls, status: int, error: MaskwrightError) -> Problem:
        """Return the problem for an error."""
        return cls(status, error.found, where=error.where, remedy=error.remedy)

    def response(self, scope: Scope) -> JSONResponse:
        """Return the answer to a request; clients of the Open Inference Protocol look for `error`."""
        content: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": str(self),
            "where": self.where,
            "found": self.found,
            "remedy": self.remedy,
            "request_id": scope["state"]["request_id"],
        }
        if scope["path"].startswith("/v2"):
            content["error"] = content["detail"]
        return JSONResponse(content, self.status, self.headers, MEDIA_TYPE)
