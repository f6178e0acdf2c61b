"""Run folders from strangers: checkpoints with dangerous, false or damaged content run nothing and are refused."""

import json
import os
import pickle
import shutil
import zlib

import pytest
import torch
import torch.distributed.checkpoint as dcp

from maskwright.errors import CheckpointError, MaskwrightError
from maskwright.runtime.device import create_accelerator
from maskwright.training.fsdp import load_sharded_checkpoint, save_sharded_checkpoint
from maskwright.training.run_folder import RunFolder
from maskwright.training.sharded_reader import NotATrainingCheckpointError
from maskwright.training.train import train
from maskwright.training.training_checkpoint import read_training_checkpoint
from tests import tiny

PROGRESS = {"step": 2}
TENSORS = {"model.weight": torch.arange(12.0).reshape(3, 4), "model.count": torch.tensor(7)}


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run/checkpoints/00000002"
    header = {"format": "maskwright-training-2", "progress": json.dumps(PROGRESS)}
    save_sharded_checkpoint(folder, TENSORS, header, create_accelerator("fp32"))
    return folder


def seal(folder, **changes):
    """Write checksums that fit the files, as an attacker can."""
    header = json.loads((folder / "header.json").read_text())
    names = [path.name for path in folder.iterdir() if path.is_file() and path.name != "header.json"]
    header["files"] = {name: f"{zlib.crc32((folder / name).read_bytes()):08x}" for name in names}
    (folder / "header.json").write_text(json.dumps(header | changes))


def metadata(folder):
    return dcp.FileSystemReader(folder).read_metadata()


def assert_refused(folder, message, kind=NotATrainingCheckpointError):
    with pytest.raises(kind) as error:
        read_training_checkpoint(folder)
    assert message in str(error.value)
    assert "00000002" in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_sharded_checkpoint_is_read(folder):
    checkpoint = read_training_checkpoint(folder)
    assert sorted(checkpoint.names) == sorted(TENSORS)
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    load_sharded_checkpoint(folder, found)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("where", ["instead", "inside", "as a tensor", "as a name"])
def test_metadata_that_calls_a_function_is_refused_and_calls_nothing(folder, tmp_path, where):
    call = Call(os.mkdir, str(tmp_path / "canary"))
    content = metadata(folder)
    if where == "inside":
        content.planner_data = call
    elif where == "as a tensor":
        content.state_dict_metadata["model.weight"] = call
    elif where == "as a name":
        content.state_dict_metadata = {call: None}
    (folder / ".metadata").write_bytes(pickle.dumps(call if where == "instead" else content))
    seal(folder)
    assert_refused(folder, "it calls posix.mkdir, which weights never need; nothing in it was run")
    assert not (tmp_path / "canary").exists()


def test_training_with_such_a_folder_is_refused_and_nothing_is_written(folder, tmp_path):
    (folder / ".metadata").write_bytes(pickle.dumps(Call(os.mkdir, str(tmp_path / "canary"))))
    seal(folder)
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(MaskwrightError, match=r"\.metadata: refused: it calls posix\.mkdir"):
        train(tiny.recipe(tiny.write_panoptic(tmp_path / "data")), tmp_path / "run")
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


def change_metadata(folder, change):
    content = metadata(folder)
    change(content)
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    seal(folder)


def storage(content):
    return content.storage_data[next(index for index in content.storage_data if index.fqn == "model.weight")]


def bytes_entry(content):
    content.state_dict_metadata["model.weight"] = dcp.metadata.BytesStorageMetadata()


FALSE_METADATA = {
    "bytes, which DCP unpickles": (bytes_entry, "BytesStorageMetadata"),
    "no tensors": (lambda content: setattr(content, "state_dict_metadata", [1]), "its content is not"),
    "no positions": (lambda content: setattr(content, "storage_data", {}), "part of 'model.weight' is in no file"),
    "path outside": (lambda content: setattr(storage(content), "relative_path", "../../secret"), "outside the files"),
    "absolute path": (lambda content: setattr(storage(content), "relative_path", "/dev/zero"), "outside the files"),
    "offset outside": (lambda content: setattr(storage(content), "offset", 2**40), "outside the files"),
    "negative offset": (lambda content: setattr(storage(content), "offset", -5), "invalid sizes"),
    "huge length": (lambda content: setattr(storage(content), "length", 2**70), "outside the files"),
    "text as length": (lambda content: setattr(storage(content), "length", "9"), "invalid sizes"),
    "transformed": (lambda content: setattr(storage(content), "transform_descriptors", ["zstd"]), "transformed"),
    "chunk outside": (
        lambda content: setattr(content.state_dict_metadata["model.weight"].chunks[0], "offsets", torch.Size([9, 9])),
        "outside its tensor",
    ),
}


@pytest.mark.parametrize("name", FALSE_METADATA)
def test_false_metadata_is_refused(folder, name):
    change, message = FALSE_METADATA[name]
    change_metadata(folder, change)
    assert_refused(folder, message)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"garbage" * 9, pickle.dumps({}), pickle.dumps([[[1]]])])
def test_other_content_is_refused(folder, content):
    (folder / ".metadata").write_bytes(content)
    seal(folder)
    assert_refused(folder, "its content is not that of a sharded checkpoint")


def test_metadata_bombs_are_refused(folder):
    (folder / ".metadata").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")  # a memo of 2^31 entries
    seal(folder)
    assert_refused(folder, "memo index")


def test_pickles_among_the_tensors_are_not_run(folder, tmp_path):
    """DCP would read them by `torch.load`."""
    part = storage(metadata(folder))
    file = folder / part.relative_path
    torch.save(Call(os.mkdir, str(tmp_path / "canary")), tmp_path / "evil")
    evil, content = (tmp_path / "evil").read_bytes(), file.read_bytes()
    file.write_bytes(content + evil)
    change_metadata(folder, lambda changed: setattr(storage(changed), "offset", len(content)))
    change_metadata(folder, lambda changed: setattr(storage(changed), "length", len(evil)))
    read_training_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"calls posix\.mkdir"):
        load_sharded_checkpoint(folder, {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()})
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"progress": "{}"}, "is of step 0"),
        ({"progress": "[]"}, "its progress cannot be read"),
        ({"progress": json.dumps({"step": "2"})}, "its progress cannot be read (step: "),
        ({"progress": json.dumps({"step": -1})}, "is of step -1"),
        ({"progress": json.dumps({"step": 2, "scaler": 3})}, "its progress cannot be read (scaler: "),
        ({"progress": 7}, "its progress cannot be read"),
        ({"format": "other"}, "not a training checkpoint, or one of another version"),
        ({"format": ["x"]}, "not a training checkpoint, or one of another version"),
    ],
)
def test_false_headers_are_refused(folder, change, message):
    seal(folder, **change)
    assert_refused(folder, message)


@pytest.mark.parametrize(
    "header",
    [
        {"files": {"/dev/zero": "0"}},
        {"files": {"../../../outside": "0"}},
        {"files": {".": "0"}},
        {"files": {"pipe": "0"}},
        {"files": {"link": "0"}},
        {"files": ["x"]},
        {"files": {"a\0b": "0"}},
        [],
        None,
    ],
)
def test_headers_that_lead_elsewhere_are_not_followed(folder, header):
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/dev/zero")
    (folder / "header.json").write_text(json.dumps(header))
    assert_refused(folder, "not a complete sharded checkpoint", CheckpointError)


def test_headers_that_are_no_files_are_not_read(folder):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir):
        (folder / "header.json").unlink(missing_ok=True)
        make(folder / "header.json")
        assert_refused(folder, "not a complete sharded checkpoint", CheckpointError)
    os.rmdir(folder / "header.json")
    (folder / "header.json").write_text("[" * 200_000)
    assert_refused(folder, "not a complete sharded checkpoint", CheckpointError)


def test_tensors_of_another_shape_are_refused_in_one_line(folder):
    with pytest.raises(CheckpointError, match=r"00000002: does not fit the model: .*model\.weight") as error:
        load_sharded_checkpoint(folder, {"model.weight": torch.zeros(5)})
    assert str(error.value).isprintable()
    with pytest.raises(CheckpointError, match=r"does not fit the model: Missing key .*model\.other"):
        load_sharded_checkpoint(folder, {"model.other": torch.zeros(5)})


def test_damaged_checkpoint_gives_way_to_the_one_before(folder, tmp_path):
    shutil.copytree(folder, folder.with_name("00000003"))
    with (folder.with_name("00000003") / ".metadata").open("ab") as file:
        file.write(b"!")
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path / "data"))
    found = RunFolder(tmp_path / "run", recipe).latest_checkpoint()
    assert found.path == folder


def test_checkpoints_that_are_no_files_are_not_read(folder):
    for name, make in {"00000003": os.mkfifo, "00000004": lambda path: path.symlink_to("/dev/zero")}.items():
        path = folder.with_name(f"{name}.safetensors")
        make(path)
        with pytest.raises(CheckpointError, match=f"{name}"):
            read_training_checkpoint(path)


def test_rows_of_a_log_that_are_of_other_types_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr("maskwright.training.report.curves", lambda log, file: file.write_text("curves"))
    monkeypatch.setattr("maskwright.training.report.report", lambda run, file, **content: file.write_text("report"))
    recipe, run = tiny.recipe(tiny.write_panoptic(tmp_path / "data"), train__steps=2), tmp_path / "run"
    train(recipe, run)
    (run / "best.safetensors").unlink()
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    rows = [
        {"step": "x"},
        {"start": 5},
        {"seconds": "9"},
        {"step": [1], "evaluation": 3},
        {"step": None},
        {"step": 1e400},
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(recipe, run)
    assert [json.loads(line).get("step") for line in (run / "log.jsonl").read_text().splitlines()][-3:] == [1, 2, 2]
