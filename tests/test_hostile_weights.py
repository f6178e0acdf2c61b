"""Weight files that are broken, false or dangerous: each is refused in one line, soon, and nothing else happens.

The files are made and used in one process of its own whose memory and time are limited, so that a bomb would show.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from maskwright.checkpoints.checkpoint import save_checkpoint
from maskwright.checkpoints.load import load_model, read_checkpoint
from maskwright.errors import CheckpointError
from tests.test_checkpoint import build, packed

LONGEST_SECONDS = 20  # of CPU; a few of the files take some seconds, and a test machine may be slow
LONGEST_MESSAGE = 600


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("hostile")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.hostile_weights", str(folder)],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    found = [json.loads(line) for line in run.stdout.splitlines()]
    last = found[-1]["name"] if found else "none"
    assert run.returncode == 0, f"the process ended with {run.returncode} behind {last}: {run.stderr[-2000:]}"
    return {row["name"]: row for row in found}


def test_there_are_many(rows):
    assert len(rows) > 200


def test_each_is_refused_by_a_checkpoint_error(rows):
    assert {name: row["kind"] for name, row in rows.items() if row["kind"] != "CheckpointError"} == {}


def test_each_message_is_one_line_that_names_the_file(rows):
    wrong = {
        name: row["message"]
        for name, row in rows.items()
        if name not in row["message"] or not row["message"].isprintable() or len(row["message"]) > LONGEST_MESSAGE
    }
    assert wrong == {}


def test_each_message_tells_the_reason(rows):
    wrong = {name: row["message"] for name, row in rows.items() if row["expected"] not in row["message"]}
    assert wrong == {}


# How a message says what to do.
ADVICE = (
    " again",
    "use ",
    "save ",
    "name ",
    "fetch ",
    "unpack ",
    "open its address",
    "download ",
    "check ",
    "set ",
    "nearest: ",
)


def test_each_message_says_what_to_do(rows):
    silent = {name: row["message"] for name, row in rows.items() if not any(word in row["message"] for word in ADVICE)}
    assert silent == {}


def test_nothing_ran_and_nothing_was_written(rows):
    assert {name: row["left"] for name, row in rows.items() if row["left"]} == {}


def test_each_is_refused_soon(rows):
    assert {name: row["seconds"] for name, row in rows.items() if row["seconds"] > LONGEST_SECONDS} == {}


def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = tmp_path / "secret.pth"
    torch.save({}, path)
    path.chmod(0)
    with pytest.raises(CheckpointError, match=r"secret\.pth: cannot be read: Permission denied; check"):
        read_checkpoint(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_weight_that_is_no_number_is_enough(tmp_path, value):
    model = build()
    with torch.no_grad():
        model.pixel_decoder.smooth.conv.weight[3, 2, 1, 0] = value
    save_checkpoint(tmp_path / "lost.safetensors", packed(model))
    with pytest.raises(
        CheckpointError, match=r"lost\.safetensors: 1 of its weights have NaN or infinite values: pixel_dec"
    ):
        load_model(tmp_path / "lost.safetensors")


def test_weights_that_became_nan_are_refused_if_the_header_cannot_vouch_for_them(tmp_path):
    save_checkpoint(tmp_path / "ours.safetensors", packed(build()))
    with safetensors.safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        header = {key: text for key, text in file.metadata().items() if key != "checksum"}
    state = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    assert header["finite"] == "true"
    state["pixel_decoder.smooth.conv.weight"][0] = torch.nan
    safetensors.torch.save_file(state, tmp_path / "changed.safetensors", header)
    with pytest.raises(CheckpointError, match=r"changed\.safetensors: 1 of its weights have NaN or infinite values"):
        load_model(tmp_path / "changed.safetensors")


def test_large_weights_are_numbers(tmp_path):
    model = build()
    with torch.no_grad():
        model.pixel_decoder.smooth.conv.weight.fill_(3e38)
    save_checkpoint(tmp_path / "large.safetensors", packed(model))
    assert load_model(tmp_path / "large.safetensors").pixel_decoder.smooth.conv.weight.max() == torch.tensor(3e38)


def test_a_checkpoint_without_digest_is_read(tmp_path):
    made = packed(build())
    save_checkpoint(tmp_path / "ours.safetensors", made)
    with safetensors.safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        header = file.metadata()
    del header["checksum"]
    changed = {key: value * 2 if value.is_floating_point() else value for key, value in made.state.items()}
    safetensors.torch.save_file(changed, tmp_path / "changed.safetensors", header)
    assert read_checkpoint(tmp_path / "changed.safetensors").config == made.config
