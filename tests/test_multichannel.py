"""Images with any number of channels: every format keeps the stored values."""

import io
import struct
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from maskwright.checkpoints.backbone import load_backbone_weights
from maskwright.checkpoints.convert import convert
from maskwright.data.build import open_dataset
from maskwright.data.check.check import check
from maskwright.data.images.find import find_images
from maskwright.data.images.label_images import read_label_image
from maskwright.data.images.load import image_size, load_image
from maskwright.data.images.multichannel import count_channels, load_channels, load_pixels, read_image_size
from maskwright.data.images.resize import resize_to
from maskwright.data.pixel_statistics import channel_sums, measure_pixel_statistics, summarize_sums
from maskwright.data.storage.folders import File, open_folder
from maskwright.data.transforms import CropBox, crop_image
from maskwright.errors import CheckpointError, DatasetError, ImageError, RecipeError
from maskwright.inference.predictor import Predictor
from maskwright.models import build_model
from maskwright.results.draw import to_display_rgb
from maskwright.structures.annotations import Category
from maskwright.training.train import train
from tests import tiny

SIZE = (20, 30)
CLASSES = (Category(1, "thing", True, (0, 0, 0)),)


def numbers(channels, dtype):
    """Return (H, W, C) values over the whole range of the type."""
    rng = np.random.default_rng(channels)
    if np.issubdtype(dtype, np.floating):
        return rng.normal(0, 1e4, (*SIZE, channels)).astype(dtype)
    limit = np.iinfo(dtype)
    return rng.integers(limit.min, limit.max, (*SIZE, channels), endpoint=True).astype(dtype)


def expected(array):
    return array if array.dtype == np.uint8 else array.astype(np.float32)


def assert_loads(source, array):
    found = load_channels(source, array.shape[2])
    np.testing.assert_array_equal(found, expected(array))
    assert found.dtype == expected(array).dtype
    assert found.flags.c_contiguous
    assert found.flags.writeable


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float32, np.float64, np.float16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 16])
def test_tiff_and_npy_keep_every_value(tmp_path, channels, dtype):
    array = numbers(channels, dtype)
    files = {
        "separate.tif": (array.transpose(2, 0, 1), {"planarconfig": "separate", "photometric": "minisblack"}),
        "together.tif": (array, {"planarconfig": "contig", "photometric": "minisblack"}),
        "pages.tif": (array.transpose(2, 0, 1), {"photometric": "minisblack"}),
        "deflate.tiff": (array.transpose(2, 0, 1), {"compression": "deflate", "photometric": "minisblack"}),
        "unsaid.tif": (array, {}),
    }
    for name, (stored, options) in files.items():
        if dtype == np.uint32 and "predictor" in options:
            continue
        tifffile.imwrite(tmp_path / name, stored.squeeze() if channels == 1 else stored, **options)
        assert_loads(tmp_path / name, array)
    for name, stored in {"last.npy": array, "first.npy": array.transpose(2, 0, 1)}.items():
        np.save(tmp_path / name, stored)
        assert_loads(tmp_path / name, array)
        assert_loads((tmp_path / name).read_bytes(), array)
    assert_loads(array, array)
    if dtype not in (np.uint32, np.float64):
        assert_loads(
            torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)).astype(np.float32)),
            expected(array).astype(np.float32),
        )


def wide_png(array, interlaced=0):
    """Return a PNG with 16 bits per channel, which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_keeps_every_value(tmp_path, channels, dtype):
    array = numbers(channels, dtype)
    path = tmp_path / "image.png"
    if dtype == np.uint16:
        path.write_bytes(wide_png(array))
    else:
        Image.fromarray(array.squeeze()).save(path)
    assert_loads(path, array)


def test_color_of_16_bits_that_would_lose_eight_is_rejected(tmp_path):
    (tmp_path / "a.png").write_bytes(wide_png(numbers(3, np.uint16), interlaced=1))
    with pytest.raises(ImageError, match=r"a\.png: .* 16 bits per color"):
        load_channels(tmp_path / "a.png", 3)


def test_alpha_is_a_channel_like_any_other(tmp_path):
    array = numbers(4, np.uint8)
    Image.fromarray(array).save(tmp_path / "a.webp", lossless=True, exact=True)
    Image.fromarray(array).save(tmp_path / "a.tif", compression="tiff_lzw")
    assert_loads(tmp_path / "a.webp", array)
    assert_loads(tmp_path / "a.tif", array)
    assert_loads(Image.fromarray(array), array)


def test_jpeg_and_palette_are_read_as_rgb(tmp_path):
    array = numbers(3, np.uint8)
    Image.fromarray(array).save(tmp_path / "a.jpg")
    np.testing.assert_array_equal(load_channels(tmp_path / "a.jpg", 3), load_image(tmp_path / "a.jpg"))
    Image.fromarray(array).quantize(16).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_channels(tmp_path / "a.png", 3), load_image(tmp_path / "a.png"))


def test_exif_rotation_is_applied(tmp_path):
    array, exif = numbers(3, np.uint8), Image.Exif()
    exif[0x0112] = 6
    for name in ("a.png", "a.tif"):
        Image.fromarray(array).save(tmp_path / name, exif=exif)
        np.testing.assert_array_equal(load_channels(tmp_path / name, 3), np.rot90(array, -1))


def test_image_in_an_archive_and_its_size(tmp_path):
    array = numbers(5, np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array.transpose(2, 0, 1), photometric="minisblack")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.write(tmp_path / "a.tif", "a.tif")
    file = open_folder(tmp_path / "set.zip").file("a.tif", "key")
    assert_loads(file, array)
    assert read_image_size(file, 5) == SIZE
    with pytest.raises(ImageError, match=r"set\.zip/a\.tif: found 5 channels .*, but model\.channels is 4"):
        load_channels(file, 4)


def test_model_without_channels_gets_the_usual_rgb_image(tmp_path):
    Image.fromarray(numbers(4, np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_pixels(tmp_path / "a.png", None), load_image(tmp_path / "a.png"))
    assert read_image_size(File(str(tmp_path / "a.png")), None) == SIZE


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 6, 3)), "found 3 channels (shape (4, 6, 3)), but model.channels is 5"),
        (np.zeros((4, 6)), "found 1 channel, but model.channels is 5"),
        (np.zeros((2, 4, 6, 5)), "found shape (2, 4, 6, 5)"),
        (np.full((4, 6, 5), np.nan), "120 values are NaN or infinite"),
        (np.zeros((4, 6, 5), dtype=complex), "found complex128 values"),
        (np.zeros((0, 6, 5)), "0 x 6 pixels"),
    ],
)
def test_array_with_other_channels_is_rejected_with_the_reason(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    for source in (array, tmp_path / "a.npy"):
        with pytest.raises(ImageError) as error:
            load_channels(source, 5, name="upload 7")
        assert words in str(error.value)
        assert str(error.value).startswith("upload 7: ")


def test_pixel_limit_holds_before_anything_is_decoded(tmp_path):
    array = numbers(5, np.uint16)
    np.save(tmp_path / "a.npy", array)
    tifffile.imwrite(tmp_path / "a.tif", array.transpose(2, 0, 1), photometric="minisblack")
    for name in ("a.npy", "a.tif"):
        load_channels(tmp_path / name, 5, max_pixels=600)
        with pytest.raises(ImageError, match=r"limit|shape"):
            load_channels(tmp_path / name, 5, max_pixels=500)


def test_damaged_files_are_named(tmp_path):
    array = numbers(5, np.uint16)
    np.save(tmp_path / "a.npy", array)
    tifffile.imwrite(tmp_path / "a.tif", array.transpose(2, 0, 1), photometric="minisblack", compression="deflate")
    for name in ("a.npy", "a.tif"):
        whole = (tmp_path / name).read_bytes()
        for end in (len(whole) // 2, 9):
            (tmp_path / name).write_bytes(whole[:end])
            with pytest.raises(ImageError, match=name) as error:
                load_channels(tmp_path / name, 5)
            assert "\n" not in str(error.value)
    with pytest.raises(ImageError, match="cannot be read"):
        load_channels(tmp_path / "nowhere.tif", 5)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ImageError, match=r"objects\.npy: .*object"):
        load_channels(tmp_path / "objects.npy", 5)


def test_npy_is_accepted_as_image_and_as_label_image(tmp_path):
    colors, labels = numbers(3, np.uint8), numbers(1, np.uint8)[..., 0]
    np.save(tmp_path / "colors.npy", colors)
    np.testing.assert_array_equal(load_image(tmp_path / "colors.npy"), colors)
    assert image_size(tmp_path / "colors.npy") == SIZE
    for stored in (labels, labels.astype(np.int64), labels[None], labels[..., None], labels.astype(np.uint16)):
        np.save(tmp_path / "labels.npy", stored)
        np.testing.assert_array_equal(read_label_image(tmp_path / "labels.npy"), labels)
    np.save(tmp_path / "labels.npy", labels / 7)
    with pytest.raises(DatasetError, match=r"labels\.npy: found floats in a label image"):
        read_label_image(tmp_path / "labels.npy")
    assert [path.name for path in find_images(tmp_path)] == ["colors.npy", "labels.npy"]


def test_images_are_displayed_in_visible_rgb():
    usual = numbers(3, np.uint8)
    assert to_display_rgb(usual) is usual
    assert to_display_rgb(numbers(4, np.uint8)).tolist() == numbers(4, np.uint8)[..., :3].tolist()
    gray = to_display_rgb(numbers(2, np.uint8))
    assert (gray == numbers(2, np.uint8)[..., :1]).all()
    deep = (np.linspace(500, 4000, 600).reshape(*SIZE, 1) * [1, 2, 3, 4, 5]).astype(np.float32)
    shown = to_display_rgb(deep)
    assert shown.shape == (*SIZE, 3)
    assert shown.dtype == np.uint8
    assert shown.min() == 0
    assert shown.max() == 255
    assert abs(int(shown[10, 0, 0]) - 127) < 4
    assert to_display_rgb(np.zeros((4, 6, 5), dtype=np.float32)).max() == 0


def test_pillow_image_of_floats_and_wide_gray(tmp_path):
    array = numbers(1, np.float32)
    image = Image.fromarray(array[..., 0])
    assert_loads(image, array)
    stream = io.BytesIO()
    image.save(stream, "TIFF")
    assert_loads(stream.getvalue(), array)


# From files to a trained model and its predictions


MEASURED = {"model__channels": 5, "model__pixel_mean": "measure", "model__pixel_std": "measure"}


def write_set(folder, channels=5, count=4, size=(64, 64)):
    """The scenes of `tiny` with more channels: colors in other units, and channels that separate the classes."""
    tiny.write_labels(folder, count, size)
    for number in range(count):
        (folder / f"images/{number:02d}.png").unlink()
        ids, categories = tiny.scene(number, size)
        colors = tiny.scene_image(number, size).astype(np.float32)
        values = np.array([0, *categories], dtype=np.float32)[ids]
        more = [values * (channel + 1) for channel in range(max(0, channels - 3))]
        array = (np.stack([*np.moveaxis(colors, 2, 0)[:channels], *more], 0) * 100).astype(np.uint16)
        planes = "separate" if channels > 1 else None
        tifffile.imwrite(folder / f"images/{number:02d}.tif", array, photometric="minisblack", planarconfig=planes)
    return folder


def test_reader_returns_stored_channels_and_names_files_with_others(tmp_path):
    folder = write_set(tmp_path)
    recipe = tiny.recipe(folder, "semantic", **MEASURED)
    annotated = open_dataset(recipe, "train")
    image, target = annotated.sample(0)
    assert (image.shape, image.dtype) == ((64, 64, 5), np.float32)
    assert len(target) == 4
    with pytest.raises(ImageError, match=r"00\.tif: found 5 channels .*model\.channels is 4"):
        replace(annotated, channels=4).image(0)


def test_measured_statistics_are_those_of_all_pixels(tmp_path):
    annotated = open_dataset(
        tiny.recipe(
            write_set(tmp_path), "semantic", model__channels=5, model__pixel_mean="measure", model__pixel_std="measure"
        ),
        "train",
    )
    pixels = np.concatenate([annotated.image(index).reshape(-1, 5) for index in range(4)]).astype(np.float64)
    measured = measure_pixel_statistics(annotated)
    assert measured.num_images == 4
    np.testing.assert_allclose(measured.mean, pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(measured.std, pixels.std(0), rtol=1e-5)
    assert measure_pixel_statistics(annotated, 2).num_images == 2
    usual = open_dataset(tiny.recipe(tiny.write_labels(tmp_path / "rgb"), "semantic"), "train")
    colors = np.concatenate([usual.image(index).reshape(-1, 3) for index in range(4)]).astype(np.float64)
    np.testing.assert_allclose(measure_pixel_statistics(usual).mean, colors.mean(0), rtol=1e-5)


def test_channel_without_contrast_is_not_divided_by_zero():
    sums = channel_sums(np.full((4, 4, 2), 0.1, dtype=np.float32))
    assert summarize_sums(sums, 1).std == (1.0, 1.0)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_multichannel_sample_is_cropped_like_rgb(dtype):
    """Each channel is cropped as in an RGB image, up to Pillow's rounding."""
    rgb = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    crop = CropBox(47, 63, 5, 7, 32, 40, True)
    expected = crop_image(rgb, crop).astype(np.float32)
    image = np.concatenate([rgb, rgb[..., :2]], axis=2).astype(dtype)
    found = crop_image(image, crop)
    assert found.shape == (5, 32, 40)
    assert found.dtype == dtype
    assert found.flags.c_contiguous
    assert np.abs(found[[0, 1, 2]] - expected).max() <= (0 if dtype == np.uint8 else 1.01)
    resized = resize_to(image, (30, 40))
    assert resized.shape == (30, 40, 5)
    assert np.abs(resized[..., 3:] - resize_to(rgb, (30, 40))[..., :2].astype(np.float32)).max() <= 1.01


@pytest.mark.parametrize(
    ("backbone", "channels"), [("test_resnet", 1), ("test_resnet", 6), ("swin_tiny_patch4_window7_224", 6)]
)
def test_inflated_first_convolution_equals_the_rgb_network_on_a_gray_image(tmp_path, backbone, channels):
    options = {"model__backbone": backbone, "model__hidden_dim": 32}
    rgb = build_model(tiny.recipe(tmp_path, "semantic", **options).model, CLASSES)
    path = tmp_path / "backbone.safetensors"
    state = {key: tensor.contiguous() for key, tensor in rgb.backbone.state_dict().items()}
    save_file({key.removeprefix("network."): tensor for key, tensor in state.items()}, path)
    numbers = [0.0] * channels, [1.0] * channels
    options |= {"model__channels": channels, "model__backbone_weights": str(path)}
    wide = tiny.recipe(tmp_path, "semantic", **options, model__pixel_mean=numbers[0], model__pixel_std=numbers[1])
    model = build_model(wide.model, CLASSES)
    lines = load_backbone_weights(model)
    assert any(f"from 3 channels to {channels}" in line for line in lines)
    gray = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        expected = rgb.eval().backbone(gray.expand(1, 3, 64, 64)).features
        found = model.eval().backbone(gray.expand(1, channels, 64, 64)).features
    for stride, features in expected.items():
        scale = features.abs().max().item()
        torch.testing.assert_close(found[stride], features, rtol=1e-4, atol=2e-4 * scale)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__channels": 4}, "channels 4 needs pixel_mean"),
        ({"model__channels": 4, "model__pixel_mean": [1, 2, 3], "model__pixel_std": "measure"}, "pixel_mean has 3"),
        ({"model__pixel_mean": [1, 2, 3, 4]}, "pixel_mean has 4 values, but images have 3 channels"),
        ({"model__pixel_std": [1, 0, 1]}, "greater than 0"),
        ({"model__channels": 17, "model__pixel_mean": "measure"}, "channels"),
        (
            {
                "model__channels": 4,
                "model__pixel_mean": "measure",
                "model__pixel_std": "measure",
                "train__augment": {"resize": "short_side", "short_sides": [64], "crop_size": [64, 64], "color": True},
            },
            "color_jitter changes red, green and blue",
        ),
    ],
)
def test_recipe_with_contradictory_channels_is_rejected(tmp_path, changes, words):
    with pytest.raises(RecipeError, match=words):
        tiny.recipe(tmp_path, "semantic", **changes)


def test_model_without_pixel_statistics_is_not_built(tmp_path):
    config = tiny.recipe(tmp_path, "semantic", model__pixel_mean="measure").model
    with pytest.raises(RecipeError, match="not measured yet"):
        build_model(config, CLASSES)


def test_training_and_prediction_with_five_channels(tmp_path):
    folder = write_set(tmp_path / "data")
    changes = {
        "model__channels": 5,
        "model__pixel_mean": "measure",
        "model__pixel_std": "measure",
        "train__steps": 30,
        "train__learning_rate": 3e-3,
        "train__checkpoint_every": 30,
        "train__log_every": 30,
    }
    recipe = tiny.recipe(folder, "semantic", **changes)
    scores = train(recipe, tmp_path / "run")
    assert scores["mIoU"] > 0.6
    again = train(recipe, tmp_path / "run")  # finished; measured anew, and found to be the same recipe
    assert again["mIoU"] == scores["mIoU"]
    predictor = Predictor(tmp_path / "run/last.safetensors")
    config = predictor.model.config
    assert (config.channels, len(config.pixel_mean)) == (5, 5)
    assert config.pixel_mean == measure_pixel_statistics(open_dataset(recipe, "train")).mean
    path = folder / "images/00.tif"
    result = predictor(path)
    assert result.size == (64, 64)
    assert (result.label_map == predictor(load_channels(path, 5)).label_map).all()
    assert result.overlay().size == (64, 64)
    assert len(result.save(tmp_path / "out")) >= 2
    assert predictor(path, tile_size=48, short_side=None).size == (64, 64)
    with pytest.raises(ImageError, match=r"model\.channels is 5"):
        predictor(np.zeros((64, 64, 3), dtype=np.uint8))
    with pytest.raises(CheckpointError, match="5 channels"):
        convert(tmp_path / "run/last.safetensors", tmp_path / "theirs", to="transformers")


def test_check_measures_images_with_many_channels(tmp_path):
    folder = write_set(tmp_path)
    report = check(folder, workers=1)
    assert report.errors == 0
    lines = yaml.safe_load(report.recipe_lines())["model"]
    assert (lines["channels"], len(lines["pixel_mean"])) == (5, 5)
    tiny.recipe(folder, "semantic", **{f"model__{key}": value for key, value in lines.items()})
    assert report.previews[0].jpeg


def test_channels_are_counted_only_for_images_that_are_not_rgb(tmp_path):
    Image.fromarray(numbers(4, np.uint8)).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", numbers(6, np.uint16), photometric="minisblack", planarconfig="contig")
    np.save(tmp_path / "a.npy", numbers(2, np.float32))
    (tmp_path / "b.tif").write_bytes(b"II*\0 and nothing else")
    counted = {name: count_channels(File(str(tmp_path / name))) for name in ("a.png", "a.tif", "a.npy", "b.tif")}
    assert counted == {"a.png": None, "a.tif": 6, "a.npy": 2, "b.tif": None}
