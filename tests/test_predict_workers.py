"""`predict` in several processes: the files are those of one process, and no process is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from maskwright.data.storage.folders import File
from maskwright.errors import MaskwrightError
from maskwright.inference import predict_workers
from maskwright.inference.predict_files import predict_files
from maskwright.inference.predict_workers import choose_workers, make_job, predict_with_workers
from maskwright.inference.predictor import Predictor
from tests import tiny


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        Image.fromarray(tiny.scene_image(number)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def predictor():
    return Predictor(tiny.trained_model(), device="cpu")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("format", [None, "coco"])
def test_two_processes_write_the_files_of_one(predictor, images, tmp_path, format, caplog):
    summaries, seen = [], []
    for workers in (1, 2):
        output = tmp_path / "out"
        summaries.append(
            predict_files(
                predictor,
                [str(images)],
                output,
                format=format,
                workers=workers,
                on_image=lambda path, total: seen.append((path.name, total)),
            )
        )
        output.rename(tmp_path / f"out{workers}")
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert summaries[0] == summaries[1]
    assert summaries[0].done == 7
    assert [path.name for path, _ in summaries[0].failures] == ["2.png"]
    assert sorted(seen[8:]) == sorted(seen[:8])


@dataclass
class WriteOrDie:
    """Writes results, except those over which its process crashes, as a decoder may."""

    output: Path
    deadly: str

    def __call__(self, result, name, _):
        if name in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        result.save(self.output, name)


def run_in_another_process(predictor, images, output, deadly, monkeypatch):
    monkeypatch.setattr(predict_workers, "take", lambda queue, count: [])  # this process takes no image
    job = make_job(predictor, {}, 2, WriteOrDie(output, deadly))
    found = [(path, path.stem, None) for path in sorted(images.iterdir())]
    return predict_with_workers(job, predictor.pipeline(), found, 2, job.write)


@pytest.mark.slow
def test_an_image_that_kills_its_process_fails_alone(predictor, images, tmp_path, monkeypatch):
    summary = run_in_another_process(predictor, images, tmp_path, "4", monkeypatch)
    assert summary.done == 6
    reasons = {path.name: reason for path, reason in summary.failures}
    assert reasons.keys() == {"2.png", "4.png"}
    assert reasons["4.png"] == "its process was killed (out of memory?)"
    assert {path.stem for path in tmp_path.glob("*.json")} == set("013567")


@pytest.mark.slow
def test_processes_that_are_all_killed_end_the_run_in_one_sentence(predictor, images, tmp_path, monkeypatch):
    (images / "2.png").unlink()
    with pytest.raises(MaskwrightError, match=r"^--workers 2: 3 processes were killed, .*; use fewer workers$"):
        run_in_another_process(predictor, images, tmp_path, "01234567", monkeypatch)


def test_an_error_that_concerns_all_images_ends_the_run(predictor, images, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(MaskwrightError, match="cannot be written"):
        predict_files(predictor, [str(images)], tmp_path / "file", workers=2)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_command_leaves_no_process(images, tmp_path, number):
    """SIGINT is sent to the whole group, as a terminal does."""
    for copy in range(5000):  # far more than this process segments before the other has started
        os.link(images / "0.png", images / f"copy{copy}.png")
    command = [sys.executable, "-m", "maskwright", "predict", str(tiny.trained_model()), str(images), "--workers", "2"]
    command += ["--device", "cpu", "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it in the background
    )
    try:
        workers = wait_for_workers(process.pid)
        os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
        errors = process.communicate(timeout=60)[1]
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert errors.splitlines()[-1] == "interrupted"
        assert "Traceback" not in errors
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_workers(parent):
    """Return the children of a command once one of them has loaded PyTorch."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        children = psutil.Process(parent).children()
        if any(child.memory_info().rss > 200e6 for child in children):
            return children
        time.sleep(0.1)
    raise AssertionError("no worker started")


def test_many_small_images_get_a_process_for_each_core(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(predict_workers, "free_and_total_memory_gb", lambda _: (100.0, 100.0))
    config = predictor.settings.model_copy(update={"short_side": None, "max_side": None, "size": None})
    for name, side in (("small", 64), ("large", 1024)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    small, large = [tmp_path / "small.png"], [tmp_path / "large.png"]
    assert choose_workers(predictor, config, small * 400) == 4
    assert choose_workers(predictor, config, small * 100) == 2
    assert choose_workers(predictor, config, small * 99) == 1
    assert choose_workers(predictor, config, (small * 15 + large) * 25) == 4
    assert choose_workers(predictor, config, (small + large) * 200) == 1
    assert choose_workers(predictor, config.model_copy(update={"short_side": 1024}), small * 400) == 1
    assert choose_workers(predictor, config, [tmp_path / "unreadable.png"] * 400) == 4
    assert choose_workers(predictor, config, [File("s3://bucket/0.png")] * 400) == 1
    monkeypatch.setattr(predict_workers, "free_and_total_memory_gb", lambda _: (0.01, 100.0))
    assert choose_workers(predictor, config, small * 400) == 1
    assert choose_workers(Predictor(predictor.model, device="cpu"), config, small * 400) == 1


def test_workers_are_for_checkpoints_on_a_cpu(predictor, images, tmp_path):
    with pytest.raises(MaskwrightError, match=r"^--workers 2: is for checkpoints on a CPU, but the model is in memory"):
        predict_files(Predictor(predictor.model, device="cpu"), [str(images)], tmp_path / "out", workers=2)
