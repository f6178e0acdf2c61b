"""The host waits for the device once in a training step, for the costs of the matching, and damage is found.

No CUDA device is needed. Tensors on `meta` and PyTorch's fake tensors have no numbers: to read one, or to ask
for a shape that hangs on one, is an error. Copies from the host to the device go through a mode that lists them.
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
import maskwright.training.nan_guard as finite
import maskwright.training.step as step_module
import maskwright.training.train as train_module
from maskwright.data.build import open_dataset, train_loader
from maskwright.errors import TrainingError
from maskwright.models import build_model
from maskwright.models.layers import sine_positions
from maskwright.models.ops.deformable_attention import reference_positions
from maskwright.runtime.device import create_accelerator
from maskwright.training.losses.criterion import Normalisers
from maskwright.training.losses.point_sampling import RandomPoints
from maskwright.training.nan_guard import Unchecked
from maskwright.training.optimizer import build_optimizer
from maskwright.training.step import build_criterion, train_step
from maskwright.training.train import train
from tests import tiny

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")


class Waits(TorchDispatchMode):
    """Lists what makes the host wait: numbers and shapes read from a device, and copies not asked to run on."""

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
            runs_on = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if not runs_on:
                self.found.append(f"{name} {tensors[0].device.type} to {tensors[-1].device.type}")
        return result


class PointsOfNoDevice(RandomPoints):
    """Points on a device without a generator."""

    def __init__(self, seed, step, keys, device):
        self.device = device

    def _draw(self, image, rows, count):
        return torch.rand(rows, count, 2, device=self.device)


@pytest.fixture
def copies(monkeypatch):
    """Stands in for what these devices lack, and counts the copies to the host that are meant: one for the matching."""
    made = []

    def to_numpy(costs):
        made.append("matching")
        return np.random.default_rng(0).random(costs.shape, dtype=np.float32)

    def start_copy_to_host(tensor):
        made.append("numbers, behind")
        return lambda: torch.zeros(tensor.shape)

    monkeypatch.setattr(matcher_module, "_to_numpy", to_numpy)
    monkeypatch.setattr(finite, "start_copy_to_host", start_copy_to_host)
    monkeypatch.setattr(step_module, "RandomPoints", PointsOfNoDevice)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    return made


def step_without_device(recipe):
    """One step on the device `meta`; returns what would make the host wait."""
    engine = create_accelerator(recipe.train.precision)
    model = build_model(recipe.model, open_dataset(recipe, "train").categories).train().to("meta")
    optimizer = build_optimizer(model, recipe.train, fused=False)
    parts = next(iter(train_loader(recipe)))
    engine.state.device = torch.device("meta")
    with Waits() as waits:
        train_step(engine, model, optimizer, build_criterion(recipe.train), parts, recipe.train, 0)
    return waits.found


def test_a_training_step_waits_for_the_matching_and_nothing_else(tmp_path, copies):
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path / "data"))
    assert step_without_device(recipe) == []
    assert copies == ["matching", "numbers, behind"]


def test_model_and_losses_copy_nothing_to_the_device_while_the_host_waits(tmp_path, copies):
    """What `meta` does not show: numbers that Python makes tensors of. Fake CUDA tensors do, but have no backward."""
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path / "data"))
    model = build_model(recipe.model, open_dataset(recipe, "train").categories).train()
    (batch,) = next(iter(train_loader(recipe)))
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes, Waits() as waits:
        put_on_fake_device(model, fakes)
        batch = fake_batch(batch, fakes)
        output = model(batch.images, batch.padding, intermediate=True)
        normalisers = Normalisers(4, 9, 8192, 8000)
        points = PointsOfNoDevice(0, 0, batch.keys, torch.device("cuda"))
        build_criterion(recipe.train)(output, batch.targets, points, normalisers)
    sine_positions.cache_clear()  # they hold fake tensors
    reference_positions.cache_clear()
    assert output.final.class_logits.device.type == "cuda"
    assert waits.found == []
    assert copies == ["matching"]


def put_on_fake_device(model, fakes):
    """As `model.cuda()`, which exchanges memory and so cannot."""
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


def test_a_read_number_a_mask_as_index_and_a_plain_copy_would_be_noticed():
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
    """Fused AdamW of the CPU obeys the same flag as that of CUDA, so the CPU can stand in for it."""
    monkeypatch.setattr(finite, "is_asynchronous", lambda _: True)
    monkeypatch.setattr("maskwright.training.report.curves", lambda log, file: file.write_text("curves"))
    monkeypatch.setattr("maskwright.training.report.report", lambda run, file, **content: file.write_text("report"))


def damage(monkeypatch, step, parameter="masked_decoder.class_head.weight"):
    """Make one gradient infinite at a step; returns the weights before each step."""
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


def test_a_step_that_the_device_left_out_ends_the_run_one_step_later_with_weights_unchanged(
    tmp_path, monkeypatch, device_that_runs_behind
):
    seen = damage(monkeypatch, step=3)
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path / "data"), train__log_every=6, train__checkpoint_every=6)
    with pytest.raises(
        TrainingError, match=r"step 3: the gradient is not finite \(norm .*\) for images 1\d, 1\d; stop"
    ):
        train(recipe, tmp_path / "run")
    assert len(seen) == 4
    assert not all(torch.equal(seen[1][name], seen[2][name]) for name in seen[0])
    assert all(torch.equal(seen[2][name], seen[3][name]) for name in seen[0])


def test_a_damaged_step_is_found_before_it_is_logged_or_kept(tmp_path, monkeypatch, device_that_runs_behind):
    seen = damage(monkeypatch, step=4)
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path / "data"), train__log_every=1, train__checkpoint_every=2)
    with pytest.raises(TrainingError, match="step 4: the gradient is not finite"):
        train(recipe, tmp_path / "run")
    assert len(seen) == 4
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["00000002.safetensors"]
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 3


def test_updates_after_a_damaged_one_are_left_out_too():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    values = []
    for damaged in (False, True, False):
        weight.grad = torch.ones(4)
        finite.skip_from_now_on(optimizer, torch.tensor(damaged))
        optimizer.step()
        values.append(weight.detach().clone())
    assert not torch.equal(values[0], torch.ones(4))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2])


def test_an_infinite_loss_with_finite_gradients_poisons_them_and_a_finite_one_changes_nothing():
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    plain, poisoned = (weight.square().sum(), finite.poisoned(weight.square().sum()))
    assert torch.equal(plain, poisoned)
    first, second = (torch.autograd.grad(total, weight)[0] for total in (plain, poisoned))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(finite.poisoned(weight.sum() + math.inf), weight)
    assert gradient.isnan().all()


def numbers_of(parts, losses=None, norm=1.0):
    """Of step 7, two parts of one image each, called a and b."""
    batches = [SimpleNamespace(targets=[SimpleNamespace(image_id=name)]) for name in "ab"]
    parts = [{"class": torch.tensor(part[:2]), "semantic": torch.tensor(part[2:])} for part in parts]
    total = losses or {term: parts[0][term] + parts[1][term] for term in parts[0]}
    return finite.StepNumbers(6, batches, parts, total, torch.tensor(norm), scaled=False)


@pytest.mark.parametrize(
    ("parts", "losses", "norm", "message"),
    [
        ([[1.0, 1.0, 1.0], [1.0, math.inf, 1.0]], None, math.nan, r"\(class of layer 1\) for images b;"),
        ([[1.0, 1.0, math.nan], [1.0, 1.0, 1.0]], None, math.nan, r"\(semantic\) for images a;"),
        (
            [[1.0, 1.0, 1.0]] * 2,
            {"class": torch.tensor([1.0, 2.0]), "semantic": torch.tensor([math.nan])},
            math.nan,
            r"loss of another process is not finite \(semantic\); stopped",
        ),
        ([[1.0, 1.0, 1.0]] * 2, None, math.inf, r"gradient is not finite \(norm inf\) for images a, b;"),
    ],
)
def test_the_error_names_step_terms_and_the_images_of_the_part(parts, losses, norm, message):
    with pytest.raises(TrainingError, match="step 7: .*" + message):
        numbers_of(parts, losses, norm).check()


def test_where_a_later_step_fails_the_damage_before_it_is_told():
    def run():
        with Unchecked() as unchecked:
            unchecked.add(numbers_of([[1.0, 1.0, 1.0]] * 2, norm=math.inf), at_once=False)
            raise TrainingError("step 8: matching costs")

    with pytest.raises(TrainingError, match="step 7: the gradient"):
        run()
