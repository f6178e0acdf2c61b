"""The training step: the gradients of the whole batch, however it is divided, and a criterion as the recipe says."""

from contextlib import nullcontext
from dataclasses import astuple

import pytest
import torch

from maskwright.data.build import open_dataset, train_loader
from maskwright.models import build_model
from maskwright.runtime.device import create_accelerator
from maskwright.structures.annotations import Target
from maskwright.structures.predictions import MaskPrediction, ModelOutput, PixelPrediction
from maskwright.training.losses.criterion import count_normalizers
from maskwright.training.losses.point_sampling import RandomPoints
from maskwright.training.step import backward_micro_batch, build_criterion, step_normalizers, sum_losses, train_step
from tests import tiny

SIDE = 16


class Process:
    """One of several processes, as far as `backward_micro_batch` needs it."""

    device = torch.device("cpu")

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes

    def autocast(self):
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        """As if all processes had the same tensor."""
        assert reduction == "sum"
        return tensor * self.num_processes


class CountedPoints(RandomPoints):
    """Random points that record how many of each kind were asked for."""

    def __init__(self) -> None:
        super().__init__(0, 0, [(0, 0)], "cpu")
        self.counts: dict[str, int] = {}

    def matching(self, image: int, layers: int, count: int) -> torch.Tensor:
        self.counts["matching"] = count
        return super().matching(image, layers, count)

    def candidates(self, layer: int, image: int, masks: int, count: int) -> torch.Tensor:
        self.counts["candidates"] = count
        return super().candidates(layer, image, masks, count)

    def uniform(self, layer: int, image: int, masks: int, count: int) -> torch.Tensor:
        self.counts["uniform"] = count
        return super().uniform(layer, image, masks, count)


def half_covered() -> Target:
    """One object of class 0 in the left half of an image."""
    ids = torch.zeros(1, SIDE, SIDE, dtype=torch.int32)
    ids[..., : SIDE // 2] = 1
    return Target(ids, torch.tensor([0]), torch.tensor([False]), 1, (SIDE, SIDE))


def masks_output(queries: int = 3) -> ModelOutput:
    torch.manual_seed(0)
    return ModelOutput(
        MaskPrediction(torch.randn(1, queries, 3), torch.randn(1, queries, 4), torch.randn(1, 4, SIDE // 4, SIDE // 4))
    )


def train_config(folder, **changes):
    return tiny.recipe(folder, **{f"train__{key}": value for key, value in changes.items()}).train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_panoptic(tmp_path_factory.mktemp("data"))


def test_gradients_averaged_over_processes_are_those_of_the_whole_batch(folder):
    """AdamW and clipping cancel a wrong factor, so that losses and weights of a run cannot show it."""
    whole_crops = {"resize": "large_scale_jitter", "scale_range": [1.0, 1.5], "crop_size": [64, 64]}
    recipe = tiny.recipe(folder, train__batch_size=2, train__gradient_accumulation_steps=2, train__augment=whole_crops)
    torch.manual_seed(0)
    model = build_model(recipe.model, open_dataset(recipe, "train").categories).train()
    halves = next(iter(train_loader(recipe)))
    (whole,) = next(iter(train_loader(tiny.recipe(folder, train__batch_size=2, train__augment=whole_crops))))
    assert torch.equal(torch.cat([half.images for half in halves]), whole.images)
    normalizers = count_normalizers(whole.targets, model.config.num_queries, recipe.train.no_object_weight)

    def gradients(num_processes, batches):
        total = {}
        for batch in batches:
            model.zero_grad()
            criterion = build_criterion(recipe.train)
            backward_micro_batch(Process(num_processes), model, criterion, batch, normalizers, recipe.train, 0)
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    total[name] = total.get(name, 0) + parameter.grad / num_processes
        return total

    expected, found = gradients(1, [whole]), gradients(2, halves)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert norm > 0.1
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * norm.item(), msg=name)


def test_losses_and_normalizers_of_a_step_are_sums_over_micro_batches_and_processes(folder):
    recipe = tiny.recipe(folder, train__batch_size=2, train__gradient_accumulation_steps=2)
    model = build_model(recipe.model, open_dataset(recipe, "train").categories)
    halves = next(iter(train_loader(recipe)))
    alone, together = (step_normalizers(Process(count), halves, model, recipe.train) for count in (1, 2))
    own = count_normalizers([*halves[0].targets, *halves[1].targets], model.config.num_queries, 0.1)
    assert alone == own
    assert astuple(together) == pytest.approx([2 * count for count in astuple(own)])
    losses = [{"class": torch.tensor([1.0, 2.0]), "mask": torch.tensor([3.0])}] * 2
    total = {term: values.tolist() for term, values in sum_losses(Process(3), losses).items()}
    assert total == {"class": [6.0, 12.0], "mask": [18.0]}


def test_each_step_starts_from_zero_gradients_which_are_clipped(folder):
    """With plain gradient descent at a learning rate of 1, the weights move by the norm of the clipped gradient."""
    recipe = tiny.recipe(folder, train__max_grad_norm=0.01)
    torch.manual_seed(0)
    model = build_model(recipe.model, open_dataset(recipe, "train").categories).train()
    batches, engine = next(iter(train_loader(recipe))), create_accelerator("fp32")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    criterion = build_criterion(recipe.train)
    norms = [
        train_step(engine, model, optimizer, criterion, batches, recipe.train, 0).gradient_norm.item() for _ in "ab"
    ]
    assert norms[0] == norms[1] > 0.1
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.param_groups[0]["lr"] = 1.0
    train_step(engine, model, optimizer, criterion, batches, recipe.train, 0)
    moved = [(new.detach() - old).norm() for new, old in zip(parameters, before, strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_smaller_images_of_progressive_resizing_have_fewer_points(folder, monkeypatch):
    config = {"num_points": 64, "progressive_resizing": [{"until": 0.5, "size": 0.5}]}
    recipe = tiny.recipe(folder, **{f"train__{key}": value for key, value in config.items()})
    model = build_model(recipe.model, open_dataset(recipe, "train").categories).train()
    (batch,) = next(iter(train_loader(recipe)))
    counts = []
    monkeypatch.setattr(
        RandomPoints,
        "matching",
        lambda self, image, layers, count: counts.append(count) or torch.rand(layers, count, 2),
    )
    normalizers = count_normalizers(batch.targets, model.config.num_queries, 0.1)
    for step in (0, recipe.train.steps - 1):
        backward_micro_batch(Process(1), model, build_criterion(recipe.train), batch, normalizers, recipe.train, step)
    assert counts[0] == 16
    assert counts[-1] == 64


def test_numbers_of_points_follow_the_recipe(folder):
    config = train_config(folder, num_points=20, oversample_ratio=2.0, importance_sample_ratio=0.5)
    points = CountedPoints()
    build_criterion(config)(masks_output(), [half_covered()], points)
    assert points.counts == {"matching": 20, "candidates": 40, "uniform": 10}


def test_weights_of_the_terms_follow_the_recipe(folder):
    weights = {"class": 1.0, "mask": 2.0, "dice": 3.0, "semantic": 4.0}
    config = train_config(folder, **{f"{term}_loss_weight": weight for term, weight in weights.items()})
    criterion = build_criterion(config)
    one = {term: criterion.total({term: torch.ones(1)}).item() for term in weights}
    assert one == weights
    matcher = criterion.matcher
    assert (matcher.class_weight, matcher.mask_weight, matcher.dice_weight) == (1.0, 2.0, 3.0)


def test_weight_of_no_object_follows_the_recipe(folder):
    small, large = (
        build_criterion(train_config(folder, no_object_weight=weight))(
            masks_output(), [half_covered()], CountedPoints()
        )["class"]
        for weight in (0.1, 1.0)
    )
    assert abs(small - large) > 0.05


def test_pixels_of_hard_example_mining_follow_the_recipe(folder):
    output = ModelOutput(PixelPrediction(torch.randn(1, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(0))))
    every, hardest = (
        build_criterion(train_config(folder, ohem_pixels=pixels))(output, [half_covered()], CountedPoints())["pixel"]
        for pixels in (None, 1)
    )
    losses = torch.nn.functional.cross_entropy(
        output.final.class_logits, half_covered().label_map(-1)[None], ignore_index=-1, reduction="none"
    )
    assert every.item() == pytest.approx(losses.sum().item() / SIDE**2, rel=1e-5)
    assert hardest.item() == pytest.approx(losses.max().item() / SIDE**2, rel=1e-5)
