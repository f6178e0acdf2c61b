"""Runs that are killed, preempted, run out of disk space or hang: nothing is lost, and the reason is printed."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import maskwright.training.train as train_module
from maskwright.errors import RunInterrupted
from maskwright.runtime.device import create_accelerator
from maskwright.training.hang_watchdog import HangWatchdog
from maskwright.training.log_files import list_log_files
from maskwright.training.run_folder import RunFolder
from maskwright.training.train import train
from maskwright.training.training_checkpoint import Progress
from tests import tiny
from tests.processes import run_command, start_ranks, start_training, wait, wait_until
from tests.run_files import assert_same_run, partial_files, rows, steps_kept

# Everything that has state: a moving average, micro-batches, a warm-up, evaluations, drop path.
FULL = {
    "train__steps": 14,
    "train__batch_size": 4,
    "train__gradient_accumulation_steps": 2,
    "train__warmup_steps": 5,
    "train__warmup_factor": 0.1,
    "train__ema_decay": 0.9,
    "train__checkpoint_every": 3,
    "train__evaluate_every": 7,
    "model__drop_path_rate": 0.3,
}


pytestmark = pytest.mark.usefixtures("quick_report")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_panoptic(tmp_path_factory.mktemp("data"), count=5)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run without interruption."""
    run = tmp_path_factory.mktemp("whole") / "run"
    process = start_training(folder, run, **FULL)
    assert wait(process) == [0], run.with_suffix(".out").read_text()
    return run


def logged(run):
    log = run / "log.jsonl"
    return len(log.read_bytes().splitlines()) if log.is_file() else 0


def kill_group(process, number):
    os.killpg(process.pid, number)  # including its workers, as a scheduler does


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_run_equals_an_uninterrupted_one(folder, whole, tmp_path, workers):
    run = tmp_path / "run"
    for count in (5, 9):  # in the second epoch between checkpoints; and after the first evaluation
        process = start_training(folder, run, train__num_workers=workers, **FULL)
        wait_until(lambda count=count: logged(run) >= count, process)
        kill_group(process, signal.SIGKILL)
        assert wait(process) == [-signal.SIGKILL]
    process = start_training(folder, run, train__num_workers=workers, **FULL)
    assert wait(process) == [0]
    assert "resuming from step" in run.with_suffix(".out").read_text()
    assert_same_run(run, whole)
    assert not partial_files(run)
    assert steps_kept(run) == [12, 14]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_run_killed_twenty_times_at_random_equals_an_uninterrupted_one(folder, whole, tmp_path, workers):
    run, moments = tmp_path / "run", random.Random(workers)
    changes = FULL | {"train__checkpoint_every": 1, "train__num_workers": workers}
    kills, damaged = 0, 0
    while kills < 20:
        run.with_suffix(".out").unlink(missing_ok=True)
        process = start_training(folder, run, **changes)
        wait_until(lambda: "memory probe:" in output_of(run), process)  # before that nothing is written
        process.join(moments.uniform(0.0, 3.0))
        if process.is_alive():
            kill_group(process, signal.SIGKILL)
        (status,) = wait(process)
        if status == 0:  # it finished: start over
            shutil.rmtree(run)
            continue
        assert status == -signal.SIGKILL, output_of(run)
        kills += 1
        kept = sorted((run / "checkpoints").glob("[0-9]*")) if run.is_dir() else []
        assert len(kept) <= 3  # two, and the one that was just written
        if len(kept) > 1 and damaged < kills // 4:  # truncate the latest checkpoint
            kept[-1].write_bytes(kept[-1].read_bytes()[: moments.randrange(1, kept[-1].stat().st_size)])
            damaged += 1
    assert damaged
    assert wait(start_training(folder, run, **changes)) == [0]
    assert_same_run(run, whole)
    assert not partial_files(run)


def output_of(run):
    printed = run.with_suffix(".out")
    return printed.read_text() if printed.is_file() else ""


def test_sigterm_saves_the_last_step_and_exits_with_status_75(folder, whole, tmp_path):
    run = tmp_path / "run"
    process = start_training(folder, run, train__num_workers=2, **FULL)
    wait_until(lambda: logged(run) >= 4, process)
    kill_group(process, signal.SIGTERM)
    assert wait(process) == [75]
    printed = output_of(run)
    step = steps_kept(run)[-1]
    assert f"stopped by SIGTERM at step {step}/14, which is saved; run the same command to resume" in printed
    assert "Traceback" not in printed
    assert step == rows(run)[-1]["step"]
    assert wait(start_training(folder, run, **FULL)) == [0]
    assert_same_run(run, whole)


def test_sigterm_in_an_evaluation_keeps_the_steps_before_it(folder, tmp_path, monkeypatch):
    recipe = tiny.recipe(folder, train__steps=3, train__checkpoint_every=10)
    real = train_module.evaluate

    def evaluate(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", evaluate)
        with pytest.raises(RunInterrupted, match="at step 3/3"):
            train(recipe, tmp_path / "run")
    assert steps_kept(tmp_path / "run") == [3]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    train(recipe, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 3]


def preempt_in_the_evaluation(recipe, run, preempted, slow):
    """Train as one rank; the slow rank scores an image per second, the preempted one receives SIGTERM."""
    rank, real = int(os.environ["RANK"]), train_module.evaluate

    def evaluate(*arguments, on_image, **options):
        if rank == preempted:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

        def slowly(count):
            time.sleep(1.0 if rank == slow else 0.0)
            on_image(count)

        return real(*arguments, on_image=slowly, **options)

    train_module.evaluate = evaluate
    run_command("train", recipe, "--output", run)


@pytest.mark.parametrize(
    ("preempted", "slow"),
    [(1, 1), (1, 0), (0, 0)],
    ids=["before the barrier", "at the barrier", "hosting the store"],
)
def test_sigterm_to_one_of_two_processes_in_an_evaluation_stops_both(folder, tmp_path, preempted, slow):
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    tiny.write_recipe(recipe, folder, train__steps=3, train__checkpoint_every=10)
    ranks = start_ranks(
        preempt_in_the_evaluation, str(recipe), str(run), preempted, slow, world=2, output=tmp_path / "out"
    )
    printed = lambda: "\n".join((tmp_path / f"out{rank}").read_text() for rank in range(2))  # noqa: E731
    assert wait(*ranks, seconds=120) == [75, 75], printed()
    assert printed().count("stopped by SIGTERM at step 3/3, which is saved") == 2
    assert "Traceback" not in printed()
    assert steps_kept(run) == [3]
    assert "scores" not in (run / "log.jsonl").read_text()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB, about two checkpoints large."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(place)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk_ends_the_run_with_one_line_and_loses_nothing(folder, small_disk, tmp_path):
    run = small_disk / "run"
    changes = {"train__steps": 8, "train__checkpoint_every": 1, "train__keep_checkpoints": 3}
    assert wait(start_training(folder, run, **changes)) == [1]
    printed = output_of(run)
    (line,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert "cannot be written: " in line
    assert "No space left on device" in line
    assert "Traceback" not in printed
    assert not partial_files(run)
    assert 1 <= len(steps_kept(run)) < 3
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert wait(start_training(folder, run, **changes)) == [0]
    assert wait(start_training(folder, tmp_path / "whole", **changes)) == [0]
    assert_same_run(run, tmp_path / "whole")


def test_checkpoint_with_one_bit_flipped_falls_back_to_the_one_before(folder, tmp_path, caplog):
    run = tmp_path / "run"
    recipe = tiny.recipe(folder, val=False, train__steps=4)
    train(recipe, run)
    (run / "best.safetensors").unlink()
    newest = run / "checkpoints/00000004.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1000] ^= 16
    newest.write_bytes(content)
    with caplog.at_level(logging.INFO):
        train(recipe, run)
    assert (
        "00000004.safetensors: damaged: its content has changed since it was written; trying the checkpoint"
        in caplog.text
    )
    assert "resuming from step 2/4" in caplog.text


def test_hang_prints_the_stacks_of_all_threads_once_and_into_the_folder(tmp_path, capfd):
    with HangWatchdog(tmp_path, 3, 1) as watchdog:
        watchdog.beat()
        hang(2.6)
    printed = capfd.readouterr().err
    assert printed.count("process 3: no progress for 1 s; stacks of all threads:") == 1
    assert "in hang" in printed
    assert "in hang" in (tmp_path / "stalls/rank-3.txt").read_text()


def hang(seconds):
    time.sleep(seconds)


def test_run_with_progress_writes_nothing_about_hangs(tmp_path, capfd):
    with HangWatchdog(tmp_path, 0, 3) as watchdog:
        for _ in range(9):
            time.sleep(0.4)
            watchdog.beat()
    assert not (tmp_path / "stalls").exists()
    assert "progress" not in capfd.readouterr().err


def test_long_log_is_split_into_files_and_read_and_truncated_as_one(folder, tmp_path):
    run = RunFolder(tmp_path, tiny.recipe(folder, train__max_log_megabytes=1))
    run.begin(Progress(), ["begun"])
    for step in range(1, 61):
        run.log({"step": step, "loss": 1.0, "filling": "x" * 50_000})
    names = [path.name for path in list_log_files(run.log_file)]
    assert names == ["log.1.jsonl", "log.2.jsonl", "log.jsonl"]
    assert [row["step"] for row in run.rows()] == list(range(61))
    assert run.start() == ["begun"]
    run.begin(Progress(step=25), ["begun"])
    assert [row["step"] for row in run.rows()] == list(range(26))
    run.log({"step": 26})
    assert run.rows()[-1] == {"step": 26}


def test_half_written_row_of_a_killed_run_is_removed_when_it_resumes(folder, tmp_path):
    run = RunFolder(tmp_path, tiny.recipe(folder))
    run.log_file.write_text('{"step": 1}\n{"step": 2, "lo')
    run.begin(Progress(step=1), [])
    run.log({"step": 2})
    assert run.rows() == [{"step": 1}, {"step": 2}]


def test_checkpoints_of_both_kinds_are_pruned_together(folder, tmp_path):
    run = RunFolder(tmp_path, tiny.recipe(folder, train__keep_checkpoints=1))
    (tmp_path / "checkpoints/00000001").mkdir(parents=True)
    run.save({}, Progress(step=2), create_accelerator("fp32"))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000002.safetensors"]
