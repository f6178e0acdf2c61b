"""`python -m benchmarks.cuda`: check and time maskwright on one CUDA device, in at most six minutes.

- The Triton kernels of deformable attention against the plain formula on `grid_sample`: forward and backward, random
  levels of odd sizes, each number format.
- A prediction and a training step of published size against transformers, with the same weights: time and peak memory.
- How often the host waits for the device in each.
- The network as it is, compiled, and compiled with CUDA graphs.

`--device cpu` runs the same code with tiny images, and another backend in place of Triton; its times mean nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from cyclopts import App
from torch import Tensor

from benchmarks import peer, prediction, training
from benchmarks.rows import Part, Precision, Row, compared, table
from benchmarks.suite import machine
from benchmarks.timing import alternate, timed
from maskwright.errors import MaskwrightError
from maskwright.inference.compile import compile_forward
from maskwright.models.ops.deformable_attention import deformable_attention
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.runtime.device import autocast, pick_device

HEADS, CHANNELS, POINTS = 8, 32, 4
# The largest difference from `grid` in float32, relative to the largest value: rounding of the inputs and of sums.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "hipStreamSynchronize")
READS = "aten::_local_scalar_dense"  # a value that Python asks for

app = App(name="benchmarks.cuda")


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        cases: random cases for each number format.
        levels: (h, w) of the levels of the timed attention.
        image: height and width of the predicted image.
        crop: side of the training crops.
        batch: number of crops in a step.
        rounds: timed calls of each side, after one warm-up call.
        precisions: of prediction and training.
        compiled: whether to compile.
    """

    cases: int = 30
    levels: tuple[tuple[int, int], ...] = ((32, 32), (64, 64), (128, 128))
    image: tuple[int, int] = (800, 1333)
    crop: int = 1024
    batch: int = 2
    rounds: int = 10
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    compiled: bool = True


DRY = Sizes(2, ((2, 3), (4, 6)), (64, 90), 64, 1, 1, ("fp32",), compiled=False)


@app.default
def run(
    device: str = "cuda",
    minutes: float = 6,
    output: Path | None = None,
) -> None:
    """Check and time maskwright on one CUDA device.

    Parameters
    ----------
    device
        The device; cpu runs everything with tiny images.
    minutes
        No part begins after this time.
    output
        File for the tables, in Markdown.
    """
    target = pick_device(device)
    blocks = [f"{device_name(target)}, {machine()}"]
    print(blocks[0], flush=True)
    end = time.monotonic() + 60 * minutes
    for part in measure(target, DRY if target.type == "cpu" else Sizes(), end):
        blocks.append(part if isinstance(part, str) else table([part]))
        print(f"\n{blocks[-1]}", flush=True)
        if output:
            text = "\n\n".join(blocks) + "\n"
            write_file_atomically(output, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def device_name(device: torch.device) -> str:
    """Return the name of a device for the table."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"dry run on {device}"


def measure(device: torch.device, sizes: Sizes, end: float) -> Iterator[Part | str]:
    """Yield the parts, or a line for each that there is no time for.

    Raises:
        MaskwrightError: a kernel is wrong; transformers is not installed.
    """
    steps: list[tuple[str, Callable[[], Part]]] = [("kernels", partial(check_kernels, device, sizes))]
    with peer.saved_model("r50", 0) as folder:
        for precision in sizes.precisions:
            steps.append((f"prediction {precision}", partial(predict, folder, device, sizes, precision)))
            steps.append((f"training {precision}", partial(train, folder, device, sizes, precision)))
        if sizes.compiled:
            steps.append(("compiled", partial(compiled, folder, device, sizes)))
        for name, step in steps:
            yield step() if time.monotonic() < end else f"{name}: not run, time is up"


def check_kernels(device: torch.device, sizes: Sizes) -> Part:
    """Compare the kernels with `grid` on random cases, and time both on levels of published size."""
    backend = "triton" if device.type == "cuda" else "bag"
    notes = []
    for kind, tolerance in TOLERANCES.items():
        if device.type == "cpu" and kind != torch.float32:
            continue
        worst = 0.0
        for seed in range(sizes.cases):
            worst = max(worst, *differences(random_case(seed, kind, device), backend))
        notes.append(f"{backend} against grid, {kind}, {sizes.cases} random cases: {worst:.1e} at most")
        if not worst <= tolerance:
            raise MaskwrightError(f"{notes[-1]}, expected at most {tolerance:.1e}")
    kinds = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    return Part([row for kind in kinds for row in _attention_times(backend, kind, device, sizes)], notes)


def _attention_times(backend: str, kind: torch.dtype, device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Yield the times of one self-attention of the pixel decoder, against `grid`."""
    case = attention_case(sizes.levels, sum(h * w for h, w in sizes.levels), kind, device, 0)
    for name, call in (("forward", forward_only), ("forward and backward", attend_and_differentiate)):
        sides = [timed(synchronized(partial(call, case, side), device)) for side in (backend, "grid")]
        timings = alternate(sides, sizes.rounds)
        yield compared("attention", f"{name}, {kind}", f"levels {sizes.levels}", "grid", timings)


Case = tuple[Tensor, list[tuple[int, int]], Tensor, Tensor, Tensor]


def random_case(seed: int, kind: torch.dtype, device: torch.device) -> Case:
    """Return values, shapes, positions, weights and an upstream gradient; levels have odd sizes, queries any number."""
    generator = np.random.default_rng(seed)
    levels = [(int(h), int(w)) for h, w in generator.integers(1, 40, (generator.integers(1, 5), 2))]
    return attention_case(tuple(levels), int(generator.integers(1, 300)), kind, device, seed)


def attention_case(
    levels: Sequence[tuple[int, int]], queries: int, kind: torch.dtype, device: torch.device, seed: int
) -> Case:
    """Return random values, positions around the levels and beyond them, weights and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    cells, size = sum(h * w for h, w in levels), (1, queries, HEADS, len(levels), POINTS)
    values = torch.randn(1, cells, HEADS, CHANNELS, generator=generator).to(kind)
    extent = torch.tensor([[w, h] for h, w in levels], dtype=torch.float32)[:, None]
    positions = torch.rand(*size, 2, generator=generator) * (extent + 3) - 2
    weights = torch.rand(size, generator=generator)
    upstream = torch.randn(1, queries, HEADS * CHANNELS, generator=generator).to(kind)
    return values.to(device), list(levels), positions.to(device), weights.to(device), upstream.to(device)


def forward_only(case: Case, backend: str) -> Tensor:
    """Run the attention."""
    values, shapes, positions, weights, _ = case
    with torch.no_grad():
        return deformable_attention(values, shapes, positions, weights, backend)


def attend_and_differentiate(case: Case, backend: str) -> tuple[Tensor, ...]:
    """Return the output and the gradients of values, positions and weights."""
    values, shapes, positions, weights, upstream = case
    leaves = [tensor.detach().requires_grad_() for tensor in (values, positions, weights)]
    output = deformable_attention(leaves[0], shapes, leaves[1], leaves[2], backend)
    return output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))


def differences(case: Case, backend: str) -> list[float]:
    """Return the largest differences of output and gradients from `grid` in float32, relative to their largest value.

    Positions close to the center of a cell are left out of the positions' gradient, which jumps there.
    """
    values, shapes, positions, weights, upstream = case
    found = attend_and_differentiate(case, backend)
    expected = attend_and_differentiate((values.float(), shapes, positions, weights, upstream.float()), "grid")
    smooth = (positions - positions.round()).abs() > 1e-3
    result = []
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        difference = (ours.float() - theirs).abs()
        if index == 2:
            difference = difference[smooth.expand_as(difference)]
        result.append(float(difference.max() / theirs.abs().max().clamp_min(1e-6)))
    return result


def predict(folder: Path, device: torch.device, sizes: Sizes, precision: Precision) -> Part:
    """Time whole predictions of both sides, from a uint8 image on the host to a panoptic result."""
    image = peer.smooth_image(0, *sizes.image)
    ours, theirs = peer.load_ours(folder), peer.load_theirs(folder).to(device)
    calls = [
        prediction.our_call(ours, image, precision, device.type),
        prediction.their_call(theirs, image, precision, device.type),
    ]
    setting = f"R50, {precision}, one image of {sizes.image[0]}x{sizes.image[1]}"
    return _compare("prediction", setting, calls, device, sizes)


def train(folder: Path, device: torch.device, sizes: Sizes, precision: Precision) -> Part:
    """Time training steps of both sides, from forward to optimizer."""
    steps = [
        training.our_step(folder, 0, precision, sizes.crop, sizes.batch),
        training.their_step(training.load_for_training(folder).to(device), 0, precision, sizes.crop, sizes.batch),
    ]
    setting = f"R50, {precision}, {sizes.batch} crops of {sizes.crop}x{sizes.crop}, AdamW, frozen batch norms"
    return _compare("training step", setting, [step.call for step in steps], device, sizes)


def _compare(part: str, setting: str, calls: list[Callable], device: torch.device, sizes: Sizes) -> Part:
    """Time both sides alternately; measure their memory and count how often the host waits, each on its own."""
    waits, memory = [], []
    for call in calls:
        call()  # the first call loads libraries and compiles kernels
        waits.append(count_waits(call, device))
        memory.append(peak_memory(call, device))
    timings = alternate([timed(synchronized(call, device)) for call in calls], sizes.rounds)
    row = compared(part, "whole", setting, peer.peer_name(), timings)
    notes = [
        f"{side}: the host waits {stops} times, Python reads {reads} values"
        for side, (stops, reads) in zip(("ours", "theirs"), waits, strict=True)
    ]
    if device.type == "cuda":
        notes.append(f"peak memory on the device: ours {memory[0]:.0f} MB, theirs {memory[1]:.0f} MB")
    return Part([row], notes)


def count_waits(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Return how often the host waits for the device during a call, and how often Python reads a value of a tensor."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        call()
    counts = {event.key: event.count for event in profiler.key_averages()}
    return sum(counts.get(name, 0) for name in WAITS), counts.get(READS, 0)


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """Return the peak of allocated device memory during a call in 10^6 bytes; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e6


def synchronized(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Return a call that ends when the device has finished."""

    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def compiled(folder: Path, device: torch.device, sizes: Sizes) -> Part:
    """Time the network as it is, compiled, and compiled with CUDA graphs, in bfloat16."""
    model = peer.load_ours(folder).to(device).eval()
    height, width = (32 * -(-side // 32) for side in sizes.image)
    images = torch.randn(1, 3, height, width, device=device)
    padding = torch.zeros(1, height, width, dtype=torch.bool, device=device)

    def call_of(forward: Callable) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode(), autocast(device, "bf16"):
                return forward(images, padding)

        return call

    calls, notes = [call_of(_final(model))], []
    for name, graphs in (("compiled", False), ("compiled with CUDA graphs", True)):
        torch._dynamo.reset()
        calls.append(call_of(compile_forward(model, device, cuda_graphs=graphs)))
        start = time.perf_counter()
        synchronized(calls[-1], device)()
        notes.append(f"{name}: first call {time.perf_counter() - start:.0f} s")
    plain, *others = alternate([timed(synchronized(call, device)) for call in calls], sizes.rounds)
    setting = f"R50, bf16, {height}x{width}"
    rows = [
        Row("network", name, setting, "uncompiled", side["whole"], plain["whole"])
        for name, side in zip(("compiled", "compiled with CUDA graphs"), others, strict=True)
    ]
    return Part(rows, notes)


def _final(model: Segmenter) -> Callable:
    return lambda images, padding: model(images, padding).final


if __name__ == "__main__":
    try:
        app()
    except MaskwrightError as error:
        sys.exit(f"error: {error}")
