"""Results of tiles become one: whatever a model that makes no mistake sees in tiles is what is in the image."""

import logging
import re
import tracemalloc

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from maskwright.inference.mask_upsampling import SemanticScores
from maskwright.inference.merge_tiles import start_merge
from maskwright.inference.sliding_window import WindowMean, list_windows, window_starts
from maskwright.inference.tiling import Rectangle, cut_tiles
from maskwright.results.rle import decode_runs, encode_segmentation, find_runs, runs_box
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category

CATEGORIES = (
    Category(1, "ground", False, (90, 90, 90)),
    Category(2, "water", False, (0, 0, 200)),
    Category(3, "house", True, (200, 0, 0)),
    Category(4, "tree", True, (0, 200, 0)),
)
SIZE = (150, 210)


def scene(seed, size=SIZE, objects=25):
    """(N, H, W) masks of things that may overlap, from a few pixels to most of the image, and their labels."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    masks = np.zeros((objects, *size), dtype=bool)
    for mask in masks:
        y, x = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        height, width = rng.uniform(4, 15, 2) if rng.random() < 0.8 else rng.uniform(40, 120, 2)
        mask[:] = ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2 <= 1
    return masks[masks.any((1, 2))], rng.integers(2, 4, objects)[masks.any((1, 2))]


def panoptic_scene(seed):
    """(H, W) map, and the labels of its segments: things in one piece, that lie apart, on two kinds of stuff."""
    masks, things = scene(seed)
    ids = np.where(np.arange(SIZE[1]) < 100, 1, 2) * np.ones((SIZE[0], 1), dtype=int)
    for number, mask in enumerate(masks, 3):
        if ids[mask].max() <= 2:
            ids[mask] = number
    ids[:5] = 0  # void
    present = np.unique(ids[ids > 0])
    return np.searchsorted([0, *present], ids).astype(np.int32), np.array([0, 1, *things])[present - 1]


def panoptic_tile(ids, labels, tile):
    """What a model without fault says about a tile."""
    part = ids[tile.area.slices_in(Rectangle(0, 0, *ids.shape))]
    present = np.unique(part[part > 0])
    own = np.searchsorted([0, *present], part).astype(np.int32)
    scores = np.full(len(present), 0.9, np.float32)
    return Segmentation("panoptic", tile.area.size, CATEGORIES, labels[present - 1], scores, segment_map=own)


def instance_tile(masks, labels, tile, scores=None):
    part = masks[:, *tile.area.slices_in(Rectangle(0, 0, *masks.shape[1:]))]
    seen = part.any((1, 2))
    scores = (np.full(len(masks), 0.9) if scores is None else scores).astype(np.float32)
    return Segmentation("instance", tile.area.size, CATEGORIES, labels[seen], scores[seen], instance_masks=part[seen])


def put_together(task, tiles, results, size=SIZE):
    merge = start_merge(task, size, CATEGORIES, 10**8)
    for tile, result in zip(tiles, results, strict=True):
        merge.add(tile, result)
    return merge.finish()


# Where tiles lie


@pytest.mark.parametrize(("size", "tile", "overlap"), [((150, 210), 64, 8), ((65, 64), 64, 63), ((9, 999), 10, 0)])
def test_cores_cover_every_pixel_once_and_lie_in_their_tiles(size, tile, overlap):
    count = np.zeros(size, dtype=int)
    for area, core in cut_tiles(size, tile, overlap):
        assert area.size == (min(tile, size[0]), min(tile, size[1]))
        assert area.intersection(core) == core
        count[core.slices_in(Rectangle(0, 0, *size))] += 1
    assert (count == 1).all()


def test_neighbors_overlap_at_least_as_asked_and_evenly():
    starts = [tile.area.left for tile in cut_tiles((10, 1000), 100, 20)]
    steps = np.diff(starts)
    assert starts[0] == 0
    assert starts[-1] == 900
    assert steps.max() <= 80
    assert steps.max() - steps.min() <= 1
    assert len(starts) == 13  # the fewest: 12 would overlap by less


def test_an_image_that_fits_is_one_tile():
    ((area, core),) = cut_tiles((50, 64), 64, 8)
    assert area == core == Rectangle(0, 0, 50, 64)


def test_sliding_windows_are_where_mmseg_has_them():
    for length, window, stride in [(230, 128, 85), (301, 160, 107), (100, 128, 85), (128, 128, 128), (257, 128, 128)]:
        expected = []
        for number in range(max(length - window + stride - 1, 0) // stride + 1):
            end = min(number * stride + window, length)
            expected.append(max(end - window, 0))
        assert window_starts(length, window, stride) == expected


def test_overlapping_windows_are_averaged_not_summed():
    windows = list_windows((4, 6), (4, 4), (4, 2))
    assert [window.left for window in windows] == [0, 2]
    mean = WindowMean((4, 6), len(windows))
    for value, window in zip((1.0, 3.0), windows, strict=True):
        mean.add(window, SemanticScores(torch.full((2, 4, 4), value), True, (4, 4), (4, 4)))
    scores = mean.mean()
    assert scores.values[0, 0].tolist() == [1, 1, 2, 2, 3, 3]
    assert scores.are_logits


# Semantic


def test_labels_come_from_the_core_of_each_tile():
    tiles = cut_tiles(SIZE, 64, 16)
    results = []
    for number, tile in enumerate(tiles):
        label_map = np.full(tile.area.size, 3)
        label_map[tile.core.slices_in(tile.area)] = number % 3
        results.append(Segmentation("semantic", tile.area.size, CATEGORIES, np.arange(4), label_map=label_map))
    whole = put_together("semantic", tiles, results)
    for number, tile in enumerate(tiles):
        assert (whole.label_map[tile.core.slices_in(Rectangle(0, 0, *SIZE))] == number % 3).all()
    assert whole.labels.tolist() == [0, 1, 2]
    assert whole.label_map.dtype == np.uint8
    assert whole.areas.sum() == SIZE[0] * SIZE[1]


# Panoptic


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("tile", "overlap"), [(64, 16), (100, 30), (300, 0), (80, 60)])
def test_panoptic_objects_across_seams_are_one(seed, tile, overlap):
    ids, labels = panoptic_scene(seed)
    tiles = cut_tiles(SIZE, tile, overlap)
    whole = put_together("panoptic", tiles, [panoptic_tile(ids, labels, each) for each in tiles])
    assert len(whole) == len(labels)
    pairs = np.unique(np.stack([ids.ravel(), whole.segment_map.ravel()]), axis=1)
    assert pairs.shape[1] == len(np.unique(ids)), "each object has one number, and each number is one object"
    for number, found in pairs.T:
        assert (number == 0) == (found == 0)
        if number:
            assert labels[number - 1] == whole.labels[found - 1]
    np.testing.assert_allclose(whole.scores, 0.9, rtol=1e-6)


def flat_panoptic(tile, segments):
    """A tile's result from (label, score, columns)."""
    ids = np.zeros(tile.area.size, np.int32)
    for number, (_, _, columns) in enumerate(segments, 1):
        ids[:, columns] = number
    labels, scores = (np.array([segment[i] for segment in segments]) for i in (0, 1))
    return Segmentation("panoptic", tile.area.size, CATEGORIES, labels, scores, segment_map=ids)


def test_the_score_of_a_joined_object_is_the_mean_over_its_pixels():
    tiles = cut_tiles((10, 180), 100, 20)  # areas 0-100 and 80-180, cores 0-90 and 90-180
    left = flat_panoptic(tiles[0], [(2, 0.9, slice(60, 100))])  # 30 columns in its core
    right = flat_panoptic(tiles[1], [(2, 0.6, slice(0, 70))])  # 60 in its own
    whole = put_together("panoptic", tiles, [left, right], (10, 180))
    assert whole.segment_map[0].tolist() == [0] * 60 + [1] * 90 + [0] * 30
    assert whole.scores.tolist() == pytest.approx([(30 * 0.9 + 60 * 0.6) / 90])


def test_objects_of_other_classes_or_places_stay_apart():
    tiles = cut_tiles((10, 180), 100, 20)
    left = flat_panoptic(tiles[0], [(2, 0.9, slice(40, 100))])
    other_class = flat_panoptic(tiles[1], [(3, 0.9, slice(0, 60))])
    assert put_together("panoptic", tiles, [left, other_class], (10, 180)).labels.tolist() == [2, 3]
    elsewhere = flat_panoptic(tiles[1], [(2, 0.9, slice(14, 60))])
    assert put_together("panoptic", tiles, [left, elsewhere], (10, 180)).labels.tolist() == [2, 2]


def test_a_thing_that_lies_mostly_where_another_tile_sees_nothing_is_dropped():
    tiles = cut_tiles((10, 180), 100, 20)
    doubtful = flat_panoptic(tiles[0], [(2, 0.9, slice(86, 100)), (0, 0.9, slice(0, 50))])
    nothing = flat_panoptic(tiles[1], [])
    whole = put_together("panoptic", tiles, [doubtful, nothing], (10, 180))
    assert whole.labels.tolist() == [0]
    assert whole.areas.tolist() == [500]


def test_a_large_image_without_segments():
    tiles = cut_tiles((10, 180), 100, 20)
    whole = put_together("panoptic", tiles, [flat_panoptic(tile, []) for tile in tiles], (10, 180))
    assert len(whole) == len(whole.scores) == 0
    assert not whole.segment_map.any()


# Instance


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("tile", "overlap"), [(64, 16), (100, 30), (300, 0), (80, 60)])
def test_instances_across_seams_are_one(seed, tile, overlap):
    masks, labels = scene(seed, objects=12)
    scores = np.linspace(0.9, 0.3, len(masks))
    tiles = cut_tiles(SIZE, tile, overlap)
    whole = put_together("instance", tiles, [instance_tile(masks, labels, each, scores) for each in tiles])
    assert whole.masks.shape == masks.shape
    assert np.array_equal(whole.masks, masks)  # the order is that of the scores
    assert whole.labels.tolist() == labels.tolist()
    np.testing.assert_allclose(whole.scores, scores, rtol=1e-6)
    assert whole.areas.tolist() == masks.sum((1, 2)).tolist()
    decoded = [coco_mask.decode(rle).astype(bool) for rle in encode_segmentation(whole)]
    assert np.array_equal(decoded, masks)
    dense = Segmentation("instance", SIZE, CATEGORIES, labels, scores, instance_masks=masks)
    assert np.array_equal(whole.boxes, dense.boxes)
    image = np.zeros((*SIZE, 3), np.uint8)
    assert np.array_equal(np.asarray(whole.overlay(image)), np.asarray(dense.overlay(image)))


def flat_instances(tile, found):
    """A tile's result from (label, score, columns)."""
    masks = np.zeros((len(found), *tile.area.size), dtype=bool)
    for mask, (_, _, columns) in zip(masks, found, strict=True):
        mask[:, columns] = True
    labels, scores = (np.array([one[i] for one in found]) for i in (0, 1))
    return Segmentation("instance", tile.area.size, CATEGORIES, labels, scores, instance_masks=masks)


def test_second_guesses_about_an_object_are_joined_with_each_other():
    tiles = cut_tiles((10, 180), 100, 20)
    left = flat_instances(tiles[0], [(2, 0.9, slice(50, 100)), (2, 0.2, slice(51, 100)), (3, 0.1, slice(50, 100))])
    right = flat_instances(tiles[1], [(2, 0.8, slice(0, 60)), (2, 0.1, slice(0, 59)), (3, 0.1, slice(0, 60))])
    whole = put_together("instance", tiles, [left, right], (10, 180))
    assert whole.labels.tolist() == [2, 2, 3]
    assert whole.areas.tolist() == [900, 880, 900]
    assert whole.scores.tolist() == pytest.approx([(40 * 0.9 + 50 * 0.8) / 90, (39 * 0.2 + 49 * 0.1) / 88, 0.1])


def test_an_object_that_one_tile_sees_is_whole_or_not_there():
    tiles = cut_tiles((10, 180), 100, 20)
    nothing = flat_instances(tiles[1], [])
    here = put_together("instance", tiles, [flat_instances(tiles[0], [(2, 0.9, slice(70, 96))]), nothing], (10, 180))
    assert here.areas.tolist() == [260]
    there = put_together("instance", tiles, [flat_instances(tiles[0], [(2, 0.9, slice(88, 96))]), nothing], (10, 180))
    assert len(there) == 0


def test_instances_are_held_by_their_own_size():
    """Five thousand small objects in an image of 10,000 x 10,000 take megabytes."""
    size, rng = (10_000, 10_000), np.random.default_rng(0)
    merge = start_merge("instance", size, CATEGORIES, 10**8)
    for tile in cut_tiles(size, 1024, 64)[:10]:
        masks = np.zeros((50, 1024, 1024), dtype=bool)
        for mask in masks:
            y, x = rng.integers(0, 1000, 2)
            mask[y : y + 20, x : x + 20] = True
        ones = np.ones(50, np.float32)
        merge.add(tile, Segmentation("instance", (1024, 1024), CATEGORIES, np.full(50, 2), ones, instance_masks=masks))
    whole = merge.finish()
    assert 400 < len(whole) <= 500
    assert sum(runs.nbytes for runs in whole.instance_runs) < 2**20
    assert whole.areas.max() == 400
    assert len(encode_segmentation(whole)) == len(whole)


def noise_tile(tile, rng, count=20):
    """Masks without any short form, as random weights give."""
    masks = rng.random((count, *tile.area.size)) < 0.5
    scores = rng.random(count).astype(np.float32)
    return Segmentation("instance", tile.area.size, CATEGORIES, np.full(count, 2), scores, instance_masks=masks)


def memory_of_noise(size, mask_bytes):
    """Peak of what a merge takes in bytes, its result, and the scores of all that was found."""
    rng, merge, scores = np.random.default_rng(0), start_merge("instance", size, CATEGORIES, mask_bytes), []
    tracemalloc.start()
    peak = 0
    for tile in cut_tiles(size, 128, 8):
        result = noise_tile(tile, rng)
        tracemalloc.reset_peak()
        merge.add(tile, result)
        peak = max(peak, tracemalloc.get_traced_memory()[1] - result.masks.nbytes)
        scores += result.scores.tolist()
    whole = merge.finish()
    tracemalloc.stop()
    return peak, whole, scores


def test_noise_is_held_up_to_a_limit_and_the_surest_of_it(caplog):
    limit = 2_000_000
    with caplog.at_level(logging.WARNING):
        peak, whole, scores = memory_of_noise((600, 600), limit)
    held = sum(runs.nbytes + 1024 for runs in whole.instance_runs)
    assert 0.8 * limit < held <= limit
    assert peak < 2 * limit
    assert len(whole) < 100 < len(scores)
    best = sorted(scores, reverse=True)
    assert whole.scores.min() > best[2 * len(whole)]  # streaming, sizes differ a little
    assert whole.scores.max() == pytest.approx(best[0])
    (line,) = caplog.messages
    assert re.search(r"need more than 2 MB, so the 4\d\d of lowest score were dropped; raise score_threshold", line)
    assert len(encode_segmentation(whole)) == len(whole)


def test_memory_of_noise_does_not_grow_with_the_image():
    small, large = (memory_of_noise((side, 248), 500_000)[0] for side in (368, 1100))
    assert large < 1.1 * small


def test_an_object_with_a_part_that_is_sure_is_kept_whole():
    tiles = cut_tiles((128, 248), 128, 8)
    rng = np.random.default_rng(0)
    noise = rng.random((128, 248)) < 0.5
    parts = [noise[tile.area.slices_in(Rectangle(0, 0, *noise.shape))] for tile in tiles]
    merge = start_merge("instance", noise.shape, CATEGORIES, 75_000)  # two masks of noise
    for part, tile, score in zip(parts, tiles, (0.9, 0.1), strict=True):
        masks = np.stack([part, rng.random(part.shape) < 0.5])
        scores = np.array([score, 0.4], np.float32)
        found = Segmentation("instance", part.shape, CATEGORIES, np.array([2, 3]), scores, instance_masks=masks)
        merge.add(tile, found)
    whole = merge.finish()
    assert whole.labels.tolist() == [2]
    assert np.array_equal(whole.masks[0], noise)


def test_an_object_in_many_tiles_is_merged_in_the_memory_of_one_image():
    size = (1200, 1200)
    tiles = cut_tiles(size, 128, 32)
    merge = start_merge("instance", size, CATEGORIES, 10**8)
    for tile in tiles:
        masks = np.ones((1, *tile.area.size), dtype=bool)
        found = Segmentation("instance", tile.area.size, CATEGORIES, np.full(1, 2), np.ones(1), instance_masks=masks)
        merge.add(tile, found)
    assert len(tiles) > 100
    tracemalloc.start()
    whole = merge.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert whole.areas.tolist() == [1200 * 1200]
    assert peak < 8 * 1200 * 1200


# Runs


def test_large_masks_have_the_runs_of_small_ones(monkeypatch):
    mask = np.random.default_rng(0).random((61, 97)) < 0.4
    expected = find_runs(mask, 5, 7, 200)
    assert expected.dtype == np.uint32
    monkeypatch.setattr("maskwright.results.rle._BAND_PIXELS", 61 * 10)  # ten columns at a time
    assert np.array_equal(find_runs(mask, 5, 7, 200), expected)


def test_runs_paint_the_mask_again():
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(1, 12, 2)
        mask = rng.random((height, width)) < rng.choice([0.0, 0.1, 0.5, 1.0])
        top, left = rng.integers(0, 5, 2)
        image = np.zeros((height + top + rng.integers(0, 3), width + left), dtype=bool)
        image[top : top + height, left:] = mask
        runs = find_runs(mask, int(top), int(left), len(image))
        assert np.array_equal(decode_runs(runs, (0, 0, *image.shape), len(image)), image)
        box = runs_box(runs, len(image))
        assert np.array_equal(decode_runs(runs, box, len(image)), image[box[0] : box[2], box[1] : box[3]])
        whole = Segmentation("instance", image.shape, CATEGORIES, np.array([2]), np.ones(1), instance_runs=[runs])
        expected = coco_mask.encode(np.asfortranarray(image.astype(np.uint8)))["counts"].decode()
        assert encode_segmentation(whole)[0]["counts"] == expected
