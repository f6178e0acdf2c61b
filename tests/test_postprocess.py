"""Both forms of post-processing against the formulas of the original, with all masks at full size at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.config.schema import EvaluateConfig
from maskwright.inference import blockwise_postprocess, blockwise_upsampling, mask_upsampling, postprocess
from maskwright.inference import segment as segment_module
from maskwright.inference.mask_upsampling import CropPrediction
from maskwright.inference.segment import class_scores, postprocess_for, segment
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category
from maskwright.structures.predictions import MaskPrediction

THINGS = (True, False, True, False, False)
CATEGORIES = tuple(Category(10 + n, f"class {n}", thing, (n, n, n)) for n, thing in enumerate(THINGS))
SIZES = {
    "same size": {"padded_size": (64, 96), "input_size": (64, 96), "output_size": (64, 96)},
    "padded": {"padded_size": (64, 96), "input_size": (51, 77), "output_size": (51, 77)},
    "padded and smaller": {"padded_size": (64, 96), "input_size": (63, 70), "output_size": (31, 35)},
    "padded and larger": {"padded_size": (64, 32), "input_size": (33, 29), "output_size": (101, 87)},
    "one pixel": {"padded_size": (32, 32), "input_size": (1, 1), "output_size": (1, 1)},
}
EVERY_SIZE = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


@pytest.fixture(params=["plain", "plain, few", "plain, one", "blocks", "blocks, few", "blocks, one"])
def algorithm(request, monkeypatch):
    """The form of post-processing, and how many masks or blocks it processes at a time."""
    form, _, amount = request.param.partition(", ")
    module = {"plain": postprocess, "blocks": blockwise_postprocess}[form]
    monkeypatch.setattr(segment_module, "postprocess_for", lambda device: module)
    values = {"one": 1, "few": 3 * 64 * 96, "": 10**9}[amount]
    monkeypatch.setattr(postprocess, "CHUNK_VALUES", values)
    monkeypatch.setattr(mask_upsampling, "SCORE_VALUES", values)
    monkeypatch.setattr(blockwise_postprocess, "SCORE_BAND_VALUES", values)
    monkeypatch.setattr(blockwise_postprocess, "BAND_VALUES", values)
    monkeypatch.setattr(blockwise_postprocess, "_BLOCKS", values)
    monkeypatch.setattr(blockwise_postprocess, "_DENSE_SHARE", {"one": 2.0, "few": 0.5, "": -1.0}[amount])
    monkeypatch.setattr(blockwise_upsampling, "PAIRS", values)


def prediction(padded_size: tuple[int, int], queries: int = 20, seed: int = 0) -> MaskPrediction:
    """Masks in blobs, and classes that are certain often enough to make segments."""
    generator = torch.Generator().manual_seed(seed)
    height, width = padded_size[0] // 4, padded_size[1] // 4
    coarse = torch.randn(1, 6, height // 4 + 2, width // 4 + 2, generator=generator)
    features = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False) * 3
    embeddings = torch.randn(1, queries, 6, generator=generator)
    class_logits = torch.randn(1, queries, len(CATEGORIES) + 1, generator=generator) * 5
    return MaskPrediction(class_logits, embeddings, features)


def run(predicted: MaskPrediction, task: str, sizes: dict, **settings: object) -> Segmentation:
    return segment([crop(predicted, sizes)], task, **arguments(sizes, EvaluateConfig(task=task, **settings)))


def crop(predicted: MaskPrediction, sizes: dict, flipped: bool = False) -> CropPrediction:
    return CropPrediction(predicted, sizes["padded_size"], sizes["input_size"], flipped)


def arguments(sizes: dict, config: EvaluateConfig) -> dict:
    return {"output_size": sizes["output_size"], "categories": CATEGORIES, "config": config}


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def full_masks(predicted: MaskPrediction, sizes: dict, at: str = "output") -> Tensor:
    """(Q, H, W) logits of every query."""
    height, width = sizes["input_size"]
    masks = resized(predicted.mask_logits()[0], sizes["padded_size"])[:, :height, :width]
    return resized(masks, sizes["output_size"]) if at == "output" else masks


def assert_same_map(ours: np.ndarray, theirs: Tensor) -> None:
    """Equal but for pixels where two classes tie to the last bit."""
    assert ours.shape == tuple(theirs.shape)
    assert (ours != theirs.numpy()).sum() <= 2


# Semantic


@EVERY_SIZE
@pytest.mark.parametrize("at", ["input", "output"])
def test_semantic_equals_the_plain_formula(sizes, at, algorithm):
    predicted = prediction(sizes["padded_size"])
    probabilities = predicted.class_logits[0].softmax(-1)[:, :-1]
    scores = torch.einsum("qk,qhw->khw", probabilities, full_masks(predicted, sizes, at).sigmoid())
    expected = resized(scores, sizes["output_size"]).argmax(0)
    result = run(predicted, "semantic", sizes, semantic_resolution=at)
    assert_same_map(result.label_map, expected)
    assert result.labels.tolist() == sorted(set(result.label_map.flatten().tolist()))
    assert result.scores is None


def test_the_size_at_which_scores_are_combined_matters_only_where_the_sizes_differ():
    predicted = prediction((64, 96))
    same, larger = SIZES["padded"], {**SIZES["padded"], "output_size": (102, 154)}
    maps = [
        [run(predicted, "semantic", sizes, semantic_resolution=at).label_map for at in ("input", "output")]
        for sizes in (same, larger)
    ]
    assert np.array_equal(*maps[0])
    assert not np.array_equal(*maps[1])


# Instance


def plain_instances(predicted: MaskPrediction, sizes: dict, top_k: int) -> list[tuple[int, float, Tensor]]:
    """(label, score, mask), best first."""
    probabilities = predicted.class_logits[0].softmax(-1)[:, :-1]
    scores, flat = probabilities.flatten().topk(min(top_k, probabilities.numel()))
    logits, found = full_masks(predicted, sizes), []
    for score, index in zip(scores.tolist(), flat.tolist(), strict=True):
        query, label = divmod(index, len(CATEGORIES))
        if THINGS[label]:
            inside = logits[query] > 0
            quality = (logits[query].sigmoid() * inside).sum() / (inside.sum() + 1e-6)
            found.append((label, score * quality.item(), inside))
    return sorted(found, key=lambda item: -item[1])


@EVERY_SIZE
@pytest.mark.parametrize("top_k", [7, 1000])
def test_instances_equal_the_plain_formula(sizes, top_k, algorithm):
    predicted = prediction(sizes["padded_size"], seed=3)
    expected = [item for item in plain_instances(predicted, sizes, top_k) if item[1] > 0]
    result = run(predicted, "instance", sizes, top_k=top_k)
    shown = result.scores > 0  # empty masks score 0 and come in any order
    assert result.labels[shown].tolist() == [label for label, _, _ in expected]
    np.testing.assert_allclose(result.scores[shown], [score for _, score, _ in expected], rtol=1e-5)
    for mask, (_, _, theirs) in zip(result.masks[shown], expected, strict=True):
        assert_same_map(mask, theirs)
    assert len(result) == len(plain_instances(predicted, sizes, top_k))


def test_the_score_threshold_keeps_the_best_instances():
    predicted, sizes = prediction((64, 96)), SIZES["padded"]
    whole, part = run(predicted, "instance", sizes), run(predicted, "instance", sizes, score_threshold=0.5)
    kept = int((whole.scores >= 0.5).sum())
    assert 0 < kept < len(whole)
    assert np.array_equal(part.scores, whole.scores[:kept])
    assert np.array_equal(part.masks, whole.masks[:kept])


def test_the_best_pairs_are_taken_before_stuff_is_dropped():
    predicted = prediction((64, 96))
    predicted.class_logits[..., 1] += 20  # every query is stuff first
    assert len(run(predicted, "instance", SIZES["padded"], top_k=20)) == 0
    assert len(run(predicted, "instance", SIZES["padded"], top_k=1000)) == 40


# Panoptic


def plain_panoptic(predicted: MaskPrediction, sizes: dict, object_threshold: float, overlap_threshold: float):
    """The original's loop: the segment map and (label, score) of each segment."""
    scores, labels = predicted.class_logits[0].softmax(-1).max(-1)
    keep = (labels != len(CATEGORIES)) & (scores > object_threshold)
    scores, labels, masks = scores[keep], labels[keep], full_masks(predicted, sizes).sigmoid()[keep]
    segment_map, segments, stuff = torch.zeros(sizes["output_size"], dtype=torch.int32), [], {}
    if not len(scores):
        return segment_map, segments
    winner = (scores[:, None, None] * masks).argmax(0)
    for query, (label, score) in enumerate(zip(labels.tolist(), scores.tolist(), strict=True)):
        won, own = (winner == query).sum().item(), (masks[query] >= 0.5).sum().item()
        visible = (winner == query) & (masks[query] >= 0.5)
        if not won or not own or not visible.any() or won / own < overlap_threshold:
            continue
        if not THINGS[label] and label in stuff:
            segment_map[visible] = stuff[label]
            continue
        segments.append((label, score))
        segment_map[visible] = len(segments)
        if not THINGS[label]:
            stuff[label] = len(segments)
    return segment_map, segments


@EVERY_SIZE
@pytest.mark.parametrize(("object_threshold", "overlap_threshold"), [(0.8, 0.8), (0.4, 0.3), (0.0, 0.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_panoptic_equals_the_original_loop(sizes, object_threshold, overlap_threshold, seed, algorithm):
    predicted = prediction(sizes["padded_size"], seed=seed)
    thresholds = {"object_threshold": object_threshold, "overlap_threshold": overlap_threshold}
    segment_map, segments = plain_panoptic(predicted, sizes, **thresholds)
    result = run(predicted, "panoptic", sizes, **thresholds)
    assert_same_map(result.segment_map, segment_map)
    assert result.labels.tolist() == [label for label, _ in segments]
    np.testing.assert_allclose(result.scores, [score for _, score in segments], rtol=1e-5)


def handmade(regions: list[tuple[int, slice, float]]) -> MaskPrediction:
    """Queries of (label, columns, class logit), each a stripe of a 32x32 image; label 5 is "no object"."""
    features = torch.full((1, len(regions), 8, 8), -20.0)
    logits = torch.zeros(1, len(regions), len(CATEGORIES) + 1)
    for query, (label, columns, certainty) in enumerate(regions):
        features[0, query, :, columns] = 20.0
        logits[0, query, label] = certainty
    return MaskPrediction(logits, torch.eye(len(regions))[None], features)


SMALL = {"padded_size": (32, 32), "input_size": (32, 32), "output_size": (8, 8)}


def test_pieces_of_one_stuff_class_are_one_segment_and_things_stay_apart(algorithm):
    left, middle, right = slice(0, 2), slice(3, 5), slice(6, 8)
    stuff = run(handmade([(1, left, 9.0), (3, middle, 9.0), (1, right, 9.0)]), "panoptic", SMALL)
    things = run(handmade([(0, left, 9.0), (3, middle, 9.0), (0, right, 9.0)]), "panoptic", SMALL)
    assert stuff.labels.tolist() == [1, 3]
    assert stuff.segment_map[0].tolist() == [1, 1, 0, 2, 2, 0, 1, 1]
    assert things.labels.tolist() == [0, 3, 0]
    assert things.segment_map[0].tolist() == [1, 1, 0, 2, 2, 0, 3, 3]


def test_a_segment_without_rivals_ends_where_its_mask_ends(algorithm):
    result = run(handmade([(0, slice(0, 4), 9.0)]), "panoptic", SMALL | {"output_size": (128, 128)})
    assert result.labels.tolist() == [0]
    assert (result.segment_map[:, :60] == 1).all()
    assert (result.segment_map[:, 68:] == 0).all()


def test_a_segment_that_is_mostly_hidden_is_dropped_and_leaves_a_hole(algorithm):
    result = run(handmade([(0, slice(0, 6), 9.0), (2, slice(2, 6), 12.0)]), "panoptic", SMALL)
    assert result.labels.tolist() == [2]
    assert result.segment_map[0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_a_segment_that_wins_exactly_the_threshold_of_its_mask_is_kept(algorithm):
    predicted = handmade([(0, slice(0, 4), 9.0), (2, slice(2, 4), 12.0)])
    assert run(predicted, "panoptic", SMALL, overlap_threshold=0.5).labels.tolist() == [0, 2]
    assert run(predicted, "panoptic", SMALL, overlap_threshold=0.51).labels.tolist() == [2]


def test_pixels_won_outside_the_mask_count_as_won(algorithm):
    """Query 0 wins half of its mask, and the other columns with a probability below one half; those stay void."""
    predicted = handmade([(0, slice(0, 4), 9.0), (2, slice(2, 4), 12.0)])
    predicted.mask_features[0, 0, :, 5:] = -0.1
    result = run(predicted, "panoptic", SMALL, overlap_threshold=0.9)
    assert result.labels.tolist() == [0, 2]
    assert result.segment_map[0].tolist() == [1, 1, 2, 2, 0, 0, 0, 0]


def test_a_query_whose_score_is_the_threshold_does_not_compete():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.625, 0.25, 0.125]])
    assert postprocess.confident_queries(probabilities, 0.5)[0].tolist() == [1]


def test_an_instance_whose_score_is_the_threshold_is_kept(algorithm):
    predicted, sizes = prediction((64, 96)), SIZES["padded"]
    whole = run(predicted, "instance", sizes)
    third = float(whole.scores[2])
    assert whole.scores[3] < third
    assert run(predicted, "instance", sizes, score_threshold=third).labels.tolist() == whole.labels[:3].tolist()


def test_only_queries_above_the_threshold_become_segments():
    predicted = handmade([(0, slice(0, 4), 0.5), (5, slice(4, 6), 30.0), (2, slice(6, 8), 9.0)])
    assert run(predicted, "panoptic", SMALL).labels.tolist() == [2]
    assert run(predicted, "panoptic", SMALL, object_threshold=0.0).labels.tolist() == [0, 2]


# Both forms


def test_a_cpu_decides_by_blocks_and_an_accelerator_by_the_plain_algorithm():
    assert postprocess_for(torch.device("cpu")) is blockwise_postprocess
    assert postprocess_for(torch.device("cuda")) is postprocess_for(torch.device("mps")) is postprocess


def random_crops(seed: int) -> tuple[list[CropPrediction], tuple[int, int]]:
    """A prediction of random size, sometimes with its flip, and the size of the result."""
    rng = np.random.default_rng(seed)
    input_size = tuple(int(side) for side in rng.integers(8, 130, 2))
    output_size = tuple(int(side) for side in rng.integers(1, 200, 2))
    padded_size = tuple(-(-side // 32) * 32 for side in input_size)
    queries = int(rng.integers(1, 40))
    predicted = prediction(padded_size, queries, seed)
    crops = [CropPrediction(predicted, padded_size, input_size)]
    if seed % 2:
        flipped = prediction(padded_size, queries, seed + 1000)
        crops.append(CropPrediction(flipped, padded_size, input_size, True))
    return crops, output_size


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
@pytest.mark.parametrize("seed", range(20))
def test_the_plain_algorithm_and_the_one_by_blocks_agree(seed, task, monkeypatch):
    crops, output_size = random_crops(seed)
    thresholds = {"object_threshold": 0.3, "overlap_threshold": 0.2, "top_k": 60}
    config = EvaluateConfig(task=task, semantic_resolution=("input", "output")[seed // 2 % 2], **thresholds)
    results = []
    for module in (postprocess, blockwise_postprocess):
        monkeypatch.setattr(segment_module, "postprocess_for", lambda device, module=module: module)
        results.append(segment(crops, task, output_size=output_size, categories=CATEGORIES, config=config))
    plain, blocks = results
    if task == "instance":  # empty masks score 0 and are in any order
        shown, other = plain.scores > 0, blocks.scores > 0
        np.testing.assert_array_equal(plain.labels[shown], blocks.labels[other])
        np.testing.assert_allclose(plain.scores[shown], blocks.scores[other], rtol=1e-5)
        differing = plain.masks[shown] != blocks.masks[other]
        assert differing.sum((1, 2)).max(initial=0) <= 2
        return
    ours, theirs = ((r.label_map if task == "semantic" else r.segment_map) for r in results)
    assert (ours != theirs).sum() <= 2  # pixels where two queries or classes tie up to rounding
    np.testing.assert_array_equal(plain.labels, blocks.labels)
    if task == "panoptic":
        np.testing.assert_array_equal(plain.scores, blocks.scores)


@pytest.mark.parametrize("seed", range(0, 10, 2))
def test_class_scores_of_both_forms_agree(seed, monkeypatch):
    (predicted,), output_size = random_crops(seed)
    for size in (None, output_size):
        found = []
        for module in (postprocess, blockwise_postprocess):
            monkeypatch.setattr(segment_module, "postprocess_for", lambda device, module=module: module)
            found.append(class_scores(predicted, size).values)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


# All tasks


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_a_result_without_segments_is_empty_in_every_view(task, algorithm):
    predicted = handmade([(5, slice(0, 4), 30.0), (5, slice(4, 8), 30.0)])
    result = run(predicted, task, SMALL, score_threshold=0.5)
    assert len(result) == 0
    assert result.masks.shape == (0, 8, 8)
    assert result.masks.dtype == bool
    assert result.boxes.shape == (0, 4)
    assert result.areas.shape == result.labels.shape == result.scores.shape == (0,)
    assert result.names == []
    if task == "panoptic":
        assert not result.segment_map.any()


def test_without_things_there_are_no_instances(algorithm):
    predicted = prediction((32, 32))
    stuff = tuple(Category(c.id, c.name, False, c.color) for c in CATEGORIES)
    settings = arguments(SMALL, EvaluateConfig(task="instance")) | {"categories": stuff}
    result = segment([crop(predicted, SMALL)], "instance", **settings)
    assert result.masks.shape == (0, 8, 8)


@EVERY_SIZE
@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_masks_areas_boxes_and_labels_agree(task, sizes):
    result = run(prediction(sizes["padded_size"], seed=5), task, sizes, object_threshold=0.3, overlap_threshold=0.2)
    assert len(result.masks) == len(result.areas) == len(result.boxes) == len(result.labels) == len(result.names)
    assert result.masks.shape[1:] == result.size == sizes["output_size"]
    assert result.areas.tolist() == [int(mask.sum()) for mask in result.masks]
    for mask, (x0, y0, x1, y1) in zip(result.masks, result.boxes.astype(int), strict=True):
        inside = np.zeros_like(mask)
        inside[y0:y1, x0:x1] = True
        assert not (mask & ~inside).any()
        if mask.any():
            assert mask[y0].any()
            assert mask[y1 - 1].any()
            assert mask[:, x0].any()
            assert mask[:, x1 - 1].any()
        else:
            assert (x0, y0, x1, y1) == (0, 0, 0, 0)
    if task != "instance":
        assert (result.masks.sum(0) <= 1).all()
        assert result.areas.min(initial=1) > 0
    if task == "semantic":
        assert result.areas.sum() == result.masks[0].size
    if result.scores is not None:
        assert result.scores.dtype == np.float32
        assert ((result.scores >= 0) & (result.scores <= 1)).all()
    if task == "instance":
        assert (np.diff(result.scores) <= 0).all()


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_the_prediction_is_not_changed_and_may_be_in_half_precision(task):
    predicted = prediction((64, 96))
    before = [tensor.clone() for tensor in (predicted.class_logits, predicted.mask_embeddings, predicted.mask_features)]
    run(predicted, task, SIZES["same size"])
    after = (predicted.class_logits, predicted.mask_embeddings, predicted.mask_features)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    half = MaskPrediction(*(tensor.bfloat16() for tensor in after))
    exact = MaskPrediction(*(tensor.bfloat16().float() for tensor in after))
    rounded, expected = (run(p, task, SIZES["same size"]) for p in (half, exact))
    assert np.array_equal(rounded.masks, expected.masks)


def test_an_unknown_task_is_refused():
    config = EvaluateConfig(task="panoptic")
    with pytest.raises(ValueError, match="unknown task 'depth'; known: semantic, instance, panoptic"):
        segment([crop(prediction((32, 32)), SMALL)], "depth", **arguments(SMALL, config))
