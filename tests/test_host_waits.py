"""The host waits for the device once per training step, for the matching costs; non-finite steps are still found.

No CUDA device is needed. Tensors on `meta` and PyTorch's fake tensors have no values: reading one, or computing a shape
that depends on one, is an error. A dispatch mode lists the copies from the host to the device.
"""

import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import maskwright.training.losses.matcher as matcher_module
import maskwright.training.nan_guard as nan_guard
import maskwright.training.step as step_module
import maskwright.training.train as train_module
from maskwright.data.build import open_dataset, train_loader
from maskwright.errors import TrainingError
from maskwright.models import build_model
from maskwright.models.layers import sine_positions
from maskwright.models.ops.deformable_attention import reference_positions
from maskwright.runtime.device import create_accelerator
from maskwright.training.losses.criterion import Normalizers
from maskwright.training.losses.point_sampling import RandomPoints
from maskwright.training.nan_guard import DelayedChecks
from maskwright.training.optimizer import build_optimizer
from maskwright.training.step import build_criterion, train_step
from maskwright.training.train import train
from tests import tiny

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")


class Waits(TorchDispatchMode):
    """List what makes the host wait: values and shapes read from a device, and blocking copies."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        result = function(*args, **kwargs)
        tensors = [value for value in (*args, result) if isinstance(value, torch.Tensor)]
        on_device = {tensor.device.type for tensor in tensors} - {"cpu"}
        if name in READS and on_device:
            self.found.append(name)
        if name in ("_to_copy", "copy_") and len({tensor.device.type for tensor in tensors}) > 1:
            non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if not non_blocking:
                self.found.append(f"{name} {tensors[0].device.type} to {tensors[-1].device.type}")
        return result


class PointsWithoutGenerator(RandomPoints):
    """Random points on a device that has no generator."""

    def __init__(self, seed, step, keys, device):
        self.device = device

    def _draw(self, image, rows, count):
        return torch.rand(rows, count, 2, device=self.device)


@pytest.fixture
def copies(monkeypatch):
    """Replace what these devices lack, and list the intended copies to the host: one for the matching."""
    made = []

    def to_numpy(costs):
        made.append("matching")
        return np.random.default_rng(0).random(costs.shape, dtype=np.float32)

    def start_copy_to_host(tensor):
        made.append("step result, non-blocking")
        return lambda: torch.zeros(tensor.shape)

    monkeypatch.setattr(matcher_module, "_to_numpy", to_numpy)
    monkeypatch.setattr(nan_guard, "start_copy_to_host", start_copy_to_host)
    monkeypatch.setattr(step_module, "RandomPoints", PointsWithoutGenerator)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return made


def step_without_device(recipe):
    """Take one step on the device `meta`; return what would make the host wait."""
    engine = create_accelerator(recipe.train.precision)
    model = build_model(recipe.model, open_dataset(recipe, "train").categories).train().to("meta")
    optimizer = build_optimizer(model, recipe.train, fused=False)
    parts = next(iter(train_loader(recipe)))
    engine.state.device = torch.device("meta")
    with Waits() as waits:
        train_step(engine, model, optimizer, build_criterion(recipe.train), parts, recipe.train, 0)
    return waits.found


def test_a_training_step_waits_only_for_the_matching(tmp_path, copies):
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path / "data"))
    assert step_without_device(recipe) == []
    assert copies == ["matching", "step result, non-blocking"]


def test_model_and_losses_make_no_blocking_copies_to_the_device(tmp_path, copies):
    """Fake CUDA tensors show tensors made from Python numbers, which `meta` does not, but have no backward pass."""
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path / "data"))
    model = build_model(recipe.model, open_dataset(recipe, "train").categories).train()
    (batch,) = next(iter(train_loader(recipe)))
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes, Waits() as waits:
        put_on_fake_device(model, fakes)
        batch = fake_batch(batch, fakes)
        output = model(batch.images, batch.padding, intermediate=True)
        normalizers = Normalizers(4, 9, 8192, 8000)
        points = PointsWithoutGenerator(0, 0, batch.keys, torch.device("cuda"))
        build_criterion(recipe.train)(output, batch.targets, points, normalizers)
    sine_positions.cache_clear()  # they hold fake tensors
    reference_positions.cache_clear()
    assert output.final.class_logits.device.type == "cuda"
    assert waits.found == []
    assert copies == ["matching"]


def put_on_fake_device(model, fakes):
    """Do what `model.cuda()` does, which fails for fake tensors."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = fakes.from_tensor(parameter.data).to("cuda", non_blocking=True)
            module._parameters[name] = torch.nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = fakes.from_tensor(buffer).to("cuda", non_blocking=True)


def fake_batch(batch, fakes):
    for target in batch.targets:
        for name in ("id_maps", "labels", "is_crowd"):
            setattr(target, name, fakes.from_tensor(getattr(target, name)))
    batch.images, batch.padding = fakes.from_tensor(batch.images), fakes.from_tensor(batch.padding)
    return batch.to("cuda")


def test_reads_mask_indices_and_blocking_copies_would_be_noticed():
    with FakeTensorMode(), Waits() as waits:
        there = torch.ones(3, device="cuda")
        torch.ones(3).to("cuda", non_blocking=True)
        torch.ones(3).to("cuda")
        there.new_tensor([1.0, 2.0])
    assert waits.found == ["_to_copy cpu to cuda"] * 2
    there = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError):
        there.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        there[there > 0]


@pytest.fixture
def device_that_runs_behind(monkeypatch):
    """Let the CPU stand in for CUDA: its fused AdamW reads the same flag."""
    monkeypatch.setattr(nan_guard, "is_asynchronous", lambda _: True)
    monkeypatch.setattr("maskwright.training.report.curves", lambda log, file: file.write_text("curves"))
    monkeypatch.setattr("maskwright.training.report.report", lambda run, file, **content: file.write_text("report"))


def make_gradient_infinite(monkeypatch, step, parameter="masked_decoder.class_head.weight"):
    """Make one gradient infinite at a step; return the list to which the weights before each step are added."""
    real, seen = train_module.train_step, []

    def wrapped(engine, model, *rest):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        hook = None
        if len(seen) == step:
            weight = dict(model.named_parameters())[parameter]
            hook = weight.register_hook(lambda gradient: gradient * math.inf)
        try:
            return real(engine, model, *rest)
        finally:
            if hook:
                hook.remove()

    monkeypatch.setattr(train_module, "train_step", wrapped)
    return seen


def test_a_step_skipped_on_the_device_ends_the_run_one_step_later_with_weights_unchanged(
    tmp_path, monkeypatch, device_that_runs_behind
):
    weights = make_gradient_infinite(monkeypatch, step=3)
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path / "data"), train__log_every=6, train__checkpoint_every=6)
    with pytest.raises(
        TrainingError, match=r"step 3: the gradient is not finite \(norm .*\) for images 1\d, 1\d; the run has stopped"
    ):
        train(recipe, tmp_path / "run")
    assert len(weights) == 4
    assert not all(torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    assert all(torch.equal(weights[2][name], weights[3][name]) for name in weights[0])


def test_a_nonfinite_step_is_found_before_it_is_logged_or_saved(tmp_path, monkeypatch, device_that_runs_behind):
    weights = make_gradient_infinite(monkeypatch, step=4)
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path / "data"), train__log_every=1, train__checkpoint_every=2)
    with pytest.raises(TrainingError, match="step 4: the gradient is not finite"):
        train(recipe, tmp_path / "run")
    assert len(weights) == 4
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["00000002.safetensors"]
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 3


def test_updates_after_a_skipped_one_are_skipped_too():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    values = []
    for skipped in (False, True, False):
        weight.grad = torch.ones(4)
        nan_guard.skip_updates(optimizer, torch.tensor(skipped))
        optimizer.step()
        values.append(weight.detach().clone())
    assert not torch.equal(values[0], torch.ones(4))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2])


def test_an_infinite_loss_makes_finite_gradients_nan_and_a_finite_one_changes_nothing():
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    plain, guarded = (weight.square().sum(), nan_guard.propagate_nonfinite(weight.square().sum()))
    assert torch.equal(plain, guarded)
    first, second = (torch.autograd.grad(total, weight)[0] for total in (plain, guarded))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(nan_guard.propagate_nonfinite(weight.sum() + math.inf), weight)
    assert gradient.isnan().all()


def step_result(parts, losses=None, norm=1.0):
    """The result of step 7, with two micro-batches of one image each, a and b."""
    batches = [SimpleNamespace(targets=[SimpleNamespace(image_id=name)]) for name in "ab"]
    parts = [{"class": torch.tensor(part[:2]), "semantic": torch.tensor(part[2:])} for part in parts]
    total = losses or {term: parts[0][term] + parts[1][term] for term in parts[0]}
    return nan_guard.StepResult(6, batches, parts, total, torch.tensor(norm), scaled=False)


@pytest.mark.parametrize(
    ("parts", "losses", "norm", "message"),
    [
        ([[1.0, 1.0, 1.0], [1.0, math.inf, 1.0]], None, math.nan, r"\(class of layer 1\) for images b;"),
        ([[1.0, 1.0, math.nan], [1.0, 1.0, 1.0]], None, math.nan, r"\(semantic\) for images a;"),
        (
            [[1.0, 1.0, 1.0]] * 2,
            {"class": torch.tensor([1.0, 2.0]), "semantic": torch.tensor([math.nan])},
            math.nan,
            r"loss of another process is not finite \(semantic\); the run has stopped",
        ),
        ([[1.0, 1.0, 1.0]] * 2, None, math.inf, r"gradient is not finite \(norm inf\) for images a, b;"),
    ],
)
def test_the_error_names_step_terms_and_the_images_of_the_micro_batch(parts, losses, norm, message):
    with pytest.raises(TrainingError, match="step 7: .*" + message):
        step_result(parts, losses, norm).check()


def test_an_error_in_a_later_step_does_not_hide_the_nonfinite_step_before_it():
    def run():
        with DelayedChecks() as checks:
            checks.add(step_result([[1.0, 1.0, 1.0]] * 2, norm=math.inf), now=False)
            raise TrainingError("step 8: matching costs")

    with pytest.raises(TrainingError, match="step 7: the gradient"):
        run()
