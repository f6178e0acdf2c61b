"""Images are what they are: bands that are not alpha, 9 to 16 bits, floats, no data, HEIC, and damaged files."""

import io
import logging
import multiprocessing
import sys
import threading
import types
import warnings

import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from maskwright.data.images import safe_pillow, warn
from maskwright.data.images.label_images import read_label_image
from maskwright.data.images.load import image_size, load_image
from maskwright.data.images.multichannel import load_channels
from maskwright.data.images.tiled_tiff import TiledTiffImage, open_image
from maskwright.errors import DatasetError, ImageError
from tests import hostile_files

SIZE = (40, 60)


@pytest.fixture(autouse=True)
def _no_warning_was_logged():
    warn.forget()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def rgb(rng):
    return rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def infrared(rng, low=0, high=64):
    return rng.integers(low, high, (*SIZE, 1), dtype=np.uint8)


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("values", [(0, 64), (0, 256), (0, 1), (200, 201), (100, 110)])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_fourth_band_that_does_not_look_like_alpha_is_ignored_with_a_warning(
    tmp_path, rng, rgb, caplog, extra, values, bits
):
    array = np.concatenate([rgb, infrared(rng, *values)], axis=2)
    array = array if bits == 8 else array.astype(np.uint16) * 257
    path = tmp_path / "tile.tif"
    tifffile.imwrite(path, array, photometric="rgb", extrasamples=[extra])
    np.testing.assert_array_equal(load_image(path), rgb)
    assert image_size(path) == SIZE
    (message,) = caplog.messages
    assert message.startswith(f"{path}: ")
    assert "model.channels=4" in message
    np.testing.assert_array_equal(load_channels(path, 4), array)


@pytest.mark.parametrize("values", [[0, 255], [0, 128, 255], [255]])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_fourth_band_that_looks_like_alpha_is_alpha(tmp_path, rng, rgb, caplog, values, bits):
    alpha = rng.choice(np.array(values, dtype=np.uint8), (*SIZE, 1))
    expected = load_image(np.concatenate([rgb, alpha], axis=2))
    array = np.concatenate([rgb, alpha], axis=2).astype(np.uint16 if bits == 16 else np.uint8) * (
        257 if bits == 16 else 1
    )
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", extrasamples=[2])
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif"), expected)
    assert caplog.messages == []


def test_soft_edges_and_declared_associated_alpha_are_alpha(tmp_path, rgb, caplog):
    alpha = np.full((*SIZE, 1), 255, dtype=np.uint8)
    alpha[:, :20, 0] = np.linspace(0, 254, 20)
    array = np.concatenate([rgb, alpha], axis=2)
    tifffile.imwrite(tmp_path / "soft.tif", array, photometric="rgb", extrasamples=[2])
    np.testing.assert_array_equal(load_image(tmp_path / "soft.tif"), load_image(array))
    array[..., 3] = np.arange(SIZE[1]) * 4
    tifffile.imwrite(tmp_path / "associated.tif", array, photometric="rgb", extrasamples=[1])
    assert load_image(tmp_path / "associated.tif")[:, 0].min() == 255
    assert caplog.messages == []


def test_infrared_of_which_many_pixels_are_saturated_is_no_alpha(tmp_path, rng, rgb, caplog):
    band = infrared(rng)
    band[:24] = 255  # 60 % of the pixels
    tifffile.imwrite(tmp_path / "a.tif", np.concatenate([rgb, band], axis=2), photometric="rgb", extrasamples=[2])
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif"), rgb)
    assert "the last band is marked as transparency" in caplog.text


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_alpha_of_a_png_and_of_an_array_is_always_alpha(tmp_path, rng, rgb, caplog, suffix):
    array = np.concatenate([rgb, infrared(rng)], axis=2)
    Image.fromarray(array).save(tmp_path / f"a.{suffix}", lossless=True, exact=True)
    np.testing.assert_array_equal(load_image(tmp_path / f"a.{suffix}"), load_image(array))
    assert "its transparency has many different values" in caplog.text  # as infrared stored as alpha has
    assert load_image(array).mean() > 220
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(load_image(tmp_path / "a.npy"), rgb)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("layout", [{"tile": (16, 32)}, {"rowsperstrip": 7}])
def test_regions_of_a_tiff_with_four_bands_equal_the_whole_image(tmp_path, rng, rgb, compression, alpha, layout):
    band = infrared(rng)
    if alpha:
        band = np.where(band > 20, 255, 0).astype(np.uint8)
    array = np.concatenate([rgb, band], axis=2)
    for extra in (0, 2):
        path = tmp_path / f"{extra}.tif"
        tifffile.imwrite(path, array, photometric="rgb", extrasamples=[extra], compression=compression, **layout)
        image = open_image(path)
        assert isinstance(image, TiledTiffImage)
        np.testing.assert_array_equal(image.read(5, 3, 39, 58), load_image(path)[5:39, 3:58])


def test_more_bands_than_colors_are_named(tmp_path, rng, rgb, caplog):
    array = np.concatenate([rgb, infrared(rng), infrared(rng)], axis=2)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", extrasamples=[0, 0])
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif"), rgb)
    assert "only the first 3 of 5 bands are used" in caplog.text
    assert "model.channels=5" in caplog.text


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535)])
def test_gray_whose_white_is_zero_is_inverted_at_any_depth(tmp_path, dtype, white):
    gray = np.linspace(0, white, 60).astype(dtype)[None].repeat(40, 0)
    tifffile.imwrite(tmp_path / "xray.tif", gray, photometric="miniswhite")
    tifffile.imwrite(tmp_path / "inverted.tif", white - gray)
    np.testing.assert_array_equal(load_image(tmp_path / "xray.tif"), load_image(tmp_path / "inverted.tif"))


def sixteen_bits(rng, bits, channels):
    shape = (*SIZE, channels) if channels > 1 else SIZE
    return rng.integers(0, 2**bits, shape, dtype=np.uint16)


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["tif", "png", "npy"])
def test_few_bits_in_16_are_dark_and_said_for_color_and_gray_alike(tmp_path, rng, caplog, bits, channels, suffix):
    values = sixteen_bits(rng, bits, channels)
    values.flat[0] = 2**bits - 1
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, values, photometric="rgb" if channels == 3 else "minisblack")
    elif suffix == "npy":
        np.save(path, values)
    elif channels == 3:
        path.write_bytes(hostile_files.png_of_16_bits(values))
    else:
        Image.fromarray(values).save(path)
    found = load_image(path)
    expected = np.atleast_3d(values / 257)
    assert np.abs(found - expected).max() <= 1
    (message,) = caplog.messages
    assert f"{path}: only the lowest {bits} of 16 bits are used" in message
    assert f"model.channels={channels} and model.pixel_mean=measure" in message


def test_the_factor_does_not_depend_on_the_image(tmp_path, rng):
    values = sixteen_bits(rng, 12, 1)
    values[0, 0] = 4095
    darker = values // 2
    for name, array in (("a", values), ("b", darker)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    assert load_image(tmp_path / "b.png").max() == round(2047 / 257)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_the_full_range_of_16_bits_gives_the_upper_byte_of_colors_without_a_warning(tmp_path, rng, caplog, compression):
    values = sixteen_bits(rng, 16, 3)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", compression=compression)
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif"), values >> 8)
    planes = np.moveaxis(values, 2, 0).copy()
    tifffile.imwrite(tmp_path / "b.tif", planes, photometric="rgb", planarconfig="separate", compression=compression)
    np.testing.assert_array_equal(load_image(tmp_path / "b.tif"), values >> 8)
    assert caplog.messages == []


@pytest.mark.parametrize("channels", [1, 3])
def test_a_declared_maximum_is_white(tmp_path, rng, caplog, channels):
    values = sixteen_bits(rng, 12, channels)
    tags = [(281, "H", channels, (4095,) * channels if channels > 1 else 4095, True)]
    photometric = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", values, photometric=photometric, extratags=tags)
    expected = np.rint(np.atleast_3d(values) * (255 / 4095))
    assert np.abs(load_image(tmp_path / "a.tif") - expected).max() == 0
    assert caplog.messages == []
    tags = [(281, "H", channels, (3000,) * channels if channels > 1 else 3000, True)]  # that of the image itself
    tifffile.imwrite(tmp_path / "b.tif", values, photometric=photometric, extratags=tags)
    assert load_image(tmp_path / "b.tif").max() <= 16


def test_pgm_with_a_declared_maximum_is_scaled_by_it(tmp_path, rng):
    values = sixteen_bits(rng, 12, 1)
    (tmp_path / "a.pgm").write_bytes(b"P5\n60 40\n4095\n" + values.astype(">u2").tobytes())
    assert np.abs(load_image(tmp_path / "a.pgm")[..., 0] - values * (255 / 4095)).max() <= 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_float_tiff_in_0_to_1_is_read(tmp_path, rng, dtype, channels):
    values = rng.random((*SIZE, 3)[: 2 if channels == 1 else 3]).astype(dtype)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values, photometric="rgb" if channels == 3 else "minisblack")
    found = load_image(path)
    assert np.abs(found - np.atleast_3d(values) * 255.0).max() <= 0.6
    assert image_size(path) == SIZE


@pytest.mark.parametrize(
    ("array", "photometric", "found", "remedy"),
    [
        (np.zeros((*SIZE, 8), np.uint16), "minisblack", "a TIFF of 8 bands of uint16", "model.channels=8"),
        (np.zeros((*SIZE, 4), np.uint8), "minisblack", "a TIFF of 4 bands of uint8", "model.channels=4"),
        (np.zeros((*SIZE, 2), np.float32), "minisblack", "a TIFF of 2 bands of float32", "model.channels=2"),
        (np.full((*SIZE, 3), 7.5, np.float32), "rgb", "float values from 7.5 to 7.5", "model.channels=3"),
        (np.full(SIZE, -5, np.int16), "minisblack", "found int32 values", "model.channels=1"),
        (np.full(SIZE, 100000, np.int32), "minisblack", "found int32 values", "model.channels=1"),
        (np.full(SIZE, np.nan, np.float32), "minisblack", "2400 values are NaN or infinite", "GDAL_NODATA"),
        (np.full(SIZE, -9999, np.float32), "minisblack", "float values from -9999 to -9999", "GDAL_NODATA"),
    ],
)
def test_other_tiffs_are_refused_with_the_setting_that_reads_them(tmp_path, array, photometric, found, remedy):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, array, photometric=photometric, planarconfig="contig" if array.ndim == 3 else None)
    with pytest.raises(ImageError) as error:
        load_image(path)
    assert found in error.value.found
    assert remedy in error.value.remedy
    assert error.value.where == str(path)


@pytest.mark.parametrize("no_data", ["-9999", "nan", "-3.4028234663852886e+38"])
@pytest.mark.parametrize("channels", [1, 3])
def test_declared_no_data_is_0(tmp_path, rng, caplog, no_data, channels):
    values = rng.random((*SIZE, channels) if channels > 1 else SIZE).astype(np.float32)
    values[:5] = np.float32(no_data)
    path = tmp_path / "a.tif"
    tags = [(42113, "s", 0, no_data, True)]
    tifffile.imwrite(path, values, photometric="rgb" if channels == 3 else "minisblack", extratags=tags)
    assert load_image(path)[:5].max() == 0
    assert load_image(path)[5:].max() > 200
    assert load_channels(path, channels)[:5].max() == 0
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("maskwright")]
    assert "declares as no data (GDAL_NODATA)" in message


def test_values_of_8_bits_are_never_changed_by_no_data(tmp_path, rgb, caplog):
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb", extratags=[(42113, "s", 0, "255", True)])
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif"), rgb)
    assert caplog.messages == []


def test_undeclared_no_data_is_said_where_values_are_used_as_stored(tmp_path, rng, caplog):
    values = rng.random((*SIZE, 5)).astype(np.float32)
    values[0] = -9999
    np.save(tmp_path / "a.npy", values)
    np.testing.assert_array_equal(load_channels(tmp_path / "a.npy", 5), values)
    assert "300 values are -9999, which often means no data" in caplog.text


def test_each_warning_is_logged_once_but_for_every_image_where_that_is_asked(tmp_path, rng, rgb, caplog):
    for name in "abc":
        array = np.concatenate([rgb, infrared(rng)], axis=2)
        tifffile.imwrite(tmp_path / f"{name}.tif", array, photometric="rgb")
    for name in "abc":
        load_image(tmp_path / f"{name}.tif")
    assert len(caplog.messages) == 1
    with warn.logging_each():
        for name in "abc":
            load_image(tmp_path / f"{name}.tif")
    assert len(caplog.messages) == 4


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def test_heic_is_named_with_the_package_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    safe_pillow._has_heic.cache_clear()
    (tmp_path / "a.HEIC").write_bytes(HEIC)
    with pytest.raises(ImageError) as error:
        load_image(tmp_path / "a.HEIC")
    assert "a HEIC image, which needs the package pillow-heif" in error.value.found
    assert "pip install 'maskwright[heic]'" in error.value.remedy
    safe_pillow._has_heic.cache_clear()


def test_heic_is_read_by_the_package(tmp_path, monkeypatch, rgb):
    class Heif(PngImagePlugin.PngImageFile):
        format = "HEIF"

        def _open(self):
            stream = io.BytesIO()
            Image.fromarray(rgb).save(stream, "png")
            self.fp = io.BytesIO(stream.getvalue())
            super()._open()

    package = types.ModuleType("pillow_heif")
    package.register_heif_opener = lambda: Image.register_open("HEIF", Heif, lambda start: start[4:12] == b"ftypheic")
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    safe_pillow._has_heic.cache_clear()
    (tmp_path / "a.HEIC").write_bytes(HEIC)
    np.testing.assert_array_equal(load_image(tmp_path / "a.HEIC"), rgb)
    safe_pillow._has_heic.cache_clear()
    Image.OPEN.pop("HEIF", None)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 4",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (4, 4), \0\0",
        b"{'descr': '<q9', 'fortran_order': False, 'shape': (4, 4)}",
        b"((((((((((((",
        b"'unclosed",
        b"\xff\xfe\0\0",
        b"{'descr': '<U1000000', 'fortran_order': False, 'shape': (4, 4)}",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (-4, -4)}",
    ],
)
def test_damaged_npy_is_an_image_error(tmp_path, header):
    header = header.ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(16))
    for load in (load_image, image_size, lambda path: load_channels(path, 1)):
        with pytest.raises(ImageError, match=r"a\.npy"):
            load(tmp_path / "a.npy")


def test_flipped_bytes_of_a_tiff_never_raise_anything_else(tmp_path, rng, rgb):
    tifffile.imwrite(tmp_path / "a.tif", np.dstack([rgb, rgb[..., :2]]), photometric="rgb", extrasamples=[0, 0])
    content = (tmp_path / "a.tif").read_bytes()
    for number in range(300):
        damaged = bytearray(content)
        for position in rng.integers(0, 400, 3):
            damaged[position] = rng.integers(0, 256)
        for load in (load_image, lambda data: load_channels(data, 5)):
            try:
                load(bytes(damaged[: len(damaged) - number]))
            except ImageError as error:
                assert "\n" not in str(error)  # noqa: PT017


def test_messages_do_not_show_the_content_of_files(tmp_path):
    (tmp_path / "secret").write_bytes(b"root:x:0:0:root:/root:/bin/bash\n")
    (tmp_path / "a.png").symlink_to(tmp_path / "secret")
    for load in (load_image, image_size, lambda path: load_channels(path, 3)):
        with pytest.raises(ImageError) as error:
            load(tmp_path / "a.png")
        assert "root" not in error.value.found
        assert "not an image" in error.value.found


def corrupt_exif():
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "text" * 20
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(stream, "JPEG", exif=exif)
    data = bytearray(stream.getvalue())
    start = data.index(b"Exif\0\0") + 14
    data[start : start + 2] = b"\x7f\x00"  # many more entries than there are
    return bytes(data)


def test_warnings_of_pillow_are_logged_with_the_name_in_every_thread(caplog):
    data = corrupt_exif()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=lambda: load_image(data, name="photo.jpg"))
        thread.start()
        thread.join()
    assert caplog.messages
    assert all(message.startswith("photo.jpg: ") for message in caplog.messages)
    assert not caught


def test_warnings_of_other_threads_are_left_alone(caplog):
    stop = threading.Event()
    data = corrupt_exif()

    def read():
        while not stop.is_set():
            load_image(data, name="photo.jpg")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters), warnings.showwarning
        with caplog.at_level(logging.CRITICAL):
            threads = [threading.Thread(target=read) for _ in range(3)]
            for thread in threads:
                thread.start()
            for number in range(200):
                warnings.warn(f"from the main thread {number}", stacklevel=1)
            stop.set()
            for thread in threads:
                thread.join()
        assert (list(warnings.filters), warnings.showwarning) == before
    assert len(caught) == 200


# Label images


@pytest.fixture
def labels(rng):
    return rng.integers(0, 5, SIZE, dtype=np.uint8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_label_images_of_whole_floats_are_read(tmp_path, labels, dtype):
    tifffile.imwrite(tmp_path / "a.tif", labels.astype(np.float32))
    np.save(tmp_path / "a.npy", labels.astype(dtype))
    for name in ("a.tif", "a.npy"):
        np.testing.assert_array_equal(read_label_image(tmp_path / name), labels)


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "float16"])
def test_label_tiffs_that_pillow_does_not_know_are_read(tmp_path, labels, dtype):
    tifffile.imwrite(tmp_path / "a.tif", labels.astype(dtype))
    np.testing.assert_array_equal(read_label_image(tmp_path / "a.tif"), labels)


@pytest.mark.parametrize("bits", [8, 16])
def test_labels_are_the_stored_values_where_white_is_zero(tmp_path, labels, bits):
    tifffile.imwrite(tmp_path / "a.tif", labels.astype(f"uint{bits}"), photometric="miniswhite")
    np.testing.assert_array_equal(read_label_image(tmp_path / "a.tif"), labels)


@pytest.mark.parametrize(("kind", "maximum"), [("P5", 4), ("P5", 255), ("P5", 1000), ("P2", 4)])
def test_labels_in_a_pgm_are_not_scaled_by_its_maximum(tmp_path, labels, kind, maximum):
    text = " ".join(map(str, labels.ravel())).encode()
    data = text if kind == "P2" else labels.astype(">u2" if maximum > 255 else "u1").tobytes()
    header = f"{kind}\n{labels.shape[1]} {labels.shape[0]}\n{maximum}\n"
    (tmp_path / "a.pgm").write_bytes(header.encode() + data)
    np.testing.assert_array_equal(read_label_image(tmp_path / "a.pgm"), labels)


def test_label_tiffs_with_jpeg_compression_or_more_bands_are_refused(tmp_path, labels):
    Image.fromarray(labels).save(tmp_path / "jpeg.tif", compression="jpeg")
    with pytest.raises(DatasetError, match="TIFF with JPEG, whose lossy compression"):
        read_label_image(tmp_path / "jpeg.tif")
    for bands in (2, 3):
        pixels = np.stack([labels] * bands, axis=-1)
        tifffile.imwrite(tmp_path / "bands.tif", pixels, photometric="minisblack", planarconfig="contig")
        with pytest.raises(DatasetError, match=f"has {bands} bands, expected one value per pixel"):
            read_label_image(tmp_path / "bands.tif")


@pytest.mark.parametrize("value", [0.5, np.nan, 1e20])
def test_label_images_of_other_floats_are_refused(tmp_path, labels, value):
    array = labels.astype(np.float32)
    array[3, 4] = value
    tifffile.imwrite(tmp_path / "a.tif", array)
    with pytest.raises(DatasetError, match="of which 1 are not whole numbers"):
        read_label_image(tmp_path / "a.tif")


def test_label_images_of_several_pages_are_refused_but_not_their_reduced_copies(tmp_path, labels):
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([labels == value for value in range(5)]).astype(np.uint8))
    with pytest.raises(DatasetError, match="has 5 pages, expected one label image"):
        read_label_image(tmp_path / "pages.tif")
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as file:
        file.write(labels)
        file.write(labels[::2, ::2], subfiletype=1)
    np.testing.assert_array_equal(read_label_image(tmp_path / "pyramid.tif"), labels)


def test_unused_pages_of_an_image_are_named(tmp_path, rng, caplog):
    tifffile.imwrite(tmp_path / "a.tif", rng.integers(0, 256, (3, 64, 64), dtype=np.uint8), photometric="minisblack")
    load_image(tmp_path / "a.tif")
    assert "only the first of 3 pages is used" in caplog.text


def test_gray_label_image_with_an_opaque_alpha_is_read(tmp_path, labels):
    Image.fromarray(np.dstack([labels, np.full_like(labels, 255)])).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_label_image(tmp_path / "a.png"), labels)


@pytest.mark.parametrize(("hidden", "is_read"), [((0, 0, 0), True), ((255, 0, 0), False)])
def test_painted_label_image_may_be_transparent_where_no_class_is(tmp_path, hidden, is_read):
    rgba = np.zeros((*SIZE, 4), dtype=np.uint8)
    rgba[..., :3] = hidden
    rgba[5:20, 5:20] = (255, 0, 0, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    if is_read:
        np.testing.assert_array_equal(read_label_image(tmp_path / "a.png", allow_colors=True), rgba[..., :3])
    else:
        with pytest.raises(DatasetError, match=r"found colors \(RGBA\)"):
            read_label_image(tmp_path / "a.png", allow_colors=True)


# Warnings


def test_each_kind_of_warning_is_logged_once_by_all_workers():
    flags = warn.shared_flags()
    with multiprocessing.get_context("fork").Pool(3, warn.share_flags, (flags,)) as pool:
        first = pool.map(warn.is_first, ["dark"] * 12, chunksize=1)
    assert first.count(True) == 1
    assert not warn.is_first("dark")
    warn.forget()
    assert warn.is_first("dark")
