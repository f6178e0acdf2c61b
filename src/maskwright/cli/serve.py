"""The command `serve`."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from maskwright.errors import MaskwrightError
from maskwright.serving.service_options import ServiceOptions, ServiceSettings, name_models


def serve(
    *models: str,
    token: str | None = None,
    no_token: bool = False,
    settings: Annotated[ServiceSettings | None, Parameter(name="*")] = None,
) -> None:
    """Answer HTTP requests with the segments of images, until SIGTERM or Ctrl-C; see docs/serving.md.

    Needs `pip install "maskwright[serve]"`.

    Parameters
    ----------
    models
        Checkpoints, as FILE or NAME=FILE; the name is part of the URL.
    token
        Clients must send it as "Authorization: Bearer TOKEN"; default: the variable MASKWRIGHT_TOKEN, which other users
        of this machine cannot read.
    no_token
        Serve without a token on an address that other machines can reach.
    settings
        Further options.
    """
    options = ServiceOptions(
        models=name_models(models),
        token=None if no_token else token or os.environ.get("MASKWRIGHT_TOKEN") or None,
        allow_open=no_token,
        **(asdict(settings) if settings else {}),
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
