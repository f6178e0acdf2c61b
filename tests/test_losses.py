"""Matching and losses: closed forms and properties. test_parity.py compares them with the original."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskwright.errors import TrainingError
from maskwright.structures.annotations import Target
from maskwright.structures.predictions import MaskPrediction, ModelOutput, PixelPrediction
from maskwright.training.losses import point_sampling
from maskwright.training.losses.criterion import Criterion, Normalizers, count_normalizers
from maskwright.training.losses.matcher import HungarianMatcher
from maskwright.training.losses.point_sampling import (
    RandomPoints,
    sample_features,
    sample_masks,
    sample_matched_objects,
    sample_objects,
)

H, W, QUERIES, CLASSES, WIDTH = 24, 32, 6, 4, 5


def target(image_id: int | str = 1, objects: int = 3, size: tuple[int, int] = (H, W), seed: int = 0) -> Target:
    """Rectangles, drawn over each other."""
    generator = torch.Generator().manual_seed(seed)
    id_maps = torch.zeros(1, *size, dtype=torch.int32)
    for number in range(1, objects + 1):
        y, x = (int(torch.randint(0, side // 2, (), generator=generator)) for side in size)
        id_maps[0, y : y + size[0] // 3, x : x + size[1] // 3] = number
    labels = torch.randint(0, CLASSES, (objects,), generator=generator)
    return Target(id_maps, labels, torch.zeros(objects, dtype=torch.bool), image_id, size)


def predictions(images: int, layers: int = 3, seed: int = 0) -> tuple[ModelOutput, list[Tensor]]:
    """Random predictions with shared mask features, and their leaf tensors."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, WIDTH, H // 4, W // 4, generator=generator).requires_grad_()
    leaves, made = [features], []
    for _ in range(layers):
        logits = torch.randn(images, QUERIES, CLASSES + 1, generator=generator).requires_grad_()
        embeddings = torch.randn(images, QUERIES, WIDTH, generator=generator).requires_grad_()
        leaves += [logits, embeddings]
        made.append(MaskPrediction(logits, embeddings, features))
    return ModelOutput(made[-1], made[:-1]), leaves


def from_masks(masks: Tensor, class_logits: Tensor) -> ModelOutput:
    """A prediction for one image with the given mask logits (Q, h, w)."""
    return ModelOutput(MaskPrediction(class_logits[None], torch.eye(len(masks))[None], masks[None]))


def keys(count: int) -> list[tuple[int, int]]:
    return [(0, index) for index in range(count)]


def losses_of(
    output: ModelOutput, targets: Sequence[Target], points: int = 40, seed: int = 7, **settings: float
) -> Tensor:
    """(layers, 3): class, mask and dice."""
    losses = Criterion(num_points=points, **settings)(output, targets, RandomPoints(seed, 3, keys(len(targets)), "cpu"))
    assert list(losses) == ["class", "mask", "dice"]
    return torch.stack(list(losses.values()), 1)


class FixedPoints:
    """The same points everywhere."""

    def __init__(self, points: Tensor) -> None:
        self.points = points

    def matching(self, image: int, layers: int, count: int) -> Tensor:
        return self.points[:count].expand(layers, -1, -1)

    def candidates(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        return self.points.repeat(-(-count // len(self.points)), 1)[:count].expand(masks, -1, -1)

    def uniform(self, layer: int, image: int, masks: int, count: int) -> Tensor:
        return self.points[:count].expand(masks, -1, -1)


# Closed forms


def test_class_loss_of_uniform_logits_is_the_logarithm_of_the_number_of_classes():
    output = from_masks(torch.randn(QUERIES, 6, 8), torch.zeros(QUERIES, CLASSES + 1))
    assert losses_of(output, [target()])[0, 0].item() == pytest.approx(math.log(CLASSES + 1), rel=1e-6)


def test_class_loss_is_the_weighted_mean_over_queries():
    logits = torch.zeros(2, 2 + 1)
    logits[:, 2] = 2.0  # both queries say "no object"; one of them is matched
    one = Target(torch.ones(1, H, W, dtype=torch.int32), torch.tensor([1]), torch.tensor([False]), 1, (H, W))
    probability = math.exp(2) / (2 + math.exp(2))
    wrong, right = -math.log((1 - probability) / 2), -math.log(probability)
    loss = losses_of(from_masks(torch.zeros(2, 6, 8), logits), [one], no_object_weight=0.25)[0, 0]
    assert loss.item() == pytest.approx((wrong + 0.25 * right) / 1.25, rel=1e-5)


def test_masks_of_zero_logits_cost_log_two_and_half_the_dice():
    inside = torch.rand(64, 2, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    whole = Target(torch.ones(1, H, W, dtype=torch.int32), torch.tensor([1]), torch.tensor([False]), 1, (H, W))
    criterion = Criterion(num_points=64)
    losses = criterion(from_masks(torch.zeros(1, 6, 8), torch.zeros(1, 5)), [whole], FixedPoints(inside))
    assert losses["mask"].item() == pytest.approx(math.log(2), rel=1e-6)
    assert losses["dice"].item() == pytest.approx(1 - (2 * 32 + 1) / (32 + 64 + 1), rel=1e-6)


def test_a_perfect_prediction_costs_nothing():
    truth = target(objects=2)
    masks = torch.cat([truth.masks.float() * 2 - 1, -torch.ones(1, H, W)]) * 1e4
    logits = torch.full((3, CLASSES + 1), -50.0)
    logits[0, truth.labels[0]] = logits[1, truth.labels[1]] = logits[2, CLASSES] = 50.0
    inside = (torch.cartesian_prod(torch.arange(W), torch.arange(H)) + 0.5) / torch.tensor([W, H])  # cell centers
    losses = Criterion(num_points=len(inside))(from_masks(masks, logits), [truth], FixedPoints(inside))
    assert torch.stack(list(losses.values())).abs().max() < 1e-3


def test_a_good_prediction_costs_less_than_a_bad_one_in_every_term():
    truth = target(objects=2)
    masks = F.interpolate(torch.cat([truth.masks.float() * 2 - 1, torch.zeros(2, H, W)])[None], scale_factor=0.25)[0]
    logits = torch.zeros(4, CLASSES + 1)
    logits[0, truth.labels[0]] = logits[1, truth.labels[1]] = 3.0
    good, bad = losses_of(from_masks(masks * 5, logits), [truth]), losses_of(from_masks(-masks * 5, -logits), [truth])
    assert (good < bad).all()


def test_the_total_is_the_weighted_sum_over_all_layers():
    losses = {"class": [1.0, 10.0], "mask": [2.0, 20.0], "dice": [3.0, 30.0], "semantic": [100.0]}
    criterion = Criterion(class_weight=1.0, mask_weight=0.5, dice_weight=2.0, semantic_weight=0.1)
    assert criterion.total({term: torch.tensor(values) for term, values in losses.items()}).item() == 98.0


# Numbers of objects


def test_without_objects_only_the_class_loss_remains_and_gradients_are_finite():
    output, leaves = predictions(2)
    losses = losses_of(output, [target(objects=0), target(objects=0)])
    assert (losses[:, 0] > 0).all()
    assert not losses[:, 1:].any()
    gradients = torch.autograd.grad(losses.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0].any()


def test_an_image_without_objects_beside_another_adds_no_mask_loss():
    output, _ = predictions(2)
    first = MaskPrediction(
        output.final.class_logits[:1], output.final.mask_embeddings[:1], output.final.mask_features[:1]
    )
    both = losses_of(ModelOutput(output.final), [target(), target(objects=0)])
    alone = losses_of(ModelOutput(first), [target()])
    torch.testing.assert_close(both[:, 1:], alone[:, 1:])


@pytest.mark.parametrize("objects", [1, QUERIES, 2 * QUERIES])
def test_each_object_or_each_query_is_matched_once(objects):
    output, _ = predictions(1)
    truth = target(objects=objects, seed=4)
    layers = [*output.intermediate, output.final]
    matchings = Criterion(num_points=30).matcher(layers, [truth], RandomPoints(0, 0, keys(1), "cpu"))
    assert len(matchings) == 3
    for (queries, numbers), *_ in matchings:
        assert len(queries) == len(numbers) == min(objects, QUERIES)
        assert queries.tolist() == sorted(set(queries.tolist()))
        assert len(set(numbers.tolist())) == len(numbers)
        assert set(numbers.tolist()) <= set(range(objects))


def test_the_only_object_goes_to_the_query_that_fits_best():
    truth = target(objects=1)
    masks = torch.full((3, H, W), -5.0)
    masks[2] = truth.masks[0] * 10.0 - 5.0
    output = from_masks(masks, torch.zeros(3, CLASSES + 1))
    matchings = Criterion(num_points=100).matcher([output.final], [truth], RandomPoints(0, 0, keys(1), "cpu"))
    assert [tensor.tolist() for tensor in matchings[0][0]] == [[2], [0]]


def test_matching_costs_equal_the_plain_formulas():
    output, _ = predictions(1, layers=1)
    truth, points = target(), torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    matcher = HungarianMatcher(class_weight=2.0, mask_weight=3.0, dice_weight=5.0, num_points=200)
    with torch.no_grad():
        (found,) = matcher.cost([output.final], 0, truth, points[None])
        logits = sample_masks(output.final.mask_logits()[0], points.expand(QUERIES, -1, -1))  # (Q, P)
    masks = sample_objects(truth, points)  # (N, P)
    expected = torch.empty(QUERIES, len(truth))
    for query in range(QUERIES):
        probabilities = logits[query].sigmoid()
        for number, mask in enumerate(masks):
            dice = 1 - (2 * (probabilities * mask).sum() + 1) / (probabilities.sum() + mask.sum() + 1)
            mask_cost = F.binary_cross_entropy_with_logits(logits[query], mask)
            probability = output.final.class_logits[0, query].softmax(0)[truth.labels[number]]
            expected[query, number] = 3 * mask_cost + 5 * dice - 2 * probability
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("weights", "chosen"), [((0, 10, 1), 0), ((0, 1, 10), 1), ((100, 1, 10), 0)])
def test_each_term_has_its_own_weight_in_the_matching(weights, chosen):
    """An object of a tenth of the area: query 0 is unsure of pixels, query 1 sure of the object and of others."""
    ids = torch.zeros(1, 10, 100, dtype=torch.int32)
    ids[0, 0] = 1
    truth = Target(ids, torch.tensor([0]), torch.tensor([False]), 1, (10, 100))
    masks = torch.full((2, 10, 100), -3.0)
    masks[1] = -8.0
    masks[1, :3] = 8.0
    cell_centers = (torch.cartesian_prod(torch.arange(100), torch.arange(10)) + 0.5) / torch.tensor([100, 10])
    class_logits = torch.zeros(2, CLASSES + 1)
    class_logits[0, 0] = 3.0
    terms = dict(zip(("class_weight", "mask_weight", "dice_weight"), weights, strict=True))
    criterion, output = Criterion(num_points=1000, **terms), from_masks(masks, class_logits)
    ((queries, _),) = criterion.matcher([output.final], [truth], FixedPoints(cell_centers))[0]
    assert queries.tolist() == [chosen]


def test_more_objects_than_queries_count_in_the_normalizer():
    ten, two, none = target(objects=10), target(objects=2), target(objects=0)
    area, labeled = H * W, [int((truth.id_maps > 0).sum()) for truth in (ten, two)]
    assert count_normalizers([ten], 6, 0.1) == Normalizers(10, 6.0, area, labeled[0])
    assert count_normalizers([two, none], 6, 0.1) == Normalizers(2, pytest.approx(3.0), 2 * area, labeled[1])
    assert count_normalizers([none], 6, 0.1) == Normalizers(0, pytest.approx(0.6), area, 0)


# Properties


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(CLASSES)), st.integers(0, 10**6))
def test_permuting_the_objects_changes_nothing(order, seed):
    output, _ = predictions(1, seed=seed)
    truth = target(objects=CLASSES, seed=seed)
    truth.labels = torch.arange(CLASSES)  # objects of one class that no point of the matcher hits would be a tie
    numbers = torch.zeros(CLASSES + 1, dtype=torch.int32)
    numbers[torch.tensor(order) + 1] = torch.arange(1, CLASSES + 1, dtype=torch.int32)
    permuted = Target(
        numbers[truth.id_maps.long()], truth.labels[list(order)], truth.is_crowd, truth.image_id, truth.original_size
    )
    torch.testing.assert_close(losses_of(output, [permuted]), losses_of(output, [truth]))


@pytest.mark.parametrize("split", [[4], [2, 2], [1, 3], [1, 1, 1, 1]])
def test_micro_batches_with_the_normalizers_of_the_step_add_up_to_the_whole_batch(split):
    output, leaves = predictions(4)
    targets = [target(image, objects, seed=image) for image, objects in enumerate([3, 0, 1, 9])]
    criterion, whole = Criterion(num_points=40), RandomPoints(5, 2, keys(4), "cpu")
    expected = criterion(output, targets, whole)
    expected_gradients = torch.autograd.grad(criterion.total(expected), leaves, retain_graph=True)
    normalizers = count_normalizers(targets, QUERIES, 0.1)
    losses, start = {term: torch.zeros_like(values) for term, values in expected.items()}, 0
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    for count in split:
        part = slice(start, start + count)
        shared = output.final.mask_features[part]
        layers = [
            MaskPrediction(p.class_logits[part], p.mask_embeddings[part], shared)
            for p in (*output.intermediate, output.final)
        ]
        points = RandomPoints(5, 2, keys(4)[part], "cpu")
        own = criterion(ModelOutput(layers[-1], layers[:-1]), targets[part], points, normalizers)
        losses = {term: values + own[term].detach() for term, values in losses.items()}
        for total, gradient in zip(gradients, torch.autograd.grad(criterion.total(own), leaves), strict=True):
            total += gradient
        start += count
    torch.testing.assert_close(losses, {term: values.detach() for term, values in expected.items()})
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_layers_with_their_own_features_give_the_same_as_shared_ones():
    output, _ = predictions(2)
    apart = ModelOutput(
        output.final,
        [MaskPrediction(p.class_logits, p.mask_embeddings, p.mask_features + 0) for p in output.intermediate],
    )
    targets = [target(objects=2), target(objects=4, seed=9)]
    torch.testing.assert_close(losses_of(apart, targets), losses_of(output, targets))


@pytest.mark.parametrize("chunk", [1, 500])
def test_layers_processed_in_chunks_have_the_same_losses(monkeypatch, chunk):
    output, leaves = predictions(2, layers=5)
    targets = [target(1), target(2, objects=2, seed=1)]
    found = []
    for values in (2**21, chunk):  # a layer has 240 cost values, and 360 and 240 candidates
        monkeypatch.setattr(point_sampling, "MAX_CPU_CHUNK", values)
        result = losses_of(output, targets)
        found.append([result, *torch.autograd.grad(result.sum(), leaves)])
    torch.testing.assert_close(found[1], found[0])


def test_losses_are_float32_in_mixed_precision():
    output, _ = predictions(1)
    rounded = [
        MaskPrediction(*(part.bfloat16() for part in (p.class_logits, p.mask_embeddings)), p.mask_features.bfloat16())
        for p in (*output.intermediate, output.final)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(ModelOutput(rounded[-1], rounded[:-1]), [target()])
    assert losses.dtype == torch.float32
    exact = [
        MaskPrediction(p.class_logits.float(), p.mask_embeddings.float(), p.mask_features.float()) for p in rounded
    ]
    torch.testing.assert_close(losses, losses_of(ModelOutput(exact[-1], exact[:-1]), [target()]))


def test_crowd_flags_are_ignored():
    output, _ = predictions(1)
    truth = target()
    flagged = Target(truth.id_maps, truth.labels, ~truth.is_crowd, truth.image_id, truth.original_size)
    torch.testing.assert_close(losses_of(output, [flagged]), losses_of(output, [truth]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["class_logits", "mask_embeddings", "mask_features"])
def test_nonfinite_predictions_raise_an_error_that_names_the_image(part, value):
    output, _ = predictions(2)
    with torch.no_grad():
        getattr(output.final, part)[1].flatten()[3:5] = value
    with pytest.raises(TrainingError, match=r"image street/17\.png are not finite") as error:
        losses_of(output, [target(), target("street/17.png", seed=2)])
    assert "\n" not in str(error.value)


# Points


def test_random_points_depend_only_on_seed_step_and_key():
    def draw(seed: int, step: int, key: tuple[int, int]) -> Tensor:
        points = RandomPoints(seed, step, [(9, 9), key], "cpu")
        points.uniform(0, 0, 3, 5)  # draws for another image do not matter
        return torch.cat([points.matching(1, 1, 4), points.candidates(0, 1, 1, 4), points.uniform(2, 1, 1, 4)])

    first = draw(1, 2, (3, 4))
    assert torch.equal(draw(1, 2, (3, 4)), first)
    others = [draw(2, 2, (3, 4)), draw(1, 3, (3, 4)), draw(1, 2, (4, 4)), draw(1, 2, (3, 5)), draw(12, 3, (4, 0))]
    assert not any(torch.equal(other, first) for other in others)
    assert first.min() >= 0
    assert first.max() < 1


def test_losses_repeat_and_change_with_the_step():
    output, _ = predictions(1)
    criterion = Criterion(num_points=40)
    first, again, later = (criterion(output, [target()], RandomPoints(0, step, keys(1), "cpu")) for step in (1, 1, 2))
    assert all(torch.equal(first[term], again[term]) for term in first)
    assert not any(torch.equal(first[term], later[term]) for term in ("mask", "dice"))


def test_the_most_uncertain_candidates_are_chosen():
    ramp = torch.linspace(-4, 4, 32).expand(1, 24, 32)  # zero in the middle column
    points = RandomPoints(0, 0, keys(1), "cpu")
    chosen = Criterion(num_points=40, oversample_ratio=3, importance_sample_ratio=0.75)._importance_sample(
        ramp, points, 1, 0
    )
    assert chosen.shape == (1, 40, 2)
    distance = (chosen[0, :, 0] - 0.5).abs()
    assert distance[:30].max() < 0.2  # 30 of 120 uniform candidates: about a quarter of the width
    assert distance[30:].max() > 0.2


@pytest.mark.parametrize("plain", [True, False])
def test_features_at_points_are_those_of_grid_sample(monkeypatch, plain):
    monkeypatch.setattr(point_sampling, "has_plain_operators", lambda device: plain)
    generator = torch.Generator().manual_seed(0)
    features, points = torch.randn(3, 5, 7, generator=generator), torch.rand(200, 2, generator=generator)
    points[:4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    expected = F.grid_sample(features[None], points[None, None] * 2 - 1, align_corners=False)[0, :, 0].T
    torch.testing.assert_close(sample_features(features, points), expected)


# Objects at points


@st.composite
def maps_and_points(draw) -> tuple[Target, Tensor]:
    """Targets with one or several id maps, and points in 0..1, many on borders, centers and corners of pixels."""
    height, width, depth = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(1, 3))
    objects = draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    id_maps = torch.zeros(depth, height, width, dtype=torch.int32)
    for number in range(1, objects + 1):
        here = torch.rand(height, width, generator=generator) < 0.5
        id_maps[number % depth][here] = number
    points = torch.rand(20, 2, generator=generator)
    steps = torch.tensor([2 * width, 2 * height])
    points[::2] = (points[::2] * steps).round() / steps
    points[0], points[1] = 0.0, 1.0
    labels = torch.zeros(objects, dtype=torch.int64)
    return Target(id_maps, labels, labels.bool(), 1, (height, width)), points


# grid_sample scales points to -1..1 and back in float32: about 1e-6 of a cell.
@settings(max_examples=100, deadline=None)
@given(maps_and_points())
def test_sampled_objects_equal_grid_sample_of_their_masks(case):
    truth, points = case
    expected = sample_masks(truth.masks.float(), points.expand(len(truth), -1, -1))
    torch.testing.assert_close(sample_objects(truth, points), expected, rtol=0, atol=1e-5)
    numbers = torch.arange(len(truth)).flip(0)
    torch.testing.assert_close(
        sample_matched_objects(truth, numbers, points.expand(len(truth), -1, -1)), expected.flip(0), rtol=0, atol=1e-5
    )


def test_overlapping_objects_on_different_id_maps_do_not_hide_each_other():
    id_maps = torch.zeros(2, 4, 4, dtype=torch.int32)
    id_maps[0, :, :2], id_maps[1] = 1, 2
    truth = Target(id_maps, torch.tensor([0, 1]), torch.tensor([False, False]), 1, (4, 4))
    shares = sample_objects(truth, torch.tensor([[0.25, 0.5], [0.75, 0.5]]))
    torch.testing.assert_close(shares, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))


# Pixels


def per_pixel(images: int = 2, semantic: bool = True, seed: int = 0) -> ModelOutput:
    """A per-pixel prediction at stride 4, with semantic logits."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(images, CLASSES, H // 4, W // 4, generator=generator).requires_grad_() for _ in range(2)]
    return ModelOutput(PixelPrediction(maps[0]), semantic_logits=maps[1] if semantic else None)


def pixel_losses(output: ModelOutput, targets: Sequence[Target], **settings: float) -> dict[str, Tensor]:
    return Criterion(num_points=40, **settings)(output, targets, RandomPoints(7, 3, keys(len(targets)), "cpu"))


def entropies(logits: Tensor, truth: Target) -> Tensor:
    """Cross-entropy (H, W) by its definition, for logits (K, h, w); NaN without a class."""
    resized = F.interpolate(logits[None], (H, W), mode="bilinear", align_corners=False)[0].double()
    probabilities = resized.exp() / resized.exp().sum(0)
    result = torch.full((H, W), torch.nan, dtype=torch.float64)
    for mask, label in zip(truth.masks, truth.labels, strict=True):
        result[mask] = -probabilities[label][mask].log()
    return result


def test_per_pixel_terms_are_means_over_all_pixels_labeled_or_not():
    output, targets = per_pixel(), [target(), target(objects=1, seed=3)]
    losses = pixel_losses(output, targets)
    assert list(losses) == ["pixel", "semantic"]
    for term, logits in (("pixel", output.final.class_logits), ("semantic", output.semantic_logits)):
        expected = sum(entropies(image, truth).nansum() for image, truth in zip(logits, targets, strict=True))
        assert losses[term].shape == (1,)
        assert losses[term].item() == pytest.approx(expected.item() / (2 * H * W), rel=1e-5)


def test_with_masks_the_semantic_term_is_the_mean_over_labeled_pixels():
    masks, maps, targets = predictions(2)[0], per_pixel().semantic_logits, [target(), target(objects=1, seed=3)]
    output = ModelOutput(masks.final, masks.intermediate, semantic_logits=maps)
    losses = pixel_losses(output, targets)
    assert list(losses) == ["class", "mask", "dice", "semantic"]
    labeled = torch.cat([entropies(image, truth).flatten() for image, truth in zip(maps, targets, strict=True)])
    assert losses["semantic"].item() == pytest.approx(labeled.nanmean().item(), rel=1e-5)
    without = pixel_losses(masks, targets)
    assert all(torch.equal(without[term], losses[term]) for term in without)


def test_ohem_keeps_the_pixels_of_highest_loss_for_the_pixel_term_only():
    output, targets = per_pixel(), [target(), target(objects=1, seed=3)]
    logits = output.final.class_logits
    all_of_them = torch.cat([entropies(image, truth).flatten() for image, truth in zip(logits, targets, strict=True)])
    hardest = all_of_them[~all_of_them.isnan()].sort(descending=True).values
    whole, few = pixel_losses(output, targets), pixel_losses(output, targets, ohem_pixels=20)
    assert few["pixel"].item() == pytest.approx(hardest[:40].sum().item() / (2 * H * W), rel=1e-5)
    assert torch.equal(few["semantic"], whole["semantic"])
    more_than_there_are = pixel_losses(output, targets, ohem_pixels=H * W)
    torch.testing.assert_close(more_than_there_are["pixel"], whole["pixel"])


@pytest.mark.parametrize("with_masks", [False, True])
def test_pixel_terms_without_any_labeled_pixel_are_zero_with_finite_gradients(with_masks):
    output = per_pixel()
    if with_masks:
        output.final = predictions(2)[0].final
    for ohem_pixels in (None, 10):
        losses = pixel_losses(output, [target(objects=0)] * 2, ohem_pixels=ohem_pixels)
        assert all(losses[term].item() == 0 for term in ("pixel", "semantic") if term in losses)
        Criterion(num_points=40).total(losses).backward()
    assert output.semantic_logits.grad.abs().max() == 0


@pytest.mark.parametrize("with_masks", [False, True])
def test_pixel_terms_of_micro_batches_add_up_to_the_whole_batch(with_masks):
    output, targets = per_pixel(4), [target(image, objects, seed=image) for image, objects in enumerate([3, 0, 1, 9])]
    masks = predictions(4)[0].final

    def part(images: slice) -> ModelOutput:
        own = MaskPrediction(masks.class_logits[images], masks.mask_embeddings[images], masks.mask_features[images])
        pixels = PixelPrediction(output.final.class_logits[images])
        return ModelOutput(own if with_masks else pixels, semantic_logits=output.semantic_logits[images])

    criterion, normalizers = Criterion(num_points=40), count_normalizers(targets, QUERIES if with_masks else 0, 0.1)
    whole = criterion(part(slice(0, 4)), targets, RandomPoints(5, 2, keys(4), "cpu"))
    parts = [
        criterion(part(slice(a, b)), targets[a:b], RandomPoints(5, 2, keys(4)[a:b], "cpu"), normalizers)
        for a, b in ((0, 1), (1, 4))
    ]
    torch.testing.assert_close({term: sum(p[term] for p in parts) for term in whole}, whole)


def test_pixels_without_an_object_are_not_labeled():
    truth = target()
    assert 0 < truth.labeled_pixels < H * W
    assert truth.labeled_pixels == int((truth.label_map() != 255).sum())


def test_class_255_is_not_confused_with_ignored_pixels():
    truth = Target(torch.ones(1, H, W, dtype=torch.int32), torch.tensor([255]), torch.tensor([False]), 1, (H, W))
    output = ModelOutput(PixelPrediction(torch.zeros(1, 300, 6, 8)))
    assert pixel_losses(output, [truth])["pixel"].item() == pytest.approx(math.log(300), rel=1e-6)
