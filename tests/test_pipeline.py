"""Scales, flips, windows and tiles against the formulas, with everything at full size at once."""

import gc
import weakref

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image

import maskwright.inference.predict_each as files_module
import maskwright.inference.predictor as predictor_module
from maskwright.checkpoints.load import load_model
from maskwright.config.recipe import change_settings
from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.data.images import tiled_tiff as regions
from maskwright.data.images.tiled_tiff import ArrayImage
from maskwright.errors import MaskwrightError
from maskwright.evaluation.evaluate import evaluate
from maskwright.inference import blockwise_postprocess
from maskwright.inference.blockwise_upsampling import SIDE
from maskwright.inference.mask_upsampling import CropPrediction
from maskwright.inference.pipeline import Pipeline
from maskwright.inference.predict_files import predict_files
from maskwright.inference.predictor import Predictor
from maskwright.inference.preprocess import prepare
from maskwright.inference.test_time_augmentation import MaskQueries
from maskwright.inference.tiling import Rectangle
from maskwright.models import build_model
from maskwright.structures.annotations import Category, pad_images
from maskwright.structures.predictions import MaskPrediction
from tests import tiny

SIZE = (75, 101)


@pytest.fixture(scope="module")
def masks_model():
    return load_model(tiny.trained_model(), "cpu")


@pytest.fixture(scope="module")
def pixels_model():
    """A per-pixel model that takes images of any size."""
    torch.manual_seed(0)
    options = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    config = ModelConfig(
        family="semantic_fpn", backbone="swin_tiny_patch4_window7_224", backbone_options=options, width=32
    )
    categories = [Category(i, f"class {i}", False, (i, i, i)) for i in range(5)]
    model = build_model(config, categories).eval()
    model.evaluate_config = EvaluateConfig(task="semantic")
    return model


@pytest.fixture
def image():
    return tiny.scene_image(1, SIZE)


def resized(maps, size):
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


@torch.no_grad()
def plain_scores(model, pixels, output_size, at="output"):
    """(K, H, W) logits or sums of class times mask probability of one image (h, w, 3) at a size."""
    images, padding = pad_images([torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)], model.size_divisor)
    prediction = model(images, padding).final
    height, width = pixels.shape[:2]
    if not isinstance(prediction, MaskPrediction):
        return resized(resized(prediction.class_logits[0], images.shape[-2:])[:, :height, :width], output_size)
    masks = resized(prediction.mask_logits()[0], images.shape[-2:])[:, :height, :width]
    masks = resized(masks, output_size) if at == "output" else masks
    scores = torch.einsum("qk,qhw->khw", prediction.class_logits[0].softmax(-1)[:, :-1], masks.sigmoid())
    return resized(scores, output_size)


def plain_mean(model, image, config):
    """The mean over scales and flips of scores, or of probabilities where they are logits, at the image's size."""
    views = []
    for pixels in prepare(ArrayImage(image), config).scales:
        for flipped in (False, True)[: 1 + config.flip]:
            scores = plain_scores(model, pixels[:, ::-1] if flipped else pixels, SIZE, config.semantic_resolution)
            scores = scores.softmax(0) if model.tasks == ("semantic",) else scores
            views.append(scores.flip(-1) if flipped else scores)
    return torch.stack(views).mean(0)


def assert_same_map(ours, theirs):
    """Equal but for pixels where two classes tie to the last bits."""
    assert ours.shape == tuple(theirs.shape)
    assert (ours != theirs.numpy()).sum() <= 2


def one(model, image, **settings):
    return Predictor(model, device="cpu")(image, **settings)


# Scales and flips


@pytest.mark.parametrize("settings", [{"flip": True}, {"scales": (0.5, 1.0, 1.5), "flip": True}, {"scales": (1.25,)}])
@pytest.mark.parametrize("semantic_resolution", ["input", "output"])
def test_semantic_scores_of_scales_and_flips_are_averaged(
    masks_model, pixels_model, image, settings, semantic_resolution
):
    for model in (masks_model, pixels_model):
        config = EvaluateConfig(task="semantic", semantic_resolution=semantic_resolution, short_side=64, **settings)
        expected = plain_mean(model, image, config).argmax(0)
        ((result, _),) = Pipeline(model, config).segment([(prepare(ArrayImage(image), config), None)])
        assert_same_map(result.label_map, expected)
        assert result.labels.tolist() == expected.unique().tolist()


def test_averaged_scores_are_those_of_the_formula(masks_model, pixels_model, image):
    for model in (masks_model, pixels_model):
        config = EvaluateConfig(task="semantic", scales=(0.75, 1.0), flip=True)
        (done,) = Pipeline(model, config).predict([(prepare(ArrayImage(image), config), None)])
        (scores,) = done.predictions
        torch.testing.assert_close(scores.values, plain_mean(model, image, config), atol=2e-5, rtol=1e-5)


def test_scales_are_relative_to_the_size_in_the_recipe():
    picture = ArrayImage(np.zeros((100, 300, 3), np.uint8))

    def sizes(**settings):
        return [scale.shape[:2] for scale in prepare(picture, EvaluateConfig(task="semantic", **settings)).scales]

    assert sizes(scales=(0.5, 1, 1.75)) == [(50, 150), (100, 300), (175, 525)]
    assert sizes(scales=(0.5, 2), short_side=200) == [(100, 300), (400, 1200)]
    assert sizes(scales=(0.5, 2), short_side=200, max_side=300) == [(50, 150), (200, 600)]


def test_batches_of_crops_do_not_change_results(masks_model, image):
    settings = {"task": "semantic", "scales": (0.5, 1.0), "flip": True}
    single = Predictor(masks_model, device="cpu")(image, **settings)
    batched = Predictor(masks_model, device="cpu", batch_size=8)([image, image], **settings)
    for result in batched:
        assert (result.label_map != single.label_map).sum() <= 2


# Flips of objects


def handmade(seed=0, queries=12, size=(64, 96)):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 6, size[0] // 16, size[1] // 16, generator=generator)
    features = F.interpolate(coarse, size=(size[0] // 4, size[1] // 4), mode="bilinear", align_corners=False) * 3
    return MaskPrediction(
        torch.randn(1, queries, 6, generator=generator) * 5, torch.randn(1, queries, 6, generator=generator), features
    )


def mirrored(prediction, order):
    """The prediction of a perfect model for the flipped image, with its queries in another order."""
    return MaskPrediction(
        prediction.class_logits[:, order], prediction.mask_embeddings[:, order], prediction.mask_features.flip(-1)
    )


def whole_masks(objects: MaskQueries, numbers: list[int]) -> torch.Tensor:
    """(n, H, W) mask logits at the output size."""
    ((_, masks),) = blockwise_postprocess.output_bands(objects, torch.tensor(numbers), 10**9)
    return masks.join(masks.all_logits(masks.every_block()).unflatten(2, (SIDE, SIDE)))


def test_equal_predictions_for_an_image_and_its_flip_are_merged():
    prediction = handmade()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    first, second = (
        CropPrediction(prediction, (64, 96), (64, 96)),
        CropPrediction(mirrored(prediction, order), (64, 96), (64, 96), True),
    )
    alone, both = MaskQueries([first], (64, 96)), MaskQueries([first, second], (64, 96))
    seen = (prediction.mask_logits()[0] > 0).flatten(1).any(1)
    matched = both.partners[0].tolist()[: int(seen.sum())]
    assert sorted(matched) == seen.nonzero()[:, 0].tolist()
    for number, query in enumerate(matched):
        assert order[both.partners[1][number]] == query
        torch.testing.assert_close(both.probabilities[number], alone.probabilities[query])
        wanted, found = whole_masks(alone, [query]), whole_masks(both, [number])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_masks_are_compared_at_the_same_place_despite_padding():
    """An image of 64 x 83 is padded on the right, so its flip is 13 pixels further left than a mirrored input."""
    width = 83
    image = torch.zeros(1, 3, 16, 24)
    image[:, 0, :, 2:5] = image[:, 1, 4:9, 10:14] = image[:, 2, 10:, 15:20] = 1
    mirror = F.interpolate(image, (64, 96), mode="nearest")[..., :width].flip(-1)
    flipped = F.avg_pool2d(F.pad(mirror, (0, 96 - width)), 4)
    logits = torch.full((1, 3, 6), -9.0)
    logits[0, torch.arange(3), torch.arange(3)] = 9.0
    views = [
        CropPrediction(MaskPrediction(logits, torch.eye(3)[None], image * 20 - 10), (64, 96), (64, width)),
        CropPrediction(MaskPrediction(logits, torch.eye(3)[None], flipped * 20 - 10), (64, 96), (64, width), True),
    ]
    objects = MaskQueries(views, (64, width))
    assert objects.partners.tolist() == [[0, 1, 2], [0, 1, 2]]
    torch.testing.assert_close(objects.probabilities, logits[0].softmax(-1))
    inside, alone = (
        whole_masks(objects, [0, 1, 2]) > 0,
        whole_masks(MaskQueries(views[:1], (64, width)), [0, 1, 2]) > 0,
    )
    assert ((inside & alone).sum((1, 2)) / (inside | alone).sum((1, 2)) > 0.8).all()


def test_the_probability_of_an_object_without_partner_is_halved():
    features = torch.full((1, 2, 16, 24), -20.0)
    features[0, 0, :, :8] = features[0, 1, :, 16:] = 20.0
    logits = torch.zeros(1, 2, 6)
    logits[0, 0, 0] = logits[0, 1, 2] = 20.0
    nothing = torch.zeros(1, 2, 6)
    nothing[0, 0, 0] = nothing[0, 1, 5] = 20.0  # the second query is "no object"
    first = CropPrediction(MaskPrediction(logits, torch.eye(2)[None], features), (64, 96), (64, 96))
    gone = features.flip(-1).clone()
    gone[0, 1] = -20.0
    second = CropPrediction(MaskPrediction(nothing, torch.eye(2)[None], gone), (64, 96), (64, 96), True)
    objects = MaskQueries([first, second], (64, 96))
    assert objects.partners.tolist() == [[0, 1, -1], [0, -1, 1]]
    assert objects.probabilities.amax(1).tolist() == pytest.approx([1, 0.5, 1])
    assert objects.probabilities.argmax(1).tolist()[::2] == [0, 5]
    assert objects.probabilities[1, [2, 5]].tolist() == pytest.approx([0.5, 0.5])
    torch.testing.assert_close(whole_masks(objects, [1]), whole_masks(MaskQueries([first], (64, 96)), [1]))


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_flips_find_the_same_objects(masks_model, task):
    image = tiny.scene_image(1)
    plain, flipped = (one(masks_model, image, task=task, flip=flip) for flip in (False, True))
    assert flipped.task == task
    certain = plain.scores > 0.5
    assert certain.sum() >= 1
    for label, mask in zip(plain.labels[certain], plain.masks[certain], strict=True):
        found = [other for other, kind in zip(flipped.masks, flipped.labels, strict=True) if kind == label]
        assert max((other & mask).sum() / (other | mask).sum() for other in found) > 0.5
    mirror = one(masks_model, np.ascontiguousarray(image[:, ::-1]), task=task, flip=True)
    assert sorted(mirror.labels.tolist()) == sorted(flipped.labels.tolist())
    np.testing.assert_allclose(np.sort(mirror.scores), np.sort(flipped.scores), atol=1e-3)


# Windows


@pytest.mark.parametrize(("window", "stride"), [((32, 64), (21, 43)), ((64, 64), None), ((200, 300), None)])
def test_windows_are_averaged_as_mmseg_does(masks_model, pixels_model, image, window, stride):
    down, across = stride or (round(window[0] * 2 / 3), round(window[1] * 2 / 3))
    for model in (masks_model, pixels_model):
        total, count = torch.zeros(len(model.categories), *SIZE), torch.zeros(1, *SIZE)
        for row in range(max(SIZE[0] - window[0] + down - 1, 0) // down + 1):
            for column in range(max(SIZE[1] - window[1] + across - 1, 0) // across + 1):
                bottom, right = min(row * down + window[0], SIZE[0]), min(column * across + window[1], SIZE[1])
                top, left = max(bottom - window[0], 0), max(right - window[1], 0)
                part = plain_scores(model, image[top:bottom, left:right], (bottom - top, right - left), "input")
                total += F.pad(part, (left, SIZE[1] - right, top, SIZE[0] - bottom))
                count[:, top:bottom, left:right] += 1
        assert (count > 0).all()
        result = one(model, image, task="semantic", window_size=window, window_stride=stride)
        assert_same_map(result.label_map, (total / count).argmax(0))


def test_a_window_larger_than_the_image_is_the_whole_image(pixels_model, image):
    plain, windowed = one(pixels_model, image), one(pixels_model, image, window_size=(512, 512))
    assert np.array_equal(plain.label_map, windowed.label_map)


# Tiles


def sheet(rows=2, columns=3):
    """A grid of scenes of 64 x 64."""
    return np.concatenate(
        [
            np.concatenate([tiny.scene_image(row * columns + column) for column in range(columns)], 1)
            for row in range(rows)
        ]
    )


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_one_tile_that_covers_all_is_the_image(masks_model, task):
    whole = one(masks_model, sheet(), task=task)
    for settings in ({"tile_size": 192}, {"tile_size": 192, "tile_overlap": 0}, {"tile_size": 5000}):
        tiled = one(masks_model, sheet(), task=task, **settings)
        assert np.array_equal(tiled.masks, whole.masks)
        assert tiled.labels.tolist() == whole.labels.tolist()
        assert whole.scores is None or np.array_equal(tiled.scores, whole.scores)


def test_each_tile_is_an_image_of_its_own(masks_model):
    settings = {"task": "semantic", "short_side": 80, "scales": (0.5, 1.0), "flip": True}
    tiled = one(masks_model, sheet(), tile_size=64, tile_overlap=0, **settings)
    alone = Predictor(masks_model, device="cpu")([tiny.scene_image(i) for i in range(6)], **settings)
    for number, result in enumerate(alone):
        row, column = divmod(number, 3)
        place = (slice(row * 64, row * 64 + 64), slice(column * 64, column * 64 + 64))
        assert np.array_equal(tiled.label_map[place], result.label_map)
    assert tiled.label_map.shape == (128, 192)
    assert np.array_equal(tiled.image, sheet())


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_objects_on_a_seam_are_found_once(masks_model, task):
    """A scene that the model was trained on, with a seam through its middle."""
    picture = np.pad(tiny.scene_image(1), ((0, 0), (0, 32), (0, 0)), mode="reflect")
    whole = one(masks_model, tiny.scene_image(1), task=task)
    tiled = one(masks_model, picture, task=task, tile_size=64, tile_overlap=32)
    assert tiled.size == (64, 96)
    certain = (whole.scores > 0.6) & (whole.areas > 0)
    assert certain.sum() >= 1
    for label, mask in zip(whole.labels[certain], whole.masks[certain], strict=True):
        overlaps = [
            (mask & other[:, :64]).sum() / mask.sum()
            for other, kind, score in zip(tiled.masks, tiled.labels, tiled.scores, strict=True)
            if kind == label and score > 0.5
        ]
        assert max(overlaps) > 0.6


def test_a_large_tiff_is_read_tile_by_tile(masks_model, tmp_path, monkeypatch):
    picture = sheet(4, 4)
    tifffile.imwrite(tmp_path / "large.tif", picture, photometric="rgb", tile=(64, 64))
    expected = one(masks_model, picture, task="panoptic", tile_size=96)
    asked = []
    real = regions.TiledTiffImage.read
    monkeypatch.setattr(
        regions.TiledTiffImage, "read", lambda self, *area: asked.append(Rectangle(*area)) or real(self, *area)
    )
    monkeypatch.setattr(predictor_module, "MAX_PIXELS", 1000)  # else the image is read at the end, for overlays
    result = one(masks_model, tmp_path / "large.tif", task="panoptic", tile_size=96)
    assert len(asked) >= 9
    assert {area.size for area in asked} == {(96, 96)}
    assert result.image is None
    assert result.source == str(tmp_path / "large.tif")
    assert np.array_equal(result.segment_map, expected.segment_map)


def test_the_results_of_a_large_image_are_saved(masks_model, tmp_path):
    tifffile.imwrite(tmp_path / "large.tif", sheet(), photometric="rgb", tile=(64, 64))
    for task in ("semantic", "instance", "panoptic"):
        summary = predict_files(
            Predictor(masks_model, device="cpu"),
            [str(tmp_path / "large.tif")],
            tmp_path / task,
            task=task,
            tile_size=64,
        )
        assert summary.done == 1
        assert (tmp_path / task / "large_overlay.png").is_file()
        assert len(list((tmp_path / task).iterdir())) == {"semantic": 2, "instance": 2, "panoptic": 3}[task]


def test_evaluation_uses_flips_windows_and_tiles_as_prediction_does(masks_model, tmp_path):
    folder = tiny.write_panoptic(tmp_path / "data", 3)
    for settings in ({"evaluate__flip": True}, {"evaluate__tile_size": 48, "evaluate__tile_overlap": 16}):
        every = ("pq", "ap", "mean_iou")
        together = evaluate(masks_model, tiny.recipe(folder, evaluate__metrics=every, **settings)).scores
        for task, name in (("semantic", "mIoU"), ("instance", "AP"), ("panoptic", "PQ")):
            alone = evaluate(masks_model, tiny.recipe(folder, evaluate__task=task, **settings)).scores
            assert together[name] == alone[name]
    scores = evaluate(
        masks_model,
        tiny.recipe(folder, evaluate__task="semantic", evaluate__window_size=(32, 32), evaluate__scales=(1.0, 1.5)),
    ).scores
    assert 0 < scores["mIoU"] < 1


# Contradictions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "panoptic", "scales": (0.5, 1)}, r"^scales \[0.5, 1.0\] are for task semantic"),
        (
            {"task": "instance", "window_size": (64, 64)},
            r"^window_size \[64, 64\] is for task semantic; for task instance set tile_size",
        ),
        (
            {"task": "semantic", "window_size": (64, 64), "tile_size": 64},
            "window_size .* and tile_size 64 cannot be combined",
        ),
        ({"task": "semantic", "window_stride": (64, 64)}, "window_stride .* needs window_size"),
        ({"task": "semantic", "window_stride": (64, 65), "window_size": (64, 64)}, "leaves gaps"),
        ({"tile_overlap": 8}, "tile_overlap 8 needs tile_size"),
        ({"tile_size": 64, "tile_overlap": 64}, "tile_overlap 64 must be below tile_size 64"),
        ({"tile_size": 0}, "^tile_size: input should be greater than 0; found 0"),
        ({"scales": (0.0,)}, r"^scales\.0: input should be greater than 0"),
        ({"shortside": 5}, "^unknown key 'shortside'; the nearest valid key is 'short_side'"),
    ],
)
def test_contradicting_options_are_an_error_of_one_line(masks_model, image, settings, message):
    with pytest.raises(MaskwrightError, match=message) as error:
        one(masks_model, image, **settings)
    assert "\n" not in str(error.value)


def test_options_that_are_none_keep_their_value():
    config = EvaluateConfig(task="semantic", flip=True, window_size=(64, 64))
    assert change_settings(config, flip=None, task=None) == config
    assert change_settings(config, flip=False).flip is False


def test_few_images_are_in_memory_at_a_time(masks_model, tmp_path, monkeypatch):
    for number in range(9):
        Image.fromarray(tiny.scene_image(number, (64 + 7 * (number % 3), 64))).save(tmp_path / f"{number:02d}.png")
    alive, most, real = weakref.WeakSet(), [0], files_module.open_input

    class Counted(ArrayImage):
        pass

    def opened(source, config):
        picture = Counted(real(source, config).pixels)
        alive.add(picture)
        gc.collect()
        most[0] = max(most[0], len(alive))
        return picture

    monkeypatch.setattr(files_module, "open_input", opened)
    assert predict_files(Predictor(masks_model, device="cpu"), [str(tmp_path)], tmp_path / "out").done == 9
    assert most[0] <= 6
