"""Training checkpoints as files: damage by a single bit is noticed wherever it is."""

import contextlib
import json
import zlib

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn

from maskwright.errors import MaskwrightError
from maskwright.training.ema import ExponentialMovingAverage
from maskwright.training.training_checkpoint import (
    Progress,
    read_training_checkpoint,
    save_training_checkpoint,
    training_tensors,
)


def untrained():
    model = nn.Linear(1, 2)
    return model, torch.optim.AdamW(model.parameters()), ExponentialMovingAverage(model, 0.9)


@pytest.fixture
def parts():
    """Return a model, its optimizer and its average after a step."""
    model, optimizer, ema = untrained()
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    ema.update(model, 1)
    return model, optimizer, ema


@pytest.fixture
def file(parts, tmp_path):
    progress = Progress(step=1, evaluated_step=1, best_score=0.5, data={"train": "0f"})
    save_training_checkpoint(tmp_path, training_tensors(*parts), progress, Accelerator(cpu=True))
    return tmp_path / "00000001.safetensors"


def read_into_untrained(file):
    """Return what a resumed run would have: the progress, and the tensors of its model, optimizer and average."""
    parts = untrained()
    checkpoint = read_training_checkpoint(file)
    checkpoint.restore(*parts)
    return checkpoint.progress, training_tensors(*parts)


def test_what_was_saved_is_read_again(file, parts):
    progress, found = read_into_untrained(file)
    assert progress == Progress(step=1, evaluated_step=1, best_score=0.5, data={"train": "0f"})
    torch.testing.assert_close(found, training_tensors(*parts), rtol=0, atol=0)
    assert {"model.bias", "optimizer.bias.step", "optimizer.bias.exp_avg", "average.bias"} <= found.keys()


def test_one_wrong_bit_is_noticed_wherever_it_is(file):
    """In the lengths, names, shapes and progress of the header as in the weights."""
    content, unnoticed = bytearray(file.read_bytes()), []
    for position in range(len(content)):
        wrong = 1 << position % 8
        content[position] ^= wrong
        file.write_bytes(content)
        content[position] ^= wrong
        with contextlib.suppress(MaskwrightError):
            read_training_checkpoint(file)
            unnoticed.append(position)
    assert not unnoticed


def test_files_of_earlier_versions_with_a_crc32_are_read(file, parts):
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    del header["checksum"]
    content = json.dumps(dict(sorted(header.items()))).encode()
    content += b"".join(tensors[key].reshape(-1).view(torch.uint8).numpy().tobytes() for key in sorted(tensors))
    header["crc32"] = f"{zlib.crc32(content):08x}"
    safetensors.torch.save_file(tensors, file, header)
    _, found = read_into_untrained(file)
    torch.testing.assert_close(found, training_tensors(*parts), rtol=0, atol=0)
    header["crc32"] = "00000000"
    safetensors.torch.save_file(tensors, file, header)
    with pytest.raises(MaskwrightError, match="its content has changed"):
        read_training_checkpoint(file)
