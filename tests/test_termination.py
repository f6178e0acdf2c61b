"""SIGTERM and SIGHUP in real processes: a command removes what it has not finished."""

import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs the signals of POSIX")

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.runtime.termination import exit_when_terminated

def write(path):
    path.write_text("half")
    print("writing", flush=True)
    time.sleep(60)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup make test` ignores it
{before}
with exit_when_terminated():
    {inside}
    write_file_atomically(Path(sys.argv[1]), write)
"""


def start(folder, before="", inside=""):
    """Start a process that is writing a file when this returns."""
    command = [sys.executable, "-c", SCRIPT.format(before=before, inside=inside), str(folder / "file")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_process_leaves_nothing(number, tmp_path):
    process = start(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    assert process.wait() == 128 + number
    assert not list(tmp_path.iterdir())


def test_signals_that_are_ignored_or_handled_stay_so(tmp_path):
    process = start(tmp_path, before="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM


def test_a_forked_process_ends_at_once(tmp_path):
    inside = """
    ready, begun = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(begun, b"1")
            time.sleep(60)
        finally:
            os._exit(1)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
"""
    process = start(tmp_path, inside=inside)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM


def test_what_a_killed_process_leaves_is_removed_by_the_next_write(tmp_path):
    from maskwright.runtime.atomic_write import remove_abandoned_files, write_file_atomically

    running, killed = start(tmp_path), start(tmp_path)
    killed.kill()
    killed.wait()
    partials = list(tmp_path.iterdir())
    for path in partials:
        os.utime(path, (time.time() - 100,) * 2)
    (tmp_path / ".file.other.12345678.partial").touch()
    write_file_atomically(tmp_path / "file", lambda path: path.write_text("new"))
    assert len(list(tmp_path.glob(".file.????????.partial"))) == 1  # of the process that is running
    os.utime(tmp_path / ".file.other.12345678.partial", (0, 0))
    remove_abandoned_files(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    running.terminate()
    running.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
