"""Models by size (`maskwright recipes --models`): parameters, floating-point operations, and the keys that choose them.

Models are built on the meta device, so nothing is computed or downloaded. `measure` runs one on this machine's CPU.
"""

from __future__ import annotations

import multiprocessing
import shlex
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from maskwright.checkpoints.timm_weights import timm_config
from maskwright.checkpoints.weight_packages import weight_packages
from maskwright.config.categories import load_categories
from maskwright.config.recipe import Recipe, load_recipe
from maskwright.models import build_model
from maskwright.runtime.device import peak_memory_gb

SIZE = 640  # height and width of the image
_CATEGORIES = "coco_panoptic"
_ROUNDS = 3
_SMALL_DECODERS = (
    "model.num_queries=50",
    "model.hidden_dim=128",
    "model.pixel_decoder_layers=3",
    "model.pixel_decoder_feedforward_dim=512",
    "model.masked_decoder_layers=6",
    "model.masked_decoder_feedforward_dim=512",
)
_HALF = ("model.pixel_mean=[127.5,127.5,127.5]", "model.pixel_std=[127.5,127.5,127.5]")
_TRAINED_NORMS = "model.backbone_norm=batch"
_LICENSES = {  # timm's names
    "apache-2.0": "Apache-2.0",
    "bsd-3-clause": "BSD-3-Clause",
    "dinov3-license": "DINOv3 License",
    "mit": "MIT",
}
_MASK2FORMER = "coco-panoptic-r50"


def _lite(number: int) -> tuple[str, ...]:
    weights = f"model.backbone_weights=efficientnet-lite{number}"
    return (f"model.backbone=tf_efficientnet_lite{number}", weights, _TRAINED_NORMS, *_HALF, *_SMALL_DECODERS)


def _backbone(name: str, *more: str) -> tuple[str, ...]:
    return (f"model.backbone={name}", *more)


# name: (recipe or published model, its overrides), from small to large
_MODELS = {
    "MobileNetV3-S, small decoders": (
        _MASK2FORMER,
        _backbone("mobilenetv3_small_100.lamb_in1k", _TRAINED_NORMS, *_SMALL_DECODERS),
    ),
    "EfficientNet-Lite0, small decoders": (_MASK2FORMER, _lite(0)),
    "EfficientNet-Lite2, small decoders": (_MASK2FORMER, _lite(2)),
    "EoMT, DINOv3 ViT-S": ("eomt-dinov3-small-640-coco-panoptic", ()),
    "EoMT, DINOv2 ViT-S": ("eomt-small-640-coco-panoptic", ()),
    "ResNet-18": (_MASK2FORMER, _backbone("resnet18.tv_in1k")),
    "ResNet-50": (_MASK2FORMER, ()),
    "DINOv2 ViT-S, simple pyramid": (_MASK2FORMER, _backbone("vit_small_patch14_dinov2")),
    "DINOv2 ViT-S, adapter": (_MASK2FORMER, _backbone("vit_small_patch14_dinov2", "model.vit_pyramid=adapter")),
    "DINOv3 ViT-S, simple pyramid": (_MASK2FORMER, _backbone("vit_small_patch16_dinov3")),
    "Swin-T": (_MASK2FORMER, _backbone("swin_tiny_patch4_window7_224.ms_in1k")),
    "DINOv3 ConvNeXt-T": (_MASK2FORMER, _backbone("convnext_tiny.dinov3_lvd1689m")),
    "ResNet-101": (_MASK2FORMER, _backbone("resnet101.tv_in1k")),
    "Swin-S": (_MASK2FORMER, _backbone("swin_small_patch4_window7_224.ms_in1k")),
    "DINOv3 ConvNeXt-S": (_MASK2FORMER, _backbone("convnext_small.dinov3_lvd1689m")),
    "EoMT, DINOv3 ViT-B": ("eomt-dinov3-base-640-coco-panoptic", ()),
    "EoMT, DINOv2 ViT-B": ("eomt-base-640-coco-panoptic", ()),
    "Swin-B (22k)": (_MASK2FORMER, _backbone("swin_base_patch4_window12_384.ms_in22k")),
    "DINOv3 ConvNeXt-B": (_MASK2FORMER, _backbone("convnext_base.dinov3_lvd1689m")),
    "Swin-L (22k)": (_MASK2FORMER, _backbone("swin_large_patch4_window12_384.ms_in22k", "model.num_queries=200")),
    "EoMT, DINOv3 ViT-L": ("eomt-dinov3-large-640-coco-panoptic", ()),
    "EoMT, DINOv2 ViT-L": ("eomt-large-640-coco-panoptic", ()),
    "EoMT, DINOv2 ViT-g": ("eomt-giant-640-coco-panoptic", ()),
}


@dataclass(frozen=True)
class ModelSize:
    """A model and its costs for one image of `SIZE` pixels squared, without pre- and post-processing.

    Attributes:
        name: of the model; Mask2Former unless it says EoMT.
        recipe: recipe or published model.
        keys: what it changes there.
        parameters: in millions, decoders included.
        gflops: 10^9 floating-point operations; a multiplication and an addition count as two.
        license: of the backbone's weights.
        seconds: on this machine's CPU, the fastest of three; None if not measured.
        memory: peak memory of the process in GB; None if not measured.
    """

    name: str
    recipe: str
    keys: tuple[str, ...]
    parameters: float
    gflops: float
    license: str
    seconds: float | None = None
    memory: float | None = None


def model_names(part: str | None = None) -> list[str]:
    """Return the names of all models, or of those that contain a text, in any case."""
    return [name for name in _MODELS if part is None or part.lower() in name.lower()]


def model_size(name: str, measured: bool = False) -> ModelSize:
    """Return the size of a model; `measured` adds time and memory of a new process that runs it."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    recipe, keys = _MODELS[name]
    loaded = load_recipe(recipe, keys)
    categories = load_categories(_CATEGORIES)
    with torch.device("meta"), torch.no_grad():
        model = build_model(loaded.model, categories).eval().requires_grad_(False)
        images = torch.empty(1, 3, SIZE, SIZE)
        with FlopCounterMode(display=False) as counter:
            model(images)
    count = sum(parameter.numel() for parameter in model.parameters())
    seconds, memory = _measure(name) if measured else (None, None)
    gflops = counter.get_total_flops() / 1e9
    return ModelSize(name, recipe, keys, count / 1e6, gflops, _license(loaded), seconds, memory)


def _license(recipe: Recipe) -> str:
    weights = recipe.model.backbone_weights or ""
    if weights in weight_packages():
        return weight_packages()[weights].licence
    known = timm_config(recipe.model.backbone).license or "not stated"
    return _LICENSES.get(known, known)


def _measure(name: str) -> tuple[float, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, name, torch.get_num_threads()).result()


def _run(name: str, threads: int) -> tuple[float, float]:
    """Return the seconds of the fastest of several predictions of the network, and peak memory in GB."""
    torch.set_num_threads(threads)
    recipe, keys = _MODELS[name]
    model = build_model(load_recipe(recipe, keys).model, load_categories(_CATEGORIES)).eval()
    images, seconds = torch.zeros(1, 3, SIZE, SIZE), []
    with torch.inference_mode():
        for _ in range(1 + _ROUNDS):
            start = time.perf_counter()
            model(images)
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:]), peak_memory_gb(torch.device("cpu"))


def table(sizes: Iterable[ModelSize]) -> str:
    """Format models as plain text: a line with the costs, and below it the recipe and keys to paste."""
    sizes = list(sizes)
    measured = any(size.seconds is not None for size in sizes)
    width = max((len(size.name) for size in sizes), default=0)
    head = (
        f"{'':{width}}  parameters    GFLOP" + ("        CPU  memory" if measured else "") + "  license of the weights"
    )
    lines = [head]
    for size in sizes:
        costs = f"{size.parameters:8.1f} M  {size.gflops:7.0f}"
        if size.seconds is not None and size.memory is not None:
            costs += f"  {size.seconds:7.2f} s  {size.memory:3.1f} GB"
        lines.append(f"{size.name:{width}}  {costs}  {size.license}")
        lines.append(f"    {shlex.join([size.recipe, *size.keys])}")
    return "\n".join(lines)
