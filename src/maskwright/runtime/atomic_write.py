"""Files that are whole or absent, whatever ends the process that writes them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import safetensors

from maskwright.errors import MaskwrightError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step; an error leaves nothing.

    Raises:
        MaskwrightError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise MaskwrightError(f"{path}: cannot be written: {reason}; free space or choose another folder") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
