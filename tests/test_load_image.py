"""Loading of images: unusual files that users really have, and all types of sources."""

import io
import itertools
import logging
import os
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

from maskwright.data.images.find import find_images, is_image_name
from maskwright.data.images.label_images import read_label_image, read_panoptic_png
from maskwright.data.images.load import image_size, load_image
from maskwright.data.images.png import decode_color, decode_labels
from maskwright.data.storage.folders import open_folder
from maskwright.errors import DatasetError, ImageError
from tests import hostile_files


@pytest.fixture
def colors():
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("entry", hostile_files.IMAGES, ids=lambda entry: entry.file)
def test_hostile_image_is_read_or_refused(entry, hostile):
    path = hostile / entry.file
    if entry.expect == "load":
        image = load_image(path)
        assert image.shape[1::-1] == entry.size
        assert image_size(path) == image.shape[:2]
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        assert image.flags.c_contiguous
        assert image.flags.writeable
    else:
        with pytest.raises(ImageError) as error:
            load_image(path)
        assert entry.name in one_line(error)


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_exif_rotated_image_equals_the_upright_one_up_to_jpeg_rounding(orientation, hostile):
    plain = load_image(hostile / "images/plain.jpg").astype(int)
    turned = load_image(hostile / f"images/exif_orientation_{orientation}.jpg")
    assert np.abs(turned - plain).mean() < 1.5


def test_sixteen_bits_and_files_with_a_wrong_suffix_give_the_plain_image(hostile):
    plain = load_image(hostile / "images/plain.jpg").astype(int)
    for name in ("rgb16.png", "png_named.jpg", "cmyk.jpg", "progressive.jpg"):
        assert np.abs(load_image(hostile / "images" / name) - plain).mean() < 4, name
    gray = plain @ [0.299, 0.587, 0.114]
    for name, factor in (("gray16.png", 1 / 16), ("gray.jpg", 1)):  # the former uses 12 of 16 bits
        assert np.abs(load_image(hostile / "images" / name)[..., 0] - gray * factor).mean() < 6, name


def test_damaged_exif_is_logged_as_a_warning(hostile, caplog):
    with caplog.at_level(logging.WARNING):
        load_image(hostile / "images/exif_corrupt.jpg")
    assert "exif_corrupt.jpg" in caplog.text


@pytest.mark.parametrize("entry", hostile_files.LABELS, ids=lambda entry: entry.file)
def test_hostile_label_image_gives_ids_or_a_dataset_error(entry, hostile):
    path = hostile / entry.file
    if entry.name in ("rgb_colors.png", "lossy.jpg", "rgba_gray_ids.png"):
        with pytest.raises(DatasetError) as error:
            read_label_image(path)
        assert path.name in one_line(error)
    else:
        assert set(np.unique(read_label_image(path))) <= {0, 1, 3, 200, 255}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_every_exif_orientation_of_every_format_is_applied_once(tmp_path, colors, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(
        tmp_path / f"image.{kind}", colors, exif=exif.tobytes(), **({"lossless": True} if kind == "webp" else {})
    )
    with Image.open(path) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(load_image(path), expected)
    assert image_size(path) == expected.shape[:2] == ((9, 6) if orientation > 4 else (6, 9))


def test_label_image_is_rotated_like_its_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.arange(54, dtype=np.uint8).reshape(6, 9)
    np.testing.assert_array_equal(
        read_label_image(save(tmp_path / "label.png", values, exif=exif.tobytes())), np.rot90(values, -1)
    )


def test_path_bytes_pillow_image_array_and_tensor_give_the_same_image(tmp_path, colors):
    path = save(tmp_path / "image.png", colors)
    forms = [
        path,
        str(path),
        path.read_bytes(),
        Image.fromarray(colors),
        colors,
        torch.from_numpy(colors).permute(2, 0, 1),
    ]
    forms += [colors / 255, torch.from_numpy(colors / 255).permute(2, 0, 1).float(), colors.astype(np.uint16) * 257]
    for form in forms:
        np.testing.assert_array_equal(load_image(form), colors)


def test_float_images_are_rounded_to_the_nearest_level():
    steps = np.array([[0.0, 0.2499 / 255, 0.5, 254.6 / 255, 1.0]], dtype=np.float32)
    assert load_image(steps)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 1)])
def test_gray_arrays_are_repeated_over_three_channels(colors, shape):
    gray = colors[..., 0]
    np.testing.assert_array_equal(load_image(gray.reshape(shape)), np.stack([gray] * 3, axis=2))
    np.testing.assert_array_equal(load_image(torch.from_numpy(gray)[None]), np.stack([gray] * 3, axis=2))


@pytest.mark.parametrize(("largest", "expected"), [(200, 1), (4080, 16), (65535, 255), (32768, 128)])
@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff"])
def test_gray_of_16_bits_is_scaled_by_the_range_of_the_type(tmp_path, kind, largest, expected):
    values = np.array([[0, largest], [largest // 2, largest]], dtype=np.uint16)
    path = tmp_path / f"gray.{kind[-4:].strip()}"
    if kind == "big-endian tiff":
        Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes()).save(path)
    else:
        save(path, values)
    image = load_image(path)
    assert image[0, 0, 0] == 0
    assert image[1, 1, 0] == expected
    assert abs(int(image[1, 0, 0]) - expected // 2) <= 1


def test_transparency_is_composited_on_white(tmp_path):
    pixels = np.array([[[255, 0, 255, 0], [10, 20, 30, 255], [0, 0, 0, 128]]], dtype=np.uint8)
    expected = [[[255, 255, 255], [10, 20, 30], [127, 127, 127]]]
    np.testing.assert_array_equal(load_image(pixels), expected)
    np.testing.assert_array_equal(load_image(save(tmp_path / "alpha.png", pixels)), expected)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((2, 2), np.nan), "NaN"),
        (np.full((2, 2), 7.0), "0..1"),
        (np.zeros((2, 2), dtype=np.int64), "int64"),
        (np.zeros((3, 8, 8), dtype=np.uint8), "(3, 8, 8)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "0 x 4"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), "(2, 8, 8)"),
    ],
)
def test_array_that_is_not_an_image_is_rejected_with_the_reason(array, words):
    with pytest.raises(ImageError) as error:
        load_image(array, name="upload 7")
    assert words in one_line(error)
    assert "upload 7" in one_line(error)


def test_large_image_below_the_limit_gives_no_warning(tmp_path, monkeypatch, caplog):
    Image.new("L", (30, 20)).save(tmp_path / "large.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # Pillow warns above it, and refuses above twice as many
    assert load_image(tmp_path / "large.tif").shape == (20, 30, 3)
    assert caplog.text == ""


def test_pixel_limit_holds_for_files_and_arrays(tmp_path, colors):
    path = save(tmp_path / "image.png", colors)
    for source in (path, colors):
        load_image(source, max_pixels=54)
        with pytest.raises(ImageError, match="exceed the limit of 53"):
            load_image(source, max_pixels=53)


def test_missing_file_and_postscript_are_rejected(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="not an image"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


def test_truncated_file_is_rejected_in_every_format(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for kind in ("jpeg", "png", "webp", "bmp", "tiff", "ppm"):
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, kind)
        with pytest.raises(ImageError):
            load_image(stream.getvalue()[: len(stream.getvalue()) // 2], name=kind)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_label_image_with_few_bits_keeps_its_values(tmp_path, bits):
    values = np.arange(16, dtype=np.uint8).reshape(4, 4) % 2**bits
    image = Image.fromarray(values).convert("P")
    image.putpalette([0, 0, 0] * 256)
    image.putdata(values.ravel().tolist())
    image.save(tmp_path / "palette.png", bits=bits)
    np.testing.assert_array_equal(read_label_image(tmp_path / "palette.png"), values)
    gray = gray_png(values, bits)
    (tmp_path / "gray.png").write_bytes(gray)
    np.testing.assert_array_equal(read_label_image(tmp_path / "gray.png"), values)


def gray_png(values, bits):
    """Return a gray PNG with fewer than 8 bits, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    bitmap = ((values[..., None] >> np.arange(bits - 1, -1, -1)) & 1).reshape(height, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bitmap)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_label_image_with_16_bits_keeps_large_values(tmp_path):
    values = np.array([[0, 26001], [65535, 7]], dtype=np.uint16)
    np.testing.assert_array_equal(read_label_image(save(tmp_path / "ids.png", values)), values)


def test_panoptic_png_has_24_bits_and_gray_is_rejected(tmp_path):
    ids = np.array([[0, 255, 256], [65536, 14466198, 2**24 - 1]])
    color = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
    np.testing.assert_array_equal(read_panoptic_png(save(tmp_path / "ids.png", color)), ids)
    with pytest.raises(DatasetError, match=r"gray\.png.*expected an RGB PNG"):
        read_panoptic_png(save(tmp_path / "gray.png", color[..., 0]))


def test_find_images_accepts_files_folders_and_patterns_without_duplicates(tmp_path, colors):
    for name in ("b.png", "a.JPG", "sub/c.webp", "._a.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    found = find_images([tmp_path, tmp_path / "b.png", str(tmp_path / "*.png")])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.JPG", "b.png", "sub/c.webp"]
    assert find_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    (tmp_path / "loop").unlink()
    assert find_images(str(tmp_path / "**/*.webp")) == [tmp_path / "sub/c.webp"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_named_pipes_are_skipped_because_reading_one_would_wait_forever(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.png")
    assert find_images(tmp_path) == [tmp_path / "a.png", tmp_path / "broken.png"]
    with pytest.raises(ImageError, match=r"pipe\.png: neither a file nor a folder"):
        find_images(tmp_path / "pipe.png")


@pytest.mark.parametrize("item", ["nowhere", "empty", "*.png"])
def test_input_that_matches_nothing_is_an_error_that_names_it(tmp_path, item):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError) as error:
        find_images([tmp_path / item])
    assert str(tmp_path / item) in one_line(error)


def test_image_names_have_a_known_suffix_and_are_not_hidden():
    assert is_image_name("a/b.JPEG")
    assert not is_image_name("a/.b.jpg")
    assert not is_image_name("a/b.json")


def interlaced(data):
    """Return the PNG with the interlace flag set, although its pixels are not interlaced."""
    data = bytearray(data)
    data[28] = 1
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def every_mode():
    """Return (name, bytes) of PNG files in all modes of Pillow, with and without transparency, text and rotation."""
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (23, 31, 4), dtype=np.uint8)
    wide = rng.integers(0, 65536, (23, 31), dtype=np.uint16)
    images = {
        "rgb": Image.fromarray(rgba[..., :3]),
        "rgba": Image.fromarray(rgba),
        "gray": Image.fromarray(rgba[..., 0]),
        "gray alpha": Image.fromarray(rgba).convert("LA"),
        "16 bits": Image.fromarray(wide),
        "12 bits": Image.fromarray(wide >> 4),
        "bilevel": Image.fromarray(rgba[..., 0] > 127),
        "palette": Image.fromarray(rgba[..., :3]).quantize(200),
        "palette of 4 bits": Image.fromarray(rgba[..., :3]).quantize(16),
    }
    turned, text, xmp = Image.Exif(), PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    turned[0x0112] = 6
    text.add_text("Software", "x" * 2000, zip=True)
    xmp.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    for name, image in images.items():
        extras = {"": {}, " turned": {"exif": turned}, " with text": {"pnginfo": text}, " with xmp": {"pnginfo": xmp}}
        if image.mode in ("RGB", "L", "P", "1"):
            extras[" with a transparent color"] = {"transparency": (1, 2, 3) if image.mode == "RGB" else 5}
        for extra, options in extras.items():
            stream = io.BytesIO()
            image.save(stream, "PNG", **options)
            yield name + extra, stream.getvalue()


@pytest.mark.parametrize(("name", "data"), [pytest.param(*case, id=case[0]) for case in every_mode()])
def test_fast_png_decoder_equals_pillow(monkeypatch, tmp_path, name, data):
    path = tmp_path / "image.png"
    path.write_bytes(data)
    found = {read: outcome(read, path) for read in (load_image, read_label_image, read_panoptic_png, image_size)}
    for fast in ("load.decode_color", "load.read_size", "label_images.decode_color", "label_images.decode_labels"):
        monkeypatch.setattr(f"maskwright.data.images.{fast}", lambda data, limit: None)
    for read, result in found.items():
        np.testing.assert_array_equal(outcome(read, path), result)
        assert getattr(result, "dtype", None) == getattr(outcome(read, path), "dtype", None)


def outcome(read, path):
    """Return the result of a reader, or its error."""
    try:
        return read(path)
    except (DatasetError, ImageError) as error:
        return str(error)


def test_fast_png_decoder_is_used_for_plain_files_only():
    plain = {name for name, data in every_mode() if decode_color(data, 10**6) is not None}
    assert plain == {kind + extra for kind in ("rgb", "gray", "16 bits", "12 bits") for extra in ("", " with text")}
    numbers = {name for name, data in every_mode() if decode_labels(data, 10**6) is not None}
    assert {"palette", "palette with a transparent color", "gray", "16 bits", "bilevel"} <= numbers
    assert not any("turned" in name or "xmp" in name or "4 bits" in name for name in numbers)
    data = dict(every_mode())["rgb"]
    assert decode_color(data, 23 * 31 - 1) is None
    assert decode_color(interlaced(data), 10**6) is None
    for end in range(0, len(data), 97):
        assert decode_color(data[:end], 10**6) is None
        assert decode_labels(data[:end], 10**6) is None


def test_bilevel_png_of_any_width_is_decoded_and_a_damaged_one_is_left_to_pillow():
    rng = np.random.default_rng(0)
    for width, shape in itertools.product((1, 7, 8, 9, 250), ("noise", "disc")):
        rows, columns = np.mgrid[:60, :width]
        bits = rng.random((60, width)) < 0.5 if shape == "noise" else (rows - 30) ** 2 + (columns - 120) ** 2 < 900
        stream = io.BytesIO()
        Image.fromarray(bits).save(stream, "PNG")
        np.testing.assert_array_equal(decode_labels(stream.getvalue(), 10**6), bits.astype(np.uint8))
    data = stream.getvalue()
    for place in (20, 30, data.index(b"IDAT") + 9, len(data) - 15):  # size, its checksum, pixels, their checksum
        damaged = bytearray(data)
        damaged[place] ^= 1
        assert decode_labels(bytes(damaged), 10**6) is None
    assert not any(decode_labels(data[:end], 10**6) is not None for end in range(len(data) - 12))  # IEND is empty


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_images_in_an_archive_are_read_like_those_on_disk(tmp_path, colors, kind):
    values = colors[..., 0]
    save(tmp_path / "a.png", colors)
    save(tmp_path / "a.jpg", colors)
    save(tmp_path / "ids.png", values)
    names = ("a.png", "a.jpg", "ids.png")
    with (
        zipfile.ZipFile(tmp_path / "set.zip", "w") if kind == "zip" else tarfile.open(tmp_path / "set.tar", "w") as out
    ):
        for name in names:
            (out.write if kind == "zip" else out.add)(tmp_path / name, f"set/{name}")
    folder = open_folder(tmp_path / f"set.{kind}")
    for name in names:
        file = folder.file(name, "key")
        np.testing.assert_array_equal(load_image(file), load_image(tmp_path / name))
        assert image_size(file) == (6, 9)
    np.testing.assert_array_equal(read_label_image(file), values)
    with pytest.raises(DatasetError, match=rf"set\.{kind}/set/a\.jpg: a label image stored as JPEG"):
        read_label_image(folder.file("a.jpg", "key"))
