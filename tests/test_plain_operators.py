"""Training with plain operators only: which operators are called, forward and backward, and equal results."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskwright.data.build import open_dataset, train_loader
from maskwright.errors import MaskwrightError
from maskwright.models import build_model
from maskwright.models.ops.deformable_attention import choose_backend
from maskwright.runtime.device import OPERATORS_VARIABLE, create_accelerator, has_plain_operators
from maskwright.training.losses.point_sampling import sample_features, sample_masks
from maskwright.training.optimizer import build_optimizer
from maskwright.training.step import build_criterion, train_step
from tests import tiny

MISSING = ("grid_sampler", "embedding_bag", "masked_select", "sparse", "sampled_addmm")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class RecordUncommonOperators(TorchDispatchMode):
    """Record the names of called operators that devices commonly lack."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.found |= {name} if name == "nonzero" or any(part in name for part in MISSING) else set()
        if name in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.found.add("boolean index")
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.found |= {f"float64 in {name}" for leaf in leaves if leaf.dtype == torch.float64}
        return result


FAMILIES = {
    "mask2former": {},
    "feature alignment": {"model__pixel_decoder": "msfapn"},
    "per pixel": {"model__family": "semantic_fpn", "train__ohem_pixels": 100},
}


def two_steps(folder, changes):
    """Return the losses of two steps, and the uncommon operators that were called."""
    task = "semantic" if "model__family" in changes else "panoptic"
    write = tiny.write_labels if task == "semantic" else tiny.write_panoptic
    recipe = tiny.recipe(write(folder), task, val=False, **changes)
    torch.manual_seed(0)
    model = build_model(recipe.model, open_dataset(recipe, "train").categories).train()
    optimizer = build_optimizer(model, recipe.train, fused=False)
    engine, criterion, losses = create_accelerator("fp32"), build_criterion(recipe.train), []
    batches = [parts for _, parts in zip(range(2), train_loader(recipe), strict=False)]
    with RecordUncommonOperators() as called:
        for step, parts in enumerate(batches):
            done = train_step(engine, model, optimizer, criterion, parts, recipe.train, step)
            losses += [torch.cat(list(done.losses.values())), done.gradient_norm[None]]
    return torch.cat(losses), called.found


@pytest.mark.parametrize("family", FAMILIES)
def test_training_with_plain_operators_gives_the_same_losses(family, tmp_path, monkeypatch):
    usual, called = two_steps(tmp_path, FAMILIES[family])
    assert family == "per pixel" or {"grid_sampler_2d", "_embedding_bag"} & called  # the recorder works
    monkeypatch.setenv(OPERATORS_VARIABLE, "plain")
    plain, called = two_steps(tmp_path, FAMILIES[family])
    assert called == set()
    torch.testing.assert_close(plain, usual, rtol=2e-4, atol=1e-5)


def test_sampling_points_with_plain_operators_gives_the_same_values(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(3, 5, 7, generator=generator, requires_grad=True)
    points = torch.rand(3, 40, 2, generator=generator) * 1.2 - 0.1  # some outside
    results = []
    for setting in ("usual", "plain"):
        monkeypatch.setenv(OPERATORS_VARIABLE, setting)
        values = sample_masks(masks, points)
        (gradient,) = torch.autograd.grad(values.square().sum(), masks)
        results.append((values, gradient, sample_features(masks.detach(), points[0])))
    for usual, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, usual, rtol=1e-4, atol=1e-5)


def test_operators_are_chosen_by_device_and_environment_variable(monkeypatch):
    here = torch.zeros(1)
    monkeypatch.delenv(OPERATORS_VARIABLE, raising=False)
    plain = {name: has_plain_operators(name) for name in ("cpu", "cuda", "xpu", "mps", "npu", "sdaa")}
    assert plain == {"cpu": False, "cuda": False, "xpu": False, "mps": True, "npu": True, "sdaa": True}
    assert choose_backend(here) == "bag"
    monkeypatch.setenv(OPERATORS_VARIABLE, "plain")
    assert choose_backend(here) == "gather"
    monkeypatch.setenv(OPERATORS_VARIABLE, "usual")
    assert not has_plain_operators("mps")
    monkeypatch.setenv(OPERATORS_VARIABLE, "fancy")
    with pytest.raises(MaskwrightError, match="MASKWRIGHT_OPERATORS: found 'fancy', expected plain or usual"):
        has_plain_operators("cpu")
