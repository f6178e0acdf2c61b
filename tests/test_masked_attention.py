"""Masked attention: one mask for all heads; the CPU path equals PyTorch's attention."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskwright.models.layers import Attention, attention
from maskwright.models.masked_decoder import MaskedDecoder
from maskwright.models.ops.explicit_attention import explicit_attention, suits_explicit_attention
from maskwright.models.ops.masked_attention_cpu import masked_attention_cpu


class LargestTensor(TorchDispatchMode):
    """Records how many float32 values fit the largest memory that an operation returned."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else [result]
        storages = [tensor.untyped_storage().nbytes() for tensor in found if isinstance(tensor, torch.Tensor)]
        self.values = max([self.values, *(size // 4 for size in storages)])
        return result


def test_no_tensor_of_heads_times_queries_times_tokens_is_made():
    torch.manual_seed(0)
    batch, queries, tokens, heads = 2, 40, 96, 8
    module = Attention(16, heads)
    visible = torch.rand(batch, queries, tokens) > 0.5
    values = torch.randn(batch, tokens, 16)
    with LargestTensor() as largest:
        module(torch.randn(batch, queries, 16), values, values, visible)
    assert largest.values < batch * heads * queries * tokens / 2


def test_the_mask_hides_the_same_keys_from_every_head():
    torch.manual_seed(1)
    module = Attention(16, 4).double()
    queries, values = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    visible = torch.rand(2, 5, 7) > 0.4
    visible[:, :, 0] = True
    found = module(queries, values, values, visible)
    query, key, value = (
        project(tensor).unflatten(-1, (4, -1)).transpose(1, 2)
        for project, tensor in ((module.query, queries), (module.key, values), (module.value, values))
    )
    scores = (query @ key.transpose(2, 3) / 2).masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    expected = module.output((scores @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, count, 32) * 2 for count in (10, 3000, 3000))
    visible = torch.rand(2, 10, 3000) < 0.1
    visible[1, 3] = False
    visible[1, 3, 17] = True
    return query, key, value, visible


def test_the_cpu_path_equals_the_plain_path(inputs):
    torch.testing.assert_close(masked_attention_cpu(*inputs, 4), attention(*inputs, 4), rtol=1e-5, atol=1e-5)


def test_hidden_keys_that_outweigh_all_visible_ones_are_left_to_the_plain_path(inputs):
    query, key, value, visible = inputs
    key = key.clone()
    key[0, 5] = 100 * query[0, 2]
    visible[0, 2, 5] = False
    assert masked_attention_cpu(query, key, value, visible, 4) is None


def test_a_query_that_is_not_finite_is_left_to_the_plain_path(inputs):
    query, key, value, visible = inputs
    query[1, 4, 3] = torch.nan
    assert masked_attention_cpu(query, key, value, visible, 4) is None


@pytest.mark.parametrize("change", ["nothing", "a hidden key outweighs", "a query is not finite"])
def test_prediction_and_training_are_the_same(inputs, change):
    query, key, value, visible = inputs
    module = Attention(32, 4)
    if change == "a hidden key outweighs":
        query, key, module = query * 100, key * 100, module.requires_grad_(False)
    if change == "a query is not finite":
        query[1, 4, 3] = torch.nan
    with torch.enable_grad():
        expected = module(query, key, value, visible).detach()
    with torch.inference_mode():
        found = module(query, key, value, visible)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert found.isnan().any() == (change == "a query is not finite")


# The masked decoder


@pytest.fixture
def decoder() -> MaskedDecoder:
    torch.manual_seed(0)
    sizes = {"num_queries": 3, "num_classes": 2, "hidden_dim": 8, "mask_dim": 8, "num_heads": 2, "feedforward_dim": 16}
    decoder = MaskedDecoder(**sizes, num_layers=4).eval()
    last = decoder.mask_head[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.ones_(last.bias)  # all masks are the sum of the mask features
    return decoder


@pytest.fixture
def levels() -> list[torch.Tensor]:
    return [torch.randn(1, 8, side, side, generator=torch.Generator().manual_seed(side)) for side in (2, 4, 8)]


@torch.no_grad()
def test_a_query_with_an_empty_mask_attends_everywhere(decoder, levels):
    full, empty, half = torch.ones(1, 8, 16, 16), -torch.ones(1, 8, 16, 16), torch.ones(1, 8, 16, 16)
    half[..., 8:] = -1
    everywhere, nowhere, left = (decoder(levels, features, False)[-1].class_logits for features in (full, empty, half))
    assert everywhere.isfinite().all()
    torch.testing.assert_close(nowhere, everywhere)
    assert (left - everywhere).abs().max() > 1e-3


@torch.no_grad()
def test_layers_attend_to_the_levels_from_coarse_to_fine(decoder, levels):
    tokens = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda module, given, result: tokens.append(given[2].shape[1]))
    decoder(levels, torch.ones(1, 8, 16, 16), False)
    assert tokens == [4, 16, 64, 4]


@pytest.mark.parametrize("masked", [False, True])
def test_training_in_bfloat16_computes_the_same_attention_explicitly(masked: bool) -> None:
    torch.manual_seed(2)
    inputs = [torch.randn(2, count, 32) for count in (10, 40, 40)]
    visible = torch.rand(2, 10, 40) > 0.7 if masked else None
    if visible is not None:
        visible[..., 3] = True

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        result = attention(*leaves, visible, num_heads=4)
        result.backward(torch.ones_like(result))
        return [result.detach().float(), *(leaf.grad.float() for leaf in leaves)]

    assert suits_explicit_attention(inputs[0].bfloat16())
    assert not suits_explicit_attention(inputs[0])
    for explicit, fused in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        torch.testing.assert_close(explicit, fused, rtol=0, atol=0.03)


def test_explicit_attention_is_exact_in_double_precision() -> None:
    torch.manual_seed(3)
    query, key, value = (torch.randn(2, 4, count, 8, dtype=torch.double) for count in (10, 40, 40))
    visible = torch.rand(2, 1, 10, 40) > 0.7
    visible[..., 3] = True
    for mask in (None, visible):
        fused = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
        torch.testing.assert_close(explicit_attention(query, key, value, mask), fused)
