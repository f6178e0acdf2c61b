"""The one place that talks to accelerate and to `torch.accelerator`: which device, which precision, how much memory."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import resource
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from maskwright.errors import MaskwrightError

if TYPE_CHECKING:
    from accelerate import Accelerator  # takes a second to import, and a prediction needs none of it

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable)

OPERATORS_VARIABLE = "MASKWRIGHT_OPERATORS"
_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def start_engine(precision: str) -> Accelerator:
    """Accelerate's engine for this process.

    Args:
        precision: "fp32", "bf16" or "fp16".

    Raises:
        MaskwrightError: several processes were started, but they do not form one run; or fp16 on a CPU.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    on_cpu = default_device().type == "cpu"
    if on_cpu and precision == "fp16":
        raise MaskwrightError("train.precision=fp16 needs an accelerator; on a CPU use bf16 or fp32")
    AcceleratorState._reset_state()  # else a second run in one process could not have another precision
    # Without cpu=True a torchrun on a machine without accelerator would train independent copies.
    usable = usable_precision(default_device(), precision)
    _join_restarted_group()
    engine = Accelerator(cpu=on_cpu, mixed_precision=_PRECISIONS[usable])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and engine.distributed_type == DistributedType.NO:
        raise MaskwrightError(
            f"WORLD_SIZE is {world}, but the processes form no group: each would train its own copy; "
            "start them with torchrun or accelerate launch"
        )
    return engine


def _join_restarted_group() -> None:
    """Form the group of processes that torchrun has started again.

    They are handed the store of those before them, with the addresses of processes that are gone, so they keep theirs
    under another prefix. In a first start accelerate forms the group.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or torch.distributed.is_initialized():
        return
    store, rank, world = next(torch.distributed.rendezvous("env://"))
    torch.distributed.init_process_group(
        torch.distributed.get_default_backend_for_device(default_device()),
        store=torch.distributed.PrefixStore(f"attempt-{attempt}", store),
        rank=rank,
        world_size=world,
    )


def be_deterministic() -> None:
    """Let PyTorch use only operators that give the same bits each time; one that has no such form is an error.

    Must be called before an accelerator is first used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def default_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def pick_device(name: str | None) -> torch.device:
    """The device that a user named, or the default.

    Raises:
        MaskwrightError: PyTorch does not know the name, or the device is not there.
    """
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise MaskwrightError(f"device '{name}' cannot be used: {reason}. Here: cpu, {default_device().type}") from None
    return device


def usable_precision(device: torch.device, precision: str) -> str:
    """The precision, or "fp32" where bf16 would be emulated: on a CPU, products then take 2 to 20 times as long.

    Says so once.
    """
    if device.type != "cpu" or precision != "bf16" or has_bfloat16_products():
        return precision
    _warn_of_emulation()
    return "fp32"


def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices and convolutions with its vector units.

    With AVX-512 alone oneDNN takes bfloat16 too, but at half the speed of float32, as it converts everything.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_bf16_supported()


@cache
def _warn_of_emulation() -> None:
    logger.warning("this CPU has no instructions for products of bfloat16, so bf16 would be slower: using fp32")


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Automatic mixed precision for inference; nothing for "fp32"."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    precision = usable_precision(device, precision)
    return torch.autocast(device.type, kinds[precision]) if precision in kinds else contextlib.nullcontext()


def synchronise_batch_norms(module: nn.Module, engine: Accelerator) -> nn.Module:
    """The module with batch norms that take their statistics over all processes, names and weights kept.

    The module as it is where there is one process, and on CPUs, for which PyTorch has no such norm.
    """
    if engine.num_processes == 1 or engine.device.type == "cpu":
        return module
    from timm.layers import convert_sync_batchnorm  # knows timm's own norms, too, and takes two seconds to import

    return convert_sync_batchnorm(module)


def has_fused_optimizer(device: torch.device) -> bool:
    """Whether PyTorch has a fused AdamW for the device."""
    return device.type in ("cpu", "cuda", "mps", "xpu")


def runs_behind(device: torch.device) -> bool:
    """Whether the host queues work for the device without waiting for it, and may ask for copies likewise."""
    return device.type == "cuda"


def start_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the host; what is returned waits for the copy and gives it."""
    if not runs_behind(tensor.device):
        here = tensor.detach().cpu()
        return lambda: here
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor.detach(), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait


def all_sums(engine: Accelerator, values: tuple[float, ...]) -> tuple[float, ...]:
    """Each value's sum over all processes, the same in all of them."""
    if engine.num_processes == 1:
        return values
    sums = engine.reduce(torch.tensor(values, dtype=torch.float32, device=engine.device), "sum")
    return tuple(sums.tolist())


def gather_objects(engine: Accelerator, item: object) -> list:
    """One object of every process, in all of them."""
    if engine.num_processes == 1:
        return [item]
    gathered: list = [None] * engine.num_processes
    torch.distributed.all_gather_object(gathered, item)
    return gathered


def shared_store(engine: Accelerator) -> torch.distributed.Store | None:
    """Words that all processes can read and write at any time, without waiting for each other or for their devices.

    None for a process alone.
    """
    if engine.num_processes == 1:
        return None
    return torch.distributed.distributed_c10d._get_default_store()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the device, or the CPU, has no memory left."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def forget_peak_memory(device: torch.device) -> None:
    """Begin to measure the peak memory anew, and give unused memory back, where the device can."""
    with contextlib.suppress(RuntimeError, AttributeError):
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def total_memory_gb(device: torch.device) -> float | None:
    """Memory of the device in GB (10^9 bytes); None where it does not say."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else None
    with contextlib.suppress(RuntimeError, AttributeError):
        return torch.accelerator.get_memory_info(device)[1] / 1e9
    return None


def wait_for_device(device: torch.device) -> None:
    """Let the host wait until the device has done what it was asked for; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GB (10^9 bytes): of the accelerator, or of this process on a CPU."""
    if device.type == "cpu":
        return _peak_of_process() / 1e9
    with contextlib.suppress(RuntimeError, AttributeError):
        return torch.accelerator.max_memory_allocated(device) / 1e9
    return 0.0


def _peak_of_process() -> int:
    """Bytes. In `ru_maxrss` Linux also counts the process that started this one, so its own file is asked first."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def describe(device: torch.device) -> str:
    """The device in words, for reports."""
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
    name_of = getattr(getattr(torch, device.type, None), "get_device_name", None)
    if name_of is not None:
        with contextlib.suppress(Exception):  # vendors write it as they like; a report can do without
            return f"{device} {name_of(device)}"
    return str(device)


def constant_when_compiled(function: Function) -> Function:
    """As `torch.compiler.assume_constant_result`, which imports the whole compiler for it, and takes two seconds."""
    function._dynamo_marked_constant = True  # ty: ignore[missing-attribute]
    return function


@constant_when_compiled
def has_plain_operators(device_type: str) -> bool:
    """Whether devices of this type get only operators that every PyTorch backend has: MASKWRIGHT_OPERATORS=plain.

    Then no training step calls `grid_sample` or `embedding_bag`, or indexes with booleans: values are gathered and
    summed instead, to the same numbers and with more memory. Unset, CPUs, CUDA (ROCm and Iluvatar present
    themselves as such) and XPU get the usual operators and all other devices the plain ones; "usual" tries the usual
    ones there too.

    Raises:
        MaskwrightError: the variable has another value.
    """
    chosen = os.environ.get(OPERATORS_VARIABLE, "")
    if chosen not in ("", "plain", "usual"):
        raise MaskwrightError(f"{OPERATORS_VARIABLE} is '{chosen}'; set it to plain or usual, or leave it unset")
    return chosen == "plain" or (not chosen and device_type not in ("cpu", "cuda", "xpu", "meta"))


# What a driver leaves in /dev, whose it is, and what PyTorch needs to see it.
_TRACES = (
    ("nvidia0", "an NVIDIA GPU", "install a CUDA build of PyTorch that the driver supports"),
    ("kfd", "an AMD GPU", "install the ROCm build of PyTorch"),
    ("davinci0", "an Ascend NPU", "install the torch-npu of the same version as torch"),
    ("cambricon_dev0", "a Cambricon MLU", "install the vendor's torch and torch_mlu"),
    ("iluvatar0", "an Iluvatar GPU", "install the vendor's torch (CoreX)"),
)
PLUGINS = ("torch_npu", "torch_mlu", "torch_musa", "torch_sdaa", "torch_xla")


def unseen_accelerators(traces: Path = Path("/dev")) -> list[tuple[str, str]]:
    """Accelerators whose driver is there, and what to install, where PyTorch sees none at all."""
    if default_device().type != "cpu":
        return []
    return [(name, remedy) for file, name, remedy in _TRACES if (traces / file).exists()]


def memory_gb(device: torch.device) -> tuple[float, float] | None:
    """Free and total memory in GB (10^9 bytes), of the machine for the CPU; None where nobody tells."""
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):
            free, total = torch.accelerator.get_memory_info(device)
            return free / 1e9, total / 1e9
        return None
    with contextlib.suppress(OSError, ValueError):
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_AVPHYS_PAGES") / 1e9, page * os.sysconf("SC_PHYS_PAGES") / 1e9
    return None
