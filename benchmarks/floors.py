"""`python -m benchmarks.floors`: where our time goes in a prediction or a training step, and the least it could take.

The floor of matrix products and convolutions is their operations at the rate of large products; that of everything else
is the bytes it reads and writes at the speed of copying memory, each tensor once per operation. Both rates are measured
in the same run. An operation whose tensors are in the cache can be faster than its floor.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import App, Parameter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import peer, prediction, training
from benchmarks.rows import Backbone, Precision
from benchmarks.suite import machine
from benchmarks.timing import matrix_rate, threads
from maskwright.errors import MaskwrightError

app = App(name="benchmarks.floors")

KINDS = {
    "products": "matrix products, convolutions and attention",
    "sampling": "gathers and scatters of sampled points",
    "copies": "copies between layouts and number formats",
    "others": "all other operations",
}
_SAMPLING = ("embedding_bag", "sampled_addmm", "grid_sampler", "index_select", "gather", "scatter", "index", "take")
_COPIES = ("copy_", "_to_copy", "clone", "cat", "stack", "constant_pad_nd")
_UNTOUCHED = ("empty", "view", "detach", "sparse_csr_tensor")  # operations that neither read nor write their tensors


@dataclass
class Work:
    """What the operations of one kind did in a call.

    Attributes:
        calls: how many there were, views included.
        flops: floating-point operations of products; those of other operations are not counted.
        bytes: read and written by other operations.
        seconds: they took, with the start of each operation.
    """

    calls: int = 0
    flops: float = 0
    bytes: float = 0
    seconds: float = 0


class Meter(TorchDispatchMode):
    """Counts and times all operations inside a `with` block, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.work = {kind: Work() for kind in KINDS}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - start
        work = self.work[_kind(func)]
        work.calls += 1
        work.seconds += seconds
        if count := flop_registry.get(func._overloadpacket):
            work.flops += count(*args, **(kwargs or {}), out_val=result)
        elif not func.is_view and not any(word in func._schema.name for word in _UNTOUCHED):
            work.bytes += sum(map(_size, tree_leaves((args, result))))
        return result


def _size(value: object) -> int:
    """Return the bytes of a tensor, of the values and indices of a sparse one; 0 for anything else."""
    if not isinstance(value, Tensor):
        return 0
    parts = [value] if value.layout == torch.strided else [value.values(), value.col_indices()]
    return sum(part.numel() * part.element_size() for part in parts)


def _kind(function: Any) -> str:
    name = function._schema.name.removeprefix("aten::")
    if function._overloadpacket in flop_registry:
        return "products"
    if any(part in name for part in _SAMPLING):
        return "sampling"
    return "copies" if name in _COPIES else "others"


def copy_rate(megabytes: int = 256, repeats: int = 10) -> float:
    """Return the bytes read and written per second by copies of a large tensor."""
    source = torch.zeros(megabytes * 2**20, dtype=torch.uint8)
    target, seconds = torch.zeros_like(source), []
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / min(seconds)


def measure(call: Callable[[], object], rounds: int) -> tuple[dict[str, Work], float]:
    """Return the work of the fastest of several calls, and the seconds of the fastest call without a meter."""
    call()
    plain, metered = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        plain.append(time.perf_counter() - start)
        with Meter() as meter:
            call()
        metered.append(meter.work)
    return min(metered, key=lambda work: sum(part.seconds for part in work.values())), min(plain)


@app.default
def floors(
    what: Literal["prediction", "training"] = "training",
    *,
    precision: Precision = "fp32",
    backbone: Backbone = "r50",
    threads_: Annotated[int, Parameter(name="--threads")] = 2,
    rounds: int = 3,
) -> None:
    """Print how long each kind of operation takes, and its floor.

    Parameters
    ----------
    what
        A prediction at 800x1066, or a training step at 512x512.
    precision
        Precision of the network.
    backbone
        Backbone of the model.
    threads_
        PyTorch threads.
    rounds
        Calls of which the fastest counts.
    """
    kind = prediction.number_format(precision)
    with threads(threads_), peer.saved_model(backbone, 0) as folder:
        work, whole = measure(_call(what, folder, precision), rounds)
        rate, bandwidth = matrix_rate(kind), copy_rate()
    print(f"{machine()}\n{what}, {backbone}, {precision}, {threads_} threads, fastest of {rounds}")
    print(f"large products at {rate / 1e9:.0f} GFLOP/s, copies at {bandwidth / 1e9:.1f} GB/s\n")
    print("| | operations | GFLOP | GB | floor, s | measured, s |\n| --- | --- | --- | --- | --- | --- |")
    total = 0.0
    for name, part in work.items():
        floor = part.flops / rate + part.bytes / bandwidth
        total += floor
        amounts = [f"{value / 1e9:.1f}" if value else "" for value in (part.flops, part.bytes)]
        print(f"| {KINDS[name]} | {part.calls:,} | {' | '.join(amounts)} | {floor:.2f} | {part.seconds:.2f} |")
    rest = whole - sum(part.seconds for part in work.values())
    print(f"| Python, SciPy and the rest | | | | | {rest:.2f} |")
    print(f"| whole | {sum(part.calls for part in work.values()):,} | | | {total:.2f} | {whole:.2f} |")


def _call(what: str, folder: Path, precision: Precision) -> Callable[[], object]:
    if what == "training":
        return training.our_step(folder, 0, precision).call
    return prediction.our_call(peer.load_ours(folder), peer.smooth_image(0), precision)


if __name__ == "__main__":
    try:
        app()
    except MaskwrightError as error:
        sys.exit(f"error: {error}")
