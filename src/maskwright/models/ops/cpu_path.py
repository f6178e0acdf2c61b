"""Shared by all CPU-optimized code paths: when they run, how many rows they process at once, and reusable memory.

A CPU spends more time moving large activations through main memory than computing them. The CPU paths therefore take a
chunk of rows (tokens or pixels) through several steps while it is in the cache. Accelerators and `torch.compile` run
the plain path of each module, and so does the training of a Swin; tests hold the two equal.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

CHUNK_ROWS = 2048
_buffers = threading.local()


_disabled = False


@contextmanager
def plain_paths() -> Generator[None]:
    """Run the plain paths inside the block, in all threads, as tracing does."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before


def uses_cpu_path(x: Tensor) -> bool:
    """Return whether `x` is on a CPU in eager mode."""
    return x.device.type == "cpu" and not _disabled and not torch.compiler.is_compiling()


def trains_channels_last(x: Tensor) -> bool:
    """Return whether training has its feature maps channels-last: on CPUs with AVX-512.

    Gain for a training step, with that of products in the matcher (ResNet-50, 512x512, two threads, AMD EPYC, minimum):
    float32 3.21 -> 2.91 s, bfloat16 2.12 -> 1.98 s. With AVX2 gradients of 3x3 weights take up to three times as long.
    """
    return uses_cpu_path(x) and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def rows_per_chunk(x: Tensor, rows: int) -> int:
    """Return how many of `rows` rows to process at once: as many as fit a CPU's cache, all on other devices."""
    return min(rows, CHUNK_ROWS) if uses_cpu_path(x) else rows


def scratch_buffer(name: str, size: tuple[int, ...], like: Tensor) -> Tensor:
    """Return uninitialized memory for short-lived values.

    On a CPU, fresh memory costs as much as filling it twice, so each thread keeps one buffer per name and dtype.

    Args:
        name: the next call of this thread with the same name and dtype returns the same memory.
        size: first dimension at most `CHUNK_ROWS`; a larger buffer is not kept.
        like: gives dtype and device.
    """
    if not uses_cpu_path(like) or size[0] > CHUNK_ROWS:
        return like.new_empty(size)
    count = math.prod(size)
    key = f"{name} {like.dtype}"
    buffer = getattr(_buffers, key, None)
    if buffer is None or len(buffer) < count:
        with torch.inference_mode(False):
            buffer = torch.empty(count, dtype=like.dtype)
        setattr(_buffers, key, buffer)
    return buffer[:count].view(size)
