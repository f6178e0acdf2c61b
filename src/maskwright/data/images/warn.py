"""Warnings about images: one of each kind over all loader workers, because a dataset would repeat them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
from collections.abc import Generator
from contextvars import ContextVar
from typing import Literal, get_args

logger = logging.getLogger(__name__)

Kind = Literal["alpha", "band", "bands", "dark", "no data", "pages", "undeclared no data"]

_logged: set[str] = set()
_logged_by_workers = None  # shared memory: one byte for each kind
_logs_each = ContextVar("logs_each", default=False)


def warn(kind: Kind, name: str, found: str, remedy: str) -> None:
    """Log a warning about an image, unless one of this kind was logged."""
    if _logs_each.get():
        logger.warning("%s: %s; %s", name, found, remedy)
    elif is_first(kind):
        logger.warning("%s: %s; %s (logged for the first such image only)", name, found, remedy)


def is_first(kind: Kind) -> bool:
    """Return whether no warning of this kind was logged, and count this one."""
    if kind in _logged:
        return False
    _logged.add(kind)
    if _logged_by_workers is None:
        return True
    index = get_args(Kind).index(kind)
    with _logged_by_workers.get_lock():
        was_logged = _logged_by_workers[index]
        _logged_by_workers[index] = 1
    return not was_logged


def shared_flags():
    """Return the shared memory that workers need for `share_flags`; this process uses it as well."""
    global _logged_by_workers
    if _logged_by_workers is None:
        context = multiprocessing.get_context("spawn")  # its locks can be sent to forked processes as well
        _logged_by_workers = context.Array("b", [kind in _logged for kind in get_args(Kind)])
    return _logged_by_workers


def share_flags(flags) -> None:
    """Log each kind once in this process and all others that share the flags."""
    global _logged_by_workers
    _logged_by_workers = flags


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
    if _logged_by_workers is not None:
        _logged_by_workers[:] = [0] * len(_logged_by_workers)
