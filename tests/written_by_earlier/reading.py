"""What the files of earlier versions give when they are used: computed the same when they were written and ever since.

Only the command line and the public names of maskwright are used here.
"""

import json
import os
import platform
import socket
import subprocess
import zlib
from pathlib import Path

import safetensors.torch
import torch

# One thread, no accelerator, and instructions that each x86 CPU has: numbers differ as little as can be.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
CLOCKS = ("seconds", "images_per_second", "data_wait", "memory_gb")  # of a row, what no second run repeats


def describe_machine():
    """Name what the bits of a result depend on: PyTorch and the kind of CPU."""
    fields = {}
    if Path("/proc/cpuinfo").is_file():
        lines = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in lines}
    kind = [fields.get(name, "") for name in ("vendor_id", "cpu family", "model")]
    return " ".join([f"torch {torch.__version__}", platform.machine(), *kind])


def start_ranks(world, command, place):
    """Run a command in as many processes as `world`, which form a group if there are several.

    Returns:
        The exit status of the first one that is not 0, or 0; and what all of them wrote to the standard error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        group["MASTER_PORT"] = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            list(map(str, command)),
            cwd=place,
            env=os.environ | ENVIRONMENT | (group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    told = "".join(process.communicate(timeout=600)[1] for process in processes)
    return next((process.returncode for process in processes if process.returncode), 0), told


def history(run):
    """Read the rows of a run's log, without its clocks."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def weights(file):
    """Give of each tensor its CRC-32, its root mean square, and a sum in which each number has a factor of its own."""
    found = {}
    for name, tensor in sorted(safetensors.torch.load_file(file).items()):
        values = tensor.double().reshape(-1)
        factors = torch.cos(torch.arange(values.numel(), dtype=torch.float64))
        bits = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        found[name] = [f"{bits:08x}", values.square().mean().sqrt().item(), (values @ factors).item()]
    return found


def looks(checkpoint, image):
    """Give what `load_model` and `Predictor` see in an image: name, area and score of each segment."""
    from maskwright import Predictor, load_model

    result = Predictor(load_model(checkpoint), device="cpu")(image)
    names = [result.categories[label].name for label in result.labels]
    scores = [None] * len(names) if result.scores is None else [float(score) for score in result.scores]
    return [list(segment) for segment in zip(names, [int(area) for area in result.areas], scores, strict=True)]
