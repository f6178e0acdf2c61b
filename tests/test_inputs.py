"""Images to predict that are not plain files: in archives, in CSV and Parquet lists, and at URLs."""

import tarfile
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maskwright.data.images.load import load_image
from maskwright.data.storage.archives import list_entries, read_entry
from maskwright.data.storage.folders import File
from maskwright.data.storage.image_tables import read_image_table
from maskwright.errors import DatasetError, MaskwrightError
from maskwright.inference.inputs import find_sources, name_results


@pytest.fixture
def images(tmp_path):
    """Return a folder with two images, 0.png and 1.png, of one color each."""
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (4, 3), (number, 0, 0)).save(tmp_path / f"images/{number}.png")
    return tmp_path / "images"


def found(inputs, output, **options):
    return find_sources([str(item) for item in inputs], Path(output), **options)


def test_images_in_archives_are_found_in_order_and_read(images, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("inside/1.png", ".hidden/0.png", "inside/0.png", "inside/readme.txt"):
            source = images / Path(name).name
            archive.writestr(name, source.read_bytes() if source.exists() else "text")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        archive.add(images / "1.png", "1.png")
    sources = found([tmp_path / "a.zip", tmp_path / "b.tar.gz"], tmp_path / "out")
    assert [Path(str(source)).name for source in sources] == ["0.png", "1.png", "1.png"]
    assert [load_image(source)[0, 0, 0] for source in sources] == [0, 1, 1]
    assert len(set(name_results(sources))) == 3
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "text")
    with pytest.raises(DatasetError, match="the archive has no images"):
        found([tmp_path / "empty.zip"], tmp_path / "out")


def test_paths_of_a_list_are_relative_to_it_and_an_image_counts_once(images, tmp_path):
    (tmp_path / "list.csv").write_text(f"id,File_Name\n1,images/0.png\n2,\n3,{images}/1.png\n4,images/0.png\n")
    sources = found([tmp_path / "list.csv", images], tmp_path / "out")
    assert sources == [images / "0.png", images / "1.png"]
    pq.write_table(pa.table({"id": [1], "where": ["images/1.png"]}), tmp_path / "list.parquet")
    with pytest.raises(DatasetError, match=r"list.parquet: no column is named image, path, .*name it with --column"):
        found([tmp_path / "list.parquet"], tmp_path / "out")
    assert found([tmp_path / "*.parquet"], tmp_path / "out", column="where") == [images / "1.png"]
    with pytest.raises(DatasetError, match="no column 'x' with paths or images; it has where"):
        found([tmp_path / "list.parquet"], tmp_path / "out", column="x")
    (tmp_path / "bad.parquet").write_text("text")
    with pytest.raises(DatasetError, match="not a readable Parquet file"):
        found([tmp_path / "bad.parquet"], tmp_path / "out")
    (tmp_path / "empty.csv").write_text("path\n")
    with pytest.raises(DatasetError, match="lists no images"):
        found([tmp_path / "empty.csv"], tmp_path / "out")


@pytest.mark.parametrize("as_struct", [True, False])
def test_images_stored_in_parquet_are_read_in_any_order(images, tmp_path, as_struct):
    contents = [(images / f"{number % 2}.png").read_bytes() for number in range(40)]
    names = [f"{number}.png" if number != 5 else "4.png" for number in range(40)]
    if as_struct:
        table = pa.table({"image": [{"bytes": c, "path": n} for c, n in zip(contents, names, strict=True)]})
    else:
        table = pa.table({"image": contents, "file_name": names})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=15)
    files = read_image_table(str(tmp_path / "a.parquet"), "image")
    assert [Path(file.name).name for file in files[3:6]] == ["3.png", "000004_4.png", "000005_4.png"]
    for index in (39, 0, 20, 19, 38, 1):
        assert files[index].read() == contents[index]
        assert load_image(files[index])[0, 0, 0] == index % 2
    pq.write_table(pa.table({"image": pa.array([None], pa.binary())}), tmp_path / "none.parquet")
    (file,) = read_image_table(str(tmp_path / "none.parquet"))
    with pytest.raises(DatasetError, match="no image in column 'image'"):
        file.read()


def test_urls_are_folders_patterns_archives_and_lists(images, tmp_path):
    """fsspec's own memory stands for a storage service; tests/test_ray_slow.py has a real one."""
    memory = fsspec.filesystem("memory")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(images / "1.png", "1.png")
    for name, content in (
        ("day/0.png", (images / "0.png").read_bytes()),
        ("day/readme.txt", b"text"),
        ("a.zip", (tmp_path / "a.zip").read_bytes()),
        ("list.csv", b"path\nday/0.png\nday/gone.png\n"),
    ):
        memory.pipe_file(f"/photos/{name}", content)
    sources = found(["memory://photos/day", "memory://photos/a.zip", "memory://photos/*.csv"], tmp_path / "out")
    assert [str(source).partition("photos/")[2] for source in sources] == ["day/0.png", "a.zip/1.png", "day/gone.png"]
    assert [load_image(source)[0, 0, 0] for source in sources[:2]] == [0, 1]
    assert name_results(sources) == ["0", "1", "gone"]
    with pytest.raises(DatasetError, match=r"gone.png: cannot be read"):
        sources[2].read()
    for missing in ("memory://photos/none", "nothing://photos"):
        with pytest.raises(MaskwrightError, match=f"{missing}: cannot be"):
            found([missing], tmp_path / "out")
    ((_, entry),) = list_entries("memory://photos/a.zip", "memory://photos/a.zip")
    np.testing.assert_array_equal(load_image(read_entry(entry, "1.png")), load_image(File(str(images / "1.png"))))
