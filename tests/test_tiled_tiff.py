"""Parts of pictures are what the whole picture has there, and of a TIFF no more than needed is read."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from maskwright.data.images import tiled_tiff as regions
from maskwright.data.images.load import load_image
from maskwright.data.images.tiled_tiff import ArrayImage, TiledTiffImage, open_image
from maskwright.errors import ImageError

PARTS = [(0, 0, 150, 210), (31, 17, 32, 18), (60, 100, 150, 210), (0, 64, 64, 128), (149, 0, 150, 210)]


@pytest.fixture(scope="module")
def colours():
    smooth = np.random.default_rng(0).integers(0, 256, (15, 21, 3), np.uint8)
    return np.array(Image.fromarray(smooth).resize((210, 150)))


def assert_parts(picture, expected):
    assert picture.size == expected.shape[:2]
    for top, left, bottom, right in PARTS:
        assert np.array_equal(picture.read(top, left, bottom, right), expected[top:bottom, left:right])


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (64, 64)},
        {"tile": (32, 80), "compression": "zlib", "predictor": True},
        {"rowsperstrip": 16},
        {"rowsperstrip": 7, "compression": "zlib"},
        {"byteorder": ">", "tile": (64, 64)},
        {"bigtiff": True, "tile": (64, 64)},
    ],
)
def test_tiff_in_tiles_or_strips_is_read_in_parts(tmp_path, colours, options):
    tifffile.imwrite(tmp_path / "a.tif", colours, photometric="rgb", **options)
    picture = open_image(tmp_path / "a.tif")
    assert isinstance(picture, TiledTiffImage)
    assert_parts(picture, colours)
    assert_parts(picture, load_image(tmp_path / "a.tif"))
    picture.close()


@pytest.mark.parametrize("kind", ["gray", "alpha"])
def test_gray_and_transparent_tiff_become_rgb_as_ever(tmp_path, colours, kind):
    if kind == "gray":
        tifffile.imwrite(tmp_path / "a.tif", colours[..., 0], tile=(64, 64))
    else:
        alpha = np.concatenate([colours, colours[..., :1]], 2)
        tifffile.imwrite(tmp_path / "a.tif", alpha, photometric="rgb", extrasamples=["unassalpha"], tile=(64, 64))
    picture = open_image(str(tmp_path / "a.tif"))
    assert isinstance(picture, TiledTiffImage)
    assert_parts(picture, load_image(tmp_path / "a.tif"))


def test_everything_else_is_read_whole(tmp_path, colours):
    picture = Image.fromarray(colours)
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "lzw.tif", compression="tiff_lzw")
    picture.quantize(8).save(tmp_path / "palette.tif")
    tifffile.imwrite(tmp_path / "deep.tif", colours[..., 0].astype(np.uint16) * 257, tile=(64, 64))
    tifffile.imwrite(tmp_path / "turned.tif", colours, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    for source in (*sorted(tmp_path.iterdir()), colours, picture, (tmp_path / "a.png").read_bytes()):
        found = open_image(source)
        assert isinstance(found, ArrayImage)
        whole = load_image(source)
        assert found.size == whole.shape[:2]
        assert np.array_equal(found.read(3, 5, 40, 60), whole[3:40, 5:60])


def test_what_is_no_picture_is_refused_as_ever(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0nonsense")
    with pytest.raises(ImageError, match=r"a\.tif"):
        open_image(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "b.tif")


def test_damage_is_found_where_it_is_read(tmp_path, colours):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, colours, photometric="rgb", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path) as file:
        last = file.pages.first.dataoffsets[-1]
    content = bytearray(path.read_bytes())
    content[last : last + 8] = b"nonsense"
    path.write_bytes(content)
    picture = open_image(path)
    assert np.array_equal(picture.read(0, 0, 64, 64), colours[:64, :64])
    with pytest.raises(ImageError, match=r"a\.tif: damaged or cut off, tile or strip 11 cannot be read"):
        picture.read(140, 200, 150, 210)


def test_only_what_is_needed_is_decoded_and_only_a_little_is_kept(tmp_path, colours, monkeypatch):
    decoded, real = [], regions._decode
    tifffile.imwrite(tmp_path / "a.tif", colours, photometric="rgb", tile=(64, 64))
    picture = open_image(tmp_path / "a.tif")
    monkeypatch.setattr(regions, "_decode", lambda page, index, name: decoded.append(index) or real(page, index, name))
    picture.read(70, 10, 100, 60)
    picture.read(64, 0, 128, 64)
    assert decoded == [4]
    monkeypatch.setattr(regions, "_CACHED_BYTES", 3 * 64 * 64 * 3)
    picture.read(0, 0, 150, 210)
    assert len(picture._decoded) <= 3
