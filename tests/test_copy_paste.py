"""Copy-paste augmentation: what is pasted, what is cut, and that the sample alone decides both."""

import itertools

import numpy as np
import pytest
import torch

from maskwright.config.schema import CopyPasteConfig
from maskwright.data.build import open_dataset, train_loader
from maskwright.data.check.check import check
from maskwright.data.check.html_report import render_html
from maskwright.data.check.previews import AUGMENTED
from maskwright.data.copy_paste import paste_objects
from maskwright.data.loader import SampleRequest, TrainingDataset
from maskwright.data.transforms import Augment
from maskwright.errors import RecipeError
from maskwright.structures.annotations import Category, Target
from tests import tiny

CATEGORIES = tuple(Category(n, name, name != "sky", (0, 0, 0)) for n, name in enumerate(("sky", "box", "card")))
ALWAYS = {"resize": "large_scale_jitter", "scale_range": [0.8, 1.25], "crop_size": [64, 64]} | {
    "copy_paste": {"probability": 1.0}
}


def target(ids, labels):
    maps = torch.from_numpy(np.asarray(ids, dtype=np.uint8))
    maps = maps if maps.ndim == 3 else maps[None]
    return Target(maps, torch.tensor(labels), torch.zeros(len(labels), dtype=torch.bool), 1, (40, 50))


def rectangle(ids, number, top, left, height, width):
    ids[top : top + height, left : left + width] = number
    return ids


def paste(base, source, max_objects=100, seed=0):
    """Paste a source of value 200 onto an image of value 10."""
    sizes = [ids.id_maps.shape[1:] for ids in (base, source)]
    images = [torch.full((3, *size), value, dtype=torch.uint8) for size, value in zip(sizes, (10, 200), strict=True)]
    config, generator = CopyPasteConfig(max_objects=max_objects), np.random.default_rng(seed)
    return paste_objects(images[0], base, images[1], source, CATEGORIES, config, generator)


def full_paste(base, source):
    """Paste until every candidate was drawn."""
    results = (paste(base, source, seed=seed) for seed in range(100))
    candidates = sum(CATEGORIES[label].is_thing for label in source.labels)
    pixels = source.id_maps.amax(0)
    things = sum(int((pixels == n + 1).sum()) for n, label in enumerate(source.labels) if CATEGORIES[label].is_thing)
    assert candidates
    return next(result for result in results if int((result[0][0] == 200).sum()) == things)


def test_pasted_pixels_are_those_of_the_new_objects_and_are_cut_from_those_below():
    base = target(rectangle(np.ones((40, 50)), 2, 10, 10, 10, 10), [0, 1])
    source = target(rectangle(np.zeros((40, 50)), 1, 15, 15, 10, 20), [2])
    image, result = full_paste(base, source)
    assert result.labels.tolist() == [0, 1, 2]
    masks = result.masks
    assert torch.equal(masks[2], source.masks[0])
    assert torch.equal(masks[1], base.masks[1] & ~source.masks[0])
    assert torch.equal(masks[0], base.masks[0] & ~source.masks[0])
    assert torch.equal(image[0] == 200, source.masks[0])


@pytest.mark.parametrize(("covered", "labels"), [(100, [2]), (91, [2]), (90, [1, 2])])
def test_objects_that_keep_less_than_a_tenth_of_their_pixels_are_dropped(covered, labels):
    ids = np.zeros((40, 50))
    ids[0, :50], ids[1, :50] = 1, 1
    source = np.zeros((40, 50))
    source.flat[:covered] = 1
    _, result = full_paste(target(ids, [1]), target(source, [2]))
    assert result.labels.tolist() == labels
    assert len(result.masks[-1].nonzero()) == covered


def test_stuff_is_never_pasted_and_without_things_nothing_changes():
    base, sky = target(np.ones((40, 50)), [0]), target(np.ones((40, 50)), [0])
    image, result = paste(base, sky)
    assert result is base
    assert (image == 10).all()
    _, result = full_paste(base, target(rectangle(np.ones((40, 50)), 2, 5, 5, 9, 9), [0, 1]))
    assert result.labels.tolist() == [0, 1]


def test_overlapping_objects_of_the_source_stay_whole_on_layers_of_their_own():
    layers = np.stack(
        [rectangle(np.zeros((40, 50)), 1, 5, 5, 20, 20), rectangle(np.zeros((40, 50)), 2, 10, 10, 20, 20)]
    )
    source = target(layers, [1, 2])
    base = target(rectangle(np.zeros((40, 50)), 1, 0, 0, 40, 20), [1])
    results = (paste(base, source, seed=seed)[1] for seed in range(100))
    result = next(found for found in results if len(found) == 3)
    assert torch.equal(result.masks[1:], source.masks)
    assert torch.equal(result.masks[0], base.masks[0] & ~source.masks.any(0))


def test_at_most_max_objects_are_pasted_each_as_often_as_the_others():
    source = target(sum(rectangle(np.zeros((40, 50)), n, 4 * n, 3, 3, 3) for n in range(1, 9)), [1] * 8)
    empty = target(np.zeros((40, 50)), [])
    empty.labels = empty.labels.long()
    counts = [len(paste(empty, source, max_objects=3, seed=seed)[1]) for seed in range(60)]
    assert set(counts) == {1, 2, 3}


def test_many_objects_need_a_larger_type():
    ids = np.arange(1, 201).reshape(10, 20).repeat(2, 0).repeat(2, 1)
    source = target(ids, [1] * 200)
    _, result = next(r for r in (paste(source, source, max_objects=200, seed=s) for s in range(50)) if len(r[1]) > 0)
    assert len(result) == 200  # every pasted object covers one
    shifted = target(np.pad(ids, ((0, 30), (0, 0))), [1] * 200)
    wide = target(np.pad(ids, ((30, 0), (0, 0))), [1] * 200)
    found = next(r for _, r in (paste(shifted, wide, max_objects=200, seed=s) for s in range(50)) if len(r) > 255)
    assert found.id_maps.dtype == torch.int32
    assert len(found.masks.flatten(1).any(1).nonzero()) == len(found)


@pytest.mark.parametrize(("size", "source_size"), [((40, 50), (20, 70)), ((16, 16), (40, 50)), ((40, 50), (8, 8))])
def test_crops_of_other_sizes_are_placed_at_random_and_slivers_are_not_pasted(size, source_size):
    source = target(rectangle(np.zeros(source_size), 1, 2, 2, source_size[0] // 2, source_size[1] // 2), [1])
    base = target(np.zeros(size), [])
    base.labels = base.labels.long()
    places = set()
    for seed in range(20):
        image, result = paste(base, source, seed=seed)
        assert image.shape[1:] == size
        for mask in result.masks:
            assert torch.equal(mask, image[0] == 200)
            assert mask.sum() >= 0.1 * source.masks[0].sum()
            places.add(mask.numpy().tobytes())
    assert len(places) > 1


# In the loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_panoptic(tmp_path_factory.mktemp("data"), crowds=(1, 3))


def batches(recipe, count=3, **options):
    return [batch for (batch,) in itertools.islice(train_loader(recipe, **options), count)]


def assert_same(one, other):
    assert torch.equal(one.images, other.images)
    for first, second in zip(one.targets, other.targets, strict=True):
        assert torch.equal(first.id_maps, second.id_maps)
        assert torch.equal(first.labels, second.labels)


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_workers_and_restarts_do_not_change_a_single_pixel(folder, task):
    options = {"train__augment": ALWAYS, "data__task": task}
    plain = batches(tiny.recipe(folder, **options))
    for one, other in zip(plain, batches(tiny.recipe(folder, train__num_workers=2, **options)), strict=True):
        assert_same(one, other)
    assert_same(plain[2], batches(tiny.recipe(folder, **options), 1, start_step=2)[0])


def test_it_adds_objects_without_changing_the_crop_of_the_sample_and_never_crowds(folder):
    recipe = tiny.recipe(folder, train__augment=ALWAYS)
    without = tiny.recipe(folder, train__augment={key: value for key, value in ALWAYS.items() if key != "copy_paste"})
    annotated = open_dataset(recipe, "train")
    more = 0
    for number in range(12):
        request = SampleRequest(number // 4, number % 4)
        pasted, plain = (TrainingDataset(annotated, Augment(r.train.augment), 0)[request] for r in (recipe, without))
        assert not pasted.target.is_crowd.any()
        assert pasted.image.shape == plain.image.shape
        changed = (pasted.image != plain.image).any(0)
        assert not changed[~pasted.target.masks.any(0)].any()
        more += len(pasted.target) - len(plain.target)
    assert more > 6


def test_probability_zero_changes_nothing(folder):
    never = ALWAYS | {"copy_paste": {"probability": 0.0}}
    without = {key: value for key, value in ALWAYS.items() if key != "copy_paste"}
    for one, other in zip(
        *(batches(tiny.recipe(folder, train__augment=augment)) for augment in (never, without)), strict=True
    ):
        assert_same(one, other)


def test_semantic_is_refused_with_the_reason(tmp_path):
    with pytest.raises(
        RecipeError, match=r"copy_paste pastes single objects, but data\.task semantic has one region per"
    ):
        tiny.recipe(tmp_path, "semantic", train__augment=ALWAYS)


def test_the_contact_sheet_of_a_recipe_shows_augmented_samples(folder, tmp_path):
    file = tmp_path / "tiny.yaml"
    tiny.write_recipe(file, folder, train__augment=ALWAYS)
    report = check(file, previews=4, workers=1)
    samples = [preview for preview in report.previews if preview.split == AUGMENTED]
    assert len(samples) == 2
    assert all(preview.jpeg for preview in samples)
    assert "<option>train, augmented</option>" in render_html(report)
