"""Files and folders are complete or absent, and a failed write leaves what was there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from maskwright.errors import MaskwrightError
from maskwright.runtime.atomic_write import (
    AtomicFile,
    write_file_atomically,
    write_files_atomically,
    write_folder_atomically,
)


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_file_is_replaced_once_it_is_complete(tmp_path):
    path = tmp_path / "new" / "file"
    write_file_atomically(path, lambda temporary: temporary.write_text("one"))
    write_file_atomically(path, lambda temporary: temporary.write_text("two"))
    assert path.read_text() == "two"
    assert names(tmp_path) == ["new", "new/file"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        full_disk()

    with pytest.raises(MaskwrightError) as caught:
        write_file_atomically(path, fail)
    assert str(caught.value) == (
        f"{path}: cannot be written: No space left on device; free up disk space or choose another folder"
    )
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])


def test_other_exceptions_pass_unchanged_and_leave_nothing(tmp_path):
    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_file_atomically(tmp_path / "file", fail)
    with pytest.raises(RuntimeError, match="boom"):
        write_folder_atomically(tmp_path / "folder", lambda temporary: fail(temporary / "file"))
    assert names(tmp_path) == []


def test_none_of_several_files_is_replaced_when_one_cannot_be_written(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "taken").write_bytes(b"a file where a folder is needed")
    with pytest.raises(MaskwrightError, match=r"taken/b: cannot be written: "):
        write_files_atomically({tmp_path / "a": b"new", tmp_path / "taken" / "b": b"new"})
    assert ((tmp_path / "a").read_bytes(), names(tmp_path)) == (b"old", ["a", "taken"])


def test_folder_appears_complete_or_not_at_all(tmp_path):
    def fill(temporary: Path) -> None:
        (temporary / "file").write_text("content")
        assert names(tmp_path) == [temporary.name, f"{temporary.name}/file"]

    write_folder_atomically(tmp_path / "folder", fill)
    with pytest.raises(MaskwrightError, match=r"other: cannot be written: No space left on device"):
        write_folder_atomically(tmp_path / "other", full_disk)
    assert names(tmp_path) == ["folder", "folder/file"]


def test_growing_file_appears_when_it_is_published(tmp_path):
    growing = AtomicFile(tmp_path / "file")
    for part in (b"one", b"two"):
        with growing.writing() as file:
            file.write(part)
    assert names(tmp_path) == [growing.partial.name]
    growing.publish()
    assert ((tmp_path / "file").read_bytes(), names(tmp_path)) == (b"onetwo", ["file"])


def test_growing_file_is_discarded_on_request_and_on_errors(tmp_path):
    abandoned = AtomicFile(tmp_path / "abandoned")
    with abandoned.writing() as file:
        file.write(b"content")
    abandoned.discard()
    with pytest.raises(MaskwrightError, match="failed: cannot be written"), AtomicFile(tmp_path / "failed").writing():
        full_disk()
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="needs the file modes of POSIX")
def test_files_of_safetensors_have_the_permissions_of_any_other_new_file(tmp_path):
    def save(path: Path) -> None:
        safetensors.torch.save_file({"a": torch.zeros(1)}, path)

    (tmp_path / "other").write_text("")
    write_file_atomically(tmp_path / "model.safetensors", save)
    write_folder_atomically(tmp_path / "folder", lambda folder: save(folder / "model.safetensors"))
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 1
