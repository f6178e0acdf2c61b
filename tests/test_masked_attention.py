"""The mask of masked attention is one for all heads; attention to very many keys is that of PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from maskwright.models.layers import Attention, masked_attention


class Largest(TorchDispatchMode):
    """The most numbers that a tensor had which an operation gave."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else [result]
        storages = [tensor.untyped_storage().nbytes() for tensor in found if isinstance(tensor, torch.Tensor)]
        self.numbers = max([self.numbers, *(size // 4 for size in storages)])
        return result


def test_no_tensor_of_heads_times_queries_times_tokens_is_made():
    torch.manual_seed(0)
    batch, queries, tokens, heads = 2, 40, 96, 8
    attention = Attention(16, heads)
    visible = torch.rand(batch, queries, tokens) > 0.5
    values = torch.randn(batch, tokens, 16)
    with Largest() as largest:
        attention(torch.randn(batch, queries, 16), values, values, visible)
    # As floats the mask of all heads is as large as that of one image's pictures times `heads`.
    assert largest.numbers < batch * heads * queries * tokens / 2


def test_the_mask_hides_exactly_what_it_says_from_every_head():
    torch.manual_seed(1)
    attention = Attention(16, 4).double()
    queries, values = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    visible = torch.rand(2, 5, 7) > 0.4
    visible[:, :, 0] = True
    found = attention(queries, values, values, visible)
    query, key, value = (
        project(tensor).unflatten(-1, (4, -1)).transpose(1, 2)
        for project, tensor in ((attention.query, queries), (attention.key, values), (attention.value, values))
    )
    scores = (query @ key.transpose(2, 3) / 2).masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    expected = attention.output((scores @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected)


def plain(query, key, value, visible, heads):
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None]).transpose(1, 2).flatten(2)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, count, 32) * 2 for count in (10, 3000, 3000))
    visible = torch.rand(2, 10, 3000) < 0.1
    visible[1, 3] = False
    visible[1, 3, 17] = True
    return query, key, value, visible


def test_it_is_pytorchs_attention(inputs):
    torch.testing.assert_close(masked_attention(*inputs, 4), plain(*inputs, 4), rtol=1e-5, atol=1e-5)


def test_hidden_keys_that_outweigh_all_visible_ones_change_nothing(inputs):
    query, key, value, visible = inputs
    key = key.clone()
    key[0, 5] = 100 * query[0, 2]
    visible[0, 2, 5] = False
    torch.testing.assert_close(
        masked_attention(query, key, value, visible, 4), plain(query, key, value, visible, 4), rtol=1e-5, atol=1e-5
    )


def test_a_value_that_is_no_number_is_not_hidden(inputs):
    query, key, value, visible = inputs
    query[1, 4, 3] = torch.nan
    found = masked_attention(query, key, value, visible, 4)
    torch.testing.assert_close(found.isnan(), plain(query, key, value, visible, 4).isnan())
    assert found[1, 4, :8].isnan().all()
    assert found[0].isfinite().all()


def test_with_and_without_gradients_it_is_the_same(inputs):
    query, key, value, visible = inputs
    attention = Attention(32, 4)
    with_gradients = attention(query, key, value, visible).detach()
    with torch.inference_mode():
        torch.testing.assert_close(attention(query, key, value, visible), with_gradients, rtol=1e-5, atol=1e-5)
