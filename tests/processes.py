"""Real processes that start quickly: each is forked from a server that has imported everything.

So tests can kill and signal processes and run several ranks without importing PyTorch each time. The server never runs
a backward pass, after which PyTorch could not be forked.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback

import torch

import maskwright.cli
import maskwright.results.draw
import maskwright.training.train
from tests import tiny

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.processes"])


def start(function, *arguments, output, environment=None):
    """Start a process that calls `function(*arguments)` in its own session; its output goes to the file `output`."""
    process = _SERVER.Process(target=_main, args=(function, arguments, str(output), environment or {}))
    process.start()
    return process


def start_training(folder, run, task="panoptic", *, val=True, arguments=(), environment=None, **changes):
    """Start `maskwright train` on a tiny recipe; its output goes to the run's name with the suffix `.out`."""
    recipe = run.with_suffix(".yaml")
    tiny.write_recipe(recipe, folder, task, val=val, **changes)
    command = ("train", str(recipe), "--output", str(run), *arguments)
    return start(run_command, *command, output=run.with_suffix(".out"), environment=environment)


def start_ranks(function, *arguments, world, output):
    """Start `world` processes that form a group; the output of each goes to `output` followed by its rank."""
    group = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    group["MASTER_PORT"] = str(free_port())
    return [
        start(
            function,
            *arguments,
            output=f"{output}{rank}",
            environment=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait(*processes, seconds=900):
    """Wait for processes and return their exit statuses, negative for signals."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            for other in processes:
                os.kill(other.pid, signal.SIGKILL)
            raise TimeoutError(f"process {process.pid} is still running after {seconds} s")
    return [process.exitcode for process in processes]


def wait_until(condition, process, seconds=900):
    """Wait until a running process has fulfilled a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), f"the process ended with {process.exitcode}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def run_command(*arguments):
    """Run the command line without drawing reports, which take most of the time of a tiny run."""
    maskwright.training.report.curves = lambda log, file: file.write_text("curves")
    maskwright.training.report.report = lambda run, file, **content: file.write_text(str(content))
    sys.argv = ["maskwright", *arguments]
    maskwright.cli.main()


def _main(function, arguments, output, environment):
    os.setsid()
    os.environ.update(environment)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    status = 0
    try:
        function(*arguments)
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
