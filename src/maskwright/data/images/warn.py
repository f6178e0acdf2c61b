"""Warnings about images: logged once for each kind in a process, because a data set repeats them a thousand times."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from contextvars import ContextVar

logger = logging.getLogger(__name__)

_logged: set[str] = set()
_logs_each = ContextVar("logs_each", default=False)


def warn(kind: str, name: str, found: str, remedy: str) -> None:
    """Log a warning about an image, unless one of this kind was logged."""
    if _logs_each.get():
        logger.warning("%s: %s; %s", name, found, remedy)
    elif kind not in _logged:
        _logged.add(kind)
        logger.warning("%s: %s; %s (logged for the first such image only)", name, found, remedy)


@contextlib.contextmanager
def logging_each() -> Generator[None]:
    """Log the warnings of every image inside the block, as `maskwright check` needs them."""
    token = _logs_each.set(True)
    try:
        yield
    finally:
        _logs_each.reset(token)


def forget() -> None:
    """Log each kind once more, as at the start of another prediction."""
    _logged.clear()
