"""Deformable attention: all backends, forward and backward, against each other and against nested loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskwright.models.ops import cpu_path, deformable_attention_bag
from maskwright.models.ops import deformable_attention as deformable_attention_module
from maskwright.models.ops.deformable_attention import DeformableAttention, deformable_attention, reference_positions
from maskwright.models.pixel_decoder import EncoderLayer

BACKENDS = ("bag", "grid", "gather")  # run anywhere; test_deformable_attention_triton.py tests the fourth
OTHERS = ("bag", "gather")

Shapes = list[tuple[int, int]]
Case = tuple[Tensor, Shapes, Tensor, Tensor]
SIDES = st.sampled_from([1, 2, 3, 5, 8])
POWERS_OF_TWO = st.sampled_from([1, 2, 4, 8])


@st.composite
def cases(draw, sides: st.SearchStrategy[int] = SIDES) -> Case:
    """Draw values, shapes, positions and weights in float64; some positions integers, on a border, or far outside."""
    shapes = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=4))
    batch, queries, heads, points, channels = (draw(st.integers(1, high)) for high in (2, 4, 3, 3, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size = (batch, queries, heads, len(shapes), points)
    values = torch.randn(
        batch, sum(h * w for h, w in shapes), heads, channels, dtype=torch.float64, generator=generator
    )
    extent = torch.tensor([[w, h] for h, w in shapes], dtype=torch.float64)[:, None]  # (L, 1, 2)
    positions = torch.rand(*size, 2, dtype=torch.float64, generator=generator) * (extent + 3) - 2
    kind = torch.randint(0, 6, (*size, 2), generator=generator)
    positions = torch.where(kind == 0, positions.round(), positions)
    positions = torch.where(kind == 1, extent - 1, positions)
    positions = torch.where(kind == 2, positions * 1e6, positions)
    weights = torch.randn(size, dtype=torch.float64, generator=generator)
    return values, shapes, positions, weights


def with_gradients(case: Case, backend: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return the output and the gradients of values, positions and weights, for an uneven upstream gradient."""
    values, shapes, positions, weights = case
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (values, positions, weights)]
    output = deformable_attention(leaves[0], shapes, leaves[1], leaves[2], backend)
    upstream = torch.linspace(-1, 2, output.numel(), dtype=dtype).view_as(output)
    return (output.detach(), *torch.autograd.grad(output, leaves, upstream))


def by_loops(values: Tensor, shapes: Shapes, positions: Tensor, weights: Tensor) -> Tensor:
    """Compute the formula one multiplication at a time."""
    batch, queries, heads, levels, points, _ = positions.shape
    channels = values.shape[-1]
    output = torch.zeros(batch, queries, heads * channels, dtype=values.dtype)
    for b in range(batch):
        for q in range(queries):
            for head in range(heads):
                for level in range(levels):
                    h, w = shapes[level]
                    start = sum(rows * columns for rows, columns in shapes[:level])
                    for point in range(points):
                        x, y = positions[b, q, head, level, point].tolist()
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if 0 <= row < h and 0 <= column < w:
                                    share = (1 - abs(x - column)) * (1 - abs(y - row))
                                    cell = values[b, start + row * w + column, head]
                                    part = weights[b, q, head, level, point] * share * cell
                                    output[b, q, head * channels : (head + 1) * channels] += part
    return output


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_equals_nested_loops(backend):
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, 2), (1, 1), (2, 5)]
    values = torch.randn(2, 17, 2, 3, dtype=torch.float64, generator=generator)
    positions = torch.rand(2, 2, 2, 3, 2, 2, dtype=torch.float64, generator=generator) * 7 - 2
    positions[0, 0, :, :, 0] = torch.tensor([1.0, 0.0])
    weights = torch.randn(2, 2, 2, 3, 2, dtype=torch.float64, generator=generator)
    expected = by_loops(values, shapes, positions, weights)
    torch.testing.assert_close(deformable_attention(values, shapes, positions, weights, backend), expected)


# In float64 the backends differ only by rounding, about 1e-15 times the few dozen terms of a sum; a position of 1e6
# cells loses six digits, but is outside in both. At an integer position the slope jumps: `grid` scales positions to
# -1..1 and back, so it may take the slope of the cell before. There, only the other gradients are compared.
@pytest.mark.parametrize("backend", OTHERS)
@settings(max_examples=50, deadline=None)
@given(cases())
def test_backends_equal_grid_forward_and_backward(backend, case):
    bag, grid = with_gradients(case, backend), with_gradients(case, "grid")
    for index in (0, 1, 3):
        torch.testing.assert_close(bag[index], grid[index], rtol=1e-9, atol=1e-11)
    positions = case[2]
    smooth = (positions - positions.round()).abs() > 1e-6
    torch.testing.assert_close(bag[2][smooth], grid[2][smooth], rtol=1e-9, atol=1e-9)


# With sides that are powers of two the scaling is exact in binary, so even the slopes at integer positions agree.
@pytest.mark.parametrize("backend", OTHERS)
@settings(max_examples=25, deadline=None)
@given(cases(POWERS_OF_TWO))
def test_backends_equal_grid_in_the_slope_at_integer_positions(backend, case):
    values, shapes, positions, weights = case
    positions = positions.clamp(-5, 12).mul(4).round().div(4)  # quarters
    case = (values, shapes, positions, weights)
    for ours, theirs in zip(with_gradients(case, backend), with_gradients(case, "grid"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", OTHERS)
def test_a_level_may_have_fewer_cells_than_a_query_has_samples(backend):
    shapes = [(1, 1), (1, 1)]
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1, 2, 1, 1, dtype=torch.float64, generator=generator)
    positions = torch.randn(1, 1, 1, 2, 9, 2, dtype=torch.float64, generator=generator)
    weights = torch.rand(1, 1, 1, 2, 9, dtype=torch.float64, generator=generator)
    case = (values, shapes, positions, weights)
    for ours, theirs in zip(with_gradients(case, backend), with_gradients(case, "grid"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


# float32 has 24 bits; scaling a position to -1..1 and back costs about 1e-6 cells, times slopes of up to about 10.
@pytest.mark.parametrize("backend", OTHERS)
@settings(max_examples=25, deadline=None)
@given(cases())
def test_backends_equal_grid_in_float32(backend, case):
    bag, grid = (with_gradients(case, name, torch.float32) for name in (backend, "grid"))
    for index in (0, 1, 3):
        torch.testing.assert_close(bag[index], grid[index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", OTHERS)
def test_the_gradient_at_an_integer_position_is_the_slope_towards_larger_positions(backend):
    shapes = [(3, 5)]
    values = torch.randn(1, 15, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    places = torch.tensor([[x, y] for y in range(-2, 5) for x in range(-2, 7)], dtype=torch.float64)
    positions = places.view(1, -1, 1, 1, 1, 2).requires_grad_()
    weights = torch.ones(1, len(places), 1, 1, 1, dtype=torch.float64)

    def run(at: Tensor) -> Tensor:
        return deformable_attention(values, shapes, at, weights, backend)

    (gradient,) = torch.autograd.grad(run(positions).sum(), positions)
    for axis in (0, 1):
        step = torch.eye(2, dtype=torch.float64)[axis] / 8
        slope = (run(positions + step) - run(positions)).flatten() * 8
        torch.testing.assert_close(gradient.view(-1, 2)[:, axis], slope.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(backend):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (1, 1), (5, 7)]
    values = torch.randn(2, 42, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    positions = torch.rand(2, 3, 2, 3, 2, 2, dtype=torch.float64, generator=generator) * 9 - 1.5
    positions = torch.where((positions - positions.round()).abs() < 1e-3, positions + 0.01, positions).requires_grad_()
    weights = torch.rand(2, 3, 2, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v, p, w: deformable_attention(v, shapes, p, w, backend), (values, positions, weights)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_outside_the_border_add_nothing_and_get_no_gradient(backend):
    values = torch.ones(1, 6, 1, 2, requires_grad=True)
    positions = torch.tensor([[-1.0, 0.0], [3.0, 1.0], [0.0, 2.0], [1e30, -1e30]]).view(1, 1, 1, 1, 4, 2)
    weights = torch.ones(1, 1, 1, 1, 4, requires_grad=True)
    output = deformable_attention(values, [(2, 3)], positions, weights, backend)
    output.sum().backward()
    assert not output.any()
    assert not values.grad.any()
    assert not weights.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_position_at_a_cell_center_reads_that_cell_alone(backend):
    values = torch.arange(6.0).view(1, 6, 1, 1)
    positions = torch.tensor([[2.0, 1.0], [0.0, 0.0]]).view(1, 2, 1, 1, 1, 2)
    output = deformable_attention(values, [(2, 3)], positions, torch.ones(1, 2, 1, 1, 1), backend)
    torch.testing.assert_close(output.flatten(), torch.tensor([5.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gather_reads_the_right_cells_where_a_runtime_computes_in_a_short_format(dtype):
    height, width = 60, 70  # 4,200 cells: neither format has all their numbers
    cells = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1).flatten(0, 1)
    values = cells.to(dtype)[None, :, None]  # each cell holds its own x and y
    positions = cells.to(dtype)[None, :, None, None, None]
    weights = torch.ones(1, len(cells), 1, 1, 1, dtype=dtype)
    output = deformable_attention(values, [(height, width)], positions, weights, "gather")
    assert torch.equal(output[0], cells.to(dtype))


@pytest.mark.parametrize("backend", OTHERS)
def test_a_nan_position_makes_only_its_own_query_nan(backend):
    positions = torch.zeros(1, 2, 1, 1, 1, 2)
    positions[0, 1] = math.nan
    values, weights = torch.ones(1, 6, 1, 2, requires_grad=True), torch.ones(1, 2, 1, 1, 1)
    output = deformable_attention(values, [(2, 3)], positions, weights, backend)
    assert output.isnan().tolist() == [[[False, False], [True, True]]]
    output.sum().backward()
    assert values.grad.isnan().any()


def test_shapes_that_do_not_add_up_and_unknown_backends_are_refused():
    values, positions, weights = torch.zeros(1, 6, 1, 2), torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="have 4 cells, values have 6"):
        deformable_attention(values, [(2, 2)], positions, weights)
    with pytest.raises(ValueError, match=r"'bags'; known: bag, grid, gather, triton"):
        deformable_attention(values, [(2, 3)], positions, weights, "bags")


def test_the_reference_of_a_cell_is_its_own_center_on_each_level():
    positions = reference_positions(((1, 2), (2, 4)), 2, torch.device("cpu"))  # (10, 2, 2 levels of 2 points)
    assert positions.shape == (10, 2, 4)
    assert positions[0].tolist() == [[0.0, 0.0, 0.5, 0.5]] * 2
    assert positions[2 + 1 * 4 + 3].tolist() == [[1.25, 1.25, 3.0, 3.0], [0.25, 0.25, 1.0, 1.0]]


def test_a_new_layer_samples_in_eight_directions_at_growing_distance_with_equal_weights():
    layer = DeformableAttention(dim=32, num_heads=8, num_levels=3, num_points=4)
    bias = layer.offsets.bias.view(8, 3, 4, 2)
    reach = bias.abs().amax(-1)  # (heads, levels, points)
    torch.testing.assert_close(reach, torch.arange(1.0, 5.0).expand(8, 3, 4))
    assert torch.equal(bias[0, 0, 0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(bias[2, 1, 3], torch.tensor([0.0, 4.0]))
    assert not layer.offsets.weight.any()
    assert not layer.weights.weight.any()


def test_the_layer_stays_near_its_float32_result_under_bfloat16():
    torch.manual_seed(0)
    layer, shapes = DeformableAttention(dim=32, num_heads=4, num_levels=2, num_points=2), [(2, 3), (4, 6)]
    tokens, places = torch.randn(2, 30, 32), torch.randn(30, 32)
    exact = layer(tokens, places, shapes)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(tokens, places, shapes)
    # bfloat16 keeps 8 bits: two linear layers of width 32 lose about 2^-8 of values near 1 each.
    assert (rounded.float() - exact).abs().max() < 0.03


def test_an_encoder_layer_in_chunks_equals_the_plain_path(monkeypatch):
    monkeypatch.setattr(cpu_path, "CHUNK_ROWS", 7)
    torch.manual_seed(0)
    layer, shapes = EncoderLayer(hidden_dim=32, num_heads=4, num_points=2, feedforward_dim=16), [(1, 2), (2, 3), (4, 6)]
    for linear in (layer.attention.offsets, layer.attention.weights):
        torch.nn.init.normal_(linear.weight, std=0.3)
    tokens = torch.randn(2, 32, 32)
    for places in (torch.randn(32, 32), torch.randn(2, 32, 32)):
        whole = layer(tokens, places, shapes)
        with torch.no_grad():
            torch.testing.assert_close(layer(tokens, places, shapes), whole)


@pytest.mark.parametrize("images_per_table", [1, 2, 3])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_backward_pass_of_the_layer_equals_that_of_grid(monkeypatch, frozen, images_per_table):
    monkeypatch.setattr(deformable_attention_bag, "MAX_BATCH_TOKENS", images_per_table * 32)
    torch.manual_seed(0)
    layer, shapes = DeformableAttention(dim=32, num_heads=4, num_levels=3, num_points=2), [(1, 2), (2, 3), (4, 6)]
    for linear in (layer.offsets, layer.weights):
        torch.nn.init.normal_(linear.weight, std=0.3)
        torch.nn.init.normal_(linear.bias)
    layer.requires_grad_(not frozen)
    found = []
    for backend in ("bag", "grid"):
        monkeypatch.setattr(deformable_attention_module, "choose_backend", lambda values, backend=backend: backend)
        torch.manual_seed(1)
        tokens, places = (torch.randn(size, requires_grad=True) for size in ((3, 32, 32), (32, 32)))
        loss = (layer(tokens, places, shapes) * torch.randn(3, 32, 32)).sum()
        leaves = [tokens, places, *([] if frozen else layer.parameters())]
        found.append(torch.autograd.grad(loss, leaves))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-4, atol=2e-5)
