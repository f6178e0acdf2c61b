"""A model's forward pass through `torch.compile`, for pictures of a few fixed sizes; CUDA graphs where there is CUDA.

Unusual: it gives only the final prediction, as memory of its own: CUDA graphs write every result to one place.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from maskwright.errors import MaskwrightError
from maskwright.models.ops.deformable_attention import runs_triton
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.device import is_asynchronous
from maskwright.structures.predictions import MaskPrediction, PixelPrediction

Forward = Callable[[Tensor, Tensor], MaskPrediction | PixelPrediction]


def compile_forward(model: Segmenter, device: torch.device) -> Forward:
    """A compiled function of images (B, C, H, W) and padding (B, H, W) that gives the final prediction.

    Each new size of (B, H, W) is compiled anew, which takes minutes; after eight of them PyTorch says so, and
    runs others uncompiled. Results differ from the model's own by rounding.

    Raises:
        MaskwrightError: there is no C++ compiler, which `torch.compile` calls. Its function raises it where
            compilation fails.
    """
    if compiler() is None:
        raise MaskwrightError(
            "compile needs a C++ compiler, found none (neither CXX nor g++, clang++ or cl); install one, or do without "
            "compile"
        )
    with_graphs = is_asynchronous(device)
    runs_triton(device.type)  # tried before PyTorch traces what follows from it

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
            raise MaskwrightError(f"torch.compile failed on this model: {reason}; do without compile") from error
        if with_graphs:
            tensors = tuple(tensor.clone() for tensor in tensors)
        return PixelPrediction(*tensors) if len(tensors) == 1 else MaskPrediction(*tensors)

    return run


def compiler() -> str | None:
    """The C++ compiler that `torch.compile` will find."""
    names = (os.environ.get("CXX"), "g++", "clang++", "cl")
    return next((found for name in names if name and (found := shutil.which(name))), None)
