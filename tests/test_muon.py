"""Muon: orthogonalized steps for matrices as in its paper, and AdamW for everything else."""

import pytest
import torch
from torch import nn

from maskwright.models import build_model
from maskwright.structures.annotations import Category
from maskwright.training.muon import Muon, orthogonalize
from maskwright.training.optimizer import build_optimizer
from tests import tiny

CLASSES = [Category(1, "sky", False, (0, 0, 255)), Category(2, "box", True, (255, 0, 0))]


def newton_schulz(matrix):
    """The iteration as Jordan et al. write it, in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("size", [(8, 8), (16, 144), (144, 16), (1, 5), (5, 1)])
def test_orthogonalize_equals_the_iteration_of_the_paper(size):
    torch.manual_seed(0)
    matrix = torch.randn(size)
    torch.testing.assert_close(orthogonalize(matrix), newton_schulz(matrix).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_singular_values_become_about_one_and_singular_vectors_stay(scale):
    torch.manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 16, dtype=torch.float64)).Q for n in (16, 40))
    values = torch.logspace(0, -2, 16, dtype=torch.float64)
    direction = orthogonalize((left * values @ right.T * scale).float()).double()
    seen = left.T @ direction @ right
    assert 0.6 < seen.diagonal().min() <= seen.diagonal().max() < 1.25
    torch.testing.assert_close(seen - seen.diagonal().diag(), torch.zeros(16, 16).double(), rtol=0, atol=1e-4)


def test_zeros_stay_zero():
    assert torch.equal(orthogonalize(torch.zeros(3, 7)), torch.zeros(3, 7))


def groups(matrix, vector, **changes):
    first = {"params": [matrix], "lr": 0.02, "weight_decay": 0.1, "orthogonal": True}
    return [first | changes, {"params": [vector], "lr": 0.003, "weight_decay": 0.2, "orthogonal": False}]


def gradients(*parameters, seed):
    torch.manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)


def test_steps_equal_those_of_the_paper_and_of_adamw():
    torch.manual_seed(2)
    kernel, vector = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(7))
    expected, alone = kernel.detach().clone(), nn.Parameter(vector.detach().clone())
    optimizer = Muon(groups(kernel, vector))
    plain = torch.optim.AdamW([alone], lr=0.003, weight_decay=0.2)
    momentum = torch.zeros(4, 27)
    for seed in (3, 4, 5):
        gradients(kernel, vector, seed=seed)
        alone.grad, gradient = vector.grad.clone(), kernel.grad.flatten(1).clone()
        optimizer.step()
        plain.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = newton_schulz(0.95 * momentum + 0.05 * gradient).float().view_as(expected)
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * 0.2 * 27**0.5 * direction
        torch.testing.assert_close(kernel.detach(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(vector, alone)
    assert set(optimizer.state[kernel]) == {"momentum"}


def test_skipped_step_changes_neither_weights_nor_momentum():
    matrix, vector = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(3))
    optimizer = Muon(groups(matrix, vector), fused=True)
    gradients(matrix, vector, seed=6)
    optimizer.step()
    before = [matrix.detach().clone(), vector.detach().clone(), optimizer.state[matrix]["momentum"].clone()]
    gradients(matrix, vector, seed=7)
    matrix.grad[1, 2] = torch.nan
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for was, now in zip(before, (matrix, vector, optimizer.state[matrix]["momentum"]), strict=True):
        assert torch.equal(was, now)


def test_matrix_without_gradient_is_unchanged():
    matrix, vector = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(3))
    before = matrix.detach().clone()
    Muon(groups(matrix, vector)).step()
    assert torch.equal(matrix, before)


def orthogonal_names(model, config):
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = build_optimizer(model, config, fused=False).param_groups
    return {names[parameter] for group in found if group["orthogonal"] for parameter in group["params"]}


def test_only_matrices_between_features_are_orthogonalized(tmp_path):
    recipe = tiny.recipe(tmp_path, train__optimizer="muon", model__backbone="convnext_atto")
    model = build_model(recipe.model, CLASSES)
    found = orthogonal_names(model, recipe.train)
    assert {
        "masked_decoder.layers.0.cross_attention.query.weight",
        "masked_decoder.mask_head.4.weight",
        "pixel_decoder.layers.0.attention.offsets.weight",
        "pixel_decoder.smooth.conv.weight",
    } <= found
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert all(name.endswith(".weight") and len(shapes[name]) in (2, 4) for name in found)
    depthwise = {name for name, shape in shapes.items() if len(shape) == 4 and shape[1] == 1}
    assert depthwise
    assert not found & depthwise
    assert not {name for name in found if "class_head" in name or "embedding" in name or "query_" in name}
    assert orthogonal_names(model, tiny.recipe(tmp_path).train) == set()


def test_muon_max_dim_leaves_large_matrices_to_adamw(tmp_path):
    recipe = tiny.recipe(tmp_path, train__optimizer="muon", train__muon_max_dim=32)
    model = build_model(recipe.model, CLASSES)
    found = orthogonal_names(model, recipe.train)
    sides = {name: min(len(p), p[0].numel()) for name, p in model.named_parameters() if p.ndim > 1}
    assert {sides[name] for name in found} <= set(range(33))
    every = orthogonal_names(model, recipe.train.model_copy(update={"muon_max_dim": None}))
    assert every - found == {name for name in every if sides[name] > 32} != set()


def test_matrices_have_their_own_learning_rate(tmp_path):
    recipe = tiny.recipe(
        tmp_path, train__optimizer="muon", train__muon_lr_multiplier=3.0, train__backbone_lr_multiplier=0.5
    )
    model = build_model(recipe.model, CLASSES)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in build_optimizer(model, recipe.train, fused=False).param_groups:
        for parameter in group["params"]:
            share = 0.5 if names[parameter].startswith("backbone") else 1.0
            expected = recipe.train.learning_rate * share * (3.0 if group["orthogonal"] else 1.0)
            assert group["initial_lr"] == pytest.approx(expected)
