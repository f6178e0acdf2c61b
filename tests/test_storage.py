"""Datasets in folders and archives have the same files, and nothing is extracted."""

import gzip
import io
import multiprocessing
import os
import pickle
import random
import re
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest

from maskwright.data.storage.archives import _stream
from maskwright.data.storage.folders import File, open_folder
from maskwright.errors import DatasetError

CONTENT = {
    "images/a.jpg": b"a" * 1000,
    "images/deep/b.png": random.Random(0).randbytes(70_000),
    "labels/a.png": b"",
    "näme.txt": b"text",
}


def zipped(target, content=CONTENT, method=zipfile.ZIP_DEFLATED, top=""):
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(top + name, data)
    return target


def tarred(target, content=CONTENT, mode="w", top="./"):
    with tarfile.open(target, mode) as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return target


def unpacked(folder, content=CONTENT):
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


MAKERS = {
    "folder": lambda path: unpacked(path / "set"),
    "stored zip": lambda path: zipped(path / "set.zip", method=zipfile.ZIP_STORED),
    "deflated zip": lambda path: zipped(path / "set.zip"),
    "bzip2 zip": lambda path: zipped(path / "set.zip", method=zipfile.ZIP_BZIP2),
    "tar": lambda path: tarred(path / "set.tar"),
    "tar.gz": lambda path: tarred(path / "set.tar.gz", mode="w:gz"),
    "tgz": lambda path: tarred(path / "set.tgz", mode="w:gz", top=""),
    "folder with a zip": lambda path: zipped(path / "set.zip").parent,
    "folder with a zip below": lambda path: below(path),
}


def below(path):
    (path / "images").mkdir()
    zipped(path / "images/part.zip", {"a.jpg": CONTENT["images/a.jpg"], "deep/b.png": CONTENT["images/deep/b.png"]})
    return unpacked(path, {name: data for name, data in CONTENT.items() if not name.startswith("images")})


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_storage_gives_the_same_files(tmp_path, kind):
    folder = open_folder(MAKERS[kind](tmp_path))
    for name, data in CONTENT.items():
        assert folder.file(name, "key").read() == data
        assert str(folder.file(name, "key")).endswith(name.rpartition("/")[2])
    if kind != "folder with a zip below":  # a folder on disk hides the archives' folder of its name
        assert folder.folder("images", "key").names() == ["a.jpg", "deep/b.png"]
    assert {"images", "labels"} <= set(folder.folders())
    found = folder.files(["images/a.jpg", "images/nothing.jpg", "images/deep/b.png"])
    assert [file and file.read() for file in found] == [CONTENT["images/a.jpg"], None, CONTENT["images/deep/b.png"]]
    assert folder.find_folder("nothing") is None


@pytest.mark.parametrize("maker", [zipped, tarred])
def test_top_folder_of_an_archive_is_searched(tmp_path, maker):
    suffix = ".zip" if maker is zipped else ".tar"
    folder = open_folder(maker(tmp_path / f"set{suffix}", top="ADEChallengeData2016/"))
    assert folder.folder("images/deep", "key").names() == ["b.png"]
    assert str(folder.folder("images", "key")) == str(tmp_path / f"set{suffix}/ADEChallengeData2016/images")


def test_several_archives_in_one_folder_are_one_dataset(tmp_path):
    zipped(tmp_path / "images.zip", {"left/train/a.png": b"image", "license.txt": b"1"})
    zipped(tmp_path / "truth.zip", {"fine/train/a.png": b"truth", "license.txt": b"2"})
    folder = open_folder(tmp_path)
    assert folder.folder("left/train", "key").file("a.png", "key").read() == b"image"
    assert folder.folder("fine", "key").names() == ["train/a.png"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("inner", [zipped, tarred])
def test_archive_in_an_archive_is_found_where_it_would_be_extracted(tmp_path, inner, method):
    suffix = ".zip" if inner is zipped else ".tar"
    noise = {f"masks_{i}.png": random.Random(i).randbytes(90_000) for i in range(40)}
    part = inner(tmp_path / f"part{suffix}", noise)
    outer = zipped(tmp_path / "outer.zip", {f"annotations/val{suffix}": part.read_bytes(), "b.json": b"{}"}, method)
    os.remove(part)
    folder = open_folder(tmp_path)
    assert folder.folder("annotations", "key").files(["masks_3.png"])[0].read() == noise["masks_3.png"]
    for name in random.Random(0).sample(sorted(noise), 10):
        assert folder.file(f"annotations/{name}", "key").read() == noise[name]
    assert str(folder.file("annotations/masks_0.png", "key")) == f"{outer}/annotations/val{suffix}/masks_0.png"


def test_compressed_tar_is_read_from_any_position(tmp_path):
    big = {f"{i}.bin": random.Random(i).randbytes(200_000) + bytes(3_000_000) for i in range(4)}
    folder = open_folder(tarred(tmp_path / "set.tar.gz", big, "w:gz"))
    for name in ("3.bin", "0.bin", "2.bin", "1.bin"):
        assert folder.file(name, "key").read() == big[name]


def test_concatenated_gzip_files_are_one_stream(tmp_path):
    import gzip

    raw = tarred(tmp_path / "plain.tar").read_bytes()
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(raw[:5000]) + gzip.compress(raw[5000:]) + bytes(512))
    os.remove(tmp_path / "plain.tar")
    assert open_folder(tmp_path).file("images/deep/b.png", "key").read() == CONTENT["images/deep/b.png"]


def test_files_on_disk_take_precedence_and_archives_stay_closed(tmp_path):
    unpacked(tmp_path, {"images/a.jpg": b"disk"})
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    folder = open_folder(tmp_path)
    assert folder.folder("images", "key").file("a.jpg", "key").read() == b"disk"
    with pytest.raises(DatasetError, match=r"broken\.zip: cannot be read as an archive"):
        folder.find_file("images/b.jpg")


def read_all(files):
    return [file.read() for file in files]


@pytest.mark.parametrize(("kind", "method"), [("deflated zip", "fork"), ("tar.gz", "fork"), ("tar.gz", "spawn")])
def test_files_are_read_by_several_processes_at_once(tmp_path, kind, method):
    folder = open_folder(MAKERS[kind](tmp_path))
    files = [folder.file(name, "key") for name in CONTENT]
    expected = read_all(files)
    assert pickle.loads(pickle.dumps(files)) == files
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_all, [files] * 20) == [expected] * 20


def test_names_in_an_archive_cannot_point_outside(tmp_path):
    zipped(
        tmp_path / "set.zip", {"../../outside.txt": b"!", "/etc/passwd": b"!", "a\\b.png": b"!", "__MACOSX/._c": b""}
    )
    folder = open_folder(tmp_path / "set.zip")
    assert folder.file("a/b.png", "key").read() == b"!"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["set.zip"]
    assert not any("MACOSX" in name for name in folder.names())


def test_decompression_bomb_is_not_extracted(tmp_path):
    zipped(tmp_path / "set.zip", {"big.png": bytes(200 << 20)})
    with pytest.raises(DatasetError, match=r"set\.zip/big\.png: .* claim to be 209,715,200"):
        open_folder(tmp_path / "set.zip").file("big.png", "key").read()


def test_damaged_file_in_a_zip_is_named(tmp_path):
    path = zipped(tmp_path / "set.zip", {"b.png": CONTENT["images/deep/b.png"]}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"set\.zip/b\.png: damaged in its archive \(wrong checksum\)"):
        open_folder(path).file("b.png", "key").read()


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_truncated_file_and_other_content_are_errors_that_name_the_archive(tmp_path, suffix):
    maker = zipped if suffix == ".zip" else lambda path: tarred(path, mode="w:gz" if suffix == ".tar.gz" else "w")
    path = maker(tmp_path / f"set{suffix}")
    whole = path.read_bytes()
    for data in (b"<html>not found</html>", whole[: len(whole) // 2], b""):
        path.write_bytes(data)
        with pytest.raises(DatasetError, match=r"cannot be read as an archive|damaged") as error:
            read_all([open_folder(path).file(name, "key") for name in CONTENT])
        assert f"set{suffix}" in str(error.value)
        assert "\n" not in str(error.value)


def test_replaced_archive_is_opened_again(tmp_path):
    path = zipped(tmp_path / "set.zip", {"a.txt": b"old"})
    assert open_folder(path).file("a.txt", "key").read() == b"old"
    zipped(tmp_path / "new.zip", {"a.txt": b"new and longer"})
    os.replace(tmp_path / "new.zip", path)
    assert open_folder(path).file("a.txt", "key").read() == b"new and longer"


def test_encrypted_file_is_rejected(tmp_path):
    path = zipped(tmp_path / "set.zip", {"a.txt": b"secret"})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match="encrypted"):
        open_folder(path).file("a.txt", "key").read()


def test_missing_things_are_errors_that_name_them(tmp_path):
    with pytest.raises(DatasetError, match=r"data\.root: no folder or archive .*nowhere"):
        open_folder(tmp_path / "nowhere")
    zipped(tmp_path / "set.zip")
    with pytest.raises(DatasetError, match=r"data\.train\.images: no folder .*left or in the archives set\.zip"):
        open_folder(tmp_path).folder("left", "data.train.images")
    with pytest.raises(DatasetError, match="cannot be read"):
        File(str(tmp_path / "gone.png")).read()
    (tmp_path / "a/x").mkdir(parents=True)
    (tmp_path / "b/x").mkdir(parents=True)
    with pytest.raises(DatasetError, match="more than once"):
        open_folder(tmp_path).folder("x", "key")


def test_file_can_be_bytes_in_memory():
    assert File("row 7", zlib.compress(b"x")).read() == zlib.compress(b"x")
    assert Path(str(File("a/b.png"))).stem == "b"


def measured(function):
    """Return the error of a call; it must come soon, and without much memory."""
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(DatasetError) as error:
        function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.process_time() - start < 10
    assert peak < 100 << 20
    assert str(error.value).isprintable()
    return str(error.value)


def list_all(path):
    return open_folder(path).names()


def test_compressed_tar_that_is_a_bomb_is_refused_before_it_is_decompressed(tmp_path):
    tarred(tmp_path / "set.tar.gz", {"zeros.bin": bytes(300 << 20)}, "w:gz")
    message = measured(lambda: list_all(tmp_path / "set.tar.gz"))
    assert re.search(r"set\.tar\.gz: cannot be read as an archive \([\d,]+ bytes become more than 67,", message)


def zip_bytes(content, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    zipped(buffer, content, method)
    return buffer.getvalue()


def test_ratio_is_counted_from_the_bytes_on_disk(tmp_path):
    inner = zip_bytes({"zeros.bin": bytes(100 << 20)})  # 1000 to 1
    middle = zip_bytes({"inner.zip": inner})  # the zeros of the inner stream are compressed again
    zipped(tmp_path / "set.zip", {"middle.zip": middle})
    message = measured(lambda: open_folder(tmp_path / "set.zip").find_file("zeros.bin").read())
    assert "claim to be 104,857,600 after decompression" in message


def test_archives_inside_one_another_are_opened_to_a_limit(tmp_path):
    content = zip_bytes({"deep.txt": b"deep"})
    for _ in range(6):
        content = zip_bytes({"in.zip": content})
    (tmp_path / "set.zip").write_bytes(content)
    folder = open_folder(tmp_path / "set.zip")
    assert folder.find_file("deep.txt") is None
    assert folder.find_file("in.zip") is not None


def tar_header(kind, size):
    info = tarfile.TarInfo("name")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE])
@pytest.mark.parametrize("size", [8 << 30, 1 << 60, -512, -(1 << 40)])
def test_huge_and_negative_headers_of_a_tar_are_refused(tmp_path, kind, size):
    content = tar_header(kind, size) + bytes(4096) + tar_header(tarfile.REGTYPE, 0) + bytes(1024)
    (tmp_path / "set.tar").write_bytes(content)
    assert "cannot be read as an archive" in measured(lambda: list_all(tmp_path / "set.tar"))
    with gzip.open(tmp_path / "other.tar.gz", "wb") as file:
        file.write(content)
    assert "cannot be read as an archive" in measured(lambda: list_all(tmp_path / "other.tar.gz"))


@pytest.mark.parametrize("size", [1 << 60, -512, -1024])
def test_false_sizes_of_files_in_a_tar_are_refused(tmp_path, size):
    content = tar_header(tarfile.REGTYPE, 0) + tar_header(tarfile.REGTYPE, size) + bytes(2048)
    (tmp_path / "set.tar").write_bytes(content)
    assert "cannot be read as an archive" in measured(lambda: list_all(tmp_path / "set.tar"))


def test_endless_extended_headers_are_refused(tmp_path):
    (tmp_path / "set.tar").write_bytes(tar_header(tarfile.XHDTYPE, 0) * 20_000 + bytes(1024))
    assert "cannot be read as an archive" in measured(lambda: list_all(tmp_path / "set.tar"))


@pytest.mark.parametrize("offsets", [(20,), (20, 24)], ids=["compressed size", "both sizes"])
def test_false_sizes_of_files_in_a_zip_allocate_nothing(tmp_path, offsets):
    path = zipped(tmp_path / "set.zip", {"a.bin": b"a" * 1000})
    content = bytearray(path.read_bytes())
    for offset in offsets:
        start = content.index(b"PK\1\2") + offset
        content[start : start + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    if len(offsets) == 1:
        assert open_folder(path).file("a.bin", "key").read() == b"a" * 1000
    else:
        assert "a.bin: " in measured(lambda: open_folder(path).file("a.bin", "key").read())


def test_position_of_compressed_data_takes_limited_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("maskwright.data.storage.archives._MAX_ACCESS_POINTS", 8)
    files = {f"{number}.bin": random.Random(number).randbytes(100_000) + bytes(2_000_000) for number in range(20)}
    folder = open_folder(tarred(tmp_path / "set.tar.gz", files, "w:gz"))
    for name in ("19.bin", "0.bin", "7.bin"):
        assert folder.file(name, "key").read() == files[name]
    assert len(_stream(str(tmp_path / "set.tar.gz"))._points) <= 8
