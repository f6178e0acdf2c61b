"""The page at `/`: its files and sample images, read once and sent with their own content security policy."""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI
from starlette.responses import Response

from maskwright.serving.problem_details import Problem

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_MEDIA_TYPES = {  # `mimetypes` depends on the machine, and browsers refuse modules of another type
    ".css": "text/css",
    ".html": "text/html",
    ".jpg": "image/jpeg",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
_SAMPLES = {
    "stained-1.jpg": "a5fe0b7412dd152c.jpg",
    "stained-2.jpg": "af6b6173c59450bc.jpg",
    "fluorescence-1.png": "e2d22d3d283915df.png",
    "fluorescence-2.png": "10328b822b836e67.png",
}


def add_page(app: FastAPI) -> None:
    """Add the routes of the page; they need no token and name no model."""
    files = {file.name: file.read_bytes() for file in (resources.files("maskwright.serving") / "page").iterdir()}
    samples = resources.files("maskwright.data") / "sample" / "val"
    files |= {name: (samples / file).read_bytes() for name, file in _SAMPLES.items()}

    def send(name: str) -> Response:
        if name not in files:
            raise Problem(404, "the page has no such file", where="URL")
        media_type = _MEDIA_TYPES[name[name.rindex(".") :]]
        return Response(files[name], media_type=media_type, headers={"Content-Security-Policy": POLICY})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return send("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return send(name)
