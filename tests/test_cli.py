"""The command line as a person meets it: help, errors in one line, and converting a checkpoint for real."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maskwright.checkpoints.load import load_model
from maskwright.cli import app
from tests.in_process import run_command
from tests.test_checkpoint import build, to_detectron2, write_pkl

COMMANDS = ("train", "evaluate", "predict", "convert", "recipes")


@pytest.fixture
def say(monkeypatch, capsys):
    """`say("recipes")` runs a command."""
    return lambda *arguments: run_command(monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "model_final.pkl"
    write_pkl(
        path, to_detectron2(build(pixel_decoder_feedforward_dim=1024).state_dict())
    )  # the only width it can express
    return path


def mistake(result: tuple[int, str, str]) -> str:
    """The one line of a mistake."""
    status, _, err = result
    assert status == 1
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


# Help


def test_the_help_of_every_command_works_and_loads_no_torch():
    names = [name for name in app if not name.startswith("-")]
    assert set(COMMANDS) <= set(names)
    code = (
        "import sys\n"
        "from maskwright.cli import app\n"
        f"for name in {names!r}:\n"
        "    app([name, '--help'], result_action='return_value', exit_on_error=False)\n"
        "print('end', [name for name in ('torch', 'numpy', 'timm') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("end []\n")
    assert all(f"Usage: maskwright {name}" in run.stdout or f" {name} " in run.stdout for name in names)


def test_every_option_of_every_command_is_explained(capsys):
    for name in COMMANDS:
        app([name, "--help"], result_action="return_value", exit_on_error=False)
        out = " ".join(capsys.readouterr().out.split())
        assert "Usage:" in out
    app(["evaluate", "--help"], result_action="return_value", exit_on_error=False)
    out = capsys.readouterr().out
    assert "--json" in out
    assert "--no-json" not in out
    for word in ("--split", "--task", "--device", "--precision"):
        assert word in out


@pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")
def test_without_a_command_the_commands_are_listed(say):
    status, out, _ = say()
    assert status == 0
    assert all(f" {name} " in out for name in COMMANDS)


def test_the_version_is_printed(say):
    from maskwright import __version__

    assert say("--version")[:2] == (0, f"{__version__}\n")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "dem"), "no recipe 'dem'"),
        (
            ("train", "demo", "train.stepps=3"),
            "demo.yaml: unknown key 'train.stepps'; the nearest valid key is 'train.steps'",
        ),
        (("train", "demo", "train.steps=many"), "demo.yaml: train.steps: "),
        (("train", "demo", "steps"), "override 'steps' does not have the form section.key=value"),
        (("evaluate", "absent.safetensors", "demo"), "absent.safetensors"),
        (("evaluate", "absent.safetensors", "nothing"), "no recipe 'nothing'"),
        (("predict", "absent.safetensors"), "no images to predict"),
        (("predict", "absent.safetensors", "picture.png"), "absent.safetensors"),
        (("predict", "absent.safetensors", "picture.png", "--device", "toaster"), "toaster"),
        (("convert", "absent.pkl", "out.safetensors"), "no checkpoint file absent.pkl"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(say, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(say(*arguments))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "trian"),
        (("train",), "recipe"),
        (("train", "demo", "--outpt", "x"), "--outpt"),
        (("predict", "a", "b", "--top-k", "many"), "many"),
        (("evaluate", "a", "demo", "--precision", "fp8"), "fp8"),
    ],
)
def test_a_call_of_another_form_names_what_is_wrong_and_has_status_2(say, arguments, message):
    status, out, err = say(*arguments)
    assert status == 2
    assert message in out + err
    assert "Traceback" not in out + err


def test_an_error_of_ours_is_not_hidden(say, monkeypatch):
    monkeypatch.setattr("maskwright.checkpoints.catalog.recipe_names", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        say("recipes")


def test_an_interruption_is_one_word_and_status_130(say, monkeypatch):
    def interrupt() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr("maskwright.checkpoints.catalog.recipe_names", interrupt)
    assert say("recipes") == (130, "", "interrupted\n")


# Converting


def test_convert_tells_what_it_found_and_writes_a_model(say, foreign, tmp_path):
    target = tmp_path / "folder" / "ours.safetensors"
    status, out, err = say("convert", foreign, target)
    assert (status, err) == (0, "")
    assert "dropped criterion.empty_weight: class weights of the loss" in out
    assert f"detectron2 -> {target}: swin_tiny_patch4_window7_224, 5 queries, 3 classes (class 0, ...)" in out
    assert len(load_model(target).categories) == 3


def test_convert_takes_a_class_list(say, foreign, tmp_path):
    names = tmp_path / "names.yaml"
    names.write_text(json.dumps([{"id": n, "name": name} for n, name in enumerate(["cat", "dog", "owl"])]))
    status, out, _ = say("convert", foreign, tmp_path / "ours.safetensors", "--categories", names)
    assert status == 0
    assert "3 classes (cat, ...)" in out
    message = mistake(say("convert", foreign, tmp_path / "other.safetensors", "--categories", "cityscapes"))
    assert "the weights have 3 classes, but the class list 'cityscapes' has 19" in message
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>404</html>", "a web page; open its address in a browser"),
        (pickle.dumps(print), "refused: it calls builtins.print"),
        (pickle.dumps({"model": {}}), "holds no weights, its keys are model"),
    ],
    ids=["a web page", "a call", "nothing"],
)
def test_convert_refuses_other_files_in_one_line_and_writes_nothing(say, tmp_path, content, message):
    (tmp_path / "model.pkl").write_bytes(content)
    assert message in mistake(say("convert", tmp_path / "model.pkl", tmp_path / "ours.safetensors"))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pkl"]


@pytest.mark.parametrize(("to", "name"), [("transformers", "theirs"), ("detectron2", "model.pkl")])
def test_convert_writes_for_others_what_it_reads_again(say, foreign, tmp_path, to, name):
    status, out, err = say("convert", foreign, tmp_path / name, "--to", to)
    assert (status, err) == (0, "")
    assert f"detectron2 -> {tmp_path / name}: swin_tiny_patch4_window7_224" in out
    status, out, _ = say("convert", tmp_path / name, tmp_path / "back.safetensors")
    assert f"{to} -> {tmp_path / 'back.safetensors'}" in out
    original, back = load_model(foreign).state_dict(), load_model(tmp_path / "back.safetensors").state_dict()
    assert all(torch.equal(original[key], back[key]) for key in original)


def test_convert_refuses_a_destination_of_another_kind(say, foreign, tmp_path):
    assert "must end in .safetensors" in mistake(say("convert", foreign, tmp_path / "ours.pth"))


def test_the_installed_command_converts_and_the_result_predicts_the_same(foreign, tmp_path):
    target = tmp_path / "ours.safetensors"
    run = subprocess.run(
        [sys.executable, "-m", "maskwright", "convert", str(foreign), str(target)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("detectron2 -> ")
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    original, converted = load_model(foreign), load_model(target)
    with torch.inference_mode():
        expected, found = original(images).final, converted(images).final
    assert torch.equal(found.class_logits, expected.class_logits)
    assert torch.equal(found.mask_logits(), expected.mask_logits())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", ""), "an empty text, expected a recipe or dataset"),
        (("check", ".", "--output", ""), "--output: an empty text, expected a path"),
        (("check", ".", "--output", "."), "is a folder, expected an HTML file"),
        (("predict", "model.safetensors", "a.png", "-o", ""), "-o: an empty text, expected a path"),
        (("train", "demo", "--output", ""), "--output: an empty text, expected a path"),
    ],
)
def test_an_unset_shell_variable_is_not_the_current_folder(say, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, complaints = say(*arguments)
    assert status == 1
    assert message in complaints
    assert list(tmp_path.iterdir()) == []
