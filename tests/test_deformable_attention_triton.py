"""The Triton kernels: interpreted on the CPU, compiled for CUDA without a device, and run on a device."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

import maskwright.models.ops.deformable_attention as module
from maskwright.models.ops.deformable_attention import DeformableAttention, choose_backend, deformable_attention

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def case(shapes, batch=1, queries=3, heads=2, channels=4, points=2, dtype=torch.float32, integer=False):
    """Return values, shapes, positions, weights and an upstream gradient; some positions are outside the levels."""
    generator = torch.Generator().manual_seed(7)
    cells, size = sum(h * w for h, w in shapes), (batch, queries, heads, len(shapes), points)
    values = torch.randn(batch, cells, heads, channels, generator=generator).to(dtype)
    extent = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float32)[:, None]
    positions = torch.rand(*size, 2, generator=generator) * (extent + 3) - 2
    positions = positions.round() if integer else positions
    positions[0, 0, 0, 0, 0] = torch.tensor([1e30, 0.25])
    positions[0, -1, -1, -1, -1] = torch.tensor([-1e9, -1e30])
    positions = positions.movedim(-1, 2).contiguous().movedim(2, -1)
    weights = torch.randn(size, generator=generator)
    upstream = torch.randn(batch, queries, heads * channels, generator=generator).to(dtype)
    return values, shapes, positions, weights, upstream


CASES = {
    "three levels of odd sizes": case([(3, 5), (1, 2), (7, 4)], batch=2),
    "six channels": case([(3, 5), (4, 3)], heads=3, channels=6),
    "more queries than a program has": case([(5, 9)], queries=37, heads=1, channels=40, points=1),
    "one of each": case([(1, 1)], queries=1, heads=1, channels=1, points=1),
    "integer positions": case([(4, 4), (2, 8)], integer=True),
    "bfloat16": case([(3, 5), (1, 2), (7, 4)], dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Results of the kernels for each case, from a process that interprets Triton."""
    folder = tmp_path_factory.mktemp("triton")
    torch.save(list(CASES.values()), folder / "cases.pt")
    run_process("run", folder / "cases.pt", folder / "results.pt", cache=folder)
    return dict(zip(CASES, torch.load(folder / "results.pt"), strict=True))


def run_process(*arguments, cache):
    run = subprocess.run(
        [sys.executable, "-m", "tests.triton_kernels", *map(str, arguments)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def expected(values, shapes, positions, weights, upstream, backend):
    """Return another backend's output and gradients, computed in float32."""
    leaves = [tensor.detach().float().requires_grad_() for tensor in (values, positions, weights)]
    output = deformable_attention(leaves[0], shapes, leaves[1], leaves[2], backend)
    return (output.detach(), *torch.autograd.grad(output, leaves, upstream.float()))


def assert_equal(found, values, shapes, positions, weights, upstream):
    """Compare up to float32's rounding of a few dozen terms, or bfloat16's rounding of the result.

    bfloat16 has 8 bits; the interpreter truncates, devices round. At integer positions only `bag` is compared; see
    `test_deformable_attention.py`.
    """
    rounded = 2**-7 if values.dtype == torch.bfloat16 else 1e-5
    smooth = (positions - positions.round()).abs() > 1e-4
    for backend in ("bag", "grid"):
        others = expected(values, shapes, positions, weights, upstream, backend)
        for index, (ours, theirs) in enumerate(zip(found, others, strict=True)):
            assert ours.dtype == (values.dtype if index < 2 else torch.float32)
            where = smooth if index == 2 and backend == "grid" else torch.ones_like(theirs, dtype=torch.bool)
            tolerance = rounded if index < 2 else 1e-5
            torch.testing.assert_close(ours.float()[where], theirs[where], rtol=tolerance, atol=2e-5)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_the_other_backends_forward_and_backward(interpreted, name):
    assert_equal(interpreted[name], *CASES[name])


@needs_triton
@pytest.mark.slow
def test_kernels_compile_to_machine_code_without_a_device(tmp_path):
    forward, backward = map(json.loads, run_process("compile", cache=tmp_path).splitlines())
    assert forward["bytes"] > 1000
    assert backward["bytes"] > 1000
    assert not forward["atomic"]
    assert backward["atomic"]


@needs_cuda
@needs_triton
@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_a_cuda_device_equal_the_other_backends(name):
    values, shapes, positions, weights, upstream = CASES[name]
    leaves = [tensor.cuda().requires_grad_() for tensor in (values, positions, weights)]
    output = deformable_attention(leaves[0], shapes, leaves[1], leaves[2], "triton")
    found = (output.detach(), *torch.autograd.grad(output, leaves, upstream.cuda()))
    assert_equal([tensor.cpu() for tensor in found], *CASES[name])


@needs_cuda
@pytest.mark.cuda
def test_a_layer_of_published_size_on_cuda_equals_the_cpu_in_training():
    torch.manual_seed(0)
    layer, shapes = (
        DeformableAttention(dim=256, num_heads=8, num_levels=3, num_points=4),
        [(25, 34), (50, 67), (100, 134)],
    )
    cells = sum(h * w for h, w in shapes)
    tokens, places = torch.randn(1, cells, 256), torch.randn(cells, 256)
    results = []
    for device in ("cpu", "cuda"):
        layer.zero_grad()
        layer.to(device)
        output = layer(tokens.to(device), places.to(device), shapes)
        output.square().mean().backward()
        results.append([output.detach().cpu(), *(parameter.grad.cpu() for parameter in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-4)  # products of CUDA may be of TF32 inputs


def test_without_triton_or_on_a_cpu_another_backend_is_chosen(monkeypatch):
    cpu = torch.zeros(1, 1, 1, 1)
    assert choose_backend(cpu) == "bag"
    assert choose_backend(cpu.to("meta")) == "grid"
    module.runs_triton.cache_clear()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert not module.runs_triton("cuda")
    module.runs_triton.cache_clear()


def test_deterministic_training_takes_the_backend_without_atomics():
    values = torch.zeros(1, 1, 1, 1, device="meta")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_backend(values) == "bag"
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_triton_that_does_not_run_is_logged_once_and_grid_sample_is_used(monkeypatch, caplog):
    module.runs_triton.cache_clear()
    real = torch.zeros

    def zeros(*size, device=None):
        return real(*size)

    monkeypatch.setattr(module.torch, "zeros", zeros)
    monkeypatch.setattr(module, "deformable_attention", lambda *_: (_ for _ in ()).throw(RuntimeError("no compiler")))
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    assert [module.runs_triton("cuda") for _ in range(2)] == [False, False]
    assert caplog.text.count("Triton does not run here (no compiler)") == 1
    module.runs_triton.cache_clear()


def test_importing_the_models_does_not_import_the_kernels():
    code = "import sys, maskwright.models; print('maskwright.models.ops.deformable_attention_triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
