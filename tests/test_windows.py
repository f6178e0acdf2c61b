"""What Windows lacks or does differently, imitated here: missing modules, spawned workers, consoles without UTF-8."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import tiny

WITHOUT_UNIX = """
import os, sys
for name in ("resource", "fcntl", "pwd", "grp", "termios", "syslog"):
    sys.modules[name] = None
for name in ("pread", "sysconf", "sched_getaffinity", "fork", "getpgid", "killpg"):
    delattr(os, name)
import multiprocessing
multiprocessing.set_start_method("spawn")
import maskwright.runtime.process_pool, maskwright.data.loader, maskwright.runtime.device
from types import SimpleNamespace
for module in (maskwright.runtime.process_pool, maskwright.data.loader, maskwright.runtime.device):
    if hasattr(module, "sys"):
        module.sys = SimpleNamespace(platform="win32")
"""


def run_python(code, folder, *arguments, **environment):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)


def test_predictor_works_without_modules_of_unix(tmp_path):
    Image.fromarray(tiny.scene_image(0)).save(tmp_path / "0.png")
    code = (
        WITHOUT_UNIX
        + "from maskwright import Predictor\nprint(len(Predictor(sys.argv[1], device='cpu')('0.png').names))"
    )
    code += "\nimport torch\nprint(maskwright.runtime.device.peak_memory_gb(torch.device('cpu')))"
    process = run_python(code, tmp_path, tiny.trained_model())
    assert process.returncode == 0, process.stderr.decode()
    names, peak = map(float, process.stdout.split())
    assert names > 0
    assert peak >= 0


@pytest.mark.parametrize("command", ["check", "train"])
def test_workers_are_spawned_without_modules_of_unix(command, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    tiny.write_labels(tmp_path / "set", 4)
    tiny.write_recipe(recipe, tmp_path / "set", "semantic")
    arguments = {
        "check": ("check", recipe, "--workers", "2"),
        "train": ("train", recipe, "train.steps=2", "train.num_workers=2", "--output", tmp_path / "run"),
    }[command]
    code = "if __name__ == '__main__':\n" + "\n".join(f"    {line}" for line in WITHOUT_UNIX.splitlines())
    code += "\n    from maskwright.cli import main\n    sys.argv = ['maskwright', *sys.argv[1:]]\n    main()\n"
    (tmp_path / "script.py").write_text(code)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command_line = [sys.executable, str(tmp_path / "script.py"), *map(str, arguments)]
    process = subprocess.run(command_line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr


MAIN = "import sys\nfrom maskwright.cli import main\nsys.argv = ['maskwright', *sys.argv[1:]]\nmain()"


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "cp437"])
def test_names_that_a_console_cannot_show_are_escaped(encoding, tmp_path):
    Image.fromarray(tiny.scene_image(0)).save(tmp_path / "☃ 裂é.png")
    (tmp_path / "broken 裂é☃.png").write_bytes(b"no image")
    arguments = ("predict", tiny.trained_model(), tmp_path, "--output", tmp_path / "☃ 裂")
    process = run_python(MAIN, tmp_path, *arguments, PYTHONIOENCODING=encoding)
    assert process.returncode == 1
    assert b"Traceback" not in process.stderr
    assert "1 of 2 images -> " in process.stdout.decode(encoding)
    assert "\\u2603" in process.stdout.decode(encoding)
    assert "not an image" in process.stderr.decode(encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "cp437"])
def test_scores_are_in_a_file_and_printed_in_any_encoding(encoding, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    folder = tiny.write_labels(tmp_path / "set", 2)
    tiny.write_recipe(recipe, folder, "semantic")
    model = Path(tiny.trained_model())
    (tmp_path / "model.safetensors").write_bytes(model.read_bytes())
    arguments = ("evaluate", tmp_path / "model.safetensors", recipe, "evaluate.task=semantic")
    process = run_python(MAIN, tmp_path, *arguments, PYTHONIOENCODING=encoding)
    assert process.returncode == 0, process.stderr.decode(encoding)
    (line,) = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["split"] == "val"
    assert entry["scores"]["mIoU"] is not None
    assert "mIoU" in process.stdout.decode(encoding)


def test_scores_are_in_the_file_when_printing_fails(tmp_path, monkeypatch):
    from maskwright.cli import models

    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(b"")
    models._record({"mIoU": 0.5}, checkpoint, "recipe", "val", "semantic")
    models._record({"mIoU": 0.6}, Path("zoo-name"), "recipe", "val", "semantic")
    scores = [json.loads(line)["scores"] for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert scores == [{"mIoU": 0.5}, {"mIoU": 0.6}]
