"""Mask2Former of transformers with random weights, and ours of the same: what the benchmarks of the network compare.

Random weights decide nothing, so they are scaled: about twenty queries are sure of a class, masks cover half of the
picture, and queries differ from each other.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image

from benchmarks.rows import Backbone
from benchmarks.timing import TimeLimitError, peak_megabytes, time_limit
from maskwright.checkpoints.load import load_model
from maskwright.errors import MaskwrightError, one_line
from maskwright.models.mask2former import Mask2Former
from maskwright.structures.annotations import pad_images

if TYPE_CHECKING:
    from transformers import Mask2FormerForUniversalSegmentation

HEIGHT, WIDTH, MAX_SIDE = 800, 1066, 1333
CLASSES, THINGS = 133, 80
CONFIDENT_QUERIES = 20  # whose best class beats "no object", mostly clearly
COMPILED = "compiled"  # name of the compiled peer among the sides
_BACKEND = "inductor"
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def peer_name() -> str:
    """Return name and version of the peer.

    Raises:
        MaskwrightError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MaskwrightError(
            "the benchmark needs transformers, which is not installed", remedy="pip install transformers"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return f"transformers {transformers.__version__}"


def imports_note(part: str) -> str:
    """Return a note on how much memory both sides take for libraries alone; `part` is the module of the benchmark."""
    ours, theirs = peak_megabytes(importlib.import_module, part), peak_megabytes(_import_theirs, part)
    return f"memory: libraries alone take {ours:.0f} MB of ours and {theirs:.0f} MB of theirs"


def _import_theirs(part: str) -> None:
    importlib.import_module(part)
    from transformers import Mask2FormerForUniversalSegmentation  # noqa: F401 - imported for its memory


def new_model(backbone: Backbone) -> Mask2FormerForUniversalSegmentation:
    """Build a transformers model with random weights.

    Raises:
        MaskwrightError: transformers is not installed.
    """
    peer_name()
    import transformers

    stages: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    by_timm: dict[str, Any] = {"backbone": "resnet50", "out_indices": [1, 2, 3, 4], "use_pretrained_backbone": False}
    match backbone:
        case "r50":
            part = transformers.ResNetConfig(**stages)
        case "r50-timm":
            part = transformers.TimmBackboneConfig(**by_timm)
        case "swin-t":
            part = transformers.SwinConfig(depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, **stages)
    whole: dict[str, Any] = {"backbone_config": part, "num_labels": CLASSES, "class_weight": 2.0}
    return transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(**whole)).eval()


@contextmanager
def saved_model(backbone: Backbone, seed: int) -> Generator[Path]:
    """Yield a transformers folder with a model of `make_decisive`; it is removed afterwards."""
    torch.manual_seed(seed)
    model = new_model(backbone)
    make_decisive(model, common_input(smooth_image(seed)))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield Path(folder)


def load_ours(folder: Path) -> Mask2Former:
    """Load our model with their weights."""
    model = cast(Mask2Former, load_model(folder))
    model.evaluate_config = model.evaluate_config.model_copy(update={"short_side": HEIGHT, "max_side": MAX_SIDE})
    return model


def load_theirs(folder: Path) -> Mask2FormerForUniversalSegmentation:
    """Load their model."""
    peer_name()
    from transformers import Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()


def compile_networks(theirs: Mask2FormerForUniversalSegmentation) -> None:
    """Let `torch.compile` compile their backbone, pixel decoder and decoder at the first call."""
    for network in (theirs.model.pixel_level_module, theirs.model.transformer_module):
        network.compile(backend=_BACKEND)


def first_call(call: Callable[[], object], minutes: float, what: str = "the peer") -> tuple[bool, str]:
    """Make the first call of what was compiled; return whether it came to its end in time, and a note."""
    start = time.perf_counter()
    try:
        with time_limit(60 * minutes):
            call()
    except TimeLimitError:
        return False, f"{COMPILED}: torch.compile of {what} did not end within {minutes:g} min"
    except RuntimeError as error:  # e.g. without a C++ compiler
        return False, f"{COMPILED}: torch.compile of {what} failed: {one_line(error)}"
    return True, f"{COMPILED}: {what} by torch.compile, whose first call took {time.perf_counter() - start:.0f} s"


def smooth_image(seed: int, height: int | None = None, width: int | None = None) -> np.ndarray:
    """Return (H, W, 3) uint8 smooth colors, so that stretching by 2 % hardly changes a random network's output."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width or WIDTH, height or HEIGHT), Image.Resampling.BICUBIC))


def common_input(image: np.ndarray) -> torch.Tensor:
    """Return (1, 3, H, W) normalized pixels, zero in the padding."""
    images, padding = pad_images([torch.from_numpy(image).permute(2, 0, 1)])
    return normalized(images).masked_fill(padding[:, None], 0)


def normalized(images: torch.Tensor) -> torch.Tensor:
    """Normalize (B, 3, H, W) uint8 images with the mean and standard deviation of ImageNet."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return (images.float() - mean) / std


@torch.no_grad()
def make_decisive(theirs: Mask2FormerForUniversalSegmentation, pixels: torch.Tensor) -> None:
    """Change random weights so that queries differ, masks cover half of the image, and few queries are confident."""
    decoder = theirs.model.transformer_module
    decoder.queries_features.weight.normal_()
    for name, parameter in decoder.named_parameters():  # otherwise ten random layers make all queries equal
        if name.endswith(("out_proj.weight", "fc2.weight")):
            parameter *= 0.2
    features = theirs(pixel_values=pixels, output_hidden_states=True).pixel_decoder_last_hidden_state  # (1, C, h, w)
    theirs.model.pixel_level_module.decoder.mask_projection.bias -= features.mean((0, 2, 3))
    head = theirs.class_predictor
    head.weight.normal_(std=1.0)
    head.weight[-1] = 0  # "no object" has the same logit for every query and image
    logits = theirs(pixel_values=pixels).class_queries_logits[0]  # (Q, K+1)
    lead = (logits[:, :-1].amax(1) - logits[:, -1]).sort(descending=True).values
    head.bias[-1] += lead[CONFIDENT_QUERIES - 1 : CONFIDENT_QUERIES + 1].mean()
