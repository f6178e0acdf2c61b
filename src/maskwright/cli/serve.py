"""The command `serve`."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from cyclopts import Parameter

from maskwright.errors import MaskwrightError


def serve(
    *models: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    max_batch: int | None = None,
    max_wait_ms: float = 5.0,
    max_queue: int = 64,
    max_pixels: int = 2**25,
    max_bytes: int = 32 * 2**20,
    timeout: float = 60.0,
    token: str | None = None,
    no_token: Annotated[bool, Parameter(negative=())] = False,
    allow_origin: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    label_studio_files: str | None = None,
    label_studio_media: str | None = None,
) -> None:
    """Answer HTTP requests with the segments of images, until SIGTERM or Ctrl-C; see docs/serving.md.

    Needs `pip install "maskwright[serve]"`.

    Parameters
    ----------
    models
        Checkpoints, as FILE or NAME=FILE; the name is part of the URL.
    host
        Address to listen on. One that other machines can reach needs a token.
    port
        Port to listen on; 0 is any free one.
    device
        cpu, cuda, mps, ...; default: the accelerator of this machine.
    precision
        Mixed-precision type of the network.
    max_batch
        Images of one size per forward pass; default: 1 on a CPU, 8 on an accelerator.
    max_wait_ms
        Time for which an image waits for others of its size, in milliseconds.
    max_queue
        Requests that may be waiting; more are refused with status 503.
    max_pixels
        Largest image, height x width.
    max_bytes
        Largest body of a request.
    timeout
        Seconds within which a body must arrive, and within which its answer must be ready.
    token
        Clients must send it as "Authorization: Bearer TOKEN"; default: the variable MASKWRIGHT_TOKEN, which other users
        of this machine cannot read.
    no_token
        Serve without a token on an address that other machines can reach.
    allow_origin
        Origin of web pages that may use the service, such as https://example.org; may be repeated.
    label_studio_files
        Folder that Label Studio serves as local files (LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT).
    label_studio_media
        Folder of Label Studio's uploads, which has the folder `upload`.
    """
    from maskwright.serving.options import ServiceOptions, name_models

    options = ServiceOptions(
        models=name_models(models),
        host=host,
        port=port,
        device=device,
        precision=precision,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        max_pixels=max_pixels,
        max_bytes=max_bytes,
        timeout=timeout,
        token=None if no_token else token or os.environ.get("MASKWRIGHT_TOKEN") or None,
        allow_open=no_token,
        allow_origin=allow_origin,
        label_studio_files=label_studio_files,
        label_studio_media=label_studio_media,
    )
    try:
        from maskwright.serving.server import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("maskwright"):
            raise
        raise MaskwrightError(
            f"the package {error.name} is missing", remedy='run: pip install "maskwright[serve]"'
        ) from None
    run(options)
