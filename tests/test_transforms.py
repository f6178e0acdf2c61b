"""Image and target are transformed together; geometry and colors are those of the original's augmentation."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.config.recipe import load_recipe
from maskwright.config.schema import AugmentConfig, EvaluateConfig
from maskwright.data.color_jitter import jitter_colors
from maskwright.data.images.resize import network_size, resize_to, shortest_edge_size, shrink_to_fit
from maskwright.data.transforms import (
    Augment,
    CropBox,
    crop_id_maps,
    crop_image,
    progressive_scale,
)
from maskwright.structures.annotations import Target

JITTER = {"resize": "large_scale_jitter", "crop_size": (64, 80), "scale_range": (0.1, 2.0)}
SHORT = {"resize": "short_side", "crop_size": (64, 80), "scale_range": (0.5, 2.0)}


def painted(height=90, width=120, block=30, layers=1):
    """Return an image with one color per object, and its target."""
    rows, columns = np.arange(height) // block, np.arange(width) // block
    ids = (rows[:, None] * (columns.max() + 1) + columns + 1).astype(np.int32)
    count = int(ids.max())
    image = np.repeat((ids * 20).astype(np.uint8)[..., None], 3, axis=2)
    maps = np.stack([np.where(ids % layers == depth, ids, 0) for depth in range(layers)])
    return image, target(maps, torch.arange(count))


def target(maps, labels):
    maps = torch.as_tensor(maps)
    crowd = torch.zeros(len(labels), dtype=torch.bool)
    return Target(maps, labels, crowd, 1, tuple(maps.shape[1:]), np.ones(len(labels)), np.ones((len(labels), 4)))


def smooth(height, width):
    """Return an image with smooth gradients."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], axis=2).astype(np.uint8)


@pytest.mark.parametrize("config", [JITTER, SHORT], ids=["jitter", "short side"])
@pytest.mark.parametrize("layers", [1, 3])
def test_image_and_objects_move_together(config, layers):
    image, before = painted(layers=layers)
    augment = Augment(AugmentConfig(**config))
    checked = 0
    for seed in range(40):
        changed, after = augment(image, before, np.random.default_rng(seed))
        assert changed.dtype == torch.uint8
        assert changed.is_contiguous()
        assert changed.shape[1:] == after.id_maps.shape[1:]
        assert changed.shape[1] <= 64
        assert changed.shape[2] <= 80
        ids = after.id_maps.amax(0)
        expected = (after.labels[ids.long() - 1] + 1) * 20
        inside = (changed[0] % 20 == 0) & (changed[0] > 0)  # not the blurred borders of blocks
        checked += int(inside.sum())
        assert (changed[0] == expected)[inside].float().mean() > 0.97
    assert checked > 40 * 64 * 80 * 0.1


@pytest.mark.parametrize("size", [(120, 160), (45, 60), (300, 400), (90, 121), (72, 96), (200, 107)])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_equals_resizing_the_whole_image_and_cropping_it(size, flip):
    image = smooth(90, 120)
    height, width = size
    crop = CropBox(height, width, 7, 11, 32, 40, flip)
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    expected = whole[7:39, 11:51][:, :: -1 if flip else 1].transpose(2, 0, 1)
    assert np.abs(crop_image(image, crop).astype(int) - expected).max() <= 1
    ids = np.arange(90 * 120, dtype=np.int32).reshape(1, 90, 120)
    whole = np.asarray(Image.fromarray(ids[0]).resize((width, height), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(crop_id_maps(ids, crop)[0], whole[7:39, 11:51][:, :: -1 if flip else 1])


def test_flip_mirrors_image_and_objects():
    image, before = painted(60, 80, 20)
    config = {"resize": "short_side", "crop_size": (60, 80), "short_sides": (60,)}
    plain = Augment(AugmentConfig(**config, flip_probability=0))(image, before, np.random.default_rng(0))
    flipped = Augment(AugmentConfig(**config, flip_probability=1))(image, before, np.random.default_rng(0))
    np.testing.assert_array_equal(plain[0], image.transpose(2, 0, 1))
    assert torch.equal(plain[1].id_maps, before.id_maps)
    assert torch.equal(flipped[0], plain[0].flip(2))
    assert torch.equal(flipped[1].id_maps, plain[1].id_maps.flip(2))


def test_objects_outside_the_crop_are_dropped_and_the_others_renumbered():
    image, before = painted(90, 120, 30)
    config = AugmentConfig(resize="short_side", crop_size=(40, 40), short_sides=(90,))
    for seed in range(20):
        _, after = Augment(config)(image, before, np.random.default_rng(seed))
        assert 1 <= len(after) < len(before)
        assert sorted(after.id_maps.unique().tolist()) == list(range(1, len(after) + 1))
        assert after.masks.flatten(1).any(1).all()
        assert after.areas is None
        assert after.boxes is None
    assert len(before) == 12


def test_layers_without_an_object_in_the_crop_are_removed():
    maps = np.zeros((2, 40, 80), dtype=np.int32)
    maps[0, :, :5] = 1
    maps[1, :, 70:] = 2
    config = AugmentConfig(resize="short_side", crop_size=(40, 20), short_sides=(40,), flip_probability=0)
    depths = set()
    for seed in range(20):
        _, after = Augment(config)(
            np.zeros((40, 80, 3), np.uint8), target(maps, torch.tensor([3, 4])), np.random.default_rng(seed)
        )
        depths.add(len(after.id_maps))
    assert depths == {1}


@pytest.mark.parametrize("config", [JITTER | {"color_jitter": True}, SHORT | {"color_jitter": True}])
def test_image_without_objects_passes(config):
    empty = target(np.zeros((1, 50, 70), np.int32), torch.zeros(0, dtype=torch.int64))
    changed, after = Augment(AugmentConfig(**config))(smooth(50, 70), empty, np.random.default_rng(0))
    assert len(after) == 0
    assert after.masks.shape == (0, *changed.shape[1:])


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (400, 1), (2000, 3)])
@pytest.mark.parametrize("config", [JITTER, SHORT])
def test_strips_and_single_pixels_pass(shape, config):
    maps = target(np.ones((1, *shape), np.int32), torch.tensor([0]))
    for seed in range(10):
        changed, after = Augment(AugmentConfig(**config))(smooth(*shape), maps, np.random.default_rng(seed))
        assert min(changed.shape) >= 1
        assert len(after) == 1


def test_equal_generators_give_equal_samples_and_others_differ():
    image, before = painted()
    augment = Augment(AugmentConfig(**SHORT, color_jitter=True))
    first, again, other = (augment(image, before, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1].id_maps, again[1].id_maps)
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])


def test_large_scale_jitter_fits_the_image_into_the_crop_times_the_factor():
    config = AugmentConfig(resize="large_scale_jitter", crop_size=(64, 64), scale_range=(0.5, 0.5))
    changed, _ = Augment(config)(*painted(100, 200, 50), np.random.default_rng(0))
    assert changed.shape == (3, 16, 32)
    config = AugmentConfig(resize="large_scale_jitter", crop_size=(64, 64), scale_range=(2, 2))
    changed, _ = Augment(config)(*painted(100, 200, 50), np.random.default_rng(0))
    assert changed.shape == (3, 64, 64)


def test_large_scale_jitter_crops_at_the_same_share_of_both_sides():
    _, before = painted()  # becomes 120x160
    augment = Augment(AugmentConfig(**JITTER | {"scale_range": (2.0, 2.0)}))
    boxes = [augment.sample_crop(before, np.random.default_rng(seed)) for seed in range(40)]
    assert {(box.height, box.width, box.crop_height, box.crop_width) for box in boxes} == {(120, 160, 64, 80)}
    shares = np.array([[box.top / (120 - 64), box.left / (160 - 80)] for box in boxes])
    np.testing.assert_allclose(shares[:, 0], shares[:, 1], atol=0.02)
    assert shares.min() < 0.1
    assert shares.max() > 0.9


def test_range_of_scales_is_relative_to_the_short_side():
    _, before = painted()
    box = Augment(AugmentConfig(**SHORT | {"scale_range": (0.5, 0.5)})).sample_crop(before, np.random.default_rng(0))
    assert (box.height, box.width) == (45, 60)


def test_progressive_resizing_changes_the_scale_at_its_steps():
    train = load_recipe("camvid-quick").train  # 500 steps: half the size until 65 %, three quarters until 85 %
    assert [progressive_scale(train, step) for step in (0, 324, 325, 424, 425, 499)] == [0.5, 0.5, 0.75, 0.75, 1.0, 1.0]


def test_share_of_one_class_in_a_crop_is_limited_when_another_crop_can_be_found():
    ids = np.ones((1, 64, 256), dtype=np.int32)
    ids[:, :, 224:] = 2
    before = target(ids, torch.tensor([0, 1]))
    shares = {}
    for limit in (1.0, 0.75):
        config = AugmentConfig(
            resize="short_side",
            crop_size=(64, 64),
            short_sides=(64,),
            single_category_max_area=limit,
            flip_probability=0,
        )
        results = [Augment(config)(smooth(64, 256), before, np.random.default_rng(s))[1] for s in range(60)]
        shares[limit] = np.mean([(r.label_map() == 0).float().mean() < 0.75 for r in results])
    assert shares[1.0] < 0.2
    assert shares[0.75] > 0.5


@pytest.mark.parametrize(
    ("size", "short_side", "max_side", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 900), 800, 1333, (444, 1333)),
        ((512, 683), 512, 2048, (512, 683)),
        ((1, 400), 512, 2048, (5, 2048)),
        ((1, 5000), 512, 2048, (1, 2048)),
    ],
)
def test_size_for_prediction_is_that_of_resize_shortest_edge(size, short_side, max_side, expected):
    assert shortest_edge_size(size, short_side, max_side) == expected
    rule = EvaluateConfig(task="semantic", short_side=short_side, max_side=max_side)
    assert network_size(size, rule) == expected
    assert resize_to(np.zeros((*size, 3), np.uint8), expected).shape == (*expected, 3)


@pytest.mark.parametrize(
    ("short_side", "max_side", "expected"), [(None, None, None), (None, 40, None), (30, 60, None), (None, 20, (15, 20))]
)
def test_image_is_not_resized_if_no_size_is_requested(short_side, max_side, expected):
    image = smooth(30, 40)
    size = network_size((30, 40), EvaluateConfig(task="semantic", short_side=short_side, max_side=max_side))
    assert size == (expected or (30, 40))
    assert (resize_to(image, size) is image) == (expected is None)


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 96), (64, 96)), ((10, 20), (10, 20)), ((128, 96), (64, 48)), ((64, 960), (6, 96))]
)
def test_an_image_is_shrunk_to_the_size_of_an_exported_file_and_keeps_its_shape(size, expected):
    assert shrink_to_fit(size, (64, 96)) == expected


class FakeGenerator:
    """A fake random generator with chosen answers."""

    def __init__(self, use, shift=0.0, turn=0.0, factors=(1.0, 1.0)):
        self.use, self.ranges, self.factors = np.where(use, 0.0, 1.0), [shift, turn], np.array(factors)

    def random(self, size):
        return self.use

    def uniform(self, low, high, size=None):
        answer = self.factors if size else self.ranges.pop(0)
        assert np.all((low <= answer) & (answer <= high))
        return answer


@pytest.fixture
def colors():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 20, 20), dtype=np.uint8))


@pytest.mark.parametrize(("turn", "factor"), [(0.0, 0.5), (0.0, 1.5), (36.0, 1.0), (-36.0, 1.0), (20.0, 1.3)])
def test_hue_and_saturation_change_as_in_hsv(colors, turn, factor):
    found = (
        jitter_colors(colors, FakeGenerator([0, 0, 1, 1, 0], turn=turn, factors=(1.0, factor))).flatten(1).T.tolist()
    )
    for before, after in zip(colors.flatten(1).T.tolist(), found, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(part / 255 for part in before))
        expected = colorsys.hsv_to_rgb((hue + turn / 360) % 1, min(1, saturation * factor), value)
        assert np.abs(np.array(after) - 255 * np.array(expected)).max() <= 0.51


def test_brightness_shifts_and_contrast_scales_within_0_and_255(colors):
    shifted = jitter_colors(colors, FakeGenerator([1, 0, 0, 0, 0], shift=30.0))
    assert torch.equal(shifted, (colors.int() + 30).clamp(max=255).to(torch.uint8))
    scaled = jitter_colors(colors, FakeGenerator([0, 1, 0, 0, 1], factors=(1.5, 1.0)))
    assert torch.equal(scaled, (colors.float() * 1.5).clamp(max=255).round().to(torch.uint8))


def test_gray_stays_gray_under_hue_and_saturation():
    gray = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    assert torch.equal(jitter_colors(gray, FakeGenerator([0, 0, 1, 1, 0], turn=30.0, factors=(1.0, 1.5))), gray)


def test_each_color_change_has_probability_one_half(colors):
    unchanged = sum(torch.equal(jitter_colors(colors, np.random.default_rng(s)), colors) for s in range(400))
    assert 10 <= unchanged <= 45  # one in 16


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_channels_are_cropped_as_bytes_and_as_floats(channels):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, channels), dtype=np.uint8)
    crop = CropBox(60, 75, 3, 4, 32, 33, True)
    expected = crop_image(np.repeat(image[..., :1], 3, axis=2), crop)[0]
    bytes_, floats = crop_image(image, crop), crop_image(image.astype(np.float32), crop)
    assert (bytes_.dtype, floats.dtype) == (np.uint8, np.float32)
    assert bytes_.shape == floats.shape == (channels, 32, 33)
    np.testing.assert_array_equal(bytes_[0], expected)
    assert np.abs(floats - bytes_).max() <= 1.01  # bytes are rounded after each of two directions


def test_crowds_are_dropped_from_training_samples():
    image, before = painted()
    before.is_crowd[[2, 5]] = True
    config = AugmentConfig(resize="short_side", crop_size=(90, 120), short_sides=(90,), flip_probability=0)
    _, after = Augment(config)(image, before, np.random.default_rng(0))
    expected = before.select(~before.is_crowd)
    assert torch.equal(after.id_maps, expected.id_maps)
    assert torch.equal(after.labels, expected.labels)
    assert not after.is_crowd.any()


def test_large_images_are_jittered_in_chunks_with_equal_results():
    whole = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 200, 300), dtype=np.uint8))
    for seed in range(8):
        changed = jitter_colors(whole, np.random.default_rng(seed))
        for rows in (slice(0, 7), slice(150, 200)):
            assert torch.equal(jitter_colors(whole[:, rows], np.random.default_rng(seed)), changed[:, rows])
