"""Regions of images equal the same regions of the whole image, and only the needed tiles of a TIFF are decoded."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from maskwright.data.images import tiled_tiff
from maskwright.data.images.load import load_image
from maskwright.data.images.tiled_tiff import ArrayImage, TiledTiffImage, open_image
from maskwright.errors import ImageError

PARTS = [(0, 0, 150, 210), (31, 17, 32, 18), (60, 100, 150, 210), (0, 64, 64, 128), (149, 0, 150, 210)]


@pytest.fixture(scope="module")
def colors():
    smooth = np.random.default_rng(0).integers(0, 256, (15, 21, 3), np.uint8)
    return np.array(Image.fromarray(smooth).resize((210, 150)))


def assert_regions_equal(image, expected):
    assert image.size == expected.shape[:2]
    for top, left, bottom, right in PARTS:
        assert np.array_equal(image.read(top, left, bottom, right), expected[top:bottom, left:right])


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
def test_tiff_in_tiles_or_strips_is_read_by_regions(tmp_path, colors, options):
    tifffile.imwrite(tmp_path / "a.tif", colors, photometric="rgb", **options)
    image = open_image(tmp_path / "a.tif")
    assert isinstance(image, TiledTiffImage)
    assert_regions_equal(image, colors)
    assert_regions_equal(image, load_image(tmp_path / "a.tif"))
    image.close()


@pytest.mark.parametrize("kind", ["gray", "alpha"])
def test_gray_and_transparent_tiff_become_rgb_as_in_load_image(tmp_path, colors, kind):
    if kind == "gray":
        tifffile.imwrite(tmp_path / "a.tif", colors[..., 0], tile=(64, 64))
    else:
        alpha = np.concatenate([colors, colors[..., :1]], 2)
        tifffile.imwrite(tmp_path / "a.tif", alpha, photometric="rgb", extrasamples=["unassalpha"], tile=(64, 64))
    image = open_image(str(tmp_path / "a.tif"))
    assert isinstance(image, TiledTiffImage)
    assert_regions_equal(image, load_image(tmp_path / "a.tif"))


def test_other_files_are_loaded_whole(tmp_path, colors):
    image = Image.fromarray(colors)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "lzw.tif", compression="tiff_lzw")
    image.quantize(8).save(tmp_path / "palette.tif")
    tifffile.imwrite(tmp_path / "deep.tif", colors[..., 0].astype(np.uint16) * 257, tile=(64, 64))
    tifffile.imwrite(tmp_path / "turned.tif", colors, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    for source in (*sorted(tmp_path.iterdir()), colors, image, (tmp_path / "a.png").read_bytes()):
        found = open_image(source)
        assert isinstance(found, ArrayImage)
        whole = load_image(source)
        assert found.size == whole.shape[:2]
        assert np.array_equal(found.read(3, 5, 40, 60), whole[3:40, 5:60])


def test_files_that_are_not_images_are_rejected(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0nonsense")
    with pytest.raises(ImageError, match=r"a\.tif"):
        open_image(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "b.tif")


def test_damaged_tile_is_an_error_when_it_is_read(tmp_path, colors):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, colors, photometric="rgb", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path) as file:
        last = file.pages.first.dataoffsets[-1]
    content = bytearray(path.read_bytes())
    content[last : last + 8] = b"nonsense"
    path.write_bytes(content)
    image = open_image(path)
    assert np.array_equal(image.read(0, 0, 64, 64), colors[:64, :64])
    with pytest.raises(ImageError, match=r"a\.tif: damaged or truncated: tile or strip 11 cannot be read"):
        image.read(140, 200, 150, 210)


def test_only_needed_tiles_are_decoded_and_the_cache_is_bounded(tmp_path, colors, monkeypatch):
    decoded, real = [], tiled_tiff._decode_segment
    tifffile.imwrite(tmp_path / "a.tif", colors, photometric="rgb", tile=(64, 64))
    image = open_image(tmp_path / "a.tif")
    monkeypatch.setattr(
        tiled_tiff, "_decode_segment", lambda page, index, name: decoded.append(index) or real(page, index, name)
    )
    image.read(70, 10, 100, 60)
    image.read(64, 0, 128, 64)
    assert decoded == [4]
    monkeypatch.setattr(tiled_tiff, "_CACHE_BYTES", 3 * 64 * 64 * 3)
    image.read(0, 0, 150, 210)
    assert len(image._cache) <= 3
