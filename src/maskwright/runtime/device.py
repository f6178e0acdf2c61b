"""Devices, precision, memory and process groups: everything that depends on accelerate or `torch.accelerator`."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from maskwright.errors import MaskwrightError

if TYPE_CHECKING:
    from accelerate import Accelerator  # takes a second to import, and prediction does not need it

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable)

OPERATORS_VARIABLE = "MASKWRIGHT_OPERATORS"
_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def create_accelerator(precision: str) -> Accelerator:
    """Create the `Accelerator` of this process, and join the process group of the run.

    Args:
        precision: "fp32", "bf16" or "fp16".

    Raises:
        MaskwrightError: several processes were started, but they form no process group; or fp16 on a CPU.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    on_cpu = default_device().type == "cpu"
    if on_cpu and precision == "fp16":
        raise MaskwrightError("fp16 needs an accelerator", where="train.precision", remedy="use bf16 or fp32 on a CPU")
    AcceleratorState._reset_state()  # allows a second run of this process to use another precision
    # Without cpu=True, torchrun on a machine without an accelerator would train independent copies.
    usable = usable_precision(default_device(), precision)
    _join_restarted_group()
    engine = Accelerator(cpu=on_cpu, mixed_precision=_PRECISIONS[usable])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and engine.distributed_type == DistributedType.NO:
        raise MaskwrightError(
            f"WORLD_SIZE is {world}, but the processes form no group: each would train its own copy",
            remedy="start them with torchrun or accelerate launch",
        )
    return engine


def _join_restarted_group() -> None:
    """Form the process group after a restart by torchrun; on the first start accelerate does it.

    The restarted processes get the same store, which still has the addresses of the previous ones. So they use another
    prefix for their keys.
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


def use_deterministic_algorithms() -> None:
    """Make PyTorch use deterministic algorithms only; operators without one raise an error.

    Must be called before the accelerator is used for the first time.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def default_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def pick_device(name: str | None) -> torch.device:
    """Return the device with this name, or the default device for None.

    Raises:
        MaskwrightError: PyTorch does not know the name, or the device is not available.
    """
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        available = ", ".join(dict.fromkeys(("cpu", default_device().type)))
        raise MaskwrightError(
            f"cannot be used: {reason}", where=f"device '{name}'", remedy=f"available here: {available}"
        ) from None
    return device


def usable_precision(device: torch.device, precision: str) -> str:
    """Return the precision, or "fp32" with a warning where bf16 would be emulated.

    On CPUs without bfloat16 instructions, matrix products in bf16 take 2 to 20 times as long as in float32.
    """
    if device.type != "cpu" or precision != "bf16" or has_fast_bfloat16():
        return precision
    _warn_about_emulated_bfloat16()
    return "fp32"


def fast_precision(device: torch.device) -> str:
    """Return "bf16" for devices that are known to compute faster in it, else "fp32"."""
    if device.type == "cpu":
        return "bf16" if has_fast_bfloat16() else "fp32"
    is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if is_fast else "fp32"


def has_fast_bfloat16() -> bool:
    """Return True if this CPU has vector instructions for products of bfloat16.

    With AVX-512 alone, oneDNN accepts bfloat16 but converts everything, at half the speed of float32.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_bf16_supported()


@cache
def _warn_about_emulated_bfloat16() -> None:
    logger.warning("this CPU has no bfloat16 instructions, which makes bf16 slower than fp32: using fp32")


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context of automatic mixed precision for inference; does nothing for "fp32"."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    precision = usable_precision(device, precision)
    return torch.autocast(device.type, dtypes[precision]) if precision in dtypes else contextlib.nullcontext()


def full_precision(like: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return the context without mixed precision on the tensor's device; the meta device never has it."""
    return contextlib.nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def convert_sync_batch_norms(module: nn.Module, engine: Accelerator) -> nn.Module:
    """Convert batch norms to ones that compute their statistics over all processes; names and weights are kept.

    Returns the module unchanged for a single process, and on CPUs, for which PyTorch has no synchronized batch norm.
    """
    if engine.num_processes == 1 or engine.device.type == "cpu":
        return module
    from timm.layers import convert_sync_batchnorm  # knows the norms of timm too; takes two seconds to import

    return convert_sync_batchnorm(module)


def has_fused_optimizer(device: torch.device) -> bool:
    """Return True if PyTorch has a fused AdamW for the device."""
    return device.type in ("cpu", "cuda", "mps", "xpu")


def is_asynchronous(device: torch.device) -> bool:
    """Return True if the device executes kernels and copies asynchronously to the host."""
    return device.type == "cuda"


def start_copy_to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the host; the returned function waits for the copy and returns it."""
    if not is_asynchronous(tensor.device):
        on_host = tensor.detach().cpu()
        return lambda: on_host
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor.detach(), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait


def sum_over_processes(engine: Accelerator, values: tuple[float, ...]) -> tuple[float, ...]:
    """Return the sum of each value over all processes (all-reduce)."""
    if engine.num_processes == 1:
        return values
    sums = engine.reduce(torch.tensor(values, dtype=torch.float32, device=engine.device), "sum")
    return tuple(sums.tolist())


def gather_objects(engine: Accelerator, item: object) -> list:
    """Return the objects of all processes, by rank (all-gather)."""
    if engine.num_processes == 1:
        return [item]
    gathered: list = [None] * engine.num_processes
    torch.distributed.all_gather_object(gathered, item)
    return gathered


def shared_store(engine: Accelerator) -> torch.distributed.Store | None:
    """Return the key-value store of the process group, which is accessible without a barrier; None for one process."""
    if engine.num_processes == 1:
        return None
    return torch.distributed.distributed_c10d._get_default_store()


def is_out_of_memory(error: Exception) -> bool:
    """Return True if the error means that the device, or the host, is out of memory."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory statistics of an accelerator, and release its cached memory."""
    with contextlib.suppress(RuntimeError, AttributeError):
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free_and_total_memory_gb(device: torch.device) -> tuple[float, float] | None:
    """Return the free and total memory in GB (10^9 bytes), for a CPU of the machine; None if unknown."""
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):
            free, total = torch.accelerator.get_memory_info(device)
            return free / 1e9, total / 1e9
        return None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        page = os.sysconf("SC_PAGE_SIZE")
        free = _available_memory() or page * os.sysconf("SC_AVPHYS_PAGES")
        return free / 1e9, page * os.sysconf("SC_PHYS_PAGES") / 1e9
    return None


def _available_memory() -> int | None:
    """Return the bytes that processes can still get on Linux, cached files included; None elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory in GB (10^9 bytes): of the accelerator, or of this process on a CPU."""
    if device.type == "cpu":
        return _peak_memory_of_process() / 1e9
    with contextlib.suppress(RuntimeError, AttributeError):
        return torch.accelerator.max_memory_allocated(device) / 1e9
    return 0.0


def _peak_memory_of_process() -> int:
    """Return bytes; 0 if unknown. On Linux `ru_maxrss` includes the parent before the exec, so /proc is read first."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return _peak_memory_on_windows()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def _peak_memory_on_windows() -> int:
    try:
        import psutil  # accelerate depends on it
    except ImportError:
        return 0
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss)


def describe_device(device: torch.device) -> str:
    """Return a description of the device for logs and reports."""
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
    name_of = getattr(getattr(torch, device.type, None), "get_device_name", None)
    if name_of is not None:
        with contextlib.suppress(Exception):  # vendor code may raise anything, and the name is optional
            return f"{device} {name_of(device)}"
    return str(device)


def constant_when_compiled(function: Function) -> Function:
    """Same as `torch.compiler.assume_constant_result`, without the import of the compiler (two seconds)."""
    function._dynamo_marked_constant = True  # ty: ignore[missing-attribute]
    return function


@constant_when_compiled
def has_plain_operators(device_type: str) -> bool:
    """Return True if devices of this type use only operators that every PyTorch backend supports.

    Training then calls neither `grid_sample` nor `embedding_bag`, and does not index with booleans: values are gathered
    and summed instead, with equal results and more memory. By default CPUs, CUDA (also ROCm and Iluvatar) and XPU use
    the usual operators, and all other devices the plain ones. The environment variable MASKWRIGHT_OPERATORS overrides
    this with "plain" or "usual".

    Raises:
        MaskwrightError: the variable has another value.
    """
    chosen = os.environ.get(OPERATORS_VARIABLE, "")
    if chosen not in ("", "plain", "usual"):
        raise MaskwrightError(
            f"found '{chosen}', expected plain or usual", where=OPERATORS_VARIABLE, remedy="correct or unset it"
        )
    return chosen == "plain" or (not chosen and device_type not in ("cpu", "cuda", "xpu", "meta"))


# Device files of drivers, their hardware, and what PyTorch needs to use it.
_DEVICE_FILES = (
    ("nvidia0", "an NVIDIA GPU", "install a CUDA build of PyTorch that the driver supports"),
    ("kfd", "an AMD GPU", "install the ROCm build of PyTorch"),
    ("davinci0", "an Ascend NPU", "install the torch-npu of the same version as torch"),
    ("cambricon_dev0", "a Cambricon MLU", "install the vendor's torch and torch_mlu"),
    ("iluvatar0", "an Iluvatar GPU", "install the vendor's torch (CoreX)"),
)
PLUGINS = ("torch_npu", "torch_mlu", "torch_musa", "torch_sdaa", "torch_xla")


def undetected_accelerators(folder: Path = Path("/dev")) -> list[tuple[str, str]]:
    """Return (name, remedy) of accelerators with an installed driver, if PyTorch sees no accelerator at all."""
    if default_device().type != "cpu":
        return []
    return [(name, remedy) for file, name, remedy in _DEVICE_FILES if (folder / file).exists()]
