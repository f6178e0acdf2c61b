"""The forward pass of a model through `torch.compile`, for images of a few fixed sizes; with CUDA graphs on CUDA.

Unusual: only the final prediction is returned, as a copy, because CUDA graphs write every result to the same memory.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from maskwright.checkpoints.zoo import cache_folder
from maskwright.errors import MaskwrightError
from maskwright.models.ops.deformable_attention import runs_triton
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.device import is_asynchronous
from maskwright.structures.predictions import MaskPrediction, PixelPrediction

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor], MaskPrediction | PixelPrediction]


def compile_forward(model: Segmenter, device: torch.device, cuda_graphs: bool = True) -> Forward:
    """Return a compiled function from images (B, C, H, W) and padding (B, H, W) to the final prediction.

    Each new (B, H, W) is compiled again, which takes minutes, and seconds if a process has done it before: the code is
    kept in `torch_compile` in `cache_folder()`, or where TORCHINDUCTOR_CACHE_DIR says. After eight sizes PyTorch warns
    and runs new ones uncompiled. Results differ from those of the model by rounding. On a CPU a warning is logged.

    Args:
        model: the model, on the device.
        device: its device.
        cuda_graphs: record CUDA graphs, on CUDA.

    Raises:
        MaskwrightError: there is no C++ compiler, which `torch.compile` needs. The function itself raises it if
            compilation fails.
    """
    if compiler() is None:
        raise MaskwrightError(
            "torch.compile needs a C++ compiler, found none (CXX, g++, clang++, cl)",
            remedy="install one, or run without --compile",
        )
    if device.type == "cpu":
        logger.warning("on CPUs, compiled models were slower than the plain ones, whose operators are written for them")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "torch_compile"))
    with_graphs = cuda_graphs and is_asynchronous(device)
    runs_triton(device.type)  # cached now: PyTorch cannot trace the trial itself

    def forward(images: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
        final = model(images, padding).final
        if isinstance(final, PixelPrediction):
            return (final.class_logits,)
        return final.class_logits, final.mask_embeddings, final.mask_features

    compiled = torch.compile(forward, dynamic=False, mode="reduce-overhead" if with_graphs else "default")

    def run(images: Tensor, padding: Tensor) -> MaskPrediction | PixelPrediction:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
                tensors = compiled(images, padding)
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise MaskwrightError(
                f"torch.compile failed on this model: {reason}", remedy="run without --compile"
            ) from error
        if with_graphs:
            tensors = tuple(tensor.clone() for tensor in tensors)
        return PixelPrediction(*tensors) if len(tensors) == 1 else MaskPrediction(*tensors)

    return run


def compiler() -> str | None:
    """Return the path of the C++ compiler that `torch.compile` would use; None if there is none."""
    names = (os.environ.get("CXX"), "g++", "clang++", "cl")
    return next((found for name in names if name and (found := shutil.which(name))), None)
