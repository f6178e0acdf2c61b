"""`maskwright doctor`: report what this machine has, test that it computes correctly, and suggest fixes.

The self-test runs a small Mask2Former forward and backward. Weights, image and sampled points are formulas, so that
every machine has the same ones without a file; the expected values in `doctor.json` were computed by transformers.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from maskwright import __version__
from maskwright.config.schema import ModelConfig
from maskwright.models import build_model
from maskwright.models.ops.deformable_attention import BACKENDS, choose_backend, deformable_attention
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.device import (
    OPERATORS_VARIABLE,
    PLUGINS,
    describe_device,
    free_and_total_memory_gb,
    has_fast_bfloat16,
    has_plain_operators,
    pick_device,
    undetected_accelerators,
)
from maskwright.structures.annotations import Category, Target
from maskwright.training.losses.criterion import Criterion

MIN_TORCH = (2, 9)
MIN_SHARED_MEMORY = 0.5  # GB; data loading processes pass images through it
TOLERANCE = 5e-3  # absolute, for logits near 1: allows TF32 convolutions; a wrong operator is a hundred times worse
GOLDEN_RATIO = 0.6180339887498949  # its multiples modulo 1 are evenly spread

MODEL = ModelConfig(
    backbone="swin_tiny_patch4_window7_224",
    backbone_options={"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 4]},
    window_size=3,
    num_queries=6,
    hidden_dim=32,
    num_heads=4,
    pixel_decoder_layers=1,
    pixel_decoder_feedforward_dim=32,
    masked_decoder_layers=3,
    masked_decoder_feedforward_dim=32,
)
CATEGORIES = tuple(Category(number, name, True, (0, 0, 0)) for number, name in enumerate(("a", "b", "c")))
POINTS = 128
PHASE = 52  # of sixty phases, the one whose attention masks are least sensitive to rounding


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: "broken" makes the exit status 1; "note" works, but not optimally.
        text: what was found.
        remedy: what to do, if anything.
    """

    state: Literal["ok", "note", "broken"]
    text: str
    remedy: str = ""


def examine(device_name: str | None = None) -> Iterator[Finding]:
    """Yield findings on everything that training and prediction depend on.

    Args:
        device_name: cpu, cuda, mps, ...; None is the accelerator of this machine.

    Raises:
        MaskwrightError: the device cannot be used, or MASKWRIGHT_OPERATORS has an unknown value.
    """
    device = pick_device(device_name)
    yield versions()
    yield Finding("ok", f"device {describe_device(device)}")
    for name, remedy in undetected_accelerators():
        yield Finding("broken", f"this machine has {name}, but PyTorch sees no accelerator", remedy)
    yield from memory(device)
    yield processes()
    yield precision(device)
    yield from operators(device)
    yield self_test(device)


def versions() -> Finding:
    """Report the versions that affect numerics."""
    found = {}
    for name in ("torch", "torchvision", "timm", "accelerate", *PLUGINS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    text = f"maskwright {__version__}, Python {platform.python_version()}, " + ", ".join(
        f"{name} {version}" for name, version in found.items()
    )
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < MIN_TORCH:
        return Finding("broken", text, f"install torch {MIN_TORCH[0]}.{MIN_TORCH[1]} or newer")
    return Finding("ok", text)


def memory(device: torch.device, shared: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Report the memory of the machine and of the accelerator, and the shared memory of data loading processes."""
    for place in dict.fromkeys((torch.device("cpu"), device)):
        if known := free_and_total_memory_gb(place):
            yield Finding("ok", f"memory of {place}: {known[0]:.1f} GB free of {known[1]:.1f} GB")
        else:
            yield Finding("note", f"memory of {place}: not reported by its driver")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total / 1e9) < MIN_SHARED_MEMORY:
        yield Finding(
            "note",
            f"{shared} has {size:.2f} GB, too little for several data loading processes",
            "start the container with --shm-size=8g (or --ipc=host), or train with train.num_workers=0",
        )


def processes() -> Finding:
    """Report the communication backends for several processes."""
    if not torch.distributed.is_available():
        return Finding("note", "this PyTorch has no torch.distributed: it can only train in one process")
    names = [name for name in ("gloo", "nccl", "xccl", "mpi") if torch.distributed.is_backend_available(name)]
    return Finding("ok", f"communication backends: {', '.join(names)}")


def precision(device: torch.device) -> Finding:
    """Report whether bf16 is supported in hardware."""
    if device.type == "cpu" and not has_fast_bfloat16():
        return Finding("note", "this CPU has no bfloat16 matrix instructions: fp32 is used instead of bf16")
    return Finding("ok", "bf16 is supported (train.precision=bf16)")


def operators(device: torch.device) -> Iterator[Finding]:
    """Compare each backend of deformable attention on the device with `grid` on the CPU, forward and backward."""
    expected = _attention("grid", torch.device("cpu"))
    chosen = choose_backend(torch.zeros(1, device=device))
    differences, failures = {}, {}
    backends = [name for name in BACKENDS if name != "triton" or device.type == "cuda"]
    for backend in backends:
        try:
            found = _attention(backend, device)
        except Exception as error:  # vendors raise any type of exception
            failures[backend] = _first_line(error)
            continue
        difference = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
        differences[backend] = difference
        if not difference < 1e-3:
            failures[backend] = f"differs from the CPU by {difference:.1e}"
    works = ", ".join(f"{name} ({differences[name]:.0e})" for name in backends if name not in failures)
    operator_set = "plain" if has_plain_operators(device.type) else "usual"
    remedy = f"set {OPERATORS_VARIABLE}=plain" if chosen != "gather" else f"set {OPERATORS_VARIABLE}=usual"
    yield Finding(
        "broken" if chosen in failures else "ok",
        f"deformable attention on {device}: {chosen} is used, {operator_set} operators; correct: {works or 'none'}",
        remedy if chosen in failures else "",
    )
    for backend, reason in failures.items():
        yield Finding("note", f"deformable attention, backend {backend}, does not work on {device}: {reason}")


def self_test(device: torch.device) -> Finding:
    """Compare a small model, forward and backward, with the values computed by transformers."""
    start = time.perf_counter()
    try:
        found = compute(device)
    except Exception as error:  # vendors raise any type of exception
        remedy = f"try {OPERATORS_VARIABLE}=plain; if that does not help, report this line and the device"
        return Finding("broken", f"self-test on {device}: {_first_line(error)}", remedy)
    seconds = time.perf_counter() - start
    differences = {name: _difference(values, expected()[name]) for name, values in found.items()}
    text = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    text = f"self-test on {device}, {seconds:.1f} s, max differences from transformers: {text}"
    if all(difference < TOLERANCE for difference in differences.values()):
        return Finding("ok", text)
    remedy = f"this device computes wrong values; try {OPERATORS_VARIABLE}=plain and another version of its PyTorch"
    return Finding("broken", f"{text} (limit {TOLERANCE})", remedy)


def compute(device: torch.device) -> dict[str, list[float]]:
    """Return the logits, losses and gradient norm of the small model."""
    model = build(device)
    output = model(synthetic_image().to(device), intermediate=True)
    criterion = Criterion(num_points=POINTS)
    losses = criterion(output, [synthetic_target().to(device)], SpreadPoints(device))
    criterion.total(losses).backward()
    gradients = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    results = {
        "class logits": output.final.class_logits.flatten(),
        "mask logits": output.final.mask_logits()[..., ::4, ::4].flatten(),
        "losses": torch.cat(list(losses.values())),  # class, mask, dice of each layer
        "gradient": torch.stack(gradients).norm().log()[None],
    }
    return {name: values.detach().cpu().tolist() for name, values in results.items()}


def expected() -> dict[str, list[float]]:
    """Return the expected values of `compute`: `doctor.json`, written by `python -m tests.doctor_fixture`."""
    return json.loads(resources.files("maskwright.diagnostics").joinpath("doctor.json").read_text(encoding="utf-8"))


def build(device: torch.device) -> Segmenter:
    """Build the model; its weights are sine waves, different for each tensor."""
    model = build_model(MODEL, CATEGORIES)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters()), start=1):
            wave = np.sin(np.arange(parameter.numel()) * (1 + number * GOLDEN_RATIO % 1) + number + PHASE)
            values = torch.from_numpy(wave.astype(np.float32)).view(parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(values * math.sqrt(2 / max(1, parameter[0].numel())))
            else:
                parameter.copy_(values * 0.2 + ("norm" in name and name.endswith("weight")))
    return model.to(device).train()


def synthetic_image() -> Tensor:
    """Return (1, 3, 64, 96) uint8: waves in three directions."""
    y, x = np.mgrid[0:64, 0:96]
    waves = [np.sin(x / 7 + y / 11), np.sin(x / 5 - y / 13), np.sin(x * y / 300)]
    return torch.from_numpy((127 + 100 * np.stack(waves)).astype(np.uint8))[None]


def synthetic_target() -> Target:
    """Return three rectangles of three classes."""
    id_map = torch.zeros(1, 64, 96, dtype=torch.int32)
    id_map[0, 8:40, 10:50], id_map[0, 30:60, 44:90], id_map[0, 2:20, 60:80] = 1, 2, 3
    return Target(id_map, torch.tensor([0, 2, 1]), torch.zeros(3, dtype=torch.bool), "self-test", (64, 96))


class SpreadPoints:
    """Evenly spread points for the criterion (see `Points`), different for each mask and layer."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = device

    def matching(self, image: int, layers: int, count: int) -> Tensor:
        """See `Points`."""
        return torch.stack([self._spread(100 + layer, count) for layer in range(layers)])

    def candidates(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        """See `Points`."""
        return torch.stack([self._spread(200 + 10 * layer + mask, count) for mask in range(masks)])

    def uniform(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        """See `Points`."""
        return torch.stack([self._spread(300 + 10 * layer + mask, count) for mask in range(masks)])

    def _spread(self, start: int, count: int) -> Tensor:
        steps = np.arange(count) + start
        points = np.stack([steps * GOLDEN_RATIO % 1, steps * math.sqrt(2) % 1], -1)
        return torch.from_numpy(points.astype(np.float32)).to(self.device)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _attention(backend: str, device: torch.device) -> tuple[Tensor, ...]:
    """Return output and gradients of a small deformable attention, on the CPU."""
    shapes = [(6, 8), (3, 4)]
    sizes = {"values": (1, 60, 2, 8), "positions": (1, 10, 2, 2, 4, 2), "weights": (1, 10, 2, 2, 4)}
    leaves = []
    for number, (name, size) in enumerate(sizes.items(), start=1):
        wave = np.sin(np.arange(math.prod(size)) * (GOLDEN_RATIO + number)).astype(np.float32).reshape(size)
        leaf = torch.from_numpy(3 * wave + 2.3 if name == "positions" else wave)
        leaves.append(leaf.to(device).requires_grad_())
    output = deformable_attention(leaves[0], shapes, leaves[1], leaves[2], backend)
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    return tuple(tensor.detach().cpu() for tensor in (output, *gradients))


def _difference(found: list[float], correct: list[float]) -> float:
    """Return the max difference; infinite if a value is not finite."""
    difference = max(abs(a - b) for a, b in zip(found, correct, strict=True))
    return difference if math.isfinite(difference) else math.inf
