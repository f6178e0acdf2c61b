"""`maskwright train --benchmark`, in real processes: what it prints adds up, and it leaves no files behind."""

import re

import torch

from maskwright.runtime.device import create_accelerator
from maskwright.training.phase_timer import PhaseTimer, phase
from tests import processes, tiny


def measured(text):
    """Return the numbers of the table by the first word of their line."""
    return {
        line.split()[0]: [float(n) for n in re.findall(r"\d+\.\d+", line)] for line in text.splitlines() if line.strip()
    }


def check(text, images):
    table = measured(text[text.rindex("images per step") :].split("\n", 1)[1])
    assert abs(table["images/s"][0] * table["step"][0] - images) < 0.02 * images
    phases = [table[name][0] for name in ("data", "forward", "criterion", "backward", "optimizer", "other")]
    assert all(seconds > 0 for seconds in phases[1:5])
    assert 0.5 * table["step"][0] < sum(phases) < 1.5 * table["step"][0]
    assert all(0.05 < peak < 20 for peak in table["memory"])
    return table


def test_a_benchmark_reports_speed_and_phases_and_writes_nothing(tmp_path):
    data, run = tiny.write_panoptic(tmp_path / "data"), tmp_path / "run"
    process = processes.start_training(data, run, arguments=("--benchmark", "6"), train__ema_decay=0.9)
    assert processes.wait(process) == [0]
    text = run.with_suffix(".out").read_text()
    assert "1 process(es), 2 images per step, 5 steps measured" in text
    table = check(text, 2)
    assert table["images/s"][0] == table["images/s"][1]
    assert not run.exists()


def test_two_processes_are_measured_together(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    tiny.write_recipe(recipe, tiny.write_panoptic(tmp_path / "data"))
    command = ("train", str(recipe), "--output", str(tmp_path / "run"), "--benchmark", "5")
    ranks = processes.start_ranks(processes.run_command, *command, world=2, output=tmp_path / "out")
    assert processes.wait(*ranks) == [0, 0]
    text = (tmp_path / "out0").read_text()
    assert "2 process(es), 2 images per step, 4 steps measured" in text
    table = check(text, 2)
    assert abs(table["images/s"][0] / table["images/s"][1] - 2) < 0.05
    assert len(table["memory"]) == 2
    assert "images/s" not in (tmp_path / "out1").read_text()
    assert not (tmp_path / "run").exists()


def test_too_few_steps_are_an_error(tmp_path):
    data, run = tiny.write_panoptic(tmp_path / "data"), tmp_path / "run"
    process = processes.start_training(data, run, arguments=("--benchmark", "3"))
    assert processes.wait(process) == [1]
    assert "error: --benchmark 3: the first step warms up" in run.with_suffix(".out").read_text()


def test_phases_are_timed_only_while_a_timer_runs():
    timer = PhaseTimer(create_accelerator("fp32").device)
    with phase("forward"):
        pass
    assert timer.seconds == {}
    with timer.running():
        for _ in range(2):
            with phase("forward"):
                torch.ones(2).sum()
    with phase("backward"):
        pass
    assert list(timer.seconds) == ["forward"]
    assert timer.seconds["forward"] > 0
