"""`maskwright doctor`: the fixture is transformers', the machine is told, and what is wrong is found."""

import json
import subprocess
import sys

import pytest
import torch

from maskwright.diagnostics import doctor
from maskwright.runtime import device
from maskwright.runtime.device import OPERATORS_VARIABLE, undetected_accelerators
from tests import doctor_fixture

CPU = torch.device("cpu")


def states(findings):
    return [finding.state for finding in findings]


def test_the_fixture_is_what_transformers_computes(tmp_path):
    pytest.importorskip("transformers")
    found, stored = doctor_fixture.compute(tmp_path), doctor.expected()
    assert found.keys() == stored.keys()
    for name, values in found.items():
        assert values == pytest.approx(stored[name], abs=2e-4), name


@pytest.mark.parametrize("operators", ["usual", "plain"])
def test_this_machine_computes_the_fixture(operators, monkeypatch):
    monkeypatch.setenv(OPERATORS_VARIABLE, operators)
    found, right = doctor.compute(CPU), doctor.expected()
    for name, values in found.items():
        assert values == pytest.approx(right[name], abs=2e-4), name


def test_the_command_tells_all_and_leaves_with_0():
    run = subprocess.run(
        [sys.executable, "-m", "maskwright", "doctor", "--device", "cpu"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    for part in ("maskwright 0", "device ", "memory of cpu", "gloo", "bag is used", "self-test on cpu"):
        assert any(part in line and line.startswith("ok") for line in lines), part


def test_a_wrong_operator_is_found(monkeypatch):
    right = doctor.deformable_attention
    monkeypatch.setattr(doctor, "deformable_attention", lambda v, s, p, w, b: right(v, s, p + (b == "bag"), w, b))
    used, other = doctor.operators(CPU)
    assert used.state == "broken"
    assert used.remedy == f"set {OPERATORS_VARIABLE}=plain"
    assert "backend bag, does not work on cpu: differs from the CPU by" in other.text


def test_an_operator_that_is_missing_is_a_note_where_it_is_not_used(monkeypatch):
    right = doctor.deformable_attention

    def without_gather(values, shapes, positions, weights, backend):
        if backend == "gather":
            raise NotImplementedError("aten::gather is not there\nmore")
        return right(values, shapes, positions, weights, backend)

    monkeypatch.setattr(doctor, "deformable_attention", without_gather)
    used, other = doctor.operators(CPU)
    assert states([used, other]) == ["ok", "note"]
    assert other.text.endswith("NotImplementedError: aten::gather is not there")


def test_wrong_numbers_and_failures_of_the_self_test_are_broken(monkeypatch):
    right = doctor.expected()
    monkeypatch.setattr(doctor, "expected", lambda: right | {"losses": [loss + 0.1 for loss in right["losses"]]})
    wrong = doctor.self_test(CPU)
    assert wrong.state == "broken"
    assert "losses 1.0e-01" in wrong.text

    def fails(device):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(doctor, "build", fails)
    failed = doctor.self_test(CPU)
    assert (failed.state, failed.text) == ("broken", "self-test on cpu: RuntimeError: no kernel")


def test_what_is_broken_makes_the_exit_status_1(monkeypatch, capsys):
    from maskwright.cli import main

    findings = [doctor.Finding("ok", "fine"), doctor.Finding("broken", "no kernel", "buy one")]
    monkeypatch.setattr(doctor, "examine", lambda name: iter(findings))
    monkeypatch.setattr(sys, "argv", ["maskwright", "doctor", "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert json.loads(capsys.readouterr().out)[1] == {"state": "broken", "text": "no kernel", "remedy": "buy one"}


def test_an_accelerator_that_pytorch_does_not_see_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "default_device", lambda: CPU)
    (tmp_path / "davinci0").touch()
    assert undetected_accelerators(tmp_path) == [
        ("an Ascend NPU", "install the torch-npu of the same version as torch")
    ]
    monkeypatch.setattr(device, "default_device", lambda: torch.device("npu:0" if hasattr(torch, "npu") else "meta"))
    assert undetected_accelerators(tmp_path) == []


def test_too_little_shared_memory_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"total": 64 * 2**20})())
    note = list(doctor.memory(CPU, tmp_path))[-1]
    assert note.state == "note"
    assert "--shm-size" in note.remedy
